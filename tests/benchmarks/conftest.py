"""Nothing here is held to another program bit for bit: it is compiled quickly, in child processes too."""

import pytest

from tests.compilation import quickly as compilation

__all__ = ["compilation"]


@pytest.fixture(scope="module", autouse=True)
def children():
    """Child processes compile as this one does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        yield
