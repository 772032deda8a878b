"""Run models of other libraries on the fused kernels: adapters, patching, blocks."""

from prfl_fast.models.adapter import Adapter, Conditions
from prfl_fast.models.blocks import BlockParts, transformer_block
from prfl_fast.models.layers import (
    CrossAttention,
    ModulatedFeedForward,
    TimestepConditionedAttention,
)
from prfl_fast.models.other import VelocityModel
from prfl_fast.models.registry import find_adapter, is_patched, patch, unpatch
from prfl_fast.models.velocity import ModelCall

__all__ = [
    "Adapter",
    "BlockParts",
    "Conditions",
    "CrossAttention",
    "ModelCall",
    "ModulatedFeedForward",
    "TimestepConditionedAttention",
    "VelocityModel",
    "find_adapter",
    "is_patched",
    "patch",
    "transformer_block",
    "unpatch",
]
