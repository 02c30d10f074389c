"""Programs compiled once serve every test here, in whatever process."""

from tests.training.conftest import _keep_compiled_programs, compiled_programs

__all__ = ["_keep_compiled_programs", "compiled_programs"]
