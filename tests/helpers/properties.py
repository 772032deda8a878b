"""Property tests, skipped where hypothesis is not installed while other tests are collected."""

import pytest
import torch

from prfl_fast import kernels

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _AnyStrategy:
        """Accept whatever is done with a strategy when a module is imported."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

        __or__ = __call__

    def given(*args, **kwargs):
        """Replace the test by one that is skipped."""
        skip = pytest.mark.skip(reason="needs hypothesis")
        return lambda function: skip(lambda: None)

    def settings(**kwargs):
        """Return the test as it is."""
        return lambda function: function

    st = _AnyStrategy()

BACKENDS = ["reference", pytest.param("triton", marks=pytest.mark.triton)]


def use_backend(name):
    """Set the backend by name; on a GPU let each operation choose."""
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")


def property_test(examples=300, backends=BACKENDS, use=use_backend):
    """Turn a check that draws its case into a slow test of each backend, which ``use`` selects."""

    def decorate(function):
        @pytest.mark.parametrize("name", backends)
        def test(name, data):
            use(name)
            function(data.draw)

        # hypothesis stores failing examples by these names.
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(test, attribute, getattr(function, attribute))
        test = given(data=st.data())(test)
        return pytest.mark.slow(settings(max_examples=examples, deadline=None)(test))

    return decorate
