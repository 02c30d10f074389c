"""Joint recall: the published data set, an endless stream on the device, and one interface to both."""

from hax_jax.data.batch import Batch

__all__ = ["Batch"]
