"""The model of a golden file that several tests read is compiled once."""

from tests.training.conftest import _keep_compiled_programs, compiled_programs

__all__ = ["_keep_compiled_programs", "compiled_programs"]
