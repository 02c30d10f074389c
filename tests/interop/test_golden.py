"""Every golden file of the original, and that a difference in any quantity is noticed."""

import json
import pathlib

import numpy as np
import pytest

from experiments import check_golden
from hax_jax.interop.golden import Check, GoldenError, check_file
from hax_jax.interop.golden.files import largest
from tests import golden_data


@pytest.mark.parametrize("name", golden_data.ALL)
def test_everything_in_a_golden_file_is_reproduced(golden, name):
    path = golden.path(name)
    if name.endswith(("_float64.npz", "_grad.npz")):
        golden.path(name.replace("_float64", "").replace("_grad", ""))
    checks = check_file(path)
    assert checks
    outside = [check for check in checks if not check.inside]
    assert outside == []


def test_what_is_compared_in_a_model_file(golden):
    quantities = {check.quantity for check in check_file(golden.path("A_mamba2_hax.npz"))}
    of_layers = (
        "mixer_out",
        "Q2",
        "K2",
        "attn_states",
        "selected_score",
        "selected_target",
        "layer_gate_loss",
    )
    assert quantities == {
        "gradients",
        *(
            f"train/{name}"
            for name in ("loss", "gate_loss", "acc", "last_hidden_state", "logits", *of_layers)
        ),
        *(f"eval/{name}" for name in ("loss", "acc", "last_hidden_state")),
        *(
            f"{mode}/{name}"
            for mode in ("train", "eval")
            for name in ("mask", "query_bin", "key_bin", "key_score")
        ),
        "train/V",
    }


def rewrite(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> pathlib.Path:
    np.savez_compressed(path, **arrays)
    return path


def test_a_difference_is_noticed_in_every_quantity(golden, tmp_path):
    """Each array of a model file is changed by a little more than is allowed; all of them must be outside."""
    arrays = golden.load("A_mamba2_hax.npz")
    inputs = ("param/", "train/rand", "eval/rand", "inputs", "labels", "mask", "attn_mask", "meta_json")
    for name, array in arrays.items():
        if name.startswith(inputs):
            continue
        if array.dtype == np.float32:
            # 6e-6 is between the tolerance of losses and twice that; accuracies are exact.
            step = 6e-6 if "loss" in name else 4e-5 * max(1.0, float(np.abs(array).max()))
            arrays[name] = array + np.float32(step)
        elif name.endswith("mask_bits"):
            arrays[name] = array ^ 0x80
        else:
            arrays[name] = array + 1
    checks = check_file(rewrite(tmp_path / "A_changed.npz", arrays))
    assert [check.quantity for check in checks if check.inside] == []


def test_a_nan_is_never_inside():
    assert not Check("loss", float("nan"), 1.0).inside
    assert np.isnan(largest([0.0, float("nan"), 0.0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train/loss": np.float32("nan")}, "train/loss must be finite"),
        ({"meta_json": np.array("{}")}, "meta_json has no 'config'"),
        ({"inputs": None}, "array inputs is missing"),
        ({"meta_json": None}, "array meta_json is missing"),
        ({"labels": np.zeros((2, 5), np.uint8)}, "its arrays or meta_json do not fit each other"),
    ],
)
def test_a_damaged_model_file_is_one_clear_error(golden, tmp_path, change, said):
    arrays = {**golden.load("A_mamba2_hax.npz"), **change}
    path = rewrite(tmp_path / "A.npz", {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(GoldenError, match=said):
        check_file(path)


def test_a_file_without_its_partner_says_which_is_missing(golden, tmp_path):
    path = tmp_path / "A_mamba_hax_float64.npz"
    path.write_bytes(golden.path("A_mamba2_hax.npz").read_bytes())
    with pytest.raises(GoldenError, match=r"A_mamba_hax\.npz: no such file"):
        check_file(path)


def test_the_command_answers_with_a_line_and_a_status(golden, tmp_path, capsys):
    good = str(golden.path("C_ranking_loss.npz"))
    assert check_golden.main([good]) == 0
    assert capsys.readouterr().out.startswith("inside  C_ranking_loss.npz: loss ")

    changed = golden.load("C_ranking_loss.npz") | {"loss": np.float64(1.0)}
    outside = str(rewrite(tmp_path / "C.npz", changed))
    assert check_golden.main([outside, good]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("OUTSIDE C.npz: loss ") and "OUTSIDE 1e-10" in lines[0]
    assert lines[1].startswith("inside ")

    missing = str(tmp_path / "none.npz")
    assert check_golden.main([missing, outside, good]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"unusable none.npz: {missing}: no such file; check the path\n"
    assert len(captured.out.splitlines()) == 2


def test_weights_of_another_model_are_refused(golden, tmp_path, capsys):
    arrays = golden.load("A_mamba2_hax.npz")
    meta = json.loads(str(arrays["meta_json"]))
    meta["config"]["hidden_size"], meta["config"]["head_dim"] = 32, 8
    path = str(rewrite(tmp_path / "A.npz", arrays | {"meta_json": np.array(json.dumps(meta))}))
    assert check_golden.main([path]) == 2
    assert "embeddings.weight has shape (100, 64), expected (100, 32)" in capsys.readouterr().err


def test_a_missing_golden_file_fails_in_ci_where_the_whole_set_should_be(monkeypatch, tmp_path):
    monkeypatch.setattr(golden_data, "REPOSITORY", tmp_path / "checkout")
    monkeypatch.delenv("HAX_GOLDEN_DIR", raising=False)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.skip.Exception, match=r"none\.npz is in none of"):
        golden_data.Golden().path("none.npz")
    (tmp_path / "shared" / "golden").mkdir(parents=True)
    with pytest.raises(pytest.fail.Exception, match=r"none\.npz is in none of"):
        golden_data.Golden().path("none.npz")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        golden_data.Golden().path("none.npz")
