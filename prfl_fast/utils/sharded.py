"""Weights that FSDP2 shards: when they are gathered, and when their gradients are reduced.

Only classes named ``FSDPModule`` count, so that a program on one GPU imports nothing of FSDP2.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

SHARDED = "sharded_weights"  # attribute of the modules of a sharded model
_HOOKS_OF = ("torch.distributed.fsdp.", "prfl_fast.parallel.")


class ShardedWeights:
    """Hold the weights of one FSDP module, for all of its submodules.

    Attributes:
        module: the module that FSDP2 shards, a block or the rest of a model.
        reshard: False keeps the weights gathered after their first use.
        reshard_after_forward: the choice outside of :func:`gathered`.
    """

    def __init__(self, module: Any, reshard_after_forward: bool) -> None:
        self.module, self.reshard = module, True
        self.reshard_after_forward = reshard_after_forward
        self._parameters: list[tuple[nn.Module, str]] = []

    def own(self, part: nn.Module) -> None:
        """Add a submodule, from which ``utils.modules.weights_of`` then finds these weights."""
        part.__dict__[SHARDED] = self
        self._parameters += [(part, name) for name in part._parameters]

    def is_gathered(self) -> bool:
        """Return True if the weights are plain tensors now."""
        found = (part._parameters.get(name) for part, name in self._parameters)
        return not any(is_dtensor(parameter) for parameter in found)

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Gather the weights within the context; weights that were gathered before stay so."""
        before = self.is_gathered()
        if not before:
            self.module.unshard()
        try:
            yield
        finally:
            if not before and self.reshard:
                self.module.reshard()

    def __deepcopy__(self, memo: object) -> None:  # a copy must not gather the original
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def is_dtensor(tensor: object) -> bool:
    """Return True for a DTensor."""
    return any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, with the same memory; other tensors as they are."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def like_sharded(tensor: Any, part: torch.Tensor) -> torch.Tensor:
    """Return ``part`` as this rank's part of a tensor that is sharded as ``tensor`` is.

    A whole ``tensor`` returns ``part`` as it is.
    """
    if not is_dtensor(tensor):
        return part
    shape: Any = {"shape": tensor.shape, "stride": tensor.stride()}
    kind = next(kind for kind in type(tensor).__mro__ if kind.__name__ == "DTensor")
    made: Any = kind.from_local(  # type: ignore[attr-defined]
        part, tensor.device_mesh, tensor.placements, run_check=False, **shape
    )
    return made.to(part.device)  # from_local moves parts in host memory to the mesh's device


