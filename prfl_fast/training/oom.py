"""Report the part of a step that ran out of memory, and the bytes on the device by category."""

import contextlib
import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from prfl_fast.memory.offload import HostMemoryError
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.utils.allocator_settings import EXPANDABLE, expandable_segments
from prfl_fast.utils.modules import device_of
from prfl_fast.utils.sharded import discard_gradients, local_part
from prfl_fast.utils.units import GIB

# torch raises a plain RuntimeError with these words if another allocator than its own fails.
_SIGNS = ("CUDA error: out of memory", "ALLOC_FAILED", "CPUAllocator: can't allocate memory")


class OutOfMemoryError(RuntimeError):
    """Error for a full device, with the phase that failed, the memory in use, and advice."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if ``error`` reports that a device or the host has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, HostMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


def phase_of(error: BaseException) -> str:
    """Return the part of an objective that raised: rollout, forward, reward or backward."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = {frame.f_globals.get("__name__") for frame in frames}
    if "torch.autograd" in modules:
        return "backward"
    if any(frame.f_code is inspect.unwrap(Trajectory.run).__code__ for frame in frames):
        return "rollout"
    return "reward" if LatentRewardModel.__module__ in modules else "forward"


def live_bytes(
    device: torch.device,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    average: Mapping[str, torch.Tensor],
    others: Any,
) -> dict[str, int]:
    """Return the bytes on ``device`` by category; each storage counts in the first that holds it.

    Categories are weights, gradients, optimizer, average and other models (modules in ``others``).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values()]
    held: dict[str, Iterable[torch.Tensor]] = {
        "weights": _weights(model),
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [value for value in states if isinstance(value, torch.Tensor)],
        "average": average.values(),
        "other models": (t for module in modules_in(others) for t in _weights(module)),
    }
    seen: set[int] = set()
    live = {}
    for category, tensors in held.items():
        live[category] = 0
        for tensor in (plain for t in tensors for plain in _plain(t)):
            storage = tensor.untyped_storage()
            if storage.device == device and storage._cdata not in seen:
                seen.add(storage._cdata)
                live[category] += storage.nbytes()
    if device.type == "cuda":  # the rest is activations, checkpoints and workspace
        live["rest"] = torch.cuda.memory_allocated(device) - sum(live.values())
    return live


def memory_report(device: torch.device, live: Mapping[str, int]) -> list[str]:
    """Return lines with the allocator's counters (CUDA only) and the bytes of `live_bytes`."""
    lines = []
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        sizes = {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "free on the device": free,
            "total": total,
        }
        lines.append("allocator: " + ", ".join(f"{n} {_shown(size)}" for n, size in sizes.items()))
        if not expandable_segments():
            lost = _shown(sizes["reserved"] - sizes["allocated"])
            lines.append(f"{lost} reserved but not allocated: {EXPANDABLE} may help")
    return [*lines, "live: " + ", ".join(f"{n} {_shown(size)}" for n, size in live.items())]


def report(
    error: BaseException,
    place: str,
    advise: Callable[[], str] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    **held: Any,
) -> OutOfMemoryError:
    """Free gradients and the failed forward; return the error for a device that is full.

    ``held`` are those of :func:`live_bytes`.
    """
    device = device_of(model)
    live = live_bytes(device, model, optimizer, **held)
    first = str(error).partition("\n")[0]
    lines = [f"out of memory in {place}: {first}", *memory_report(device, live)]
    # The frames of the traceback hold the activations of the forward that failed.
    traceback.clear_frames(error.__traceback__)
    discard_gradients(model)
    if advise is not None:
        try:
            lines.append(advise())
        except Exception as failure:  # noqa: BLE001 - the report matters more than the advice
            lines.append(f"(no advice: {failure})")
    return OutOfMemoryError("\n".join(lines))


def modules_in(*roots: Any) -> list[nn.Module]:
    """Return the modules that objects refer to, without modules inside modules."""
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}  # holds the objects, so that no id is reused
    queue = list(roots)
    while queue:
        value = queue.pop()
        if id(value) in seen or isinstance(value, (torch.Tensor, type)) or inspect.ismodule(value):
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            queue += value
        elif isinstance(value, dict):
            queue += value.values()
        elif isinstance(value, functools.partial):
            queue += [value.func, value.args, value.keywords]
        elif inspect.ismethod(value):
            queue.append(value.__self__)
        elif inspect.isfunction(value):
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # the variable is not assigned yet
                    queue.append(cell.cell_contents)
        else:
            queue += getattr(value, "__dict__", {}).values()
    return found


def _weights(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors of this rank's part (a quantized tensor has several)."""
    part: Any = local_part(tensor)
    if hasattr(part, "__tensor_flatten__"):
        return [getattr(part, name) for name in part.__tensor_flatten__()[0]]
    return [part]


def _shown(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
