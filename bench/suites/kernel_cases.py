"""Define a case for every operation of prfl_fast.kernels, beside its naive formula.

"Naive" is the formula as diffusers' Wan and its schedulers write it, in eager mode.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Preset
from torch import nn
from torch.func import functional_call

from prfl_fast import kernels
from prfl_fast.rewards import QueryAttentionPool
from suites.kernel_checks import Case, Draw, Tensors

POOL_HEADS = 8
EPS = 1e-6
# Wan2.2 gives the first frame another timestep than the rest: two rows of modulation.
TIME_ROWS = 2
FP8_MAX = 448.0
FP8_ERROR = 6e-2  # three mantissa bits: 2⁻⁴ at worst, 2.6 % root-mean-square, operand by operand
UNIPC_TERMS = {"x": 0.9, "velocity": -0.15, "previous": 0.3, "older": -0.05}


def _modulation(
    tensors: Tensors, wide: torch.dtype, rows: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Return modulation vectors as diffusers computes them: table + time in fp32, broadcast."""
    time_rows = tensors["time"] if rows is None else tensors["time"][rows[0].long()][None]
    summed = tensors["table"].to(wide) + time_rows.to(wide)  # [B, n, D] or [B, L, n, D]
    if rows is not None:
        return [part.squeeze(2) for part in summed.chunk(summed.shape[2], dim=2)]
    return list(summed.chunk(summed.shape[1], dim=1))


def _make_norm(draw: Draw) -> Tensors:
    table = draw.param(2, draw.preset.dim)
    return {"x": draw.tokens(), "time": draw.randn(1, 2, draw.preset.dim), "table": table}


def _layer_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(x.to(scale.dtype), x.shape[-1:], eps=EPS)
    return (normed * (1 + scale) + shift).type_as(x)


