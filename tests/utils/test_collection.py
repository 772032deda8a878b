"""Simulations without Python's garbage collector."""

import gc

import pytest

from prfl_fast.utils.collection import no_collection


def test_the_collector_is_off_inside_and_as_before_afterwards():
    with pytest.raises(RuntimeError), no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()
