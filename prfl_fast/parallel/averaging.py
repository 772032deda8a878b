"""Average the gradients of whole weights over all ranks, once per update."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from prfl_fast.utils.checks import check
from prfl_fast.utils.sharded import is_dtensor

BUCKET_BYTES = 64 * 1024**2  # large enough for the full bandwidth, small beside the gradients


def average_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Replace the gradients of whole weights by their mean over all ranks.

    Call it once per update. Gradients of sharded weights, which FSDP2 has averaged, do not change.
    If only some ranks have a gradient of a parameter, it counts as zero on the others.

    Raise ``ValueError`` if the mesh does not hold all ranks.
    """
    # DistributedDataParallel would reduce all gradients in each backward of an update, and PRFL has
    # one per gradient point, DRaFT one per solver step.
    ranks = dist.get_world_size()
    check(mesh.size() == ranks, "the ranks of mesh", mesh.size(), f"all {ranks}")
    whole = [p for p in parameters if p.requires_grad and not is_dtensor(p)]
    if ranks == 1 or not whole:
        return
    device = whole[0].device
    found = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32, device=device)
    dist.all_reduce(found)
    gradients: dict[torch.dtype, list[torch.Tensor]] = {}
    for p, count in zip(whole, found.tolist(), strict=True):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype or p.dtype)
        if p.grad is not None:
            gradients.setdefault(p.grad.dtype, []).append(p.grad)
    for same in gradients.values():
        bucket: list[torch.Tensor] = []
        for gradient in same:
            if bucket and sum(g.nbytes for g in (*bucket, gradient)) > BUCKET_BYTES:
                _average(bucket, ranks)
                bucket = []
            bucket.append(gradient)
        _average(bucket, ranks)


def broadcast_weights(parameters: Iterable[torch.Tensor]) -> None:
    """Copy whole weights from the first rank to all others; sharded ones do not change.

    Call it once for weights that start at random, as those of LoRA do.
    """
    for p in parameters:
        if not is_dtensor(p) and not p.is_meta:
            on_device = dist.get_backend() == "nccl" and not p.is_cuda
            values = p.detach().cuda() if on_device else p.detach().contiguous()
            dist.broadcast(values, 0)
            p.data.copy_(values)


def _average(bucket: list[torch.Tensor], ranks: int) -> None:
    flat = torch.cat([g.reshape(-1) for g in bucket])
    dist.all_reduce(flat.div_(ranks))  # gloo has no mean
    sizes = [g.numel() for g in bucket]
    for gradient, mean in zip(bucket, flat.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))
