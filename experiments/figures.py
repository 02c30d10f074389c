"""What the figures of committed results share: one JSON file in, one file out, the same bytes each time."""

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments import results
from hax_jax.config import ConfigError

FORMATS = (".svg", ".png", ".pdf")

# The same content gives the same file, byte for byte, and text stays text.
_SETTINGS = {
    "svg.hashsalt": "hax_jax",
    "svg.fonttype": "none",
    "font.size": 10,
    # A short list of fonts: an SVG file repeats it for each text.
    "font.sans-serif": ["DejaVu Sans", "Arial"],
}


def run(
    argv: Sequence[str], doc: str | None, name: str, draw: Callable[[pathlib.Path, pathlib.Path], None]
) -> int:
    """Runs the command line of a figure, program name first, and returns the exit status.

    Args:
      argv: a JSON file, and `--out=FILE` if the figure shall not lie beside it.
      doc: the help text.
      name: what the help calls the file, without its ending.
      draw: draw(JSON file, figure file) writes the figure; it may raise ConfigError.
    """
    parser = results.Parser(doc)
    parser.add_argument("source", type=pathlib.Path, metavar=f"{name}.json")
    parser.add_argument("--out", type=pathlib.Path, help=f"file of the figure; default {name}.svg")
    try:
        options = parser.parse_args(argv[1:])
        out = options.out or options.source.with_suffix(".svg")
        if out.suffix not in FORMATS:
            raise ConfigError("--out", f"a file named {', '.join(FORMATS)}", str(out), "change its ending")
        draw(options.source, out)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"figure: {out}")
    return 0


@contextlib.contextmanager
def drawing(out: pathlib.Path, *shape: int, **layout: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, to be drawn on; written to `out` at the end.

    Args:
      out: the file; its ending says the format.
      shape, layout: arguments of `pyplot.subplots`.

    Raises:
      ConfigError: matplotlib is not installed, or `out` cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("matplotlib", "installed", None, 'pip install -e ".[plot]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_SETTINGS):
        figure, axes = pyplot.subplots(*shape, **layout)
        try:
            yield figure, axes
            _write(figure, out)
        finally:
            pyplot.close(figure)


def _write(figure: Any, out: pathlib.Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except OSError as error:
        raise ConfigError("--out", "a file that can be written", str(out), str(error.strerror)) from error
