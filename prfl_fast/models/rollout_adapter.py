"""Adapters that a rollout adds to the weights of a Wan model, such as distilled few-step LoRAs.

    W' = W + scale · (alpha / rank · up · down + diff),   b' = b + scale · diff_b

Stored weights do not change. W' is computed in float32 when a module runs, rounded once to the
dtype of W, and freed after it. Adapters that train stay on top of W'.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.models.wan_weights import rename
from prfl_fast.utils.checks import check
from prfl_fast.utils.sharded import is_dtensor

# Parts of names that wrappers of blocks add: FSDP, torch's checkpointing and torch.compile.
_WRAPPER = re.compile(r"\.(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)(?=\.|$)")


class Change(NamedTuple):
    """Change of the parameters of one module: a LoRA, and differences by parameter."""

    lora: LoraLayer | None
    differences: Mapping[str, torch.Tensor]

    def parts(self) -> list[str]:
        """Return the names of the parameters that change."""
        names = [] if self.lora is None else ["weight"]
        if self.lora is not None and self.lora.bias is not None:
            names.append("bias")
        return [*names, *(name for name in self.differences if name not in names)]

    def shape(self, part: str) -> torch.Size:
        """Return the shape of a parameter that changes."""
        if part in self.differences:
            return self.differences[part].shape
        assert self.lora is not None
        if part == "bias":
            assert self.lora.bias is not None
            return self.lora.bias.shape
        return torch.Size([len(self.lora.up), *self.lora.down.shape[1:]])

    def to(self, device: torch.device) -> "Change":
        """Return the change with its tensors on a device."""
        tensors = {name: tensor.to(device) for name, tensor in self.differences.items()}
        if self.lora is None:
            return Change(None, tensors)
        moved = {k: v.to(device) for k, v in self.lora._asdict().items() if hasattr(v, "to")}
        return Change(self.lora._replace(**moved), tensors)

    def apply(self, part: str, tensor: torch.Tensor, scale: float) -> torch.Tensor:
        """Return a changed parameter in float32 (float64 for float64)."""
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        # Autocast would round the product of up and down to bfloat16.
        with torch.autocast(tensor.device.type, enabled=False):
            if self.lora is not None and part in ("weight", "bias"):
                wide = self.lora._replace(alpha=scale * self.lora.alpha).merge(part, wide)
            if part in self.differences:
                wide = wide + scale * self.differences[part].to(wide.dtype)
        return wide


class AdapterFile(NamedTuple):
    """Hold the changes of an adapter by diffusers' name of the module, in host memory."""

    path: Path
    scale: float
    changes: Mapping[str, Change]


class _Target(NamedTuple):
    """A module that changes: its parent and its name there, and the module itself."""

    parent: nn.Module
    child: str
    module: Any
    change: Change


