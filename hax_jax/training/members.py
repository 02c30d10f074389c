"""Members of a population as ordinary runs: folders that every tool reads, and that can go on alone."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from hax_jax.config import ConfigError, Experiment
from hax_jax.training.checkpoints import Checkpoints, Restored, writer_thread
from hax_jax.training.errors import CheckpointError
from hax_jax.training.files import make_folders, write_atomically, write_json
from hax_jax.training.metrics import read_metrics
from hax_jax.training.workdir import FORMAT_VERSION, RunResult, read_config


def write_member(
    workdir: pathlib.Path,
    index: int,
    folder: pathlib.Path,
    result: RunResult | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes a member of a population, as far as its newest checkpoint, as the folder of an ordinary run.

    Training the member's experiment in that folder goes on from there, without the others.

    Args:
      workdir: the folder of the population.
      index: which member, in the order of `Experiment.members`.
      folder: where to; `config.json`, `metrics.jsonl`, `run.json`, `checkpoints/` and `best/` appear there.
      result: how the member ended, for `result.json`; None where it may go on.
      say: prints a line where a damaged checkpoint is passed over.

    Raises:
      ConfigError: `workdir` holds no population, or none with that member.
      CheckpointError: there is no whole checkpoint, or the member's could not be written.
    """
    config = read_config(workdir)
    members = Experiment.from_dict(config["experiment"]).members
    if not 0 <= index < len(members):
        raise ConfigError(
            "member",
            f"0..{len(members) - 1}" if members else "left out: this is no population",
            index,
            f"see the members in {workdir / 'result.json'}" if members else "name the folder of one",
        )
    checkpoints = Checkpoints(workdir / "checkpoints", 1, say)
    restored = checkpoints.newest()
    checkpoints.close()
    if restored is None:
        raise CheckpointError(f"No whole checkpoint lies in {workdir / 'checkpoints'}; train longer.")
    member = members[index]
    make_folders(folder)
    settings = {"module": config.get("module"), "experiment": member.to_dict()}
    write_json(folder / "config.json", {"format_version": FORMAT_VERSION, **settings})
    lines = [
        json.dumps({name: value for name, value in line.items() if name != "member"})
        for line in read_metrics(workdir)
        if line.get("member") == index and (result is not None or line["step"] <= restored.step)
    ]
    write_atomically(folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())
    if (workdir / "run.json").exists():
        write_atomically(folder / "run.json", (workdir / "run.json").read_bytes())
    _write_checkpoints(restored, index, member, folder, say)
    if result is not None and result.stopped == "finished":
        write_json(folder / "result.json", dataclasses.asdict(result))


def _write_checkpoints(
    restored: Restored, index: int, member: Experiment, folder: pathlib.Path, say: Callable[[str], None]
) -> None:
    best = restored.meta["best"][index]
    meta = {**restored.meta, "experiment": member.to_dict(), "best": best}
    del meta["step"], meta["format_version"]
    arrays: dict[str, dict[str, Any]] = {"state": {}, "best": {}}
    for path, array in restored.arrays.items():
        kind, _, name = path.partition("/")
        arrays[kind][name] = array[index]
    with writer_thread() as writer:
        kinds = [("checkpoints", restored.step, arrays["state"])]
        if best["step"] is not None:
            kinds.insert(0, ("best", best["step"], arrays["best"]))
        for kind, step, tree in kinds:
            checkpoints = Checkpoints(folder / kind, 1, say, writer)
            checkpoints.save(step, tree, meta)
            checkpoints.wait()
            checkpoints.close()
