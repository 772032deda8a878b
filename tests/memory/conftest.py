"""Fixtures of the tests on memory: offloading takes the tensors of tiny models."""

from offload_models import offload_small_tensors  # noqa: F401 - a fixture
