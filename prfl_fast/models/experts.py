"""A generator of two experts, one for high noise and one for low noise (Wan2.2 A14B).

Timesteps t ≥ 1000·boundary run ``high``, all others ``low``.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prfl_fast.models.adapter import Adapter, Conditions
from prfl_fast.models.inference import RolloutModel, RolloutOptions, UnsupportedError
from prfl_fast.utils.adapters import adapter_parameters
from prfl_fast.utils.checks import check, check_type, is_number, plain
from prfl_fast.utils.modules import unwrap, weights_of
from prfl_fast.utils.sharded import release

NAMES = ("high", "low")
# Subfolders of the experts in a diffusers pipeline, whose load_lora_weights takes the adapter of
# the second with load_into_transformer_2=True.
FOLDERS = {"high": "transformer", "low": "transformer_2"}


class Experts(nn.Module):
    """Hold two transformers of one architecture, of which each runs a range of timesteps.

    Functions that take a supported model take this pair. An expert trains if one of its parameters
    requires a gradient; to train one expert, freeze the other. Wrap each expert
    (DistributedDataParallel, torch.compile), not the pair. Build a reward model from one expert.

    Args:
        high, low: supported transformers for high and low noise, the ``transformer`` and
            ``transformer_2`` of a diffusers pipeline.
        boundary: the pipeline's ``boundary_ratio``: 0.875 for Wan2.2 T2V-A14B, 0.9 for I2V-A14B.

    Raises:
        TypeError: if an expert is not a module.
        ValueError: if ``boundary`` is not between 0 and 1, or the experts' parameters differ in
            shape.
    """

    # Called with the name of an expert before it runs. prfl_fast.memory sets it to move experts.
    swap: Callable[[str], object] | None = None

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float) -> None:
        super().__init__()
        for name, expert in zip(NAMES, (high, low), strict=True):
            check_type(name, expert, nn.Module)
        boundary = plain(boundary)
        ok = is_number(boundary) and 0 < boundary < 1
        check(ok, "boundary", boundary, "a number between 0 and 1, as 0.875 of Wan2.2 T2V-A14B")
        shapes = [_shapes(expert) for expert in (high, low)]
        expected = "a model whose parameters have the shapes of high's"
        check(shapes[0] == shapes[1], "low", type(low).__name__, expected)
        self.high, self.low, self.boundary = high, low, float(boundary)
        self._only: str | None = None

    def is_high(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return True for timesteps (1000·σ) of the expert ``high``, in their shape."""
        return timestep >= 1000 * self.boundary

    def name_at(self, timestep: torch.Tensor | float) -> str:
        """Return ``"high"`` or ``"low"``, the expert for these timesteps of any shape.

        Raise ``ValueError`` if they lie on both sides of the boundary.
        """
        # Reading a tensor waits for the device, once per forward outside rollouts.
        high = self.is_high(torch.as_tensor(timestep)).flatten().tolist()
        expected = f"timesteps on one side of the boundary {1000 * self.boundary:g}"
        hint = "Split the batch: one call runs one expert"
        check(len(set(high)) == 1, "timestep", timestep, expected, hint=hint)
        return NAMES[0] if high[0] else NAMES[1]

    def use(self, name: str) -> nn.Module:
        """Return the expert of that name, moved to the device if experts take turns there."""
        if self.swap is not None:
            self.swap(name)
        return getattr(self, name)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the experts that train now."""
        names = NAMES if self._only is None else (self._only,)
        trains = {n: any(p.requires_grad for p in getattr(self, n).parameters()) for n in names}
        return tuple(name for name in names if trains[name])

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Let training steps within the context draw timesteps of one expert only."""
        before, self._only = self._only, name
        try:
            yield
        finally:
            self._only = before


def _shapes(expert: nn.Module) -> list[torch.Size]:
    own = {id(parameter) for _, parameter in adapter_parameters(expert)}
    return [p.shape for p in unwrap(expert).parameters() if id(p) not in own]


