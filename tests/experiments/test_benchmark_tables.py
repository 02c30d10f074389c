"""The README's tables of the benchmarks say what stands in their files."""

import json

import pytest

from benchmarks import record
from experiments import benchmark_tables

PACKED = ("data.packing=1280", "data.order=even")


def step(config: str, session: int, label: str = "", changes: tuple[str, ...] = (), **facts):
    """A measured step of the benchmark, as far as the table has it."""
    return {
        "id": "/".join(filter(None, (label, config, *changes))),
        "session": session,
        "config": config,
        "label": label,
        "changes": list(changes),
        "time": {"seconds": 0.0009},
        "tokens_per_s": 31.3e6,
        "positions_per_s": 33.8e6,
        "floor": {"total": {"seconds": 0.000196}},
        "memory": {"program": {"peak": 2**29}},
        "trace": {"kernels_per_call": 249.2, "busy_share": 0.78},
        "first_step": {"total": 19.9},
    } | facts


@pytest.fixture
def tables(tmp_path):
    """From measured steps to what the README has of them."""

    def of(*measurements) -> str:
        session = {"device": {"kind": "NVIDIA H200"}, "versions": {"jax": "0.11.2"}}
        sessions = [
            session | {"commit": letter * 40, "uncommitted_changes": letter == "c"} for letter in "abc"
        ]
        content = {
            "format_version": record.FORMAT_VERSION,
            "suite": "step",
            "sessions": sessions,
            "measurements": list(measurements),
        }
        path = tmp_path / benchmark_tables.FOLDER / "step.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
        return benchmark_tables.section(tmp_path)

    return of


def test_steps_have_a_table_for_each_label_and_setting_the_latest_first(tables):
    text = tables(
        step("mamba2_hax", 0, "before", PACKED),
        step("mamba2_hax", 1, "packed", PACKED),
        step(
            "mamba2_base",
            2,
            "packed",
            PACKED,
            first_step={"total": 11.3, "without_cache": {"total": 40}},
        ),
        step("samba", 1),
    )
    titles = [line for line in text.splitlines() if line.endswith(":")]
    settings = "(`data.packing=1280`, `data.order=even`)"
    assert titles == [
        f"Packed {settings}, commit bbbbbbb, commit ccccccc with uncommitted changes:",
        "As configured, commit bbbbbbb:",
        f"Before {settings}, commit aaaaaaa:",
    ]
    packed = text.split(titles[0])[1].split(titles[1])[0]
    assert "| `mamba2_hax` | 0.900 | 0.196 | 31.3M | 33.8M | 0.50 | 249 | 78% | 19.9 |" in packed
    assert "| 11.3 (40 uncached) |" in packed
    assert "samba" not in packed and "| `samba` |" in text


def test_a_config_that_failed_has_what_it_said_in_its_row(tables):
    failed = {
        "id": "samba",
        "session": 0,
        "config": "samba",
        "label": "",
        "changes": [],
        "error": "no memory",
    }
    assert "| `samba` | no memory |" in tables(failed)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.0009, "0.900"), (0.123, "123"), (0.9994, "999"), (0.9996, "1,000"), (1.2471, "1,247")],
)
def test_milliseconds_have_three_digits(seconds, text):
    assert benchmark_tables._ms(seconds) == text
