"""The setting of the allocator in the environment."""

import pytest

from prfl_fast.utils.allocator_settings import EXPANDABLE, expandable_segments


@pytest.mark.parametrize(
    "name, value, expected",
    [
        (*EXPANDABLE.split("="), True),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64, expandable_segments : true", True),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False", False),
        ("PYTORCH_CUDA_ALLOC_CONF", "", False),
    ],
)
def test_expandable_segments(monkeypatch, name, value, expected):
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert expandable_segments() is expected
