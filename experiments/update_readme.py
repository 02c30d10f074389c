"""Writes the numbers of README.md and of pages under docs/ from the JSON under results/; nobody types one.

    python experiments/update_readme.py            # rewrites what stands between the markers
    python experiments/update_readme.py --check    # changes nothing; exit status 1 if it is out of date

Exit status: 0 done, 1 out of date (with --check), 2 bad input, said in one line.
"""

import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import benchmark_tables, results, scaling_tables, science_tables
from experiments.comparison import readme as readme_of_comparisons
from experiments.table import drawing
from hax_jax.config import ConfigError, DataConfig
from hax_jax.training.files import write_atomically
from hax_jax.training.progress import duration

FILES = ("README.md", "docs/performance.md", science_tables.FILE, "docs/scaling.md")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
BENCHMARKS, PYTORCH, TABLES = "benchmarks", "pytorch", "table3"
REMEDY = "run: python experiments/update_readme.py"
_COLUMNS = ("run", "test accuracy", "paper", "steps", "parameters", "device", "steps/s", "tokens/s", "time")


def main(argv: Sequence[str], root: pathlib.Path = results.CHECKOUT) -> int:
    """Runs the command line, program name first, on the checkout `root`; returns the exit status."""
    parser = results.Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, say whether it is up to date")
    try:
        options = parser.parse_args(argv[1:])
        texts = {name: _read(root, name) for name in FILES}
        changed = {name: new for name, (old, new) in _filled(root, texts).items() if new != old}
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not changed:
        print(f"{FILES[0]} is up to date")
        return 0
    if options.check:
        print(f"{', '.join(changed)} out of date; {REMEDY}", file=sys.stderr)
        return 1
    for name, text in changed.items():
        write_atomically(root / name, text.encode())
        print(f"{name}: results rewritten")
    return 0


