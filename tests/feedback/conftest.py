"""Fixtures of the feedback tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_wan(monkeypatch):
    """Keep diffusers' ``.float()`` sites in float64, or their rounding hides errors below 1e-7."""
    original = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else original(x)
    )
