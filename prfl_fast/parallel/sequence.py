"""Share each sample's tokens among the ranks of a mesh."""

from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from prfl_fast.models.experts import check_members
from prfl_fast.models.registry import find_adapter
from prfl_fast.rewards.latent import LatentRewardModel

Model = TypeVar("Model", bound=nn.Module)


def shard_sequence(model: Model, mesh: DeviceMesh) -> Model:
    """Run each sample's tokens on all ranks of the mesh's dimension ``sp``; return the model.

    Ranks of a sample must call the model at the same time with equal latents, timesteps and
    conditions, and get equal velocities or scores. Their losses are equal too, and the mean of
    their gradients is the gradient of that loss (FSDP2's own mean, or
    :func:`prfl_fast.parallel.average_gradients`). Call it after ``patch`` and before ``shard``.
    With one rank per sample the model does not change.

    Args:
        model: a patched ``WanTransformer3DModel`` of diffusers, two experts, or a reward model.
        mesh: the mesh of :func:`prfl_fast.parallel.make_mesh`.

    Raises:
        TypeError: if prfl_fast does not know the model's class.
        ValueError: if ranks cannot share a sample of that class, the model is not patched, or the
            ranks do not divide its heads.
    """
    group = mesh.get_group("sp") if mesh["sp"].size() > 1 else None
    target: Any = model.backbone if isinstance(model, LatentRewardModel) else model
    for each in check_members(target, lambda m: find_adapter(m).check_shard_sequence(m, group)):
        find_adapter(each).shard_sequence(each, group)
    return model
