"""The command line, each suite once on small shapes, and inputs that are what they are called."""

import time

import jax
import numpy as np
import pytest

from benchmarks import attention, attention_inputs, curves, specs, step, timing
from benchmarks import run as command
from benchmarks.attention_programs import AUTO, visible_keys
from benchmarks.record import Record, read
from experiments import plot_benchmarks, update_readme
from experiments.benchmark_tables import Measured

SHAPE = specs.TINY_LONG[-1]


def run(*arguments) -> int:
    return command.main(["run.py", *arguments])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The attention suite's measurements of one form, and of what is not there on a CPU."""
    path = tmp_path_factory.mktemp("benchmarks") / "attention.json"
    one_form = "--only=128,xla,forward_backward"
    assert run("attention", "--tiny", f"--out={path}", one_form, "--workers=2") == 0
    other = "--only=64,random,cudnn,forward_backward"
    assert run("attention", "--tiny", f"--out={path}", other, "--add") == 0
    return path


def test_attention_measures_time_memory_and_floor(measured):
    content = read(measured, "attention")
    by_id = {m["id"]: m for m in content["measurements"]}
    one = by_id["128/random/xla/forward_backward"]
    assert one["time"]["seconds"] > 0 and len(one["time"]["repeats"]["median"]) == 2
    assert one["memory"]["program"]["peak"] > one["memory"]["program"]["arguments"] > 0
    assert one["share_of_floor"] > 0 and one["floor"]["bytes"] > 0
    assert one["trace"]["kernels_per_call"] > 0 and "attention" in one["trace"]["parts"]
    assert "error" in by_id["64/random/cudnn/forward_backward"]
    for kind in (attention_inputs.RANDOM, *attention_inputs.HURTING):
        errors = by_id[f"128/{kind}/xla/errors"]["errors"]
        assert max(errors.values()) < 1e-2, (kind, errors)
    assert content["sessions"][0]["ceilings"]["copy_bytes_per_s"] > 0


def test_what_there_is_no_time_for_is_named(tmp_path):
    path = tmp_path / "attention.json"
    assert run("attention", "--tiny", f"--out={path}", "--only=64,xla,forward", "--seconds=0") == 0
    (session,) = read(path, "attention")["sessions"]
    assert "64/random/xla/forward" in session["left_out"]


