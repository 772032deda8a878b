"""norm_modulate with an FP8 output: one e4m3 row and one scale a token, for fp8_linear.

    y = (norm(x)·w + b)·(1 + s_r) + h_r       as in norm_modulate.py, but not rounded to x's dtype
    y_scale = amax |y| / 448,  y_q = e4m3(y / y_scale)                                see _fp8.py

For rollouts: no gradient.
Shapes: x, y_q ``[B, L, D]`` or ``[N, D]``, y_scale as x with 1 for D; the rest as norm_modulate.
Dtypes: x and the parameters any mix of float32, bfloat16, float16; y_q float8_e4m3fn; y_scale
float32. Statistics, y, amax and quotients are float32 (float64 x: y in float64, then float32).
Bytes: reads x, writes one byte an element and four a token.
"""

import itertools

import torch

from prfl_fast.kernels._checks import compute_dtype, require
from prfl_fast.kernels._fp8 import (
    converts,
    empty_quantised,
    quantise,
    refuse_gradients,
)
from prfl_fast.kernels._norm_modulate import forward_kernel, forward_launch
from prfl_fast.kernels._registry import register
from prfl_fast.kernels._rows import check_rows, check_tokens, count_rows, token_strides
from prfl_fast.kernels._triton import AotCase, argument_types, capability
from prfl_fast.kernels.norm_modulate import KINDS
from prfl_fast.kernels.norm_modulate import reference as norm_reference


# Reference.
def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    kind: str,
    eps: float,
    upcast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y_q, y_scale)`` in PyTorch; ``upcast`` names the dtype y is computed in."""
    dtype = compute_dtype(x, upcast)
    y = norm_reference(
        x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, eps, upcast=dtype
    )
    return quantise(y)


# Launch.
def _triton(x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, eps):
    y, y_scale = empty_quantised(x)
    dim = x.shape[-1]
    tokens = x.numel() // dim
    if tokens == 0:
        return y, y_scale
    chip = capability(x.device)
    launch = forward_launch(tokens, dim, kind, chip, fp8=True)
    vectors = [t if t is None else t.contiguous() for t in (weight, bias, scale_table, shift_table)]
    forward_kernel[(launch.programs,)](
        x, y.view(torch.uint8), y_scale, *vectors[:2], scale, shift, *vectors[2:],
        None if row_index is None else row_index.contiguous(),
        *token_strides(x),
        0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0),
        tokens, tokens // count_rows(scale, shift), -(-tokens // launch.programs), eps,
        **launch.constants(dim, kind), CONVERTS=converts(chip),
        **launch.options(),
    )  # fmt: skip
    return y, y_scale


def aot_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """What Wan compiles at 480p, D of the 1.3B and 14B models; ``every``: all flags, D to 8192."""
    rows: tuple[str, ...] = ("scale_ptr", "shift_ptr", "scale_table_ptr", "shift_table_ptr")
    affine: tuple[str, ...] = ("weight_ptr", "bias_ptr")
    indexed = (*rows, "row_index_ptr")
    chosen = [
        (1536, "bf16", "layer", rows),
        (5120, "bf16", "layer", rows),
        (5120, "fp32", "layer", affine),
    ]
    if every:
        dims = (1536, 3072, 5120, 8192)
        givens = ((), affine, rows, rows + affine, indexed)
        chosen = list(itertools.product(dims, ("bf16", "fp32"), KINDS, givens))
    cases = []
    for dim, dtype, kind, given in chosen:
        pointers = {"x_ptr": dtype, "y_ptr": "u8", "y_scale_ptr": "fp32"}
        pointers |= {name: "i64" if name == "row_index_ptr" else "fp32" for name in given}
        lengths = {"length_x": "i32" if given == indexed else None}
        types = argument_types(forward_kernel, pointers, lengths)
        launch = forward_launch(32760, dim, kind, capability, fp8=True)
        constexprs = launch.constants(dim, kind) | {"CONVERTS": converts(capability)}
        flags = "+".join(name.removesuffix("_ptr") for name in given)
        label = f"{dtype} D={dim} {kind} {flags}"
        cases.append(AotCase(label, forward_kernel, types, constexprs, **launch.options()))
    return cases


# Registration.
_op = register(
    "norm_modulate_fp8", reference, fake=lambda x, *_: empty_quantised(x), triton=_triton
)


# Public function.
def norm_modulate_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale_table: torch.Tensor | None = None,
    shift_table: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise each token, modulate it and quantise it to FP8 e4m3 with a scale of its own.

    Args:
        x and all others: as for :func:`prfl_fast.kernels.norm_modulate`.

    Returns:
        ``(y_q, y_scale)``: y_q float8_e4m3fn of x's shape; y_scale float32, x's shape with 1 for
        the last axis; both contiguous. y is about ``y_q.float() * y_scale``, within 1/16 of each
        element and 2⁻¹⁰·y_scale.

    Raises:
        ValueError: what :func:`norm_modulate` refuses, and a tensor that requires a gradient while
            gradients are recorded.
    """
    op = "norm_modulate_fp8"
    check_tokens(op, "x", x)
    vectors = {
        "weight": weight, "bias": bias, "scale_table": scale_table, "shift_table": shift_table,
    }  # fmt: skip
    check_rows(op, x, vectors, {"scale": scale, "shift": shift}, row_index)
    require(kind in KINDS, op, "kind", kind, f"one of {', '.join(KINDS)}")
    require(eps >= 0, op, "eps", eps, "a number ≥ 0")
    refuse_gradients(op, x=x, **vectors, scale=scale, shift=shift)
    return _op(x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, float(eps))