def _filled(root: pathlib.Path, texts: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Each file's text as it is and as it should be; a file that is not there, as one may lack, stays so."""
    readme, performance, science, scaling = FILES
    filled = fill(texts[readme], section(root))
    several = scaling_tables.section(root, simulated=False)
    measured = "\n".join(filter(None, [benchmark_tables.section(root), several])) or None
    if measured is not None or f"<!-- {BENCHMARKS}:begin -->" in filled:
        filled = fill(filled, measured or "\nNo benchmarks yet.\n", BENCHMARKS)
    compared = readme_of_comparisons.section(root)
    if compared is not None or f"<!-- {PYTORCH}:begin -->" in filled:
        filled = fill(filled, compared or "\nNo comparison yet.\n", PYTORCH)
    tables = drawing.section(root)
    if tables is not None or f"<!-- {TABLES}:begin -->" in filled:
        filled = fill(filled, tables or "\nNo table yet.\n", TABLES)
    result = {readme: (texts[readme], filled)}
    if text := texts[performance]:
        filled = fill(text, benchmark_tables.floor_section(), "floors", performance)
        parts = benchmark_tables.breakdown_section(root) or "\nNot measured yet.\n"
        result[performance] = text, fill(filled, parts, "breakdown", performance)
    if text := texts[science]:
        filled = text
        for name, content in science_tables.sections(root).items():
            filled = fill(filled, content, name, science)
        result[science] = text, filled
    if text := texts[scaling]:
        each = [scaling_tables.section(root, simulated=which, up="../") for which in (False, True)]
        found = "\n".join(filter(None, each))
        result[scaling] = text, fill(text, found or "\nNot measured yet.\n", "scaling", scaling)
    return result


def fill(text: str, content: str, name: str = "results", file: str = "README.md") -> str:
    """`text` with `content` between its two markers; raises ConfigError unless there is one pair of them."""
    begin_marker, end_marker = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(begin_marker)
    _, end, after = rest.partition(end_marker)
    if not (begin and end) or begin_marker in rest or end_marker in before or end_marker in after:
        expected = f"a text with one {begin_marker} and one {end_marker} below"
        raise ConfigError(file, expected, None, "restore them")
    return f"{before}{begin_marker}\n{content}\n{end_marker}{after}"


def section(root: pathlib.Path) -> str:
    """The table of all results, then each run's circumstances, command and figure."""
    paths = sorted((root / results.FOLDER / results.TASK).glob("*.json"))
    found = [(path.relative_to(root), results.read(path)) for path in paths]
    if not found:
        return "\nNo results yet.\n"
    groups = results.by_seed(found, lambda one: one[1])
    groups.sort(key=lambda group: -statistics.fmean(result["test"]["accuracy"] for _, result in group))
    several = [f"- {_over_seeds([result for _, result in group])}" for group in groups if len(group) > 1]
    lines = ["", *several, *([""] if several else []), _row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    lines += [_row(_cells(path, result)) for group in groups for path, result in group]
    lines += ["", "<details><summary>Settings, commands and figures of these runs</summary>"]
    for group in groups:
        # Seeds of one population share all circumstances; the figure is the first one's.
        path, result = group[0]
        lines += ["", *_details(path, result, root)]
    return "\n".join([*lines, "", "</details>", ""])


def _over_seeds(group: Sequence[dict[str, Any]]) -> str:
    """Mean and worst of runs that differ in their seed alone, and when they passed the paper's accuracy."""
    accuracy = [100 * result["test"]["accuracy"] for result in group]
    seeds = ", ".join(str(result["config"]["seed"]) for result in group)
    text = (
        f"**`{results.row_name(group[0])}`, seeds {seeds}, {group[0]['steps']:,} steps: mean "
        f"{statistics.fmean(accuracy):.2f}%, worst {min(accuracy):.2f}%**"
    )
    paper = results.paper_accuracy(group[0])
    if paper is None:
        return f"{text}."
    passed = [results.first_step_above(result, paper / 100) for result in group]
    told = ["never" if step is None else f"at {step:,}" for step in passed]
    together = results.first_step_above(_mean_curve(group), paper / 100)
    mean = "never" if together is None else f"at step {together:,}"
    return (
        f"{text}. The paper's {paper:.1f}% is passed in validation {', '.join(told)}; by their mean {mean}."
    )


def _mean_curve(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean validation accuracy of runs that validate at the same steps, in the form of a result."""
    valid = [result["curve"]["valid"] for result in group]
    mean = [statistics.fmean(point) for point in zip(*(curve["accuracy"] for curve in valid), strict=True)]
    return {"curve": {"valid": {"step": valid[0]["step"], "accuracy": mean}}}


def _read(root: pathlib.Path, name: str) -> str:
    path = root / name
    if name != FILES[0] and not path.exists():
        return ""
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(name, "a readable file", str(path), str(error)) from error


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(path: pathlib.Path, result: dict[str, Any]) -> list[str]:
    paper, speed = results.paper_accuracy(result), result["speed"]
    device, wall = result["device"], result["seconds"]["wall"]
    return [
        f"[`{path.stem}`]({path.as_posix()})",
        f"**{100 * result['test']['accuracy']:.2f}%**",
        "" if paper is None else f"{paper:.1f}%",
        f"{result['steps']:,}",
        f"{result['num_parameters']:,}",
        f"{device['count']} x {device['kind']}",
        f"{speed['steps_per_s']:.0f}" if speed else "",
        f"{speed['tokens_per_s'] / 1e6:.2f}M" if speed else "",
        "" if wall is None else duration(wall),
    ]


def _details(path: pathlib.Path, result: dict[str, Any], root: pathlib.Path) -> list[str]:
    experiment = results.experiment(result)
    model, data, training = experiment.model, experiment.data, experiment.training
    versions = result["versions"]
    circumstances = [
        f"seed {experiment.seed}",
        f"learning rate {training.learning_rate:g}",
        f"batch {training.batch_size}",
        f"{model.routing} routing",
        f"{model.precision} precision",
        f"trained on {_source(data, data.train_source)}",
        f"tested on {_source(data, data.eval_source)} ({result['test']['num_items']:,} sequences)",
        results.commit_of(result),
        *(f"{name} {versions[name]}" for name in ("jax", "python", "cuda") if name in versions),
    ]
    lines = [f"`{path.stem}`: {', '.join(circumstances)}. {result.get('note', '')}".rstrip(), ""]
    lines += [f"    {results.wrapped(result['command'])}"]
    figure = path.with_suffix(".svg")
    if (root / figure).exists():
        text = f"{path.stem}: validation accuracy against steps, test accuracy by table size"
        lines += ["", f"![{text}]({figure.as_posix()})"]
    return lines


def _source(data: DataConfig, source: str) -> str:
    if source == "stream":
        return "the stream"
    # Where the items lie, in rows and on disks, is no part of what they are.
    free = ("train_source", "eval_source", "data_dir", "packing", "order", "keep_on_device_mib")
    is_published = data == dataclasses.replace(DataConfig(), **{name: getattr(data, name) for name in free})
    return "the published data set" if is_published else "a data set"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
