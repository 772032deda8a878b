"""A tiny world on disk for the commands."""

import shutil

import pytest
from runs import make_world


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Model, reward, dataset and pairs; read only."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(root, tmp_path):
    """Copy the world, to be damaged."""
    return shutil.copytree(root, tmp_path / "world")
