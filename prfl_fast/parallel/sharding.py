"""Shard a model's weights over ranks with FSDP2.

:func:`shard` calls PyTorch's ``fully_shard`` on every block and on the rest of the model. A block's
weights are gathered before it runs and freed afterwards, and each backward leaves the mean of the
gradients over all ranks in this rank's part.
"""

import logging
import weakref
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prfl_fast.models.block_adapter import unwrap_block
from prfl_fast.models.experts import Experts, check_members, check_separate
from prfl_fast.models.registry import find_blocks
from prfl_fast.parallel.averaging import broadcast_weights
from prfl_fast.parallel.mesh import DIMENSIONS
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.utils.adapters import adapter_parameters
from prfl_fast.utils.checks import check, check_type
from prfl_fast.utils.interrupts import signals_end_process
from prfl_fast.utils.modules import STREAMED, unwrap
from prfl_fast.utils.sharded import (
    SHARDED,
    end_pass,
    find_owners,
    is_dtensor,
    is_fsdp,
    set_choices,
)

Model = TypeVar("Model", bound=nn.Module)
logger = logging.getLogger(__name__)

# With at most this share of a model's bytes to train, as with LoRA, whole gradients fit.
FEW_TRAINED = 0.05

_meshes: "weakref.WeakKeyDictionary[DeviceMesh, DeviceMesh]" = weakref.WeakKeyDictionary()


