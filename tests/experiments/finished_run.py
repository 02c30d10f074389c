"""A finished run's folder, made by hand: the files that training writes, without the training."""

import json
import pathlib
from typing import Any

from hax_jax.config import DataConfig, Experiment, ModelConfig, TrainingConfig

SIZES = [1, 2]
ACCURACY = [[1.0, 0.87654321], [0.75, 0.5]]


def experiment(name: str = "tiny", **model: Any) -> Experiment:
    """A run of two layers on tables of up to 2 x 2, of 1,000 steps."""
    return Experiment(
        name=name,
        model=ModelConfig(vocab_size=20, sparse_arch="sign_bin_lsh+key_selection", sparse_keys=4, **model),
        data=DataConfig(
            min_n_context=1, max_n_context=2, min_n_key=1, max_n_key=2, n_value=2, n_eval_per_pair=5
        ),
        training=TrainingConfig(num_steps=1000, log_every_steps=2, eval_every_steps=100),
    )


def make(workdir: pathlib.Path, settings: Experiment | None = None, sessions: Any = None) -> pathlib.Path:
    """Writes the folder; `sessions` are those of run.json, which is left out without them."""
    workdir.mkdir(parents=True, exist_ok=True)
    stored = (settings or experiment()).to_dict()
    _write(workdir / "config.json", {"format_version": 1, "module": None, "experiment": stored})
    if sessions:
        _write(workdir / "run.json", {"format_version": 1, "sessions": sessions})
    lines = []
    for step in range(2, 1001, 2):
        values = {"loss": 3.0 - step / 500, "gate_loss": 0.123456789, "accuracy": step / 1250, "tokens": 50.0}
        speed = {"steps_per_s": 10.0 + step % 3, "positions_per_s": 1000.0, "tokens_per_s": 500.0}
        lines.append({"step": step, "kind": "train", **values, **speed})
        if step % 100 == 0:
            values = {"loss": 3.1 - step / 500, "accuracy": step / 1300, "seconds": 0.5}
            lines.append({"step": step, "kind": "valid", **values})
    lines.append({"step": 1000, "kind": "test", "loss": 1.1234567891, "accuracy": 0.78125})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = {"n_context": SIZES, "n_key": SIZES, "accuracy": ACCURACY, "num_items": [[5, 5], [5, 5]]}
    _write(
        workdir / "result.json",
        {
            "stopped": "finished", "steps": 1000, "best_step": 1000, "best_valid_accuracy": 1000 / 1300,
            "test_accuracy": 0.78125, "test_loss": 1.1234567891, "test_by_size": table,
        },
    )
    return workdir


def session(**changes: Any) -> dict[str, Any]:
    """One process's entry of run.json."""
    return {
        "started": "2026-01-02T03:04:05+00:00", "seconds": 60.0,
        "command": "python experiments/joint_recall.py --config=tiny.py", "commit": "a" * 40,
        "uncommitted_changes": False, "device": {"kind": "NVIDIA H200", "count": 2, "hosts": 1},
        "versions": {"jax": "0.11.2", "python": "3.12.3"}, "platform": "Linux", "implementation": "xla",
        **changes,
    }


def _write(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))
