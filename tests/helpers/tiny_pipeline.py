"""The tiny Wan pipelines and clips of ``docs/tiny_pipeline.py``."""

import importlib.util
from pathlib import Path

import pytest

for _package in ("av", "PIL", "ftfy", "transformers", "tokenizers"):
    pytest.importorskip(_package)
diffusers = pytest.importorskip("diffusers")

_FILE = Path(__file__).resolve().parents[2] / "docs" / "tiny_pipeline.py"
_spec = importlib.util.spec_from_file_location("docs_tiny_pipeline", _FILE)
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

make_pipeline, make_clips, moving_shape = tiny.make_pipeline, tiny.make_clips, tiny.moving_shape
