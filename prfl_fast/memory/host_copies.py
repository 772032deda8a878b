"""Copies between a device and host memory, and gradients that wait in host memory."""

import weakref
from typing import Any

import torch
from torch import nn

from prfl_fast.memory.ledger import HOST, mark
from prfl_fast.memory.offload import _page_locked


class Copies:
    """Copy streams of a device. Events are None on the CPU, where each copy is complete at once.

    Weights are copied on one stream and gradients on another, so that neither waits for the other.
    """

    def __init__(self, device: torch.device, *, fake: bool = False) -> None:
        self.device = device
        real = device.type == "cuda" and not fake
        self.stream = torch.cuda.Stream(device) if real else None
        self.gradient_stream = torch.cuda.Stream(device) if real else None
        # The gradient that is being copied to the host, and the event for the end of its copy.
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._backward = -1  # number of the last backward that sent one

    def reached(self) -> Any:
        """Return an event for the end of the work that is queued on the compute stream."""
        if self.stream is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: Any, *, gradient: bool = False
    ) -> Any:
        """Copy after the event ``after``; return an event for the end of the copy."""
        stream = self.gradient_stream if gradient else self.stream
        if stream is None:
            target.copy_(source)
            return None
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let the compute stream wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def send(self, host: torch.Tensor, gradient: torch.Tensor) -> None:
        """Copy a gradient to the host; the host waits for the copy at the end of the backward."""
        # The device holds two gradients at most, however slow the copies are.
        self._release()
        self._sent = gradient, self.copy(host, gradient, self.reached(), gradient=True)
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def _release(self) -> None:
        if self._sent is not None:
            self.wait(self._sent[1])
        self._sent = None

    def finish(self) -> None:
        """Let the host wait for the gradients that were sent."""
        copied = None if self._sent is None else self._sent[1]
        self._release()
        if copied is not None:
            copied.synchronize()

    def host_buffer(self, nbytes: int, *, gradient: bool = False) -> torch.Tensor:
        """Return host memory as uint8, page-locked on CUDA."""
        stream = self.gradient_stream if gradient else self.stream
        if stream is None:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return _page_locked(nbytes, stream)


class HostGradients:
    """Move gradients of streamed parameters to the host while the backward continues.

    A gradient accumulates on the device, so it has the bits of one that stays there. All copies
    have ended when the backward returns, so the host may read ``.grad``.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._hooks: dict[int, tuple[Any, ...]] = {}
        # By parameter: the buffer, its view as a gradient, and the count of tensors on both.
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def watch(self, parameter: nn.Parameter) -> None:
        """Move the gradients of a parameter from now on."""
        known, *_ = self._hooks.get(id(parameter), (lambda: None,))
        if known() is parameter:  # else its number was that of a replaced parameter
            return
        copies = self._copies

        def bring(gradient: torch.Tensor) -> None:
            if parameter.grad is not None:
                host = parameter.grad.data
                here = torch.empty_like(host, device=gradient.device)
                # Copies of one stream keep their order, so a gradient whose copy to the host has
                # not ended comes back whole.
                copies.wait(copies.copy(here, host, copies.reached(), gradient=True))
                parameter.grad.data = here

        def send(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            host = self._buffer(id(parameter), parameter.grad)
            copies.send(host, parameter.grad.data)
            parameter.grad.data = host

        hooks: Any = (bring, send)
        for hook in hooks:  # else torch.save warns that a file does not keep them
            hook.__torch_unserializable__ = True
        self._hooks[id(parameter)] = (
            weakref.ref(parameter),
            parameter.register_hook(bring),
            parameter.register_post_accumulate_grad_hook(send),
        )

    def _buffer(self, key: int, like: torch.Tensor) -> torch.Tensor:
        """Return host memory in the layout of a gradient, the parameter's last one if free."""
        if key in self._buffers:
            _, host, alone = self._buffers[key]
            layout = (like.dtype, like.shape, like.stride())
            if layout == (host.dtype, host.shape, host.stride()) and _readers(host) == alone:
                return host
        memory = self._copies.host_buffer(like.nbytes, gradient=True)
        host = memory.view(like.dtype).as_strided(like.shape, like.stride())
        mark(host, HOST)
        self._buffers[key] = memory, host, _readers(host)
        return host

    def close(self) -> None:
        """Leave later gradients where they arise."""
        for _, *hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        self._hooks.clear()


def _readers(tensor: torch.Tensor) -> int:
    """Return the number of tensors that share a storage."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]
