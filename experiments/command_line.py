"""The command line of a run: flags, the config file and its overrides, each error in one line.

absl and `config_flags` parse; what they raise is turned into a `ConfigError` here, so that every bad
input is answered in the same form: what, expected, got, remedy.
"""

import contextlib
import dataclasses
import difflib
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence

from absl import flags
from ml_collections import config_flags

from hax_jax.config import ConfigError, Experiment

HELP_FLAGS = {"-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull"}
CONFIG_FILE = "a Python file whose get_config() returns the settings"
EXAMPLE = "--config=configs/mamba2_hax.py"
_OWN_FLAGS = ("config", "workdir", "compilation_cache", "distributed")


@dataclasses.dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    experiment: Experiment
    workdir: pathlib.Path
    compilation_cache: str | None = None
    distributed: bool = False


def parse(argv: Sequence[str]) -> Command:
    """Reads a command line, program name first; raises ConfigError for everything that is wrong with it."""
    try:
        arguments = flags.FlagValues().read_flags_from_files(list(argv[1:]), force_gnu=False)
    except (flags.Error, OSError, UnicodeError) as error:
        raise ConfigError("--flagfile", "a readable file of flags", argv[1:], one_line(error)) from error
    _check_config_given(arguments)
    _check_overrides(arguments)
    values = _flag_values([argv[0], *arguments])
    with _quiet_logging():
        experiment = _experiment(values, [argv[0], *arguments])
    cache = values["compilation_cache"].value
    if cache == "":
        raise ConfigError("--compilation_cache", "a folder, or off", cache, "leave the flag out")
    workdir = _workdir(values["workdir"].value, experiment)
    return Command(experiment, workdir, cache, bool(values["distributed"].value))


def describe() -> str:
    """The text of --help: the flags, and every field of an experiment with its default."""
    lines = [
        f"usage: python experiments/joint_recall.py {EXAMPLE}[:cpu] [--workdir=DIR] [--config.FIELD=VALUE]",
        "",
        *(f"  --{flag.name}: {flag.help}" for flag in _own_flags(_flag_values([""]))),
        "",
        "Fields, their defaults and what they accept (a config file may set other values):",
    ]
    for path, field in _fields().items():
        lines.append(f"  --config.{path}={field.default}  ({field.metadata['expected']})")
    return "\n".join(lines)


def _flag_values(argv: Sequence[str]) -> flags.FlagValues:
    # A set of flags of its own for each call: absl's global one would keep every override ever parsed.
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"{CONFIG_FILE}, and after a colon its arguments: cpu, parity",
        lock_config=True,
        flag_values=values,
        sys_argv=list(argv),
    )
    flags.DEFINE_string(
        "workdir", None, "folder for checkpoints and metrics; default runs/NAME", flag_values=values
    )
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "folder for compiled programs, or off; default $JAX_COMPILATION_CACHE_DIR, or hax_jax/compiled in "
        "the user's cache folder",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "one of several processes that train together; see docs/scaling.md",
        flag_values=values,
    )
    return values


def _own_flags(values: flags.FlagValues) -> Iterator[flags.Flag]:
    return (values[name] for name in _OWN_FLAGS)


def _fields() -> dict[str, dataclasses.Field]:
    """Every single field of an experiment under its dotted name."""
    found: dict[str, dataclasses.Field] = {}
    for outer in dataclasses.fields(Experiment):
        if isinstance(outer.type, type) and dataclasses.is_dataclass(outer.type):
            found |= {f"{outer.name}.{inner.name}": inner for inner in dataclasses.fields(outer.type)}
        else:
            found[outer.name] = outer
    return found


def _check_config_given(arguments: Sequence[str]) -> None:
    given = [i for i, word in enumerate(arguments) if re.match(r"--?config(=|$)", word)]
    overrides = [i for i, word in enumerate(arguments) if re.match(r"--?(no)?config\.", word)]
    if not given or arguments[given[0]].endswith("config="):
        raise ConfigError("--config", CONFIG_FILE, None, f"for example {EXAMPLE}")
    filename = _value_of("config", arguments)
    path = pathlib.Path(filename.partition(":")[0])
    # These answer False, where a path's own methods raise, also for names that no file can have.
    if filename and not os.path.isfile(path):
        folder = path.parent if os.path.isdir(path.parent) else pathlib.Path("configs")
        near = _nearest(str(path), sorted(map(str, folder.glob("*.py"))))
        hint = f"did you mean {near}?" if near else f"for example {EXAMPLE}"
        raise ConfigError("--config", CONFIG_FILE, filename, f"there is no such file; {hint}")
    if len(given) > 1:
        raise ConfigError("--config", "given once", [arguments[i] for i in given], "name one config file")
    if overrides and overrides[0] < given[0]:
        raise ConfigError(
            "--config", "before the fields that override it", arguments[overrides[0]], "put --config first"
        )


