"""Command lines and config files with something wrong in them, drawn at random."""

import dataclasses
import pathlib
import random
from collections.abc import Callable
from typing import Any

from experiments import create_dataset, evaluate, joint_recall
from hax_jax.config import SOURCES, DataConfig, ModelConfig, TrainingConfig
from tests.golden_data import REPOSITORY

CONFIGS = sorted(path.name for path in (REPOSITORY / "configs").glob("m*_*.py"))
_GROUPS = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig}
_FIELDS = {
    f"{prefix}.{field.name}": field for prefix, kind in _GROUPS.items() for field in dataclasses.fields(kind)
}
_NUMBERS = (
    "0",
    "-1",
    "-0",
    "1",
    "2",
    "3",
    "7",
    "1.5",
    "1e3",
    "1e400",
    "-1e400",
    "nan",
    "inf",
    "-inf",
    "0x10",
)
_WORDS = (
    "",
    " ",
    "many",
    "None",
    "True",
    "[]",
    "{}",
    "()",
    "1,2",
    "1 2",
    "'",
    '"',
    "\\",
    "%s",
    "{0}",
    "\u0663",
    "1_0",
    "++1",
    "1-",
    "-",
    "--",
    "=",
    "==1",
    "a" * 5_000,
    "9" * 400,
    "\x00",
    "\n",
    "\t",
    "\udcff",
    "\U0001f600",
    "$(id)",
    "`id`",
    "; true",
    "__import__('os')",
)
_PATHS = (
    "",
    ".",
    "..",
    "/",
    "//",
    "/dev/null",
    "/dev/null/run",
    "/proc/run",
    "/proc/self/mem",
    "/sys/run",
    "a_file",
    "a_file/run",
    "a_loop",
    "a_loop/run",
    "nowhere/../a_file",
    "x" * 300,
    "y/" * 3_000,
    "\x00",
    "a\x00b",
    "foreign",
    "unreadable",
    "half",
    "strange",
    "\udcff/a_file",
    "a_file\n",
    "~nobody/..\x00",
)
# A script, and its arguments.
Command = tuple[Any, list[str]]


def _base(generator: random.Random) -> str:
    name, argument = generator.choice(CONFIGS), generator.choice(("", "", ":cpu", ":parity", ":cpu,parity"))
    return f"--config={REPOSITORY / 'configs' / name}{argument}"


def _types(generator: random.Random) -> Command:
    name = generator.choice([*_FIELDS, "seed", "name"])
    value = generator.choice((*_WORDS, *_NUMBERS, generator.randbytes(4).decode("latin-1")))
    return joint_recall, [_base(generator), f"--config.{name}={value}"]


def _ranges(generator: random.Random) -> Command:
    """A number that the field's own check refuses."""
    numbers = [item for item in _FIELDS.items() if not isinstance(item[1].default, str | bool)]
    name, field = generator.choice(numbers)
    while True:
        size = 10 ** generator.uniform(0, 20)
        value: Any = generator.choice((-size, size, 0.0, -1.0, float("inf")))
        value = value if isinstance(field.default, float) or value == float("inf") else int(value)
        if not field.metadata["check"](value):
            return joint_recall, [_base(generator), f"--config.{name}={value}"]


def _unknown_names(generator: random.Random) -> Command:
    name = list(generator.choice([*_FIELDS, "seed", "name"]))
    for _ in range(generator.choice((1, 1, 2, 5))):
        at = generator.randrange(len(name))
        name[at : at + generator.choice((0, 1))] = generator.choice(("", "x", "_", ".", "A", "[0]", " ", "é"))
    flag = generator.choice(
        ("--config.", "--config.", "--", "--noconfig.", "-", "--config_", "--config.model.")
    )
    value = generator.choice(("", "=3", "=x", " 3"))
    return joint_recall, [_base(generator), f"{flag}{''.join(name)}{value}"]


def _contradictions(generator: random.Random) -> Command:
    some = lambda *values: generator.choice(values)  # noqa: E731
    words = [*SOURCES, "none", "lsh", "", " sink", "SINK"]
    sets = (
        [("model.num_heads", some(3, 5, 7, 9, 11)), ("model.arch", "mamba2")],
        [("model.n_groups", some(3, 5, 6, 7)), ("model.num_heads", 8), ("model.arch", "mamba2")],
        [
            ("model.sparse_arch", "+".join(generator.choices(words, k=some(1, 2, 3, 4)))),
            ("model.sparse_keys", 1),
        ],
        [("model.arch", "samba"), ("model.sparse_arch", some("sink", "full+sink"))],
        [
            ("model.arch", "samba"),
            ("model.sparse_arch", "none"),
            ("model.attention_heads", some(3, 5, 64, 128)),
        ],
        [("model.time_step_min", some(0.2, 5)), ("model.time_step_max", some(0.1, 0.01))],
        [("model.pad_token_id", some(0, 1, 2, 4, 99, 100, 1000))],
        [("model.vocab_size", some(5, 20, 34))],
        [("model.precision", "float64")],
        [("data.min_n_key", some(17, 40)), ("data.max_n_key", some(5, 16))],
        [("data.n_value", some(80, 10**6, 2**31 - 1))],
        [("data.max_n_context", some(10**5, 10**9)), ("data.max_n_key", some(10**5, 10**9))],
        [(f"data.{some('train', 'eval')}_source", "dataset"), ("data.data_dir", some(*_PATHS))],
        [
            ("training.schedule", some("cosine", "linear")),
            ("training.warmup_steps", some(10, 400_000)),
            ("training.num_steps", 10),
        ],
        [("training.schedule", "linear"), ("training.final_learning_rate", some(1, 5.0))],
    )
    pairs = generator.choice(sets)
    return joint_recall, [_base(generator), *(f"--config.{name}={value}" for name, value in pairs)]