def _naive_norm(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    shift, scale = _modulation(t, wide, t.get("rows"))
    return _layer_norm(t["x"], scale, shift)


def _norm(t: Tensors, **options: Any) -> Any:
    (shift, scale), (shift_table, scale_table) = t["time"].unbind(1), t["table"].unbind(0)
    return kernels.norm_modulate(
        t["x"], scale=scale, shift=shift, scale_table=scale_table, shift_table=shift_table,
        row_index=t.get("rows"), eps=EPS, **options,
    )  # fmt: skip


def _make_norm_rows(draw: Draw) -> Tensors:
    frames = draw.preset.grid[0]
    rows = torch.arange(draw.preset.tokens, device=draw.device) >= draw.preset.tokens // frames
    tensors = _make_norm(draw)
    return tensors | {"time": draw.randn(TIME_ROWS, 2, draw.preset.dim), "rows": rows[None].int()}


def _make_gated(draw: Draw, rows: int = 1) -> Tensors:
    tensors = {name: draw.tokens() for name in "xy"}
    tensors["time"] = draw.randn(1, rows, draw.preset.dim)
    return tensors | {"table": draw.param(rows, draw.preset.dim)}


def _naive_residual(t: Tensors, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate, shift, scale = _modulation(t, wide)
    x = (t["x"].to(wide) + t["y"] * gate).type_as(t["x"])
    return x, _layer_norm(x, scale, shift)


def _residual(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    gate, shift, scale = t["time"].unbind(1)
    gate_table, shift_table, scale_table = t["table"].unbind(0)
    return kernels.residual_norm_modulate(
        t["x"], t["y"], gate, scale=scale, shift=shift, gate_table=gate_table,
        scale_table=scale_table, shift_table=shift_table, eps=EPS,
    )  # fmt: skip


def _naive_gated(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    (gate,) = _modulation(t, wide)
    return (t["x"].to(wide) + t["y"].to(wide) * gate).type_as(t["x"])


def _gated(t: Tensors) -> torch.Tensor:
    return kernels.gated_residual(t["x"], t["y"], t["time"][:, 0], gate_table=t["table"][0])


def _make_rope(draw: Draw) -> Tensors:
    head_dim = draw.preset.dim // draw.preset.heads
    cos, sin = kernels.rope_table(max(draw.preset.grid), head_dim, device=draw.device)
    pairs = head_dim // 2
    parts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)

    def per_token(table: torch.Tensor) -> torch.Tensor:
        columns, grid = [], draw.preset.grid
        for axis, part in enumerate(table.split(parts, 1)):
            shape = [side if i == axis else 1 for i, side in enumerate(grid)]
            columns.append(part[: grid[axis]].view(*shape, -1).expand(*grid, -1))
        return torch.cat(columns, -1).reshape(1, draw.preset.tokens, 1, pairs)

    return {
        "q": draw.tokens(),
        "k": draw.tokens(),
        "q_weight": 1 + draw.param(draw.preset.dim),
        "k_weight": 1 + draw.param(draw.preset.dim),
        "cos": cos,
        "sin": sin,
        # As in diffusers, made once a forward for all blocks, so not part of what is timed.
        "token_cos": per_token(cos),
        "token_sin": per_token(sin),
        "grid": torch.tensor(draw.preset.grid),
        "heads": torch.tensor(draw.preset.heads),
    }


def _naive_rope(t: Tensors, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
    outputs = []
    for name in ("q", "k"):
        x = t[name]
        x = F.rms_norm(x, x.shape[-1:], t[f"{name}_weight"].to(x.dtype), EPS)
        x = x.unflatten(2, (int(t["heads"]), -1))
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = t["token_cos"].to(wide), t["token_sin"].to(wide)
        out = torch.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        outputs.append(out.flatten(2))
    return tuple(outputs)


def _rope(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (t[name] for name in ("q", "k", "q_weight", "k_weight"))
    table = {"cos": t["cos"], "sin": t["sin"], "grid": tuple(t["grid"].tolist())}
    return kernels.qk_norm_rope(*tensors, heads=int(t["heads"]), **table, eps=EPS)


def _make_gelu(draw: Draw) -> Tensors:
    width = draw.preset.ffn_dim
    return {"x": draw.randn(1, draw.preset.tokens, width), "bias": draw.param(width)}


def _naive_gelu(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    return F.gelu(t["x"] + t["bias"].type_as(t["x"]), approximate="tanh")


def _make_attention(draw: Draw) -> Tensors:
    return {name: draw.tokens() for name in "qkv"} | {"heads": torch.tensor(draw.preset.heads)}


def _naive_attention(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    q, k, v = (t[name].unflatten(2, (int(t["heads"]), -1)).transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _make_pool(draw: Draw) -> Tensors:
    dim, gain = draw.preset.dim, 10 / draw.preset.dim**0.5
    return {
        "x": draw.tokens(),
        "queries": draw.param(1, dim) * 10,
        "multihead_attn.in_proj_weight": draw.param(3 * dim, dim) * gain,
        "multihead_attn.in_proj_bias": draw.param(3 * dim),
        "multihead_attn.out_proj.weight": draw.param(dim, dim) * gain,
        "multihead_attn.out_proj.bias": draw.param(dim),
    }


@functools.cache
def _pool_module(kind: Callable[..., nn.Module], dim: int) -> nn.Module:
    """Return a module on the meta device, made once, so that its construction is not timed."""
    with torch.device("meta"):
        return kind(dim, POOL_HEADS)


_attention_module = functools.partial(nn.MultiheadAttention, batch_first=True)


def _naive_pool(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    x = t["x"]
    prefix = "multihead_attn."
    weights = {n.removeprefix(prefix): p.type_as(x) for n, p in t.items() if n.startswith(prefix)}
    module = _pool_module(_attention_module, x.shape[-1])
    query = t["queries"].type_as(x).expand(len(x), -1, -1)
    attended, _ = functional_call(module, weights, (query, x, x), {"need_weights": False})
    return (attended + query).mean(1)


def _pool(t: Tensors) -> torch.Tensor:
    module = _pool_module(QueryAttentionPool, t["x"].shape[-1])
    parameters = {n: p for n, p in t.items() if n != "x"}
    return functional_call(module, parameters, (t["x"],)).type_as(t["x"])


_POOL_WEIGHTS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_POOL_LEAVES = ("x", "queries", *(f"multihead_attn.{name}" for name in _POOL_WEIGHTS))


def _make_step(draw: Draw) -> Tensors:
    return {name: draw.latents() for name in UNIPC_TERMS}


def _naive_step(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    terms = (c * t[name].to(wide) for name, c in UNIPC_TERMS.items())
    return sum(terms, torch.zeros((), dtype=wide, device=t["x"].device)).type_as(t["x"])


def _step(t: Tensors) -> torch.Tensor:
    return kernels.flow_step([t[name] for name in UNIPC_TERMS], list(UNIPC_TERMS.values()))


def _make_loss(draw: Draw) -> Tensors:
    tensors = {name: draw.latents() for name in ("velocity", "noise", "latents")}
    return tensors | {"velocity": tensors["velocity"].to(draw.dtype)}


def _naive_loss(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    return F.mse_loss(t["velocity"].to(wide), (t["noise"] - t["latents"]).to(wide))


def _make_rms(draw: Draw) -> Tensors:
    return {"x": draw.tokens(), "weight": 1 + draw.param(draw.preset.dim)}


def _naive_rms(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    x = t["x"]
    rho = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + EPS)
    return (x.to(wide) * rho * t["weight"]).type_as(x)


def _dequantized(outputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    quantized, scale = outputs
    return quantized.to(scale.dtype) * scale


def _naive_fp8(y: torch.Tensor, wide: torch.dtype) -> Any:
    """Quantize token by token; return exact values for the oracle in float64."""
    if wide == torch.float64:
        return y, torch.ones((), dtype=wide, device=y.device)
    scale = y.abs().amax(-1, keepdim=True).float() / FP8_MAX
    return (y.float() / scale).to(torch.float8_e4m3fn), scale


def _make_linear(draw: Draw) -> Tensors:
    x, weight = draw.tokens(), draw.randn(draw.preset.dim, draw.preset.dim) / draw.preset.dim**0.5
    (x_q, x_scale), (w_q, w_scale) = kernels.quantize_fp8(x), kernels.quantize_fp8(weight)
    return {
        "x": x, "weight": weight,
        "x_q": x_q, "x_scale": x_scale, "weight_q": w_q, "weight_scale": w_scale,
    }  # fmt: skip


def _make_rollout(draw: Draw) -> Tensors:
    # Of float32 there is no 8-bit form.
    half = torch.bfloat16 if draw.dtype == torch.float32 else draw.dtype
    tensors = _make_attention(draw)
    return {n: t.to(half) if t.is_floating_point() else t for n, t in tensors.items()}


def _attention_flops(preset: Preset) -> float:
    return 4.0 * preset.tokens**2 * preset.dim


def _pool_flops(preset: Preset) -> float:
    return 12.0 * preset.tokens * preset.dim**2  # key and value projections, forward and backward


# Formatted by hand as a table: ruff would put each argument on a line of its own.
# fmt: off
POOL = Case(
    "query_pool (vs nn.MultiheadAttention)", "query_pool", _make_pool, _POOL_LEAVES, _naive_pool,
    _pool, reads=("x",), kept=("x",), arithmetic=(32, 80), writes=("x",), naive_flops=_pool_flops,
)
CASES = (
    Case(
        "norm_modulate", "norm_modulate", _make_norm, ("x", "time", "table"), _naive_norm, _norm,
        reads=("x",), kept=("x",), arithmetic=(7, 16),
    ),
    Case(
        "norm_modulate, time per token", "norm_modulate", _make_norm_rows, ("x", "time", "table"),
        _naive_norm, _norm, reads=("x", "rows"), kept=("x", "rows"), arithmetic=(7, 16),
    ),
    Case(
        "residual_norm_modulate", "residual_norm_modulate", lambda draw: _make_gated(draw, 3),
        ("x", "y", "time", "table"), _naive_residual, _residual, reads=("x", "y"),
        kept=("out0", "y"), arithmetic=(9, 20),
    ),
    Case(
        "gated_residual", "gated_residual", _make_gated, ("x", "y", "time", "table"), _naive_gated,
        _gated, reads=("x", "y"), kept=("y",), arithmetic=(2, 3), writes=("y",),
    ),
    Case(
        "qk_norm_rope", "qk_norm_rope", _make_rope, ("q", "k", "q_weight", "k_weight"), _naive_rope,
        _rope, reads=("q", "k"), kept=("q", "k"), arithmetic=(14, 28),
    ),
    Case(
        "bias_gelu", "bias_gelu", _make_gelu, ("x", "bias"), _naive_gelu,
        lambda t: kernels.bias_gelu(t["x"], t["bias"]), reads=("x",), kept=("x",),
        arithmetic=(10, 20),
    ),
    Case(
        "attention", "attention", _make_attention, ("q", "k", "v"), _naive_attention,
        lambda t: kernels.attention(t["q"], t["k"], t["v"], heads=int(t["heads"]))[0],
        reads=("q", "k", "v"), kept=("q", "k", "v", "out0"), forward_flops=_attention_flops,
        naive_flops=lambda p: 3.5 * _attention_flops(p),
    ),
    POOL,
    Case(
        "flow_step, UniPC", "flow_step", _make_step, ("velocity",), _naive_step, _step,
        reads=tuple(UNIPC_TERMS), kept=(), arithmetic=(7, 1),
    ),
    Case(
        "flow_loss", "flow_loss", _make_loss, ("velocity",), _naive_loss,
        lambda t: kernels.flow_loss(t["velocity"], t["noise"], t["latents"]),
        reads=("velocity", "noise", "latents"), kept=("velocity", "noise", "latents"),
        arithmetic=(4, 4),
    ),
    Case(
        "rms_norm", "rms_norm", _make_rms, ("x", "weight"), _naive_rms,
        lambda t: kernels.rms_norm(t["x"], t["weight"], eps=EPS), reads=("x",), kept=("x",),
        arithmetic=(4, 10),
    ),
    Case(
        "norm_modulate_fp8", "norm_modulate_fp8", _make_norm, (),
        lambda t, wide: _naive_fp8(_naive_norm(t, wide), wide),
        lambda t: _norm(t, out_dtype=torch.float8_e4m3fn), reads=("x",), kept=(),
        arithmetic=(10, 0), passes=("forward",), decode=_dequantized, tolerance=FP8_ERROR,
    ),
    Case(
        "gelu_fp8", "gelu_fp8", _make_gelu, (),
        lambda t, wide: _naive_fp8(_naive_gelu(t, wide), wide),
        lambda t: kernels.bias_gelu(t["x"], t["bias"], out_dtype=torch.float8_e4m3fn), reads=("x",),
        kept=(), arithmetic=(13, 0), passes=("forward",), decode=_dequantized, tolerance=FP8_ERROR,
    ),
    Case(
        "fp8_linear (vs bf16)", "fp8_linear", _make_linear, (),
        lambda t, wide: F.linear(t["x"], t["weight"]),
        lambda t: kernels.fp8_linear(t["x_q"], t["x_scale"], t["weight_q"], t["weight_scale"]),
        reads=("x_q", "weight_q"), kept=(), forward_flops=lambda p: 2.0 * p.tokens * p.dim**2,
        naive_flops=lambda p: 2.0 * p.tokens * p.dim**2, passes=("forward",), tolerance=FP8_ERROR,
    ),
    Case(
        "rollout_attention (vs bf16)", "rollout_attention", _make_rollout, (), _naive_attention,
        lambda t: kernels.rollout_attention(t["q"], t["k"], t["v"], heads=int(t["heads"])),
        reads=("q", "k", "v"), kept=(), forward_flops=_attention_flops,
        naive_flops=_attention_flops, passes=("forward",), tolerance=FP8_ERROR,
    ),
)
# fmt: on
