"""Provide a small world for end-to-end checks: bouncing bodies, linear codec, motion metric."""

from .captions import TEXT_DIM
from .codec import CHANNELS, decode, encode
from .metric import motion_score, track
from .videos import DEFECTS, generate

__all__ = ["CHANNELS", "DEFECTS", "TEXT_DIM", "decode", "encode", "generate"]
__all__ += ["motion_score", "track"]
