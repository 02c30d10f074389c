"""Several processes that train one run together: what one of them decides, and what all have to know.

With one process everything here does nothing. Process 0 alone writes; the others read the same folder, which
has to lie where all of them see it.
"""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from hax_jax.config import ConfigError
from hax_jax.training.signals import StopRequest


def join() -> None:
    """Makes this process one of several, before JAX has seen a device.

    Slurm and Open MPI say which one it is; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID do.

    Raises:
      ConfigError: they do not, or the others cannot be reached.
    """
    given = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    try:
        count, mine = (int(os.environ[name]) if name in os.environ else None for name in given)
        jax.distributed.initialize(num_processes=count, process_id=mine)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            "--distributed",
            "given under Slurm or Open MPI, or with JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID",
            True,
            " ".join(str(error).split()),
        ) from error


def is_primary() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def from_primary(value: int) -> int:
    """The number that process 0 has passed."""
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class SharedStop:
    """A request to stop that all processes see at the same step, whichever of them got the signal.

    Args:
      own: this process's.

    Attributes:
      name: the signal, or None.
    """

    def __init__(self, own: StopRequest):
        self._own = own
        self._agreed: str | None = None

    @property
    def name(self) -> str | None:
        return self._own.name if jax.process_count() == 1 else self._agreed

    def __bool__(self) -> bool:
        return self.name is not None

    def agree(self) -> None:
        """Exchanges what the processes have got; to be called by all at the same steps."""
        if jax.process_count() > 1 and self._agreed is None:
            with jax.transfer_guard("allow"):
                flags = multihost_utils.process_allgather(np.int32(self._own.name is not None))
            if np.any(flags):
                self._agreed = self._own.name or "a signal to another process"
