"""Count the reads of values of a device, each of which makes the host wait, on CPU tensors."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
COPIES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}


def tensors_of(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class DeviceReads(TorchDispatchMode):
    """Count reads of the given tensors and of all that is computed from them.

    The other tensors stand for the host's, such as a schedule's timesteps. ``to("cpu")`` is not
    counted, as tensors are moved to the device of others by the same call.
    """

    def __init__(self, *tensors):
        super().__init__()
        self.count = 0
        self._kept = {}  # storages, so that no other gets the address of a freed one
        self._stack = contextlib.ExitStack()
        self._keep(tensors)

    def _keep(self, values):
        for tensor in tensors_of(values):
            storage = tensor.untyped_storage()
            self._kept[storage._cdata] = storage

    def holds(self, *values):
        return any(t.untyped_storage()._cdata in self._kept for t in tensors_of(values))

    def __enter__(self):
        self._stack.enter_context(_Copies(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = self.holds(args, kwargs)
        result = func(*args, **(kwargs or {}))
        if known:
            self.count += func in READS
            self._keep(result)
        return result


class _Copies(TorchFunctionMode):
    """Count whole tensors that are copied to the host: PyTorch dispatches nothing on a CPU."""

    def __init__(self, reads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in COPIES and args[0].ndim and self._reads.holds(args[0]):
            self._reads.count += 1
        return func(*args, **(kwargs or {}))
