"""How much XLA optimises in a test: compiling is most of what the tests of models and operations cost."""

import jax
import pytest

# Whether programs that were compiled quickly may still be in memory.
_left_behind = False


def _compile(quickly: bool) -> None:
    global _left_behind
    if _left_behind and not quickly:
        jax.clear_caches()
    _left_behind = quickly
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(scope="module", autouse=True)
def as_in_use():
    """Programs as users get them, none of them left from a module of the other kind."""
    _compile(quickly=False)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Few optimisations, in half the time or less; a folder's conftest.py takes it as its `compilation`.

    Sums are rounded in another order, as on another machine: what is held bit for bit to another program or
    process, or to the original's numbers, is compiled as in use.
    """
    _compile(quickly=True)
