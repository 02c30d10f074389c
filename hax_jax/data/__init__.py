"""Joint recall: the published data set, an endless stream on the device, and one interface to both."""

from hax_jax.data.batch import Batch
from hax_jax.data.pipeline import RawBatch, Split, make_split
from hax_jax.data.reader import DatasetError

__all__ = ["Batch", "DatasetError", "RawBatch", "Split", "make_split"]
