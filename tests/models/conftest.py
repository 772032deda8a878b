"""Fixtures of the tests of model families."""

import pytest


@pytest.fixture(params=["t2v", "i2v"])
def case(request):
    """Return the kind of Wan model."""
    return request.param
