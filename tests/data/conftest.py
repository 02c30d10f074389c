"""Data sets that several files of tests read."""

import pathlib
import shutil

import pytest

from tests.data.making import make


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> pathlib.Path:
    """A complete data set, not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "whole"
    make(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> pathlib.Path:
    """A complete data set to be damaged."""
    return shutil.copytree(whole, tmp_path / "copy")
