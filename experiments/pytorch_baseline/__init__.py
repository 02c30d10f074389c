"""The models of hax_jax in ordinary PyTorch, for comparison: see README.md in this folder.

Nothing in here imports hax_jax, and nothing in hax_jax imports this.
"""
