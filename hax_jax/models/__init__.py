"""Language models of Mamba, Mamba-2 and Samba blocks."""

from hax_jax.models.language_model import LanguageModel, ModelOutput, build_model

__all__ = ["LanguageModel", "ModelOutput", "build_model"]
