"""Comparison with the golden files: arrays that the original produced, and how close we come.

A file says by its arrays and name what it is, so any file of the format can be checked, whatever its model,
sources, lengths or sizes.
"""

import pathlib

from hax_jax.interop.golden.files import Check, GoldenError, GoldenFile
from hax_jax.interop.golden.models import check_double, check_gradients, check_model
from hax_jax.interop.golden.operations import check_operation
from hax_jax.interop.golden.trajectory import check_trajectory

__all__ = ["Check", "GoldenError", "check_file"]


def check_file(path: str | pathlib.Path) -> list[Check]:
    """Compares everything that one golden file holds.

    Raises:
      GoldenError: the file is missing, damaged or of no known kind; the message names it and the remedy.
    """
    golden = GoldenFile(path)
    if golden.path.stem.endswith("_float64"):
        return check_double(golden)
    if golden.path.stem.endswith("_grad"):
        return check_gradients(golden)
    if "sequences" in golden:
        return check_trajectory(golden)
    if "train/mask" in golden:
        return _check_data_set(golden)
    if "cotangent" in golden or "pred" in golden:
        return check_operation(golden)
    if golden.group("param/"):
        return check_model(golden)
    raise GoldenError(f"{golden.path}: its arrays are those of no known group; see the golden files' README")


def _check_data_set(golden: GoldenFile) -> list[Check]:
    from hax_jax.interop.golden_data import check_golden_dataset

    return [Check(name, float(wrong), 0.0) for name, wrong in check_golden_dataset(golden.path).items()]