def _hostile_paths(generator: random.Random) -> Command:
    path = generator.choice(_PATHS)
    if generator.random() < 0.3:
        return joint_recall, [f"--config={path}{generator.choice(('', ':cpu', ':'))}"]
    if generator.random() < 0.2:
        return joint_recall, [_base(generator), f"--config.name={path}"]
    return joint_recall, [_base(generator), f"--workdir={path}"]


def _structures(generator: random.Random) -> Command:
    parts = [
        _base(generator),
        *generator.choices(
            (
                "--",
                "-",
                "---",
                "=",
                "--=",
                "--=3",
                "extra",
                "",
                "--config",
                "--config=",
                "--workdir",
                "--flagfile=",
                "--flagfile=nope",
                "--flagfile=/dev/null/x",
                "--undefok=config",
                "--config.model",
                "--config.",
                "-config",
                "--config.seed",
                "--config.model={}",
                "--noworkdir",
                "@a_file",
                "--flagfile=a_file",
                _base(generator),
            ),
            k=generator.choice((1, 2, 3)),
        ),
    ]
    if generator.random() < 0.5:
        generator.shuffle(parts)
    return joint_recall, parts


def _config_files(generator: random.Random) -> Command:
    """One of the files with some of its characters changed, or something else that ends in .py."""
    text = (REPOSITORY / "configs" / generator.choice(CONFIGS)).read_text()
    kind = generator.random()
    if kind < 0.5:
        # Behind the docstring, where a change matters.
        head, body = text[: text.rindex('"""') + 3], list(text[text.rindex("def ") :])
        for _ in range(generator.choice((1, 1, 2, 4))):
            at = generator.randrange(len(body))
            body[at : at + generator.choice((0, 1, 9))] = generator.choice(
                ("", "(", "'", "\n", "1", "=", "\0", "é")
            )
        content = (
            text[text.index('"""') : len(head)] + "\nfrom ml_collections import ConfigDict\n"
            "from configs import common\n" + "".join(body)
        ).encode()
    elif kind < 0.7:
        content = generator.randbytes(generator.choice((1, 10, 1_000)))
    else:
        value = generator.choice(
            (
                "{'model': {'sparse_keys': %s}}",
                "{'training': %s}",
                "{%s: 1}",
                "[%s]",
                "%s",
                "{'seed': %s, 'data': []}",
                "{'data': {'data_dir': %s}}",
                "__import__('collections').OrderedDict(model=%s)",
            )
        )
        inner = generator.choice(
            (
                "{}",
                "None",
                "float('nan')",
                "'\\udcff'",
                "1j",
                "b''",
                "object()",
                "lambda: 0",
                "[]",
                "10**400",
                "type",
                "...",
                "{1: {2: 3}}",
                "1/0",
                "open",
                "exit(0)",
            )
        )
        content = f"def get_config(argument=''):\n    return {value % inner}\n".encode()
    pathlib.Path("mutated.py").write_bytes(content)
    return joint_recall, [
        "--config=mutated.py",
        *generator.choice(([], ["--config.seed=3"], ["--workdir=w"])),
    ]


def _of_evaluate(generator: random.Random) -> Command:
    some = lambda *values: generator.choice(values)  # noqa: E731
    # A run without a checkpoint is no bad input; that has a status of its own.
    folder = some(*(path for path in _PATHS if path != "foreign"))
    extra = some(
        [],
        [f"--split={some(*_WORDS)}"],
        [f"--batch_size={some(*_NUMBERS)}"],
        [f"--checkpoint={some(*_WORDS)}"],
        [f"--data.{some('n_value', 'min_n_key', 'seed', 'nothing')}={some(*_NUMBERS)}"],
        ["--json"],
        ["--x"],
    )
    return evaluate, [*([folder] if some(True, True, False) else []), *extra]


def _of_create_dataset(generator: random.Random) -> Command:
    some = lambda *values: generator.choice(values)  # noqa: E731
    flags = (
        "min_n_context",
        "max_n_context",
        "n_value",
        "seed",
        "n_train_per_pair",
        "n_eval_per_pair",
        "splits",
    )
    words = [f"--{some(*flags)}={some(*_NUMBERS, *_WORDS)}", some("extra", "--x", "--text=maybe", "--verify")]
    return create_dataset, [f"--data_dir={some(*_PATHS)}", *words[: some(1, 2)]]


MUTATIONS: dict[str, Callable[[random.Random], Command]] = {
    "types": _types,
    "ranges": _ranges,
    "unknown names": _unknown_names,
    "contradictions": _contradictions,
    "hostile paths": _hostile_paths,
    "structure of the line": _structures,
    "config files": _config_files,
    "evaluate.py": _of_evaluate,
    "create_dataset.py": _of_create_dataset,
}
