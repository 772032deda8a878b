"""Memory policy of training: weight dtypes, activation checkpointing, offload, optimizers."""

from prfl_fast.memory.checkpointing import activation_checkpointing
from prfl_fast.memory.optimizers import make_optimizer
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.memory.quantized import quantize

__all__ = ["MemoryConfig", "activation_checkpointing", "apply_memory", "make_optimizer", "quantize"]
