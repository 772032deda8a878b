"""Find the tensors of a block whose bytes can wait in host memory, those of torchao included.

A weight of torchao is a wrapper around plain tensors (codes, scales), named by
``__tensor_flatten__``; these wait, and the wrapper stays. A weight of bitsandbytes cannot wait: its
backward reads weight and scales from attributes of its node, which saved-tensor hooks do not see.
By then the slot may hold another block, so it would read the weights of that one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prfl_fast.utils.adapters import adapter_parameters
from prfl_fast.utils.checks import check

_ALIGN = 256  # bytes; cuBLAS and MKL may sum in another order for weights of a lower alignment


class WeightPart(NamedTuple):
    """A parameter of a module, or a tensor inside a parameter that is a wrapper.

    ``path`` has the names of attributes from the parameter to the tensor.
    """

    module: nn.Module
    name: str
    path: tuple[str, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.name]  # type: ignore[return-value]

    @property
    def tensor(self) -> torch.Tensor:
        tensor: Any = self.parameter
        for attribute in self.path:
            tensor = getattr(tensor, attribute)
        return tensor

    def point(self, data: torch.Tensor) -> None:
        """Replace the tensor's data."""
        if not self.path:
            self.parameter.data = data
            return
        holder: Any = self.parameter
        for attribute in self.path[:-1]:
            holder = getattr(holder, attribute)
        # .data has a version of its own: a copy into the slot must not look like a change of a
        # tensor that autograd saved.
        setattr(holder, self.path[-1], data.data)

    def move(self, device: torch.device) -> None:
        """Move a wrapper and its tensors, because the wrapper's own device cannot be changed."""
        if self.path and self.parameter.device != device:
            moved = nn.Parameter(self.parameter.to(device), requires_grad=False)
            self.module._parameters[self.name] = moved

    @property
    def aligned_bytes(self) -> int:
        """Return the bytes of the tensor's layout, rounded up to align the next tensor."""
        tensor = self.tensor
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        size = (1 + sum((n - 1) * stride for n, stride in pairs)) * tensor.itemsize
        return size + -size % _ALIGN


def weight_parts(block: nn.Module) -> list[WeightPart]:
    """Return all tensors of a block that can wait in host memory; adapters stay on the device."""
    adapters = {id(p) for _, p in adapter_parameters(block)}
    found: dict[int, list[WeightPart]] = {}
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in adapters and parameter.numel():
                found.setdefault(id(parameter), list(_parts(parameter, module, name, ())))
    return [part for parts in found.values() for part in parts]


def _parts(
    tensor: Any, module: nn.Module, name: str, path: tuple[str, ...]
) -> Iterator[WeightPart]:
    if not is_torchao(tensor):
        yield WeightPart(module, name, path)
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, attribute), module, name, (*path, attribute))


def is_torchao(tensor: Any) -> bool:
    """Return True for a wrapper of torchao."""
    named = type(tensor).__module__.partition(".")[0] == "torchao"
    return named and is_traceable_wrapper_subclass(tensor)


def check_can_wait(block: nn.Module) -> None:
    """Raise ``ValueError`` if a weight of a block cannot wait in host memory."""
    for module, name, path in weight_parts(block):
        parameter: Any = module._parameters[name]
        kind = type(parameter)
        ok = kind in (nn.Parameter, FakeTensor) or (path and not parameter.requires_grad)
        expected = "a plain parameter or a frozen weight of torchao, to wait in host memory"
        hint = "weight_dtype: fp8 and nf4 can wait in 8 and 4 bits"
        subject = f"{name} of a {type(module).__name__}"
        check(bool(ok), subject, kind.__qualname__, expected, hint=hint)