class RolloutAdapter:
    """Change the weights of a bare Wan model's modules while they run.

    Args:
        file: the changes; they stay where they are, until :meth:`to`.
        model: diffusers' or official Wan.
        blocks: its transformer blocks.

    Raises:
        ValueError: if the model lacks a module or parameter that changes, or it has another shape.
    """

    def __init__(self, file: AdapterFile, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._scale = file.scale
        self._names = {module: _WRAPPER.sub("", name) for name, module in model.named_modules()}
        modules = {name: module for module, name in self._names.items()}  # the inner ones, last
        self._targets: dict[str, _Target] = {}
        label, lost = f"rollout adapter {file.path}", []
        for ours, change in file.changes.items():
            name = ours if ours in modules else _official(ours)
            if name in modules and name:
                name, target = _target(modules, name, change)
                self._targets[name] = target
            else:
                lost += [f"{ours}.{part}" for part in change.parts()]
        check(not lost, f"{label}: {len(lost)} parameters, {lost[:3]}", "missing", "in the model")
        for name, target in self._targets.items():
            _check_target(f"{label}: {name}", target)
        self._inside = {module for block in blocks for module in block.modules()}

    def to(self, device: torch.device) -> "RolloutAdapter":
        """Move the changes to a device, in place."""
        moved = {k: t._replace(change=t.change.to(device)) for k, t in self._targets.items()}
        self._targets = moved
        return self

    def outside(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Return the modules outside the blocks, with forwards that change their weights."""
        targets = [t for t in self._targets.values() if t.module not in self._inside]
        return [(t.module, self._runs(t, t.module.forward)) for t in targets]

    def _runs(self, target: _Target, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            with self.within(target.module, x.dtype):
                module: Any = target.parent._modules[target.child]
                call = forward if module is target.module else module  # of a quantized layer
                return call(x, *args, **kwargs)

        return run

    @contextlib.contextmanager
    def within(self, part: nn.Module, dtype: torch.dtype) -> Iterator[None]:
        """Change the weights of a module and of those in it within the context.

        ``dtype`` is that of the stand-ins of quantized layers.
        """
        if not self._targets:
            yield
            return
        name = self._names[part]
        targets = [t for key, t in self._targets.items() if f"{key}.".startswith(f"{name}.")]
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for target in targets:
                for slots, key, value in self._changed(target, dtype):
                    before.append((slots, key, slots[key]))
                    slots[key] = value
            yield
        finally:
            for slots, key, value in reversed(before):
                slots[key] = value

    def _changed(
        self, target: _Target, dtype: torch.dtype
    ) -> Iterator[tuple[dict[str, Any], str, Any]]:
        module, change, scale = target.module, target.change, self._scale
        if not hasattr(module, "dequantize"):
            for part in change.parts():
                tensor = module._parameters[part]
                value = change.apply(part, tensor, scale).to(tensor.dtype)
                yield module._parameters, part, nn.Parameter(value, requires_grad=False)
            return
        weight, bias = module.dequantize(torch.float32), module.bias
        if "weight" in change.parts():
            weight = change.apply("weight", weight, scale)
        if "bias" in change.parts():
            bias = change.apply("bias", bias, scale).to(bias.dtype)
        linear = nn.Linear(module.in_features, module.out_features, bias is not None, "meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        yield target.parent._modules, target.child, linear


def _official(name: str) -> str:
    """Return the name of a module in official Wan's layout."""
    return rename(f"{name}.weight", to_reference=True).removesuffix(".weight")


def _target(modules: Mapping[str, nn.Module], name: str, change: Change) -> tuple[str, _Target]:
    """Return the module that changes, inside of adapters that train, and its name."""
    while "base_layer" in modules[name]._modules:
        name += ".base_layer"
    module = modules[name]
    table = change.differences.get("scale_shift_table")
    if table is not None and "modulation" in module._parameters:  # of official Wan
        change = change._replace(differences={"modulation": table})
    parent, _, child = name.rpartition(".")
    return name, _Target(modules[parent], child, module, change)


def _check_target(label: str, target: _Target) -> None:
    module, change = target.module, target.change
    fused = getattr(target.parent, "fused_projections", False)
    hint = "Call unfuse_qkv_projections()"
    check(not fused, label, "in a fused projection", "a layer of its own", hint=hint)
    for part in change.parts():
        if part == "weight" and hasattr(module, "dequantize"):
            shape: Any = torch.Size([module.out_features, module.in_features])
        else:
            tensor = module._parameters.get(part)
            ok = tensor is not None and tensor.is_floating_point()
            ok = ok and (is_dtensor(tensor) or not hasattr(tensor, "__tensor_flatten__"))
            found = "missing" if tensor is None else type(tensor).__name__
            expected = "a floating-point parameter or a layer of prfl_fast.memory.quantize"
            check(ok, f"{label}.{part} of the model", found, expected)
            assert tensor is not None
            shape = tensor.shape
        given = list(change.shape(part))
        check(given == list(shape), f"{label}.{part}", given, f"{list(shape)}, as in the model")


class SharedAdapter:
    """Open an adapter once for all calls of a rollout; its tensors stay on the device."""

    def __init__(self, file: AdapterFile) -> None:
        self._file = file
        self._opened: RolloutAdapter | None = None

    def open(
        self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device
    ) -> RolloutAdapter:
        """Return the adapter of a bare Wan model, see :class:`RolloutAdapter`."""
        if self._opened is None:
            self._opened = RolloutAdapter(self._file, model, blocks).to(device)
        return self._opened


# A module needs no changes: contexts and lists are empty.
NO_ADAPTER = RolloutAdapter(AdapterFile(Path(), 1.0, {}), nn.Module(), ())