def shard_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh of FSDP2: copies × parts, or parts alone if there is one copy.

    Raise ``ValueError`` for a mesh with other dimensions than those of :func:`make_mesh`.
    """
    names = tuple(mesh.mesh_dim_names or ())
    check(names == DIMENSIONS, "mesh", names, f"one of make_mesh, {DIMENSIONS}")
    copies, _, sequence = mesh.shape
    if sequence == 1:
        return mesh["dp_shard"] if copies == 1 else mesh["dp_replicate", "dp_shard"]
    if mesh not in _meshes:  # ranks that share a sample have parts of their own
        ranks = mesh.mesh.flatten(1)
        named: Any = ("shard",) if copies == 1 else ("dp_replicate", "shard")
        ranks = ranks[0] if copies == 1 else ranks
        with signals_end_process():
            _meshes[mesh] = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=named)
    return _meshes[mesh]


def shard(
    model: Model,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    keep_gathered: bool = False,
    reduce_once: bool | None = None,
) -> Model:
    """Shard the weights over the ranks of a mesh in place with FSDP2; return the model.

    Call it after ``patch``, LoRA, quantization and memory policies, and make the optimizer
    afterwards. Each expert of two is sharded by itself. With one rank per copy the weights stay
    whole. Some weights stay whole on every rank, and if they train, their gradients need
    :func:`prfl_fast.parallel.average_gradients`: those of a dtype that few trained weights of their
    block have (the float32 parts of a bfloat16 model), and tensors that FSDP2 cannot split.

    Args:
        model: a generator, two experts, or a reward model.
        mesh: the mesh of :func:`make_mesh`; weights are split over ``dp_shard`` × ``sp``.
        param_dtype: dtype in which blocks are gathered and computed, where the parameters have
            another, e.g. bfloat16 for float32 ones that are trained under autocast: half the bytes
            travel. Gradients are reduced in float32. Parameters that the model's class keeps in
            float32, and vectors other than biases, stay whole. None keeps all dtypes.
        reshard_after_forward: free a block's weights after its forward, and gather them again in
            the backward. False keeps the whole model in memory from forward to backward; forwards
            without gradient free it.
        keep_gathered: keep the weights gathered through a rollout, and free them before the step
            with gradient. The device then holds the whole model, and the rollout communicates once
            instead of at each of its steps.
        reduce_once: reduce gradients once per call of :class:`prfl_fast.PRFL` instead of in each of
            its backwards. Each rank then holds whole gradients of the trained weights. None reduces
            once if these weights are at most 5 % of the model's bytes, as with LoRA.

    Raises:
        TypeError: if the model's blocks are unknown.
        ValueError: if the mesh has other dimensions; the model is sharded already, wrapped in
            DistributedDataParallel or compiled as a whole; its weights wait in host memory; a block
            is twice in its lists; or two experts take turns on the device or share parameters.
    """
    for each in check_shardable(model, mesh):
        parts = shard_mesh(mesh)
        _shard(each, parts, param_dtype, reshard_after_forward, keep_gathered, reduce_once)
    return model


def check_shardable(model: nn.Module, mesh: DeviceMesh) -> tuple[nn.Module, ...]:
    """Raise the errors of :func:`shard`; return the models that it shards one by one."""
    check_type("model", model, nn.Module)
    parts = shard_mesh(mesh)
    if parts.size(parts.ndim - 1) == 1:
        return ()
    if isinstance(model, Experts):
        hint = "Sharded experts are both on the device: apply their memory policy with device=None"
        came, expected = "experts that take turns on the device", "experts that stay on it"
        check(model.swap is None, "model", came, expected, hint=hint)
        check_separate(model, "each expert is sharded by itself")
    return check_members(model, _check_shardable)


def _parts_of(model: nn.Module) -> tuple[Any, nn.Module, list[nn.Module]]:
    """Return the transformer of a model, the module to shard as a whole, and the blocks."""
    reward = isinstance(model, LatentRewardModel)
    backbone: Any = model.backbone if reward else model
    root = model if reward else unwrap(model)
    return backbone, root, [unwrap_block(block) for block in find_blocks(backbone).blocks(backbone)]


def _check_shardable(model: nn.Module) -> None:
    _, root, blocks = _parts_of(model)
    kind = type(model).__name__
    sharded = any(is_fsdp(m) for m in root.modules()) or any(map(is_dtensor, root.parameters()))
    check(not sharded, "model", f"a {kind} that is sharded already", "a whole model")
    hint = "Wrap or compile nothing but blocks; shard takes the place of DistributedDataParallel"
    wrapped = kind == "DistributedDataParallel" or hasattr(model, "_orig_mod")
    check(not wrapped, "model", f"a {kind}", "the model inside", hint=hint)
    streamed = any(STREAMED in vars(block) for block in blocks)
    hint = "A sharded block has its weights on the device only while it runs. Leave stream_weights"
    hint += " at None, or train with shard: 1"
    kind = "one whose weights wait in host memory"
    check(not streamed, "model", kind, "one without stream_weights", hint=hint)
    count, expected = len({*blocks}), f"{len(blocks)}: each module once in its lists"
    check(count == len(blocks), "the number of blocks to shard", count, expected)


def _shard(
    model: nn.Module,
    parts: DeviceMesh,
    param_dtype: torch.dtype | None,
    reshard_after_forward: bool,
    keep_gathered: bool,
    reduce_once: bool | None,
) -> None:
    backbone, root, blocks = _parts_of(model)
    if reduce_once is None:
        trained = sum(p.nbytes for p in root.parameters() if p.requires_grad)
        reduce_once = trained <= FEW_TRAINED * sum(p.nbytes for p in root.parameters())
    # LoRA starts at random, and the parts that make one copy come from different ranks.
    broadcast_weights(p for _, p in adapter_parameters(root))
    wide = _wide_parameters(unwrap(backbone), blocks, param_dtype)
    whole = _shard_modules(root, blocks, parts, wide, param_dtype, reshard_after_forward)
    for tensor in (*whole, *root.buffers()):
        if tensor.device.type != parts.device_type and not tensor.is_meta:
            tensor.data = tensor.data.to(next(root.parameters()).device)
    find_owners(root, reshard_after_forward)
    set_choices(root, keep_gathered=keep_gathered, reduce_once=reduce_once)
    if root is not unwrap(backbone):  # a reward model
        register_fsdp_forward_method(root, "logits")  # trainers call it instead of forward
    nbytes = sum(p.nbytes for p in whole)
    logger.info("sharded %s; %d bytes stay whole", type(root).__name__, nbytes)


def _shard_modules(
    root: nn.Module,
    blocks: list[nn.Module],
    parts: DeviceMesh,
    wide: set[nn.Parameter],
    param_dtype: torch.dtype | None,
    reshard_after_forward: bool,
) -> set[nn.Parameter]:
    """Call ``fully_shard`` on the blocks and the root; return the parameters that stay whole."""
    precision = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        cast_forward_inputs=False,  # blocks take float32 modulation beside a bfloat16 stream
    )
    policy: dict[str, Any] = {
        "mp_policy": precision,
        "reshard_after_forward": reshard_after_forward,
    }
    taken = {id(p) for block in blocks for p in block.parameters()}
    whole = wide | _odd_parameters([p for p in root.parameters() if id(p) not in taken])
    for block in blocks:
        kept = wide | _odd_parameters(list(block.parameters()))
        whole |= kept
        fully_shard(block, mesh=parts, ignored_params=kept, **policy)
        if not reshard_after_forward:
            block.register_forward_hook(_free_without_gradient)
    # The root frees its weights too: after a forward without a backward they would stay, and the
    # next forward would use them although the optimizer had changed this rank's parts.
    fully_shard(root, mesh=parts, ignored_params=whole, reshard_after_forward=True)
    root.register_forward_pre_hook(_end_failed_pass, prepend=True)
    return whole


def _end_failed_pass(root: Any, inputs: Any) -> None:
    """End a forward or backward that an exception left, before FSDP2 starts the next forward."""
    state = root._get_fsdp_state()
    context = state._state_ctx
    failed = context.iter_forward_root is state or context.post_backward_final_callback_queued
    if failed and torch._C._current_graph_task_id() == -1:  # a backward may run forwards again
        end_pass(root)


def _free_without_gradient(block: Any, inputs: Any, output: Any) -> None:
    """Free a block's weights after a forward that no backward follows.

    They would stay gathered, and the next forward would use them although the optimizer had changed
    this rank's parts.
    """
    owner = vars(block).get(SHARDED)
    if not torch.is_grad_enabled() and (owner is None or owner.reshard):
        block.reshard()


def _wide_parameters(
    base: Any, blocks: list[nn.Module], param_dtype: torch.dtype | None
) -> set[nn.Parameter]:
    """Return the parameters of blocks that are not gathered in ``param_dtype``."""
    if param_dtype is None:
        return set()
    names = set(getattr(base, "_keep_in_fp32_modules", None) or ())
    wide = set()
    for block in blocks:
        for name, p in block.named_parameters():
            # Autocast casts the matrices and biases of linear layers; kernels read the weights of
            # norms in float32.
            vector = p.ndim < 2 and not name.endswith("bias")
            if p.is_floating_point() and (vector or names & set(name.split("."))):
                wide.add(p)
    return wide


def _odd_parameters(parameters: list[nn.Parameter]) -> set[nn.Parameter]:
    """Return the parameters that FSDP2 cannot shard together with the others of a module."""
    # Tensors of torchao without FSDP2's two methods, scalars, and other layouts (channels_last).
    odd = {
        p
        for p in parameters
        if p.ndim == 0
        or (is_traceable_wrapper_subclass(p) and not hasattr(p, "fsdp_pre_all_gather"))
        or not p.is_contiguous()
    }
    # A group's gradients travel in one tensor, of one dtype.
    numbers: Counter[torch.dtype] = Counter()
    trained = [p for p in parameters if p.requires_grad and p not in odd]
    for p in trained:
        numbers[p.dtype] += p.numel()
    most = max(numbers, key=lambda dtype: numbers[dtype], default=None)
    return odd | {p for p in trained if p.dtype != most}