def sharding_of(tensor: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Return mesh and placements of a DTensor; None for other tensors."""
    return (tensor.device_mesh, tuple(tensor.placements)) if is_dtensor(tensor) else None


def own_rows(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of a whole tensor that this rank holds of ``tensor``; all if it is whole."""
    sharding = sharding_of(tensor)
    if sharding is None:
        return whole
    mesh, placements = sharding
    rows, start = len(whole), 0
    for dimension, placement in enumerate(placements):
        if placement.is_shard():  # by rows, in equal parts of which the last ones may be smaller
            count = -(-rows // mesh.size(dimension))
            start = mesh.get_local_rank(dimension) * count
            rows = max(0, min(count, rows - start))
    return whole[start : start + rows]


def norm_over(norm: torch.Tensor, sharding: tuple[Any, tuple[Any, ...]]) -> torch.Tensor:
    """Return the norm of a sharded tensor, from the norm of this rank's part."""
    mesh, placements = sharding
    square = norm.square()
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            dist.all_reduce(square, group=mesh.get_group(dimension))
    return square.sqrt()


def is_fsdp(module: nn.Module) -> bool:
    """Return True for a module that FSDP2 shards."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, without the prefix that FSDP2 gives it."""
    kinds = type(module).__mro__
    plain = (k for k in kinds if all(base.__name__ != "FSDPModule" for base in k.__mro__))
    return next(plain).__name__


def is_fsdp_hook(hook: object) -> bool:
    """Return True for a hook that gathers or frees sharded weights, and changes no value."""
    return str(getattr(hook, "__module__", "")).startswith(_HOOKS_OF)


def sharded_roots(model: nn.Module) -> list[Any]:
    """Return the outermost FSDP modules in a model: two for two experts, none if it is whole."""
    if is_fsdp(model):
        return [model]
    if isinstance(model, nn.ModuleList):  # blocks are sharded all or none, and have many modules
        return [*model] if len(model) and is_fsdp(model[0]) else []
    return [root for child in model.children() for root in sharded_roots(child)]


def shares_weights(*models: object) -> bool:
    """Return True if any model is sharded, so that all ranks must call it equally often.

    Arguments that are not modules count as whole.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(sharded_roots(model) for model in models if isinstance(model, nn.Module))


def largest_of_ranks(value: torch.Tensor) -> torch.Tensor:
    """Return the largest value of all ranks of the default process group; NaN is infinite.

    Ranks with sharded weights decide by this value whether to call a model again. If one of them
    called it more often than another, their gathers would not match, and the job would hang. Ranks
    that share only a sample's tokens need it not: they compute equal latents and scores.
    """
    # A maximum of NaN and a number differs among backends.
    largest = value.detach().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def holds_on_all_ranks(good: torch.Tensor) -> torch.Tensor:
    """Return True if a 0-d bool tensor is True on all ranks of the default process group."""
    return largest_of_ranks((~good).float()) == 0


def _groups(root: nn.Module) -> list[ShardedWeights]:
    """Return the weights of each FSDP module in ``root``, in the order of modules()."""
    return [vars(m)[SHARDED] for m in root.modules() if is_fsdp(m) and SHARDED in vars(m)]


def find_owners(model: nn.Module, reshard_after_forward: bool = True) -> None:
    """Give each module of a sharded model the :class:`ShardedWeights` that holds its weights."""

    def visit(module: nn.Module, owner: ShardedWeights) -> None:
        if is_fsdp(module) and owner.module is not module:
            owner = ShardedWeights(module, reshard_after_forward)
        owner.own(module)
        for child in module.children():
            visit(child, owner)

    for root in sharded_roots(model):
        if SHARDED not in vars(root):
            visit(root, ShardedWeights(root, reshard_after_forward))


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep weights gathered within the context, from their first use on; free them at the end.

    Enter it around steps without gradient; the weights must not change within. It has no effect on
    a whole model.
    """
    roots = sharded_roots(model)
    find_owners(model)
    groups = [group for root in roots for group in _groups(root)]
    for group in groups:
        group.reshard = False
        group.module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group in groups:
            group.reshard = True
            group.module.set_reshard_after_forward(group.reshard_after_forward, recurse=False)
            group.module.reshard()


def release(model: nn.Module) -> None:
    """Free weights that :func:`gathered` keeps, when the model is not used for a while."""
    for root in sharded_roots(model):
        for group in _groups(root):
            group.module.reshard()


@contextlib.contextmanager
def whole_shapes(model: nn.Module) -> Iterator[None]:
    """Show each sharded weight in its whole shape, without values, to code that adds layers."""
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and is_dtensor(p):
                taken.append((module, name, p))
    try:
        for module, name, p in taken:
            one = torch.zeros((), dtype=p.dtype, device=p.device)
            module._parameters[name] = nn.Parameter(one.expand(p.shape), p.requires_grad)
        yield
    finally:
        for module, name, p in taken:
            shown = module._parameters[name]
            p.requires_grad_(shown is not None and shown.requires_grad)
            module._parameters[name] = p


_KEEP, _ONCE, _DELAYS = "keeps_gathered", "reduces_once", "gradient_delays"


def set_choices(root: nn.Module, *, keep_gathered: bool, reduce_once: bool) -> None:
    """Store the choices of :func:`prfl_fast.parallel.shard` for :func:`choices`."""
    vars(root).update({_KEEP: keep_gathered, _ONCE: reduce_once})


def rollout_weights(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return :func:`gathered` if the model was sharded with ``keep_gathered``."""
    roots = sharded_roots(model)
    keeps = bool(roots) and all(vars(root).get(_KEEP) for root in roots)
    return gathered(model) if keeps else contextlib.nullcontext()


def reduces_once(model: nn.Module) -> bool:
    """Return True if several backwards of one call should reduce gradients in the last one only."""
    roots = sharded_roots(model)
    # Of two experts the one that runs last would reduce, and the other would never do so.
    return len(roots) == 1 and bool(vars(roots[0]).get(_ONCE))


@contextlib.contextmanager
def delayed_reduction(model: nn.Module) -> Iterator[None]:
    """Let backwards within the context add up whole gradients on each rank, without communication.

    The next backward outside reduces their sum, so it has to follow, or
    :func:`discard_gradients`. Contexts may be nested. A whole model is not affected.
    """
    roots = sharded_roots(model)
    for root in roots:
        vars(root)[_DELAYS] = vars(root).get(_DELAYS, 0) + 1
        root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for root in roots:
            vars(root)[_DELAYS] -= 1
            root.set_requires_gradient_sync(vars(root)[_DELAYS] == 0)


def discard_gradients(model: nn.Module) -> None:
    """Drop all gradients of a model, and those of sharded weights that are not reduced yet."""
    for parameter in model.parameters():
        parameter.grad = None
    end_pass(model)


def end_pass(model: nn.Module) -> None:
    """Let sharded weights be used again after an exception in a forward or backward.

    FSDP2 notes how far a pass has come. After one that did not end, later passes would run on
    gathered weights that an update has changed since, and leave gradients out. Gradients that are
    not reduced yet are dropped.
    """
    for root in sharded_roots(model):
        state: Any = root._get_fsdp_state()
        modules = [module for module in root.modules() if is_fsdp(module)]
        for module in modules:
            for part in (part for group in _fsdp_groups(module) for part in group.fsdp_params):
                part.unsharded_accumulated_grad = None
                if hasattr(part, "_unsharded_param"):
                    part._unsharded_param.grad = None
        if not state._is_root:  # before its first forward, or a part of another model's
            continue
        if hasattr(root, "reset_iter_state"):  # torch 2.13
            root.reset_iter_state()
            continue
        context, idle = state._state_ctx, type(state._training_state).IDLE
        context.iter_forward_root, context.post_backward_final_callback_queued = None, False
        for module in modules:
            for each in (module._get_fsdp_state(), *_fsdp_groups(module)):  # type: ignore[operator]
                each._training_state = idle
            module.reshard()  # type: ignore[operator]


@contextlib.contextmanager
def ending_pass(*models: object) -> Iterator[None]:
    """Call :func:`end_pass` on the models if an exception leaves the context.

    Arguments that are not modules are left out.
    """
    try:
        yield
    except BaseException:
        for model in models:
            if isinstance(model, nn.Module):
                end_pass(model)
        raise


def _fsdp_groups(module: Any) -> list[Any]:
    """Return FSDP2's groups of parameters of a module, for which there is no public function."""
    # torch 2.10 has one group per module, later versions have a list.
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group]
