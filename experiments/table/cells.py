"""What a table consists of: cells, each a row of Table 3, made of runs that train in groups."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Collection, Sequence

from experiments import command_line, results
from hax_jax.config import ConfigError, Experiment

MODES = ("causal", "parity")
# The paper's most telling rows first: what is done when the time is over should say most.
ORDER = (
    "mamba2_hax",
    "mamba2_key_selection",
    "mamba2_lsh",
    "mamba2_base",
    "mamba2_sliding_window",
    "mamba_hax",
    "mamba_key_selection",
    "mamba_lsh",
    "mamba_base",
    "mamba_sliding_window",
    "mamba2_base_double",
    "mamba2_sliding_window_sink",
    "mamba2_sliding_window_dilated",
    "mamba2_dilated",
    "mamba_base_double",
    "mamba_sliding_window_sink",
    "mamba_sliding_window_dilated",
    "mamba_dilated",
    "samba",
)
# What a table's own options say, and therefore no override may.
_OWN = {
    "name": "--configs",
    "seed": "--seeds",
    "training.learning_rate": "--learning_rates",
    "training.num_steps": "--steps",
    "training.population_seeds": "--seeds",
    "training.population_learning_rates": "--learning_rates",
}
# Learning rate and seed.
Member = tuple[float, int]


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a table is asked to hold.

    Attributes:
      configs: rows, by the names of their config files.
      mode: 'causal' or 'parity'; see `configs/common.py`.
      small: the configs' small form, for a CPU.
      steps: of every run; None for what the configs say.
      seeds: of every rate.
      learning_rates: of every row; empty for the one that its config has.
      together: at most so many runs of a row are trained in one program.
      overrides: `--config.FIELD=VALUE`, for every run.
      compilation_cache: as in `experiments/joint_recall.py`; None for its default.
    """

    configs: tuple[str, ...] = ORDER
    mode: str = "causal"
    small: bool = False
    steps: int | None = None
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = ()
    together: int = 16
    overrides: tuple[str, ...] = ()
    compilation_cache: str | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one row that one process trains: a run alone, or a population of rates times seeds."""

    row: str
    members: tuple[Member, ...]
    command: tuple[str, ...]
    experiment: Experiment
    folder: pathlib.Path

    @property
    def num_steps(self) -> int:
        return self.experiment.training.num_steps

    def folder_of(self, index: int) -> pathlib.Path:
        """Where the run of a member lies once the group has finished."""
        members = self.experiment.members
        return self.folder / "members" / members[index].name if members else self.folder


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of Table 3: its settings without seed and learning rate, and its groups."""

    row: str
    shared: Experiment
    groups: tuple[Group, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(member for group in self.groups for member in group.members)


def plan(wish: Wish, workdir: pathlib.Path) -> list[Cell]:
    """The cells of a table, every setting of every run checked.

    Args:
      wish: the table.
      workdir: below it every group gets a folder.

    Raises:
      ConfigError: what is wished for cannot be trained.
    """
    for word in wish.overrides:
        match = re.match(r"--?(?:no)?config\.([^=]*)", word)
        if match and match[1] in _OWN:
            remedy = f"use {_OWN[match[1]]}"
            raise ConfigError(match[1], "left to the options of the table", word, remedy)
    return [_cell(wish, row, workdir) for row in wish.configs]


def name_of(wish: Wish, cells: Sequence[Cell]) -> str:
    """The folder's name of a table: mode and steps, as 'causal_400000' or 'parity_2000_cpu'."""
    steps = cells[0].shared.training.num_steps
    return f"{wish.mode}_{steps}{'_cpu' if wish.small else ''}"


def missing(cell: Cell, done: Collection[Member], wish: Wish) -> list[Group]:
    """The groups still to be trained where some runs of a cell are there already.

    A group none of whose runs is there stays as it is, so that an interrupted one goes on in its folder.
    """
    found = []
    for group in cell.groups:
        left = [member for member in group.members if member not in done]
        if len(left) == len(group.members):
            found.append(group)
        elif left:
            folder = group.folder.parent
            found += [_group(wish, cell.row, *grid, folder) for grid in _grids(left, wish.together)]
    return found


def _cell(wish: Wish, row: str, workdir: pathlib.Path) -> Cell:
    shared = command_line.parse(_command(wish, row, workdir, [])).experiment
    rates = wish.learning_rates or (shared.training.learning_rate,)
    folder = workdir / name_of(wish, [Cell(row, shared, ())]) / row
    grids = _grids([(rate, seed) for rate in rates for seed in wish.seeds], wish.together)
    groups = tuple(_group(wish, row, *grid, folder) for grid in grids)
    return Cell(row, dataclasses.replace(shared, name=row), groups)


def _group(wish: Wish, row: str, rates: Sequence[float], seeds: Sequence[int], parent: pathlib.Path) -> Group:
    members = tuple((rate, seed) for rate in rates for seed in seeds)
    if len(members) == 1:
        which = [f"--config.seed={seeds[0]}", f"--config.training.learning_rate={rates[0]!r}"]
    else:
        which = [
            f"--config.training.population_seeds={','.join(map(str, seeds))}",
            f"--config.training.population_learning_rates={','.join(map(repr, rates))}",
        ]
    folder = parent / f"lr{'+'.join(map(repr, rates))}_seed{'+'.join(map(str, seeds))}"
    command = _command(wish, row, folder, which)
    return Group(row, members, tuple(command[1:]), command_line.parse(command).experiment, folder)


def _command(wish: Wish, row: str, workdir: pathlib.Path, which: Sequence[str]) -> list[str]:
    """The command line of a run by itself, the script first, as it is typed in the present folder."""
    if row not in results.PAPER:
        raise ConfigError("--configs", f"some of {', '.join(ORDER)}", row, "these are the rows of Table 3")
    argument = ",".join([*["cpu"] * wish.small, *["parity"] * (wish.mode == "parity")])
    config = os.path.relpath(results.CHECKOUT / "configs" / f"{row}.py")
    return [
        os.path.relpath(results.CHECKOUT / "experiments" / "joint_recall.py"),
        f"--config={config}{f':{argument}' if argument else ''}",
        f"--workdir={workdir}",
        *([] if wish.compilation_cache is None else [f"--compilation_cache={wish.compilation_cache}"]),
        *([] if wish.steps is None else [f"--config.training.num_steps={wish.steps}"]),
        *which,
        *wish.overrides,
    ]


def _grids(members: Sequence[Member], together: int) -> list[tuple[tuple[float, ...], tuple[int, ...]]]:
    """Rates and seeds whose products are all `members`, no product larger than `together`."""
    seeds_of: dict[float, list[int]] = {}
    for rate, seed in members:
        seeds_of.setdefault(rate, []).append(seed)
    rates_of: dict[tuple[int, ...], list[float]] = {}
    for rate, found in seeds_of.items():
        rates_of.setdefault(tuple(found), []).append(rate)
    grids: list[tuple[tuple[float, ...], tuple[int, ...]]] = []
    for all_seeds, rates in rates_of.items():
        for i in range(0, len(all_seeds), together):
            seeds = tuple(all_seeds[i : i + together])
            width = together // len(seeds)
            grids += [(tuple(rates[j : j + width]), seeds) for j in range(0, len(rates), width)]
    return grids