def test_the_readme_and_the_figure_are_made_of_it(measured, tmp_path):
    folder = tmp_path / "results" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "attention.json").write_bytes(measured.read_bytes())
    begin, end = update_readme.BEGIN, update_readme.END
    speed = "<!-- benchmarks:begin -->\n<!-- benchmarks:end -->"
    (tmp_path / "README.md").write_text(f"{begin}\n{end}\n{speed}\n")
    assert plot_benchmarks.main(["plot_benchmarks.py", str(folder / "attention.json")]) == 0
    figure = (folder / "attention.svg").read_bytes()
    assert plot_benchmarks.main(["plot_benchmarks.py", str(folder / "attention.json")]) == 0
    assert (folder / "attention.svg").read_bytes() == figure
    assert update_readme.main(["update_readme.py"], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| tokens | HAX, XLA, ms |" in text and "results/benchmarks/attention.svg" in text
    assert "all keys in one bucket" in text
    assert update_readme.main(["update_readme.py", "--check"], tmp_path) == 0


def test_ratios_stay_within_a_session(measured):
    found = Measured(measured, "attention")
    same = [f"128/{kind}/xla/forward_backward" for kind in ("equal", "random")]
    assert found.ratio(*same) == pytest.approx(found.seconds(same[0]) / found.seconds(same[1]))
    found.by_id[same[0]]["session"] = 1
    assert found.ratio(*same) is None


@pytest.fixture
def shared_device(monkeypatch):
    """The step benchmark sets this variable for processes that share a device; it must not stay."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("shared_device")
def test_steps_are_measured_and_taken_apart_in_a_process_each(tmp_path, capsys):
    path, cache = tmp_path / "step.json", tmp_path / "compiled"
    options = ["--tiny", "--steps=2", f"--out={path}", f"--cache={cache}", "--set=model.sparse_keys=8"]
    configs = ["--configs=mamba2_lsh,mamba_base", "--breakdown=mamba2_lsh", "--workers=2", "--label=cold"]
    assert run("step", *options, *configs) == 0
    assert run("step", *options, "--configs=mamba2_lsh", "--add") == 0
    content = read(path, "step")
    ids = ["cold/mamba2_lsh", "cold/mamba_base", "mamba2_lsh"]
    assert [m["id"] for m in content["measurements"]] == [f"{name}/model.sparse_keys=8" for name in ids]
    assert not any("error" in m for m in content["measurements"]), content["measurements"]
    assert not any(session["left_out"] for session in content["sessions"])
    cold, other, warm = content["measurements"]
    for one in cold, other, warm:
        assert one["tokens"] == one["positions"] == 2 * 43
        assert one["tokens_per_s"] == pytest.approx(one["tokens"] / one["time"]["seconds"], rel=1e-3)
        assert one["floor"]["total"]["seconds"] >= one["floor"]["without_pads"]["seconds"] > 0
        phases = [
            one["first_step"][phase] for phase in ("build", "trace", "compile", "state", "first_dispatch")
        ]
        assert one["first_step"]["total"] == pytest.approx(sum(phases), rel=1e-3) and min(phases) > 0
    assert {"scan", "attention", "hashing", "optimizer", "data"} <= set(cold["breakdown"]["parts"])
    assert [one["breakdown"]["command_buffers"] for one in (cold, other, warm)] == [False, True, True]
    assert cold["first_step"]["cache_hits"] == 0 < cold["first_step"]["cache_misses"]
    assert cold["first_step"]["without_cache"]["total"] == cold["first_step"]["total"]
    assert warm["first_step"]["cache_hits"] > 0 == warm["first_step"]["cache_misses"]
    assert warm["first_step"]["compile"] < cold["first_step"]["compile"]
    assert "without_cache" not in warm["first_step"]
    assert "compiled mamba_base in " in capsys.readouterr().out


@pytest.mark.usefixtures("shared_device")
def test_a_config_that_fails_does_not_end_the_others(tmp_path):
    path = tmp_path / "step.json"
    plan = timing.Plan(samples=2, sample_seconds=0.0, seconds=0.1)
    # The command refuses such a name before it begins.
    options = step.Options(("nothing", "mamba_base"), steps=2, tiny=True, workers=2, plan=plan)
    step.run(lambda: Record(path, "step"), options, time.perf_counter())
    failed, measured = read(path, "step")["measurements"]
    assert failed["id"] == "nothing" and failed["error"].startswith("ConfigError: `--configs` must be")
    assert measured["id"] == "mamba_base" and measured["time"]["seconds"] > 0
    assert "without_cache" not in measured["first_step"]


@pytest.mark.usefixtures("shared_device")
def test_configs_for_which_there_is_no_time_are_named(tmp_path, capsys):
    path = tmp_path / "step.json"
    arguments = ["--tiny", "--workers=2", "--configs=mamba2_lsh,mamba_base", f"--out={path}", "--seconds=0"]
    assert run("step", *arguments) == 0
    content = read(path, "step")
    assert content["sessions"][0]["left_out"] == ["mamba2_lsh", "mamba_base"] and not content["measurements"]
    assert "left out, no time: mamba2_lsh, mamba_base" in capsys.readouterr().out


def test_scans_are_measured_and_absent_peers_named(tmp_path, capsys):
    path = tmp_path / "scans.json"
    assert run("scans", "--tiny", f"--out={path}", "--only=xla,forward") == 0
    content = read(path, "scans")
    times = {m["id"]: m["time"]["seconds"] for m in content["measurements"]}
    assert set(times) == {f"{op}/tiny/xla/forward" for op in ("selective_scan", "ssd")}
    said = capsys.readouterr().out
    assert all(f"not measured: {name}" in said for name in content["sessions"][0]["absent"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("attentions",),
        ("step", "--configs=nothing"),
        ("step", "--set=a"),
        ("step", "--gpus=0,1"),
        ("step", "--gpus=0,0", "--workers=2"),
        ("step", "--compile_only"),
        ("attention", "--seconds=soon"),
    ],
)
def test_a_bad_command_is_one_line(arguments, capsys, tmp_path):
    out = () if arguments[0] == "attentions" else (f"--out={tmp_path / 'x.json'}",)
    assert run(*arguments, *out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", attention_inputs.HURTING)
def test_inputs_are_what_they_are_called(kind):
    x = attention_inputs.make(kind, SHAPE, 3)
    size = SHAPE.keys_per_source
    buckets, lifetimes = visible_keys(x.q, x.k, x.scores, x.projection, size, AUTO).sources
    codes = [np.asarray(code)[0] for code in (buckets.query_code, buckets.key_code)]
    expiry, position = np.asarray(lifetimes.expiry)[0], np.arange(SHAPE.length)
    if kind == "one_bucket":
        assert len(set(codes[0]) | set(codes[1])) == 1
    elif kind == "one_key":
        assert set(codes[0]) == {codes[1][0]} and codes[1][0] not in codes[1][1:]
        assert (np.asarray(buckets.query_count) == 1).all()
        assert expiry[0] == size
    elif kind == "rising":
        assert (expiry == np.minimum(position + size, SHAPE.length)).all()
    else:
        assert (expiry[:size] == SHAPE.length).all() and (expiry[size:] <= position[size:]).all()


def test_the_goals_come_first():
    assert attention.cases()[0].shape.length == 16 * specs.KIBI
    assert {case.shape.name for case in attention.cases()[:8]} == {"16K", "64K", "256K", "1M"}
    assert len({case.identity for case in attention.cases()}) == len(attention.cases())
    assert jax.devices()[0].platform == "cpu"


def test_curves_of_each_form_and_their_distance(tmp_path):
    path = tmp_path / "curves.json"
    # Logging on the way begins the means anew, which must not be seen in the losses.
    assert run("curves", "--tiny", f"--out={path}", "--steps=12", "--set=training.log_every_steps=4") == 0
    by_id = {m["id"]: m for m in read(path, "curves")["measurements"]}
    plain = by_id["mamba2_hax/plain"]
    # The first dispatch is the warm-up, and points are differences of means from then on.
    assert plain["every"] == 2 and len(plain["loss"]) == 12 // 2 - 2
    # No model has learned anything yet: losses are about that of a uniform guess among 100 tokens.
    assert all(abs(loss - np.log(100)) < 1 for loss in plain["loss"])
    # Without a GPU the default form is the plain one, and float32 rounds otherwise.
    distances = by_id["mamba2_hax"]["distance_from_plain"]
    assert distances["default"]["largest_point"] == 0
    assert 0 < distances["plain, float32"]["largest_point"] < 0.1


def test_distance_of_curves():
    plain = np.zeros(40)
    rising = np.where(np.arange(40) < 20, 0.0, 0.5)
    found = curves.distance(rising, plain, every=10)
    assert found == {"largest_point": 0.5, "largest_window": 0.5, "last_window": 0.5, "last_loss": 0.0}
