"""Frozen linear layers in 8 or 4 bits, and the weight layouts of a model.

A quantized matrix takes 1 byte (FP8) or 0.516 bytes (NF4) per weight instead of bfloat16's 2. Each
call dequantizes the matrix, multiplies by it and frees it; the backward computes the gradients of
the input and the bias only. Trainable low-rank adapters (peft) are added on top.

    fp8: e4m3 with one scale per row, W ≈ q · s (:func:`prfl_fast.kernels.quantize_fp8`)
    nf4: 4-bit NormalFloat with one scale per 64 weights; the scales are 8-bit in blocks of 256
        around their mean (double quantization; QLoRA, arXiv 2305.14314; bitsandbytes)
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from prfl_fast.kernels import quantize_fp8
from prfl_fast.memory.host_weights import is_torchao
from prfl_fast.models.experts import check_members
from prfl_fast.models.fp8_linear import Fp8Linear
from prfl_fast.models.registry import find_blocks
from prfl_fast.utils.checks import check, check_choice
from prfl_fast.utils.modules import forget, is_plain_linear, unwrap
from prfl_fast.utils.optional import need

Kind = Literal["fp8", "nf4"]
WeightDtype = Literal["fp32", "bf16", "fp8", "nf4"]
Model = TypeVar("Model", bound=nn.Module)

KINDS = ("fp8", "nf4")
NF4_BLOCK, SCALE_BLOCK = 64, 256
_MAP = 256  # entries of the 8-bit code map, stored as float32 beside the codes of the scales
_ZEROS = 0x77  # two codes of level 0
_ALIGN = 16  # parts start at multiples of this many bytes, for 16-byte loads


class _Layout(NamedTuple):
    """Byte layout of a matrix: codes, then scales, each part aligned to 16 bytes."""

    kind: str
    rows: int
    columns: int

    def codes(self) -> int:
        """Return the bytes of the codes."""
        count = self.rows * self.columns
        return count if self.kind == "fp8" else -(-count // 2)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        if self.kind == "fp8":
            parts = list(quantize_fp8(weight))  # [rows, columns] e4m3, [rows, 1] float32
        else:
            ops, functional = torch.ops.bitsandbytes, need("bitsandbytes.functional", "nf4")
            if weight.dtype == torch.float64:
                weight = weight.float()
            codes, scales = ops.quantize_4bit(weight.contiguous(), NF4_BLOCK, "nf4", torch.uint8)
            # Set the codes of an all-zero block: its scale does not stay exactly zero.
            empty = (scales == 0).repeat_interleave(NF4_BLOCK // 2)[: codes.numel()]
            codes = codes.flatten().masked_fill(empty, _ZEROS)
            table = functional.create_dynamic_map().to(scales.device)
            mean = scales.mean()
            small, blocks = ops.quantize_blockwise(scales - mean, table, SCALE_BLOCK)
            # The second part is float32: the code map, the mean of the scales, and the scales of
            # their blocks. The third has the codes of the scales.
            parts = [codes, torch.cat([table, mean[None], blocks]), small]
        out = []
        for part in parts:
            part = part.flatten().view(torch.uint8)
            out += [part, part.new_zeros(-part.numel() % _ALIGN)]
        return torch.cat(out)

    def unpack(
        self, packed: torch.Tensor, dtype: torch.dtype, *, again: bool = False
    ) -> torch.Tensor:
        """Return the matrix; ``again`` computes it by a different expression."""
        # torch.compile merges equal expressions of forward and backward, and would keep the
        # dequantized matrix in memory from one to the other.
        if self.kind == "nf4":
            return _dequantize_nf4(packed, self.rows, self.columns, dtype, again)
        codes, scales = self.fp8_rows(packed, again=again)
        # Codes are exact in every dtype; the product with a float32 scale rounds once, to dtype.
        return codes.to(dtype).mul_(scales)

    def fp8_rows(
        self, packed: torch.Tensor, *, again: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales of an FP8 matrix as views."""
        size = self.codes()
        start = size + -size % _ALIGN
        scales = (
            packed.view(torch.float32)[start // 4 :]
            if again
            else packed[start:].view(torch.float32)
        )
        codes = packed[:size].view(torch.float8_e4m3fn).view(self.rows, self.columns)
        return codes, scales[: self.rows].unsqueeze(1)


# One operation instead of bitsandbytes' two, so that traces and simulations have fewer steps.
@torch.library.custom_op("prfl_fast::dequantize_nf4", mutates_args=())
def _dequantize_nf4(
    packed: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, again: bool
) -> torch.Tensor:
    layout, ops = _Layout("nf4", rows, columns), torch.ops.bitsandbytes
    size, count = layout.codes(), -(-rows * columns // NF4_BLOCK)
    numbers = _MAP + 1 + -(-count // SCALE_BLOCK)
    sizes = [size, -size % _ALIGN, 4 * numbers, -4 * numbers % _ALIGN, count, -count % _ALIGN]
    codes, _, floats, _, small, _ = packed.split_with_sizes(sizes)
    table, mean, blocks = floats.view(torch.float32).split_with_sizes([_MAP, 1, numbers - _MAP - 1])
    scales = ops.dequantize_blockwise(small, blocks, table, SCALE_BLOCK, torch.float32) + mean
    direct = dtype in (torch.bfloat16, torch.float16, torch.float32)
    wide_dtype = dtype if direct else torch.float32
    # One row of even length: the only shape that bitsandbytes' CPU kernel takes for every matrix.
    wide = ops.dequantize_4bit(codes, scales, NF4_BLOCK, "nf4", [1, 2 * size], wide_dtype)
    if rows * columns % 2:
        wide = wide[0, :-1].clone()
    return wide.view(rows, columns).to(dtype)


@_dequantize_nf4.register_fake
def _(
    packed: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, again: bool
) -> torch.Tensor:
    return packed.new_empty((rows, columns), dtype=dtype)


class _FrozenLinear(torch.autograd.Function):
    """Linear map y = x Wᵀ + b of a packed W; it saves neither x nor the dequantized W."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, layout: _Layout
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.layout = layout
        return F.linear(x, layout.unpack(packed, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = grad @ ctx.layout.unpack(packed, grad.dtype, again=True)
        if ctx.needs_input_grad[2]:
            d_bias = grad.flatten(0, -2).sum(0)
        return d_x, None, d_bias, None


class _NoMatrix:
    """Stand-in for ``weight`` of a quantized layer: peft reads its device and its data."""

    def __init__(self, packed: torch.Tensor, kind: str) -> None:
        self.device, self.dtype, self.kind = packed.device, packed.dtype, kind

    @property
    def data(self) -> torch.Tensor:
        raise ValueError(
            f"the weight is quantized to {self.kind}, expected a plain matrix to merge adapters "
            "into or remove them from. Load the model in bfloat16 with its adapter, merge there, "
            "then call prfl_fast.memory.quantize"
        )


class QuantizedLinear(nn.Linear):
    """Frozen linear layer with a matrix of 8 or 4 bits.

    Input ``[..., in_features]``, output ``[..., out_features]`` in the input's dtype (autocast's,
    if it is on). Forward and backward dequantize the matrix to this dtype.

    Args:
        linear: source of the matrix and the bias; it is not changed, and the bias is shared.
        kind: ``"fp8"`` or ``"nf4"``.
        device: target of the layer, where the matrix is quantized; None is the linear's device.
    """

    def __init__(
        self, linear: nn.Linear, kind: Kind, *, device: torch.device | str | None = None
    ) -> None:
        super(nn.Linear, self).__init__()  # nn.Linear's own would allocate the matrix
        check_choice("kind", kind, KINDS)
        if kind == "nf4":
            need("bitsandbytes", "nf4")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = kind
        self.train(linear.training)
        weight = linear.weight.detach()
        if device is not None:
            weight = weight.to(device)
        packed = self._layout.pack(weight)
        # Codes and scales are one uint8 vector, so that dtype casts of the model skip it.
        self.qweight = nn.Parameter(packed, requires_grad=False)
        bias: nn.Parameter | None = linear.bias
        if bias is not None and device is not None:
            bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.kind == "nf4":  # register the ops in a process that unpickles the layer
            need("bitsandbytes", "nf4")

    @property
    def _layout(self) -> _Layout:
        return _Layout(self.kind, self.out_features, self.in_features)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """Stand-in with the device and dtype of the bytes, for libraries that read them."""
        return _NoMatrix(self.qweight, self.kind)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Return the dequantized matrix ``[out_features, in_features]``."""
        return self._layout.unpack(self.qweight, dtype)

    def fp8_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of codes ``[out_features, in_features]`` and scales ``[out_features, 1]``.

        They are arguments of :func:`prfl_fast.kernels.fp8_linear`. NF4 layers raise ``ValueError``.
        """
        check_choice("the layer's kind", self.kind, ("fp8",))
        return self._layout.fp8_rows(self.qweight.detach())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return _FrozenLinear.apply(input, self.qweight, bias, self._layout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}"


def _linears(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, nn.Linear, str]]:
    """Yield (owner, name, layer, full name) of the linear layers, adapters excepted."""
    children = dict(module.named_children())
    for base in ("base_layer", "original_module"):  # of a peft layer, and of its modules_to_save
        if base in children:
            children = {base: children[base]}
    for name, child in children.items():
        whole = f"{prefix}.{name}"
        if isinstance(child, (QuantizedLinear, Fp8Linear)) or type(child) is nn.Linear:
            yield module, name, child, whole
        else:
            yield from _linears(child, whole)


def _block_linears(model: nn.Module, kind: str) -> list[tuple[nn.Module, str, nn.Linear, str]]:
    """Return the linear layers of every block; raise if one is quantized to another kind."""
    found = [
        entry
        for index, block in enumerate(find_blocks(model).blocks(model))
        for entry in _linears(block, f"blocks.{index}")
    ]
    for _, _, layer, name in found:
        if isinstance(layer, QuantizedLinear):
            hint = "It is already quantized: load the model again"
            check(layer.kind == kind, f"kind of {name}", layer.kind, repr(kind), hint=hint)
    return found


def check_cast(model: nn.Module, kind: WeightDtype) -> None:
    """Raise the errors of :func:`cast_weights`, and change nothing."""
    found = _block_linears(model, kind)
    if kind not in KINDS:
        return
    if kind == "nf4":
        need("bitsandbytes", "nf4")
    for _, _, layer, name in found:
        if not isinstance(layer, QuantizedLinear) and not is_plain_linear(layer):
            raise ValueError(
                f"{name} has hooks, a replaced forward, FP8 products or a quantized weight, "
                "expected a plain nn.Linear. Quantize the model before they are added"
            )


def _quantize_blocks(
    model: nn.Module, kind: Kind, device: torch.device | str | None, *, stay: bool = False
) -> None:
    found = _block_linears(model, kind)
    forget(unwrap(model))
    while found:
        owner, attribute, layer, _ = found.pop()  # a loop would keep the wide matrices alive
        if not isinstance(layer, QuantizedLinear):
            made = QuantizedLinear(layer, kind, device=device)
            setattr(owner, attribute, made.to(layer.weight.device) if stay else made)


def quantize(model: Model, kind: Kind, *, device: torch.device | str | None = None) -> Model:
    """Quantize and freeze the linear layers of the transformer blocks in place; return the model.

    The model may be patched or have adapters. Embeddings, norms, the output head, adapters and
    layers quantized by bitsandbytes do not change. On the ``meta`` device only sizes are computed.
    For a reward model, quantize its ``backbone``.

    Args:
        model: a transformer with an adapter or a ``ModuleList`` of blocks, possibly wrapped.
        kind: ``"fp8"`` (e4m3, one scale per row) or ``"nf4"`` (QLoRA, arXiv 2305.14314; needs
            bitsandbytes).
        device: target of the model, which moves layer by layer, so that the device never holds more
            than one wide matrix; None does not move it.

    Raises:
        TypeError: if the model has neither an adapter nor a ``ModuleList``.
        ValueError: if the kind is unknown, layers have hooks or are quantized to the other kind.
        MissingExtraError: if ``nf4`` needs bitsandbytes and it is not installed.
    """
    check_choice("kind", kind, KINDS)
    for member in check_members(model, partial(check_cast, kind=kind)):
        _quantize_blocks(member, kind, device)
    return model if device is None else model.to(device)


def cast_weights(
    model: Model,
    kind: WeightDtype,
    *,
    device: torch.device | str | None = None,
    stay: bool = False,
) -> Model:
    """Convert a transformer's weights to one of four layouts in place; return the model.

    ``fp32``: every parameter in float32. ``bf16``: the layout that diffusers loads with
    ``torch_dtype=torch.bfloat16``, bfloat16 except for modules that the class keeps in float32.
    ``fp8`` and ``nf4``: ``bf16`` with the linear layers of the blocks quantized from their original
    values (:func:`quantize`). Buffers keep their dtypes.

    ``model`` and ``device`` are as in :func:`quantize`, which raises the same errors. With ``stay``
    the model stays where it is: each layer is quantized on ``device`` and moves back.
    """
    check_choice("kind", kind, ("fp32", "bf16", *KINDS))
    check_cast(model, kind)
    if kind == "fp8" or kind == "nf4":
        _quantize_blocks(model, kind, device, stay=stay)
    for parameter, dtype in _cast_dtypes(model, kind):
        parameter.data = parameter.data.to(dtype)
    return model if device is None or stay else model.to(device)


def _cast_dtypes(model: nn.Module, kind: WeightDtype) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """Yield each parameter that :func:`cast_weights` casts, and its new dtype."""
    base = unwrap(model)
    keep = getattr(base, "_keep_in_fp32_modules", None) or ()
    for name, parameter in base.named_parameters():
        if parameter.is_floating_point() and not is_torchao(parameter):
            wide = kind == "fp32" or any(part in keep for part in name.split("."))
            yield parameter, torch.float32 if wide else torch.bfloat16


def layouts_after(model: nn.Module, kind: WeightDtype) -> list[tuple[Any, ...]]:
    """Return a key for the layout of each tensor after :func:`cast_weights`.

    Tensors with equal keys have equal shapes, strides and dtypes.
    """
    layers = [layer for *_, layer, _ in _block_linears(model, kind)] if kind in KINDS else []
    packed = {
        id(layer.qweight if isinstance(layer, QuantizedLinear) else layer.weight): layer
        for layer in layers
    }
    dtypes = {id(parameter): dtype for parameter, dtype in _cast_dtypes(model, kind)}
    return [
        (kind, packed[id(t)].out_features, packed[id(t)].in_features)
        if id(t) in packed
        else (t.shape, t.stride(), dtypes.get(id(t), t.dtype))
        for t in (*model.parameters(), *model.buffers())
        if t.numel()
    ]
