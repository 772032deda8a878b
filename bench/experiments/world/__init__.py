"""Provide a small world for end-to-end checks: bouncing bodies, linear codec, motion metric."""

from .captions import TEXT_DIM, TEXT_TOKENS
from .codec import decode, encode
from .metric import motion_score, roc_auc, track
from .videos import DEFECTS, Videos, generate

__all__ = [
    "DEFECTS",
    "TEXT_DIM",
    "TEXT_TOKENS",
    "Videos",
    "decode",
    "encode",
    "generate",
    "motion_score",
    "roc_auc",
    "track",
]
