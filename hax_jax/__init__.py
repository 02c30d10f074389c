"""State-space models with context-dependent sparse attention (HAX), in JAX."""

__version__ = "0.1.0"