def _check_overrides(arguments: Sequence[str]) -> None:
    fields = _fields()
    for word in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]*)=?(.*)", word, re.DOTALL)
        if not match or match[1] in fields:
            continue
        path, value = match[1], match[2]
        if any(name.startswith(f"{path}.") for name in fields):
            remedy = f"override its fields one by one, for example --config.{path}.NAME=VALUE"
            raise ConfigError(path, "a single field", value, remedy)
        near = _nearest(path, fields)
        remedy = f"did you mean --config.{near}?" if near else "--help lists the fields"
        raise ConfigError(path, "a known field", value, remedy)


def _experiment(values: flags.FlagValues, argv: list[str]) -> Experiment:
    """Loads the config file, applies the overrides and checks the result."""
    # config_flags loads every file under this one name, on top of what an earlier one left there.
    sys.modules.pop("config_config", None)
    try:
        rest = values(argv)
    except (Exception, SystemExit) as error:
        raise _explain(error, argv[1:]) from error
    if len(rest) > 1:
        raise ConfigError(
            "command line", "flags only", rest[1], "write --NAME=VALUE; quote a value that holds spaces"
        )
    config = values["config"].value
    try:
        if not hasattr(config, "items"):
            raise TypeError(f"get_config() returned {config!r}")
        return Experiment.from_dict(config)
    except ConfigError:
        raise
    except Exception as error:
        # config_flags keeps a file it could not read for whoever first touches the settings.
        raise _config_file_error(error, _value_of("config", argv[1:])) from error


def _explain(error: BaseException, arguments: Sequence[str]) -> ConfigError:
    """What absl or config_flags raised while parsing, said as field, expected, got, remedy."""
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(error)
    match = re.match(r"flag --config\.([\w.]+)=", str(error))
    if isinstance(error, flags.IllegalFlagValueError) and match:
        field = _fields()[match[1]]
        return ConfigError(
            match[1],
            field.metadata["expected"],
            _value_of(f"config.{match[1]}", arguments),
            f"the default is {field.default!r}",
        )
    if isinstance(error, flags.IllegalFlagValueError) or not isinstance(error, flags.Error):
        return _config_file_error(error, _value_of("config", arguments))
    if match := re.match(r"Missing value for flag (\S+)", str(error)):
        return ConfigError(match[1], "followed by a value", None, f"write {match[1]}=VALUE")
    return ConfigError("command line", "flags of the form --NAME=VALUE", list(arguments), one_line(error))


def _unknown_flag(error: flags.UnrecognizedFlagError) -> ConfigError:
    path = error.flagname.removeprefix("no").removeprefix("config.")
    if path in _fields():
        remedy = "only a field that is True or False can be negated"
        return ConfigError(path, "given as --config.FIELD=VALUE", f"--{error.flagname}", remedy)
    names = [*_OWN_FLAGS, "help", *(f"config.{name}" for name in _fields())]
    near = _nearest(error.flagname, names)
    hint = f"did you mean --{near}?" if near else "--help lists them"
    return ConfigError(f"--{error.flagname}", "a known flag", error.flagvalue, hint)


def _config_file_error(error: BaseException, filename: str) -> ConfigError:
    """Why a config file does not load; the first cause counts, not what others made of it."""
    cause: BaseException = error
    while (earlier := cause.__cause__ or cause.__context__) is not None:
        cause = earlier
    if isinstance(cause, ConfigError):
        return cause
    path = filename.partition(":")[0]
    lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == path]
    where = f"line {lines[-1]}: " if lines else ""
    reason = f"{where}{type(cause).__name__}: {one_line(cause)}"
    if isinstance(cause, KeyError) and not lines:
        reason = f"its settings lack a field that the command line overrides: {one_line(cause)}"
    return ConfigError("--config", CONFIG_FILE, filename, reason)


def _workdir(given: str | None, experiment: Experiment) -> pathlib.Path:
    if given:
        return pathlib.Path(given)
    if given == "":
        raise ConfigError("--workdir", "a folder", given, "leave the flag out for runs/NAME")
    if not re.fullmatch(r"\w[\w.+-]*", experiment.name):
        raise ConfigError(
            "name",
            "letters, digits and .+-_ where it names the folder of the run",
            experiment.name,
            "change it, or give --workdir=DIR",
        )
    return pathlib.Path("runs") / experiment.name


def _nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one is meant to be: alike, or of the same last part."""
    known = list(known)
    same_end = [name for name in known if name.endswith("." + word.rpartition(".")[2])]
    return next(iter(difflib.get_close_matches(word, known, n=1) or same_end), None)


def _value_of(flag: str, arguments: Sequence[str]) -> str:
    """What the command line gives for a flag, as --flag=value or --flag value; the last one counts."""
    value = ""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, after = word.lstrip("-").partition("=")
        if word.startswith("-") and name == flag:
            value = after if equals else following
    return value


def one_line(error: BaseException) -> str:
    """The text of an error, line breaks and all other runs of white space made single spaces."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    # config_flags logs a warning beside an error that is reported anyway.
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
