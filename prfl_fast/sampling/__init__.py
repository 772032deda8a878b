"""Uses of a reward that train nothing: noise optimization, guidance, search."""

from prfl_fast.sampling.gradient import guide, optimize_noise
from prfl_fast.sampling.search import beam_search, prune

__all__ = ["beam_search", "guide", "optimize_noise", "prune"]
