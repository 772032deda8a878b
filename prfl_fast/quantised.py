"""Frozen linear layers in 8 or 4 bits, and the layouts a model's weights are held in.

A quantised matrix costs 1 byte (FP8) or 0.516 bytes (NF4) a weight instead of bfloat16's 2. It is
widened for each product and dropped again, so what a layer computes is an ordinary product with
the widened matrix; its backward gives the gradient of the input and nothing else. Trainable
low-rank adapters (peft) go on top.

    fp8: e4m3 with one scale a row, W ≈ q · s (:func:`prfl_fast.kernels.quantise_fp8`)
    nf4: 4-bit NormalFloat with one scale for 64 weights, the scales themselves in 8 bits, in blocks
        of 256 about their mean (double quantisation; QLoRA, arXiv 2305.14314; bitsandbytes)
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from prfl_fast._extras import need
from prfl_fast.adapters import find_adapter
from prfl_fast.adapters._unwrap import unwrap
from prfl_fast.kernels import quantise_fp8
from prfl_fast.modules import _is_plain_linear

Kind = Literal["fp8", "nf4"]
Model = TypeVar("Model", bound=nn.Module)

KINDS = ("fp8", "nf4")
NF4_BLOCK, SCALE_BLOCK = 64, 256
# Of the map of 8-bit codes; its float32 values lie beside the codes of the scales.
_MAP = 256
_ZEROS = 0x77  # two codes of the level 0
# Parts start at multiples of this, for 16-byte loads.
_ALIGN = 16


class _Layout(NamedTuple):
    """How a matrix lies in its bytes: codes, then its scales, each part from a multiple of 16.

    fp8: float32 scales. nf4: float32 map, mean of the scales, and their blocks' scales; then the
    codes of the scales.
    """

    kind: str
    rows: int
    columns: int

    def codes(self) -> int:
        """Bytes of the codes."""
        count = self.rows * self.columns
        return count if self.kind == "fp8" else -(-count // 2)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        if self.kind == "fp8":
            parts = list(quantise_fp8(weight))
        else:
            ops, functional = torch.ops.bitsandbytes, need("bitsandbytes.functional", "nf4")
            if weight.dtype == torch.float64:
                weight = weight.float()
            codes, scales = ops.quantize_4bit(weight.contiguous(), NF4_BLOCK, "nf4", torch.uint8)
            # A block of zeros has no codes of its own, and its scale does not stay zero.
            empty = (scales == 0).repeat_interleave(NF4_BLOCK // 2)[: codes.numel()]
            codes = codes.flatten().masked_fill(empty, _ZEROS)
            table = functional.create_dynamic_map().to(scales.device)
            mean = scales.mean()
            small, blocks = ops.quantize_blockwise(scales - mean, table, SCALE_BLOCK)
            parts = [codes, torch.cat([table, mean[None], blocks]), small]
        out = []
        for part in parts:
            part = part.flatten().view(torch.uint8)
            out += [part, part.new_zeros(-part.numel() % _ALIGN)]
        return torch.cat(out)

    def unpack(
        self, packed: torch.Tensor, dtype: torch.dtype, *, again: bool = False
    ) -> torch.Tensor:
        """The matrix; ``again`` says so in another way.

        torch.compile makes equal expressions in forward and backward one, and then keeps the wide
        matrix from forward to backward.
        """
        if self.kind == "nf4":
            return _dequantise_nf4(packed, self.rows, self.columns, dtype, again)
        codes, scales = self.fp8_rows(packed, again=again)
        # The product with a float32 scale is rounded once, to dtype.
        return codes.to(dtype).mul_(scales)

    def fp8_rows(
        self, packed: torch.Tensor, *, again: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of an FP8 matrix, views."""
        size = self.codes()
        start = size + -size % _ALIGN
        scales = (
            packed.view(torch.float32)[start // 4 :]
            if again
            else packed[start:].view(torch.float32)
        )
        codes = packed[:size].view(torch.float8_e4m3fn).view(self.rows, self.columns)
        return codes, scales[: self.rows].unsqueeze(1)


# One operation of bitsandbytes' two: fewer steps for whoever traces or simulates the model.
@torch.library.custom_op("prfl_fast::dequantise_nf4", mutates_args=())
def _dequantise_nf4(
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
    # One row of an even length: bitsandbytes' CPU kernel takes no other for every matrix.
    wide = ops.dequantize_4bit(codes, scales, NF4_BLOCK, "nf4", [1, 2 * size], wide_dtype)
    if rows * columns % 2:
        wide = wide[0, :-1].clone()
    return wide.view(rows, columns).to(dtype)


@_dequantise_nf4.register_fake
def _(
    packed: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, again: bool
) -> torch.Tensor:
    return packed.new_empty((rows, columns), dtype=dtype)


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b from the packed W; keeps neither x nor the widened W."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        layout: _Layout,
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
    """``weight`` of a quantised layer: peft asks where it lies and, to merge, for its data."""

    def __init__(self, packed: torch.Tensor, kind: str) -> None:
        self.device, self.dtype, self.kind = packed.device, packed.dtype, kind

    @property
    def data(self) -> torch.Tensor:
        raise ValueError(
            f"the weight is quantised to {self.kind}, expected a plain matrix: adapters cannot be "
            "merged into it or taken out of it; load the model in bfloat16 and its adapter, merge "
            "there, then call prfl_fast.quantise"
        )


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose matrix is held in 8 or 4 bits.

    Input ``[..., in_features]``, output ``[..., out_features]`` in the input's dtype (autocast's,
    where that is on). The matrix is widened to that dtype in every call, forward and backward, and
    the layer saves nothing for the backward but a reference to its parameter.

    The parameter ``qweight`` is one uint8 vector: codes, then scales. As bytes, it moves
    between devices and through state dicts like any parameter, and no cast of the model reaches it.

    Args:
        linear: gives the matrix and the bias; it is left as it is, and the bias is shared.
        kind: ``"fp8"`` or ``"nf4"``.
        device: where the layer goes; the matrix is quantised there. The linear's unless given.

    Raises:
        ValueError: another kind.
        MissingExtra: ``nf4`` needs bitsandbytes.
    """

    def __init__(
        self, linear: nn.Linear, kind: Kind, *, device: torch.device | str | None = None
    ) -> None:
        super(nn.Linear, self).__init__()  # nn.Linear's own would allocate the matrix
        _check_kind(kind, KINDS)
        if kind == "nf4":
            need("bitsandbytes", "nf4")
        self.in_features, self.out_features, self.kind = (
            linear.in_features,
            linear.out_features,
            kind,
        )
        self.train(linear.training)
        weight = linear.weight.detach()
        if device is not None:
            weight = weight.to(device)
        packed = self._layout.pack(weight)
        self.qweight = nn.Parameter(packed, requires_grad=False)
        bias: nn.Parameter | None = linear.bias
        if bias is not None and device is not None:
            bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.kind == "nf4":  # a process that unpickles the layer has not registered the ops yet
            need("bitsandbytes", "nf4")

    @property
    def _layout(self) -> _Layout:
        return _Layout(self.kind, self.out_features, self.in_features)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """Device and dtype of the bytes, for libraries that look; there is no matrix."""
        return _NoMatrix(self.qweight, self.kind)

    def dequantise(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The matrix ``[out_features, in_features]`` that the layer multiplies by, widened."""
        return self._layout.unpack(self.qweight, dtype)

    def fp8_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes ``[out_features, in_features]`` and scales ``[out_features, 1]`` as
        :func:`prfl_fast.kernels.fp8_linear` takes them, views.

        Raises:
            ValueError: the layer is of another kind.
        """
        if self.kind != "fp8":
            raise ValueError(f"the layer's kind is {self.kind!r}, expected 'fp8'")
        return self._layout.fp8_rows(self.qweight.detach())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return _FrozenLinear.apply(input, self.qweight, bias, self._layout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}"


def _check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(kinds)}")


def _linears(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, nn.Linear, str]]:
    """(owner, name, layer, whole name) of the linear layers, those of adapters left out."""
    children = dict(module.named_children())
    for base in ("base_layer", "original_module"):  # of a peft layer, and of its modules_to_save
        if base in children:
            children = {base: children[base]}
    for name, child in children.items():
        whole = f"{prefix}.{name}"
        if isinstance(child, QuantisedLinear) or type(child) is nn.Linear:
            yield module, name, child, whole
        else:
            yield from _linears(child, whole)


def _block_linears(model: nn.Module, kind: str) -> list[tuple[nn.Module, str, nn.Linear, str]]:
    """Those of every block; a ``ValueError`` if one is quantised to something but ``kind``."""
    found = [
        entry
        for index, block in enumerate(find_adapter(model).blocks(model))
        for entry in _linears(block, f"blocks.{index}")
    ]
    for _, _, layer, name in found:
        if isinstance(layer, QuantisedLinear) and layer.kind != kind:
            raise ValueError(
                f"kind is {kind!r}, but {name} is already quantised to {layer.kind}, expected a "
                "model that is not: load it again"
            )
    return found


def _quantise_blocks(model: nn.Module, kind: Kind, device: torch.device | str | None) -> None:
    found = _block_linears(model, kind)
    for _, _, layer, name in found:
        if not isinstance(layer, QuantisedLinear) and not _is_plain_linear(layer):
            raise ValueError(
                f"{name} has hooks or a forward of its own, expected a plain nn.Linear: quantise "
                "the model before they are added"
            )
    while found:
        owner, attribute, layer, _ = found.pop()  # the list must not keep wide matrices alive
        if not isinstance(layer, QuantisedLinear):
            setattr(owner, attribute, QuantisedLinear(layer, kind, device=device))


def quantise(model: Model, kind: Kind, *, device: torch.device | str | None = None) -> Model:
    """Hold the linear layers of the transformer blocks in FP8 or 4 bits, frozen, in place.

    Works before and after :func:`prfl_fast.patch` and before and after adapters are added (their
    own layers stay as they are). Embeddings, norms and the output head are not quantised. Layers
    that bitsandbytes has already quantised are left alone. On the ``meta`` device only sizes are
    computed. Of a reward model, quantise its ``backbone``.

    Args:
        model: a supported transformer, possibly wrapped.
        kind: ``"fp8"`` or ``"nf4"`` (needs bitsandbytes).
        device: where the model goes, layer by layer: the wide matrices never lie there together.
            Where it is unless given.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: the model is not supported.
        ValueError: another kind, layers already quantised to the other kind, or a layer with hooks.
        MissingExtra: ``nf4`` needs bitsandbytes.
    """
    _check_kind(kind, KINDS)
    _quantise_blocks(model, kind, device)
    return model if device is None else model.to(device)


def cast_weights(
    model: Model,
    kind: Literal["fp32", "bf16", "fp8", "nf4"],
    *,
    device: torch.device | str | None = None,
) -> Model:
    """Hold a transformer's weights in one of four layouts, in place.

    ``fp32``: every parameter in float32. ``bf16``: the layout diffusers loads
    (``torch_dtype=torch.bfloat16``): bfloat16 but for the modules the class keeps in float32.
    ``fp8`` and ``nf4``: ``bf16``, with the linear layers of the blocks quantised, from the values
    they came with (:func:`quantise`). Buffers keep their dtypes.

    Args:
        model: a supported transformer, possibly wrapped; of a reward model, its ``backbone``.
        device: where the model goes, in its new layout; see :func:`quantise`. Where it is
            unless given.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: the model is not supported.
        ValueError: another kind, or the blocks are already quantised to something else.
        MissingExtra: ``nf4`` needs bitsandbytes.
    """
    _check_kind(kind, ("fp32", "bf16", *KINDS))
    _block_linears(model, kind)
    if kind == "fp8" or kind == "nf4":
        _quantise_blocks(model, kind, device)
    base = unwrap(model)
    keep = getattr(base, "_keep_in_fp32_modules", None) or ()
    for name, parameter in base.named_parameters():
        if parameter.is_floating_point():
            wide = kind == "fp32" or any(part in keep for part in name.split("."))
            dtype = torch.float32 if wide else torch.bfloat16
            parameter.data = parameter.data.to(dtype)
    return model if device is None else model.to(device)
