"""Compiled programs, kept between runs, and what compiling cost."""

import os
import pathlib
from typing import Any

import jax

# Programs that compile faster are not worth a file; jax's own default of a second leaves out half of them.
_LEAST_SECONDS = 0.1
_SCHEDULING = "xla_gpu_command_buffer_scheduling_mode"
_IN_GRAPHS = "xla_gpu_enable_command_buffer"
# What XLA takes into graphs by itself, and loops.
_ALL_AND_LOOPS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
_COUNTED = {
    "/jax/compilation_cache/cache_hits": "cache_hits",
    "/jax/compilation_cache/cache_misses": "cache_misses",
    "/jax/core/compile/backend_compile_duration": "compiling_seconds",
}


def keep_programs(folder: str | None = None) -> None:
    """Keeps compiled programs, and on a GPU the choices of its autotuner, in a folder between runs.

    Args:
      folder: where; 'off' for nowhere. None: as JAX_COMPILATION_CACHE_DIR says, or else hax_jax/compiled in
        the user's cache folder.
    """
    if folder == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    if folder is None and jax.config.jax_compilation_cache_dir is None:
        folder = str(pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hax_jax" / "compiled")
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(folder).expanduser().absolute()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)


def compiler_options(platform: str, *, one_graph: bool = False) -> dict[str, Any] | None:
    """What XLA is told about updates and the scoring of batches beyond its own defaults.

    On a GPU kernels of a CUDA graph that do not depend on each other may run side by side: most are too small
    to fill the device. Results keep their bits, memory is used again less soon. Where XLA_FLAGS says how
    graphs are made (`--xla_gpu_command_buffer_scheduling_mode=SERIALIZE`, or
    `--xla_gpu_enable_command_buffer=`), all is left as it says.

    Args:
      platform: of the devices.
      one_graph: make a loop of known length one graph with all its turns, so that one turn follows another as
        kernels do. To make out such a graph takes 6 us a kernel: nothing that the loop uses may move in
        memory from call to call, and its turns have to be few and small.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if platform not in ("gpu", "cuda") or _SCHEDULING in flags or _IN_GRAPHS in flags:
        return None
    options: dict[str, Any] = {_SCHEDULING: "CONCURRENT"}
    if one_graph:
        options |= {_IN_GRAPHS: _ALL_AND_LOOPS, "xla_gpu_command_buffer_unroll_loops": True}
    return options


class Compilations:
    """Counts what this process compiles from the making of the first instance on."""

    _totals: dict[str, float] | None = None

    def __init__(self) -> None:
        if Compilations._totals is None:
            Compilations._totals = dict.fromkeys(_COUNTED.values(), 0)
            jax.monitoring.register_event_listener(lambda event, **_: _count(event, 1))
            jax.monitoring.register_event_duration_secs_listener(_count)
        self._before = dict(Compilations._totals)

    def so_far(self) -> dict[str, Any]:
        """Since this instance was made: seconds of compiling, programs in the cache or not, its folder."""
        totals = Compilations._totals or {}
        counts: dict[str, Any] = {name: totals[name] - before for name, before in self._before.items()}
        counts["compiling_seconds"] = round(counts["compiling_seconds"], 1)
        return {**counts, "cache": jax.config.jax_compilation_cache_dir}


def _count(event: str, duration_secs: float, **_: Any) -> None:
    name = _COUNTED.get(event)
    if name is not None and Compilations._totals is not None:
        Compilations._totals[name] += duration_secs
