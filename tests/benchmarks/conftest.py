"""Nothing here is held to another program bit for bit: it is compiled quickly, in child processes too."""

import os

import pytest

from tests.compilation import quickly as compilation

__all__ = ["compilation"]


@pytest.fixture(scope="module", autouse=True)
def children():
    """Child processes compile as this one does."""
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    before = os.environ.get(name)
    os.environ[name] = "true"
    yield
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before
