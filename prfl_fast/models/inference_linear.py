"""Linear layers of a rollout's blocks: unchanged, with LoRA merged, or in FP8.

    merged:  W' = W + Σ_a s_a B_a A_a, computed in float32 when the block runs, rounded once
    fp8:     y = fp8_linear(quantized x, quantize_fp8(W')), with W' computed when the block runs

Stored weights do not change. W' is freed after the block.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from prfl_fast.kernels import fp8_linear, quantize_fp8
from prfl_fast.kernels.linear.fp8 import unsupported_reason
from prfl_fast.models.fp8_linear import Fp8Linear
from prfl_fast.utils.modules import is_plain_linear


def add_note(notes: list[str], reason: str) -> None:
    """Append ``reason`` unless it is there already."""
    if reason not in notes:
        notes.append(reason)


def half_of(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype`` if it has 16 bits, else bfloat16, because 8-bit kernels return 16 bits."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


class Dense:
    """Compute ``x Wᵀ + b`` with W ``[N, K]`` and b ``[N]``."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x Wᵀ``."""
        return F.linear(x, self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Fp8Dense:
    """Compute ``x Wᵀ + b`` with FP8 products, as ``dtype``; x may be a pair ``(x_q, x_scale)``."""

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.codes, self.scale, self.dtype = codes, scale, dtype
        self.half = half_of(dtype)
        self.bias = None if bias is None else bias.to(self.half).contiguous()

    def product(self, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x Wᵀ + bias``."""
        x_q, x_scale = x if isinstance(x, tuple) else quantize_fp8(x)
        return fp8_linear(x_q, x_scale, self.codes, self.scale, bias, self.half).to(self.dtype)

    def __call__(self, x: Any) -> torch.Tensor:
        return self.product(x, self.bias)


Layer = Any  # nn.Module | Dense | Fp8Dense


class AttentionParts:
    """Hold the parts of an attention module; linear layers are those of a rollout."""

    def __init__(self, attn: Any, names: Sequence[str], layer: Callable[[nn.Module], Layer]):
        self.heads, self.norm_q, self.norm_k = attn.heads, attn.norm_q, attn.norm_k
        self.fused_projections = "to_qkv" in names
        for name in names:
            setattr(self, name, layer(getattr(attn, name)))
        outs = attn.to_out if isinstance(attn.to_out, nn.ModuleList) else (attn.to_out,)
        # check_rollout rejects active dropout; inactive dropout returns its input.
        self.to_out = tuple(layer(out) for out in outs if not isinstance(out, _DropoutNd))


class Matrix(NamedTuple):
    """Describe a layer as one matrix: a base layer plus adapters ``(A, B, scaling)``."""

    base: Any
    adapters: list[tuple[nn.Linear, nn.Linear, float]]

    def wide(self) -> torch.Tensor:
        """Return W' as a new tensor, float32 (float64 for float64 weights)."""
        if isinstance(self.base.weight, torch.Tensor):
            weight = self.base.weight.detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        else:
            weight = self.base.dequantize(torch.float32)
        # Autocast would round the product B·A to bfloat16 before it is added.
        with torch.autocast(weight.device.type, enabled=False):
            for a, b, scaling in self.adapters:
                weight.addmm_(b.weight.to(weight.dtype), a.weight.to(weight.dtype), alpha=scaling)
        return weight

    def bias(self) -> torch.Tensor | None:
        """Return the bias of the base plus those of the adapters that have one."""
        bias = self.base.bias
        for _, b, scaling in self.adapters:
            if b.bias is not None:
                bias = scaling * b.bias if bias is None else bias + scaling * b.bias
        return bias


def _has_matrix(layer: nn.Module) -> bool:
    # A layer of prfl_fast.memory.quantized has the method. FP8 products of training do not count.
    return is_plain_linear(layer) or isinstance(layer, Fp8Linear) or hasattr(layer, "dequantize")


def as_matrix(layer: nn.Module) -> Matrix | str:
    """Return the layer as one matrix, or the reason why it is not one."""
    if _has_matrix(layer):
        return Matrix(layer, [])
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if kind != "peft.tuners.lora.layer.Linear":
        return f"{kind} is neither a plain linear layer nor one with LoRA"
    lora: Any = layer
    base = lora.base_layer
    if not _has_matrix(base):
        return f"Cannot merge LoRA: base layer {type(base).__qualname__} exposes no dense weight"
    if lora.merged:
        return "peft has merged disabled adapters" if lora.disable_adapters else Matrix(base, [])
    names = [n for n in lora.active_adapters if n in lora.lora_A and not lora.disable_adapters]
    adapters = []
    for name in names:
        a, b = lora.lora_A[name], lora.lora_B[name]
        # peft before 0.16 has no variants and marks DoRA by a flag.
        variant = getattr(lora, "lora_variant", {}).get(name) or lora.use_dora.get(name)
        if variant or lora.fan_in_fan_out:
            return f"adapter {name!r} is not only B·A: {type(variant).__name__}"
        if not (is_plain_linear(a) and is_plain_linear(b)):
            return f"the matrices of adapter {name!r} are not plain linear layers"
        adapters.append((a, b, float(lora.scaling[name])))
    return Matrix(base, adapters)


class Layers:
    """Convert a model's linear layers to those of a rollout.

    ``merge_lora`` applies to exact layers; FP8 layers always merge LoRA. ``notes`` receives the
    reasons why layers stay unchanged.
    """

    def __init__(self, merge_lora: bool, notes: list[str]) -> None:
        self._merge_lora, self._notes = merge_lora, notes

    def __call__(self, layer: nn.Module, dtype: torch.dtype, fp8: bool) -> Layer:
        """Return the layer in the form that this rollout runs, with outputs of ``dtype``."""
        matrix = as_matrix(layer)
        if isinstance(matrix, str):
            if fp8 or self._merge_lora:
                add_note(self._notes, f"{'exact' if fp8 else 'unmerged'} layers: {matrix}")
            return layer
        made = self._fp8(matrix, dtype) if fp8 else None
        return self._exact(layer, matrix, dtype) if made is None else made

    def _exact(self, layer: nn.Module, matrix: Matrix, dtype: torch.dtype) -> Layer:
        base = matrix.base
        if not matrix.adapters:
            plain = isinstance(base.weight, torch.Tensor)
            return Dense(base.weight, base.bias) if plain else base
        if not self._merge_lora:
            return layer
        if isinstance(base.weight, torch.Tensor):
            dtype = base.weight.dtype
        bias = matrix.bias()
        return Dense(matrix.wide().to(dtype), None if bias is None else bias.to(dtype))

    def _fp8(self, matrix: Matrix, dtype: torch.dtype) -> Fp8Dense | None:
        base = matrix.base
        rows, columns, device = base.out_features, base.in_features, base.weight.device
        if rows % 16 or columns % 16:  # torch._scaled_mm refuses such sizes
            add_note(self._notes, f"exact layers: {rows} × {columns} is not in multiples of 16")
            return None
        reason = unsupported_reason(device) if device.type == "cuda" else None
        if reason:
            add_note(self._notes, f"FP8 products run in bfloat16, which is slow: {reason}")
        if not matrix.adapters and isinstance(base.weight, torch.Tensor):
            codes, scale = quantize_fp8(base.weight.detach())
        elif not matrix.adapters and base.kind == "fp8":
            codes, scale = base.fp8_rows()
        else:
            codes, scale = quantize_fp8(matrix.wide())
        return Fp8Dense(codes, scale, matrix.bias(), dtype)
