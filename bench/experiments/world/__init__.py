"""Provide a small world for end-to-end checks: bouncing bodies, linear codec, motion metric."""

from .captions import TEXT_DIM
from .codec import decode, encode
from .metric import motion_score
from .videos import DEFECTS, generate

__all__ = ["DEFECTS", "TEXT_DIM", "decode", "encode", "generate", "motion_score"]
