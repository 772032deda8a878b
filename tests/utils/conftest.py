"""Fixtures of the tests on utilities: offloading takes the tensors of tiny models."""

from offload_models import offload_small_tensors  # noqa: F401 - a fixture
