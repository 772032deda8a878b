"""Fused operations of timestep-conditioned attention blocks; installs as ``prfl_fast.kernels``."""

if __name__ != "prfl_fast.kernels":
    raise ImportError(
        f"this package is prfl_fast.kernels, imported here as {__name__!r}; `pip install` prfl_fast"
    )

from prfl_fast.kernels._attention_choice import get_attention_backend, set_attention_backend
from prfl_fast.kernels._backend import get_backend, set_backend
from prfl_fast.kernels._registry import report
from prfl_fast.kernels.attention import attention
from prfl_fast.kernels.bias_gelu import bias_gelu
from prfl_fast.kernels.flow_loss import flow_loss
from prfl_fast.kernels.flow_step import flow_step
from prfl_fast.kernels.fp8_linear import fp8_linear, quantise_fp8
from prfl_fast.kernels.gated_residual import gated_residual
from prfl_fast.kernels.gelu_fp8 import gelu_fp8
from prfl_fast.kernels.norm_modulate import norm_modulate
from prfl_fast.kernels.norm_modulate_fp8 import norm_modulate_fp8
from prfl_fast.kernels.qk_norm_rope import qk_norm_rope, rope_table
from prfl_fast.kernels.query_pool import merge_pooled, query_pool
from prfl_fast.kernels.residual_norm_modulate import residual_norm_modulate
from prfl_fast.kernels.rms_norm import rms_norm
from prfl_fast.kernels.rollout_attention import rollout_attention

__all__ = [
    "attention",
    "bias_gelu",
    "flow_loss",
    "flow_step",
    "fp8_linear",
    "gated_residual",
    "gelu_fp8",
    "get_attention_backend",
    "get_backend",
    "merge_pooled",
    "norm_modulate",
    "norm_modulate_fp8",
    "qk_norm_rope",
    "quantise_fp8",
    "query_pool",
    "report",
    "residual_norm_modulate",
    "rms_norm",
    "rollout_attention",
    "rope_table",
    "set_attention_backend",
    "set_backend",
]
