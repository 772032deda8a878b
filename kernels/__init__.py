"""Fused operations of timestep-conditioned attention blocks; installs as ``prfl_fast.kernels``."""

if __name__ == "prfl_fast.kernels":
    from prfl_fast.kernels.attn.backend_choice import set_attention_backend
    from prfl_fast.kernels.attn.exact import attention
    from prfl_fast.kernels.attn.norm_rope import qk_norm_rope
    from prfl_fast.kernels.attn.pool import query_pool
    from prfl_fast.kernels.attn.rollout import rollout_attention
    from prfl_fast.kernels.common.rope import rope_table
    from prfl_fast.kernels.flow.loss import flow_loss
    from prfl_fast.kernels.flow.step import flow_step
    from prfl_fast.kernels.linear.fp8 import fp8_linear, quantize_fp8
    from prfl_fast.kernels.linear.gelu import bias_gelu
    from prfl_fast.kernels.norm.modulate import norm_modulate
    from prfl_fast.kernels.norm.residual import gated_residual
    from prfl_fast.kernels.norm.residual_modulate import residual_norm_modulate
    from prfl_fast.kernels.norm.rms import rms_norm
    from prfl_fast.kernels.runtime.registry import set_backend
else:
    # Python runs in the checkout's root, where this folder hides Hugging Face's package `kernels`.
    # transformers and diffusers import that name to see if the package is installed, and an error
    # here would break them: load the installed package in its place, or look like a missing one.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path
    from typing import Any

    _others = [p for p in sys.path if not Path(p, "kernels", "runtime", "registry.py").exists()]
    _spec = PathFinder.find_spec(__name__, _others)
    if _spec is not None and _spec.loader is not None and _spec.has_location:
        sys.modules[__name__] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
    else:
        # transformers takes a module with neither __file__ nor __version__ for a missing package.
        globals().update(__file__=None, __path__=[])

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        text = (
            "This folder installs as prfl_fast.kernels: import that, or run outside the checkout."
        )
        raise ModuleNotFoundError(f"No package 'kernels' is installed. {text}", name="kernels")


__all__ = [
    "attention",
    "bias_gelu",
    "flow_loss",
    "flow_step",
    "fp8_linear",
    "gated_residual",
    "norm_modulate",
    "qk_norm_rope",
    "quantize_fp8",
    "query_pool",
    "residual_norm_modulate",
    "rms_norm",
    "rollout_attention",
    "rope_table",
    "set_attention_backend",
    "set_backend",
]
