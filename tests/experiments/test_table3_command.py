"""The table's command, killed half-way and started again: what has finished is not run again."""

import json
import os
import pathlib
import subprocess
import sys
import time

from experiments import table3
from experiments.table import record
from hax_jax.training.environment import read_sessions

ROOT = pathlib.Path(__file__).parents[2]
FIRST, SECOND = "mamba2_base", "samba"
STEPS = 200
# Tables of up to 2 x 2 and one layer: what costs time is compiling.
SETTINGS = {
    "training.warmup_steps": 5,
    "training.schedule": "constant",
    "training.log_every_steps": 5,
    "training.eval_every_steps": 100,
    "training.checkpoint_every_steps": 10,
    "training.batch_size": 2,
    "training.eval_batch_size": 8,
    "training.tensorboard": False,
    "model.num_layers": 1,
    "data.min_n_context": 1,
    "data.max_n_context": 2,
    "data.min_n_key": 1,
    "data.max_n_key": 2,
    "data.n_eval_per_pair": 2,
}


class Table:
    """The command over a folder of its own."""

    def __init__(self, folder: pathlib.Path):
        self.out, self.workdir = folder / "out", folder / "runs"
        self.arguments = [
            f"--configs={FIRST},{SECOND}",
            f"--steps={STEPS}",
            "--small",
            f"--out={self.out}",
            f"--workdir={self.workdir}",
            f"--compilation_cache={folder / 'compiled'}",
            *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
        ]

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "experiments/table3.py", *self.arguments]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)

    def run(self, *more: str) -> int:
        return table3.main(["experiments/table3.py", *self.arguments, *more])

    def folder(self, row: str) -> pathlib.Path:
        return self.workdir / f"causal_{STEPS}_cpu" / row / "lr0.002_seed0"

    def steps_saved(self, row: str) -> list[int]:
        folders = (self.folder(row) / "checkpoints").glob("*")
        return [int(path.name) for path in folders if path.name.isdecimal()]


def test_killed_half_way_it_goes_on_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    table = Table(tmp_path)
    process = table.start()
    while not table.steps_saved(SECOND):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    _wait_until_nobody_trains(table.folder(SECOND))
    before = (table.out / f"{FIRST}.json").read_bytes()
    assert not (table.folder(SECOND) / "result.json").exists()
    assert not (table.out / f"{SECOND}.json").exists()

    assert table.run("--dry_run") == 0
    said, saved = capsys.readouterr().out, max(table.steps_saved(SECOND))
    assert 0 < saved < STEPS
    assert f"{FIRST}: finished, test accuracy " in said
    assert f"{SECOND}: to go on from step {saved} of {STEPS}\n1 of 2 cells finished" in said

    # Training the first cell again would write it anew.
    (table.folder(FIRST) / "run.json").unlink()
    assert table.run() == 0
    said = capsys.readouterr().out
    assert f"{FIRST}: finished" not in said and f"{SECOND}: finished, test accuracy " in said
    assert (table.out / f"{FIRST}.json").read_bytes() == before
    assert not (table.folder(FIRST) / "run.json").exists()
    assert len(read_sessions(table.folder(SECOND) / "run.json")) == 2
    assert f"going on from step {saved}" in (table.folder(SECOND) / "log.txt").read_text()
    _check_results(table)

    # All there: nothing is begun, also without the folders of the runs.
    os.rename(table.workdir, table.workdir.with_name("away"))
    figure = (table.out / "curves.svg").read_bytes()
    assert table.run() == 0 and not table.workdir.exists()
    assert (table.out / "curves.svg").read_bytes() == figure


def _check_results(table: Table) -> None:
    cells = {cell["row"]: cell for cell in record.read_all(table.out)}
    assert set(cells) == {FIRST, SECOND}
    (run,) = cells[SECOND]["runs"]
    done = json.loads((table.folder(SECOND) / "result.json").read_text())
    assert run["test"]["accuracy"] == round(done["test_accuracy"], 6)
    assert (run["seed"], run["learning_rate"], cells[SECOND]["steps"]) == (0, 0.002, STEPS)
    assert "experiments/joint_recall.py --config=configs/samba.py:cpu" in run["command"]
    assert "experiments/table3.py --configs=" in cells[SECOND]["command"]
    assert run["curve"]["valid"]["step"] == [100, 200]
    assert (table.out / "table.md").exists() and (table.out / "curves.svg").exists()


def _wait_until_nobody_trains(folder: pathlib.Path) -> None:
    """The process of a cell ends with the table's, which did not get to tell it."""
    stat = pathlib.Path("/proc", (folder / ".lock").read_text().split()[0], "stat")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            # One that has ended and that nobody has asked about yet.
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.02)
    raise AssertionError(f"{stat} is still there")
