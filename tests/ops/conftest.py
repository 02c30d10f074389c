"""Nothing here is held to another program bit for bit: it is compiled quickly."""

from tests.compilation import quickly as compilation

__all__ = ["compilation"]
