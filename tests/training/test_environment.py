"""What a run ran on is kept beside it, a session after the other."""

import json
import re
import subprocess

import jax
import pytest

import hax_jax
from hax_jax.config import ModelConfig
from hax_jax.ops import dispatch
from hax_jax.training import environment
from hax_jax.training.compilation import keep_programs
from hax_jax.training.environment import Session, read_sessions, resolved_implementation
from hax_jax.training.loop import train
from tests.training.tiny import TinyModel, tiny_experiment


def test_a_run_records_what_it_ran_on(tmp_path):
    train(tiny_experiment(num_steps=2), tmp_path, model=TinyModel())
    (session,) = read_sessions(tmp_path / "run.json")
    assert session["command"].startswith("python ")
    assert session["device"]["kind"] == jax.devices()[0].device_kind
    assert session["device"]["count"] == jax.device_count()
    assert session["versions"]["jax"] == jax.__version__
    assert session["versions"]["hax_jax"] == hax_jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= session["versions"].keys()
    assert session["platform"]
    assert 0 < session["seconds"] < 300
    # A module of one's own resolves its implementations itself.
    assert session["implementation"] is None
    # A finished run only reports its result.
    train(tiny_experiment(num_steps=2), tmp_path, model=TinyModel())
    assert len(read_sessions(tmp_path / "run.json")) == 1


def test_time_to_the_first_step_and_what_the_cache_saved_are_recorded(tmp_path):
    for name in ("cold", "warm"):
        train(tiny_experiment(num_steps=2, batch_size=6), tmp_path / name, model=TinyModel())
    (cold,), (warm,) = (read_sessions(tmp_path / name / "run.json") for name in ("cold", "warm"))
    assert cold["first_step"]["cache"] == jax.config.jax_compilation_cache_dir
    assert 0 < warm["first_step"]["seconds"] < 100
    assert cold["first_step"]["cache_misses"] > 0 == warm["first_step"]["cache_misses"]
    assert warm["first_step"]["cache_hits"] > 0
    assert cold["first_step"]["compiling_seconds"] > 0


def test_folder_of_compiled_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        keep_programs()
        # What is set already, as by JAX_COMPILATION_CACHE_DIR, stays.
        assert jax.config.jax_compilation_cache_dir == before["jax_compilation_cache_dir"]
        keep_programs("off")
        assert jax.config.jax_compilation_cache_dir is None
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "hax_jax" / "compiled")
        keep_programs(str(tmp_path / "mine"))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_sessions_are_kept_in_order_and_one_that_is_killed_has_no_end(tmp_path):
    path = tmp_path / "run.json"
    Session(path, ModelConfig()).begin()
    second = Session(path, ModelConfig(implementation="reference"))
    second.begin()
    second.begin()
    second.end()
    sessions = read_sessions(path)
    assert [session["implementation"] for session in sessions] == ["xla", "reference"]
    assert sessions[0]["seconds"] is None and sessions[1]["seconds"] >= 0


def test_a_session_that_never_began_leaves_no_trace(tmp_path):
    Session(tmp_path / "run.json", ModelConfig()).end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"format_version": 2, "sessions": []}'])
def test_an_unreadable_record_does_not_stop_a_run(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    assert read_sessions(path) == []
    Session(path, None).begin()
    assert len(read_sessions(path)) == 1


def test_the_commit_is_that_of_the_checkout_or_unknown(monkeypatch, tmp_path):
    found = environment.commit()
    if found["commit"] is not None:
        assert re.fullmatch("[0-9a-f]{40}", found["commit"])
        assert isinstance(found["uncommitted_changes"], bool)

    inside = tmp_path / "somebody_elses" / "package"
    inside.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(inside.parent)], check=True)
    settings = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    message = ["commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(["git", "-C", str(inside), *settings, *message], check=True)
    monkeypatch.setattr(environment, "CHECKOUT", inside)
    assert environment.commit() == {"commit": None, "uncommitted_changes": None}
    monkeypatch.setattr(environment, "CHECKOUT", inside.parent)
    assert environment.commit()["uncommitted_changes"] is False


@pytest.mark.parametrize(("asked", "resolved"), [("auto", "xla"), ("xla", "xla"), ("reference", "reference")])
def test_implementation_is_named_as_it_resolves(asked, resolved):
    assert resolved_implementation(ModelConfig(implementation=asked)) == resolved


def test_implementation_is_that_of_the_kernels_where_they_run(monkeypatch):
    monkeypatch.setattr(dispatch, "missing_for_mosaic_gpu", lambda: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert resolved_implementation(ModelConfig()) == "mosaic_gpu"


def test_the_record_is_plain_json(tmp_path):
    Session(tmp_path / "run.json", None).begin()
    assert json.loads((tmp_path / "run.json").read_text())["format_version"] == environment.FORMAT_VERSION
