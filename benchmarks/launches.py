"""Counts the kernels of a training step and the bytes that they move, without a GPU.

    python benchmarks/launches.py --config=mamba2_hax --set=data.packing=1280 --set=data.order=even
    python benchmarks/launches.py --config=mamba2_base --list=scan       # the kernels of a part, one a line
    python benchmarks/launches.py --config=mamba2_hax --hlo=step.txt     # keeps the compiled program
    python benchmarks/launches.py --gpus=2 --set=training.batch_size=128 # one device's share on two

XLA compiles for a GPU that is only described, Mosaic kernels included, where the CUDA packages of JAX are
installed (`pip install "jax[cuda13]"`). The estimate is a sum over kernels of the larger of 1.8 us and 1.3 us
+ bytes at 3.2 TB/s: what kernels compute, and what their bytes find in the cache, is not in it. Choices that
XLA makes by trying kernels out on a device are made by its rules instead, so a few kernels differ.

Exit status: 0 done, 2 bad input, said in one line.
"""

import collections
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence

# Works from a checkout that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.hlo_kernels import Kernel, of_loop
from experiments import results
from hax_jax.config import ConfigError

# An H200 as far as the compiler asks, and the libraries that it may use there.
_TARGET = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 151397597184
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command line, program name first, and returns the exit status."""
    parser = results.Parser(__doc__)
    parser.add_argument("--config", default="mamba2_hax", help="a file under configs/; default mamba2_hax")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting to change"
    )
    parser.add_argument("--list", metavar="PART", help="print the kernels of a part, or of 'all'")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="described GPUs; default 1")
    parser.add_argument("--hlo", type=pathlib.Path, metavar="FILE", help="write the compiled program here")
    try:
        options = parser.parse_args(argv[1:])
        hlo = compiled_text(options.config, options.set, options.gpus)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.hlo:
        options.hlo.write_text(hlo)
    print(report(hlo, options.list))
    return 0


def compiled_text(config: str, changes: Sequence[str], gpus: int = 1) -> str:
    """The program of a run's dispatch as XLA compiles it for H200s; of several, what each of them runs.

    Raises:
      ConfigError: an unknown config, field or value; a batch that does not divide; no CUDA packages.
    """
    # The process itself runs on the CPU; the CUDA plugin is asked for a description alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    from benchmarks.step_program import NO_GRAPHS, StepProgram, load
    from hax_jax.ops import devices

    experiment = load(config, changes)
    if gpus < 1 or experiment.training.batch_size % gpus:
        size = experiment.training.batch_size
        raise ConfigError("--gpus", f"a number that divides the batch of {size}", gpus, "choose another")
    try:
        described = topologies.get_topology_desc("", "cuda", target_config=_TARGET, topology=f"1x1x{gpus}")
    except NotImplementedError as error:
        expected = "the CUDA packages of JAX"
        raise ConfigError("the environment", expected, "none", 'pip install "jax[cuda13]"') from error
    mesh = Mesh(np.asarray(described.devices), (devices.BATCH_AXIS,), axis_types=(AxisType.Auto,))
    with devices.compiling_for(described.devices[0]):
        program = StepProgram(experiment, mesh=mesh)
        program.compile(NO_GRAPHS)
    return program.compiled.as_text()


def report(hlo: str, listed: str | None = None) -> str:
    """A table of the step's parts, and after it the kernels of one part, or of 'all'."""
    from benchmarks import parts

    part_of, kernels = parts.of_program(hlo), of_loop(hlo)
    by_part: dict[str, list[Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        by_part[part_of.get(kernel.name, parts.OTHER)].append(kernel)
    lines = ["| part | kernels | MB | us |", "| --- | --- | --- | --- |"]
    for part, own in sorted(by_part.items(), key=lambda item: -_seconds(item[1])):
        lines.append(_row(part.replace("_", " "), own))
    lines.append(_row("**all**", kernels))
    if listed:
        lines.append("")
        lines += [_line(part, kernel) for part, kernel in _chosen(by_part, listed)]
    return "\n".join(lines)


def _chosen(by_part: Mapping[str, Iterable[Kernel]], listed: str) -> Iterable[tuple[str, Kernel]]:
    for part, kernels in by_part.items():
        if listed in ("all", part, part.replace("_", " ")):
            for kernel in sorted(kernels, key=lambda kernel: -kernel.seconds):
                yield part, kernel


def _row(name: str, kernels: Sequence[Kernel]) -> str:
    moved = sum(kernel.count * kernel.bytes for kernel in kernels)
    count = sum(kernel.count for kernel in kernels)
    return f"| {name} | {count} | {moved / 1e6:.1f} | {1e6 * _seconds(kernels):.1f} |"


def _line(part: str, kernel: Kernel) -> str:
    times = f"{kernel.count} x " if kernel.count > 1 else ""
    shape = kernel.shape if len(kernel.shape) <= 90 else kernel.shape[:87] + "..."
    return (
        f"{1e6 * kernel.seconds:7.1f} us {kernel.bytes / 1e6:7.2f} MB  {part}  {times}{kernel.name}  {shape}"
    )


def _seconds(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.seconds for kernel in kernels)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
