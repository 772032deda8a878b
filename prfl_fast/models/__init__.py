"""Run models of other libraries on the fused kernels: model adapters, patching, blocks."""

from prfl_fast.models.adapter import Adapter, Conditions
from prfl_fast.models.blocks import BlockParts, transformer_block
from prfl_fast.models.compiled_blocks import compile_blocks
from prfl_fast.models.conversion import convert_wan, merge_lora
from prfl_fast.models.experts import Experts
from prfl_fast.models.fp8_blocks import use_fp8_linears
from prfl_fast.models.layers import (
    CrossAttention,
    ModulatedFeedForward,
    TimestepConditionedAttention,
)
from prfl_fast.models.loading import load_transformer
from prfl_fast.models.lora_files import read_lora, write_lora
from prfl_fast.models.other import VelocityModel
from prfl_fast.models.registry import find_adapter, is_patched, patch, unpatch
from prfl_fast.models.velocity import ModelCall

__all__ = [
    "Adapter",
    "BlockParts",
    "Conditions",
    "CrossAttention",
    "Experts",
    "ModelCall",
    "ModulatedFeedForward",
    "TimestepConditionedAttention",
    "compile_blocks",
    "convert_wan",
    "VelocityModel",
    "find_adapter",
    "is_patched",
    "load_transformer",
    "merge_lora",
    "patch",
    "read_lora",
    "transformer_block",
    "unpatch",
    "use_fp8_linears",
    "write_lora",
]
