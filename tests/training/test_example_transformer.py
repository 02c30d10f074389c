"""The documented example of a model of one's own runs, learns, and is causal."""

import numpy as np
from flax import nnx

from experiments import example_transformer
from hax_jax.training.metrics import read_metrics


def test_example_trains_from_its_command_line(tmp_path, capsys):
    assert example_transformer.main([f"--workdir={tmp_path}", "--num_steps=100"]) == 0
    assert "test accuracy" in capsys.readouterr().out.splitlines()[-1]
    (line,) = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    # ln 32 = 3.5 at first; to know that values come next, of which there are 4, takes it to 1.4.
    assert line["loss"] < 3.0


def test_bad_input_is_one_line(tmp_path, capsys):
    assert example_transformer.main([f"--workdir={tmp_path}", "--num_steps=0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_transformer_is_causal():
    model = example_transformer.Transformer(12, rngs=nnx.Rngs(0))
    tokens = np.arange(24).reshape(2, 12)
    changed = tokens.copy()
    changed[:, 7:] = 0
    a, b = model(tokens), model(changed)
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert not np.array_equal(a[:, 7:], b[:, 7:])
