"""What every test run shares: run-time shape checks, golden files, compilation, and the choice of device."""

import os
import pathlib
import sys

import jaxtyping
import pytest

import tests.type_checker
from tests.compilation import as_in_use as compilation
from tests.golden_data import REPOSITORY, Golden

__all__ = ["compilation"]

# Shapes and dtypes in annotations are checked in tests only; in use they cost nothing. hax_jax.config is left
# out: it checks its fields itself, and says more.
_CHECKED = [f"hax_jax.{path.parent.name}" for path in (REPOSITORY / "hax_jax").glob("*/__init__.py")]
jaxtyping.install_import_hook(_CHECKED, f"{tests.type_checker.__name__}.check")

_GOLDEN = Golden()
# With pytest-xdist each worker reports the files it used; without it this stays empty.
_USED_BY_WORKERS: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU unless `-m gpu` asks for the tests of the GPU."""
    if not _gpu_tests_asked_for(config):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    if hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(_WorkerReports(), "golden_worker_reports")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests marked `gpu` unless they were asked for and there is an NVIDIA GPU."""
    if _gpu_tests_asked_for(config) and _has_nvidia_gpu():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands the names of its golden files to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["golden"] = sorted(_GOLDEN.used)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many of the original's golden files the run has used."""
    count = len(_GOLDEN.used | _USED_BY_WORKERS)
    terminalreporter.write_line(f"golden files used: {count}")


@pytest.fixture(scope="session")
def golden() -> Golden:
    """The golden arrays of the original: `golden.load("A_mamba2_hax.npz")`."""
    return _GOLDEN


class _WorkerReports:
    """Collects the workers' golden files where pytest-xdist is in use."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        _USED_BY_WORKERS.update(getattr(node, "workeroutput", {}).get("golden", ()))


def _gpu_tests_asked_for(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr") or ""
    return "gpu" in expression.split() and "not gpu" not in expression


def _has_nvidia_gpu() -> bool:
    return pathlib.Path("/proc/driver/nvidia/version").exists() or pathlib.Path("/dev/nvidiactl").exists()
