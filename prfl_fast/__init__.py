"""Fused kernels and a training engine for latent-space reward feedback learning (PRFL)."""

from prfl_fast._version import __version__
from prfl_fast.kernels import set_backend
from prfl_fast.patching import patch, unpatch

__all__ = ["__version__", "patch", "set_backend", "unpatch"]