def members(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the transformers of a model: two experts, or the model itself."""
    return (model.high, model.low) if isinstance(model, Experts) else (model,)


def named_members(model: nn.Module) -> dict[str, nn.Module]:
    """Return the :func:`members` of a model by name: ``high`` and ``low``, or ``""`` for one."""
    names = NAMES if isinstance(model, Experts) else ("",)
    return dict(zip(names, members(model), strict=True))


def check_members(model: nn.Module, check: Callable[[Any], object]) -> tuple[nn.Module, ...]:
    """Return the :func:`members` of a model after ``check(member)`` has passed for each.

    Functions that change a model in place loop over the result, so that an error leaves both
    experts unchanged. Errors of ``check`` name the expert.
    """
    for name, member in named_members(model).items():
        try:
            check(member)
        except (TypeError, ValueError) as error:
            if not name:
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"expert {name}: {error}") from error
    return members(model)


def check_separate(model: Experts, reason: str) -> None:
    """Raise ``ValueError`` if the experts share parameters; ``reason`` ends the message."""
    shared = {*map(id, model.high.parameters())} & {*map(id, model.low.parameters())}
    check(not shared, "parameters that both experts hold", len(shared), f"0: {reason}")


class ExpertsAdapter:
    """Adapter of :class:`Experts`; ``each`` is the adapter of both experts.

    Methods that build a reward model need one expert, and raise ``ValueError`` for the pair.
    """

    name = "prfl_fast.models.Experts"

    def __init__(self, each: Adapter) -> None:
        self.each = each

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        raise ValueError(
            f"model has two experts, but {method} takes one. Pass model.high or model.low"
        )

    def patch(self, model: Experts) -> None:
        """Patch both experts."""
        for expert in check_members(model, lambda each: self.each.check_patchable(unwrap(each))):
            self.each.patch(expert)

    def unpatch(self, model: Experts) -> None:
        """Unpatch both experts."""
        for expert in members(model):
            self.each.unpatch(expert)

    def is_patched(self, model: Experts) -> bool:
        """Return True if both experts are patched."""
        return all(map(self.each.is_patched, members(model)))

    def hidden_size(self, model: Experts) -> int:
        """Return D, the width of the residual stream."""
        return self.each.hidden_size(model.high)

    def backbone_config(self, model: Experts) -> dict[str, Any]:
        """Return the experts' configuration, with the boundary as diffusers names it."""
        return self.each.backbone_config(model.high) | {"boundary_ratio": model.boundary}

    def check_latents(
        self, model: Experts, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the experts take these latents."""
        self.each.check_latents(model.high, x, conditions, name)

    def velocity(
        self, model: Experts, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the velocity of the timestep's expert, the same for the whole batch."""
        return self.each.velocity(model.use(model.name_at(timestep)), x, timestep, conditions)

    def open_rollout(
        self,
        model: Experts,
        x: torch.Tensor,
        timesteps: Sequence[torch.Tensor],
        conditions: Conditions,
        options: RolloutOptions = RolloutOptions(),  # noqa: B008 - frozen
    ) -> RolloutModel:
        """Return a rollout that opens each expert at its first step."""
        return _ExpertsRollout(model, self.each, x, timesteps, conditions, options)


class _ExpertsRollout(RolloutModel):
    """Run the expert of each step, with the caches of that expert only."""

    def __init__(
        self,
        model: Experts,
        adapter: Adapter,
        x: torch.Tensor,
        timesteps: Sequence[torch.Tensor],
        conditions: Conditions,
        options: RolloutOptions,
    ) -> None:
        names = [model.name_at(timestep) for timestep in timesteps]
        for name in sorted(set(names)):
            if not adapter.is_patched(getattr(model, name)):
                raise UnsupportedError(f"expert {name} is not patched")
        self._names, self.notes = names, []
        like = torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape)

        def open(name: str) -> RolloutModel:
            own = [t for t, of in zip(timesteps, names, strict=True) if of == name]
            expert, given = model.use(name), options
            if isinstance(options.adapter, tuple):
                given = replace(options, adapter=options.adapter[NAMES.index(name)])
            with weights_of(unwrap(expert)):
                return adapter.open_rollout(expert, like, own, conditions, given)

        self._open, self._model = open, model
        self._current, self._opened = names[0], open(names[0])

    @torch.no_grad()
    def velocity(self, x: torch.Tensor, step: int, **precisions: Any) -> torch.Tensor:
        """Return the velocity of the step's expert; see :meth:`RolloutModel.velocity`."""
        check(0 <= step < len(self._names), "step", step, f"0 to {len(self._names) - 1}")
        name = self._names[step]
        if name != self._current:
            del self._opened  # frees its caches before the other expert's are made
            release(getattr(self._model, self._current))
            self._current, self._opened = name, self._open(name)
        self._model.use(name)  # a gradient step may have run the other expert in between
        v = self._opened.velocity(x, self._names[:step].count(name), **precisions)
        self.notes += [n for n in self._opened.notes if n not in self.notes]
        return v
