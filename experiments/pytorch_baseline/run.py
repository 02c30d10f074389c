"""Takes the steps of an exchange file in PyTorch and writes what came of them.

    python experiments/pytorch_baseline/run.py EXCHANGE.npz RESULT.npz [--device=cuda] [--kernels]

`experiments/compare_pytorch.py` writes EXCHANGE.npz and reads RESULT.npz, so that PyTorch may live in an
environment, or on a machine, of its own; of other packages this needs NumPy alone. --kernels uses those of
mamba_ssm and causal_conv1d where they are installed; it says which were used.
"""

import argparse
import hashlib
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.pytorch_baseline.training import read, train


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("exchange", type=pathlib.Path, metavar="EXCHANGE.npz")
    parser.add_argument("result", type=pathlib.Path, metavar="RESULT.npz")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", action="store_true", help="use installed kernels")
    options = parser.parse_args(arguments)
    try:
        arrays = read(options.exchange)
        results = train(arrays, options.device, installed_kernels=options.kernels)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        print(f"error: {options.exchange}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    # The result says which file it belongs to.
    results["exchange_sha256"] = np.array(hashlib.sha256(options.exchange.read_bytes()).hexdigest())
    temporary = options.result.with_name(f".{options.result.name}.new")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **results)
    temporary.replace(options.result)
    info = json.loads(str(results["info_json"]))
    used = ", ".join(f"{name}: {form}" for name, form in info["kernels"].items())
    print(f"{len(results['loss'])} steps on {info['device']} in {info['dtype']}; {used}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
