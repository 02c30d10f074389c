"""Comparison with the golden files: arrays that the original produced, and how close we come.

A file says by its arrays and name what it is, so any file of the format can be checked, whatever its model,
sources, lengths or sizes.
"""

import pathlib
from collections.abc import Callable

from hax_jax.config import ConfigError
from hax_jax.interop.golden.data_set import check_data_set
from hax_jax.interop.golden.files import Check, GoldenError, GoldenFile
from hax_jax.interop.golden.models import check_double, check_gradients, check_model
from hax_jax.interop.golden.operations import check_operation
from hax_jax.interop.golden.trajectory import check_trajectory
from hax_jax.interop.state_dict import StateDictError

__all__ = ["Check", "GoldenError", "check_file"]


def check_file(path: str | pathlib.Path) -> list[Check]:
    """Compares everything that one golden file holds.

    Raises:
      GoldenError: the file is missing, damaged or of no known kind; the message names it and the remedy.
    """
    golden = GoldenFile(path)
    try:
        return _check_of(golden)(golden)
    except (GoldenError, ConfigError, StateDictError):
        raise
    except KeyError as error:
        # Arrays that are missing say so themselves; this is an entry of the description.
        raise GoldenError(
            f"{golden.path}: meta_json has no {error}; the file is of another version"
        ) from error
    except (ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GoldenError(
            f"{golden.path}: its arrays or meta_json do not fit each other ({reason}); copy it again"
        ) from error


def _check_of(golden: GoldenFile) -> Callable[[GoldenFile], list[Check]]:
    if golden.path.stem.endswith("_float64"):
        return check_double
    if golden.path.stem.endswith("_grad"):
        return check_gradients
    if "sequences" in golden:
        return check_trajectory
    if "train/inputs" in golden:
        return check_data_set
    if "cotangent" in golden or "pred" in golden:
        return check_operation
    if golden.group("param/"):
        return check_model
    raise GoldenError(f"{golden.path}: its arrays are those of no known group; see the golden files' README")
