"""How keys are chosen, pads treated and blocks added up: two rules with the same functions.

`causal` is the project's: nothing of the future, a fixed projection, pads without effect. `parity` is the
original's, faults included, and the only place where those faults live.
"""

from types import ModuleType

from hax_jax.layers.routing import causal, parity

RULES: dict[str, ModuleType] = {"causal": causal, "parity": parity}
