"""Linear layers of a rollout's blocks: as they are, with LoRA merged into them, or in FP8.

    merged:  W' = W + Σ_a s_a B_a A_a, formed in float32 when the block runs, rounded once, dropped
    fp8:     y = fp8_linear(quantised x, quantise_fp8(W')), of weights as they are at that moment

Nothing that is stored changes, so there is nothing to take back.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prfl_fast.kernels import fp8_linear, quantise_fp8
from prfl_fast.kernels.fp8_linear import refusal
from prfl_fast.modules import _is_plain_linear

HALF = (torch.bfloat16, torch.float16)


def add_note(notes: list[str], reason: str) -> None:
    """Add a reason that is not yet there."""
    if reason not in notes:
        notes.append(reason)


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype that operations of 8 bits return in place of ``dtype``."""
    return dtype if dtype in HALF else torch.bfloat16


# Layers as a rollout runs them: a module with a forward of its own, or one of these.
class Dense:
    """``x Wᵀ + b`` with W ``[N, K]`` and b ``[N]`` as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x Wᵀ``."""
        return F.linear(x, self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Fp8Dense:
    """``x Wᵀ + b`` by FP8 products, in ``dtype``; x may come quantised, as ``(x_q, x_scale)``."""

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

    def product(self, x: Any) -> torch.Tensor:
        """``x Wᵀ``."""
        return self._run(x, None)

    def __call__(self, x: Any) -> torch.Tensor:
        return self._run(x, self.bias)

    def _run(self, x: Any, bias: torch.Tensor | None) -> torch.Tensor:
        x_q, x_scale = x if isinstance(x, tuple) else quantise_fp8(x)
        return fp8_linear(x_q, x_scale, self.codes, self.scale, bias, self.half).to(self.dtype)


Layer = Any  # nn.Module | Dense | Fp8Dense


class AttentionParts:
    """What :func:`prfl_fast.modules.self_attention` and ``cross_attention`` read, for a rollout."""

    def __init__(self, attn: Any, names: Sequence[str], layer: Callable[[nn.Module], Layer]):
        self.heads, self.norm_q, self.norm_k = attn.heads, attn.norm_q, attn.norm_k
        self.fused_projections = "to_qkv" in names
        for name in names:
            setattr(self, name, layer(getattr(attn, name)))
        outs = attn.to_out if isinstance(attn.to_out, nn.ModuleList) else (attn.to_out,)
        # Dropout that is at work is refused beforehand, and what is not returns its input.
        self.to_out = tuple(layer(out) for out in outs if not isinstance(out, _DropoutNd))


class Matrix(NamedTuple):
    """A layer as one matrix: a base, and what adapters ``(A, B, scaling)`` add to it."""

    base: Any
    adapters: list[tuple[nn.Linear, nn.Linear, float]]

    def wide(self) -> torch.Tensor:
        """W' in float32 (float64 for float64), a tensor of its own."""
        if isinstance(self.base.weight, torch.Tensor):
            weight = self.base.weight.detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        else:
            weight = self.base.dequantise(torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            for a, b, scaling in self.adapters:
                weight.addmm_(b.weight.to(weight.dtype), a.weight.to(weight.dtype), alpha=scaling)
        return weight

    def bias(self) -> torch.Tensor | None:
        """Bias of the base and of adapters that have one."""
        bias = self.base.bias
        for _, b, scaling in self.adapters:
            if b.bias is not None:
                bias = scaling * b.bias if bias is None else bias + scaling * b.bias
        return bias


def _has_matrix(layer: nn.Module) -> bool:
    if _is_plain_linear(layer):  # torchao's quantised weights lie in linear layers too
        return not is_traceable_wrapper_subclass(layer.weight)
    return hasattr(layer, "dequantise")  # prfl_fast.quantised.QuantisedLinear


def as_matrix(layer: nn.Module) -> Matrix | str:
    """The layer as one matrix, or why it is none."""
    if _has_matrix(layer):
        return Matrix(layer, [])
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if kind != "peft.tuners.lora.layer.Linear":
        return f"a {kind} is neither a linear layer with a plain matrix nor one with LoRA"
    lora: Any = layer
    base = lora.base_layer
    if not _has_matrix(base):
        return f"LoRA is on a {type(base).__qualname__} whose matrix is not to be had"
    if lora.merged:
        return "peft has merged its adapters" if lora.disable_adapters else Matrix(base, [])
    names = [n for n in lora.active_adapters if n in lora.lora_A and not lora.disable_adapters]
    adapters = []
    for name in names:
        a, b = lora.lora_A[name], lora.lora_B[name]
        # peft before 0.16 knows no variants, and DoRA by a flag.
        variant = getattr(lora, "lora_variant", {}).get(name) or lora.use_dora.get(name)
        if variant or lora.fan_in_fan_out:
            return f"adapter {name!r} is more than B·A: {type(variant).__name__}"
        if not (_is_plain_linear(a) and _is_plain_linear(b)):
            return f"the matrices of adapter {name!r} are not plain linear layers"
        adapters.append((a, b, float(lora.scaling[name])))
    return Matrix(base, adapters)


class Layers:
    """Turns a model's linear layers into those of a rollout.

    Args:
        merge: merge LoRA; FP8 layers do in any case.
        notes: gets the reasons why layers stay as they are.
    """

    def __init__(self, merge: bool, notes: list[str]) -> None:
        self._merge, self._notes = merge, notes

    def __call__(self, layer: nn.Module, dtype: torch.dtype, fp8: bool) -> Layer:
        """The layer as this rollout runs it; ``dtype``: of what it returns."""
        matrix = as_matrix(layer)
        if isinstance(matrix, str):
            if fp8 or self._merge:
                add_note(self._notes, f"{'exact' if fp8 else 'unmerged'} layers: {matrix}")
            return layer
        if fp8:
            made = self._fp8(matrix, dtype)
            if made is not None:
                return made
        return self._exact(layer, matrix, dtype)

    def _exact(self, layer: nn.Module, matrix: Matrix, dtype: torch.dtype) -> Layer:
        base = matrix.base
        if not matrix.adapters:
            return Dense(base.weight, base.bias) if _is_plain_linear(base) else base
        if not self._merge:
            return layer
        if isinstance(base.weight, torch.Tensor):
            dtype = base.weight.dtype
        bias = matrix.bias()
        return Dense(matrix.wide().to(dtype), None if bias is None else bias.to(dtype))

    def _fp8(self, matrix: Matrix, dtype: torch.dtype) -> Fp8Dense | None:
        rows, columns = matrix.base.out_features, matrix.base.in_features
        if rows % 16 or columns % 16:
            add_note(self._notes, f"exact layers: {rows} × {columns} is not in multiples of 16")
            return None
        device = matrix.base.weight.device
        if device.type == "cuda" and refusal(device):
            add_note(
                self._notes,
                f"FP8 products are emulated in bfloat16, which is slow: {refusal(device)}",
            )
        base = matrix.base
        if not matrix.adapters and isinstance(base.weight, torch.Tensor):
            codes, scale = quantise_fp8(base.weight.detach())
        elif not matrix.adapters and base.kind == "fp8":
            codes, scale = base.fp8_rows()
        else:
            codes, scale = quantise_fp8(matrix.wide())
        return Fp8Dense(codes, scale, matrix.bias(), dtype)
