"""Configuration of the steps without gradient."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prfl_fast.models.sparse_attention import PREDICTORS, Predictor
from prfl_fast.models.step_cache import COEFFICIENTS, TeaCacheModel
from prfl_fast.utils.checks import (
    check,
    check_choice,
    check_count,
    check_positive,
    is_count,
    is_number,
)

Interval = tuple[float, float]
# Noise levels from the lowest to the highest, and the stride or the solver's order there.
ByLevel = tuple[float, float, int]
# Likewise, and the density there.
Density = tuple[float, float, float]


@dataclass(frozen=True)
class RolloutConfig:
    """Configure the steps without gradient; steps with gradient are always exact.

    The defaults are bit-exact on a CPU. Approximate options are opt-in, and the engine measures the
    drift that they cause on a sample of trajectories.

    Attributes:
        cache: compute values that all steps share, such as keys and values of the text, only once.
        merge_lora: add low-rank adapters to the weights of each block when it runs. Stored weights
            do not change. A bfloat16 weight loses changes below half a unit in its last place, so
            new adapters may act less on the rollout than on the gradient step.
        compile: run ``torch.compile`` on the blocks; ``"auto"`` compiles unless
            :func:`prfl_fast.rollout.engine.why_not_compiled` gives a reason not to.
        adapter: file of a LoRA of Wan that rollouts add to the weights of each module when it runs,
            below adapters that train, such as one distilled to few steps. Steps with gradient, and
            drift checks, run without it. Of two experts, both get it, or a pair (high, low) gives
            each its own, or None. Stored weights do not change; the device holds the adapter
            during rollouts, and the changed weights of one block.
        adapter_scale: factor of the adapter; a pair for two experts.
        fp8_linears: noise levels (lowest, highest) between which linear layers run in FP8 (e4m3);
            None for no level, ``(0, 1)`` for all.
        fp8_attention: noise levels between which self-attention runs in 8 bits.
        sparse_attention: density of the self-attention, the share of pairs of blocks of tokens that
            it computes; 1 computes all. Or a density for each of several intervals of noise
            levels, as (lowest, highest, density), with the rules of ``stride``.
        sparse_predictor: what chooses these pairs: ``"pooled"`` queries and keys in each call,
            or the positions of the tokens, by ``"tiles"`` around each tile or ``"radial"`` masks
            (see :mod:`prfl_fast.kernels.attn.block_masks`).
        sparse_dense_layers: numbers of the transformer blocks, from 0, whose attention stays dense.
        teacache: reuse the residual of all blocks while the sum of the relative changes of the time
            embedding stays below this threshold; 0 never does.
        teacache_model: Wan model whose published coefficients rescale each change, a key of
            :data:`prfl_fast.models.step_cache.COEFFICIENTS`; None sums the changes themselves.
        first_block_cache: reuse the residual of the blocks after the first if the residual of the
            first changed by less than this threshold, relative to the last step in which all ran;
            0 never does. A gradient step discards all residuals, so the step after it runs whole.
        stride: solver steps of the schedule that one rollout step covers, from the step where it
            begins; steps with gradient are always single steps. Or a stride for each of several
            intervals of noise levels, as (lowest, highest, stride): the first one that holds the
            level applies, and outside of all the stride is 1.
        solver_order: order of ``FlowUniPC`` in rollout steps, 1, 2 or 3, in place of the
            scheduler's own: everywhere, or for intervals of noise levels as those of ``stride``,
            outside of which it is the scheduler's. An order is that of a step's predictor, and of
            the corrector that improves its result one step later. Steps with gradient keep the
            scheduler's order.
        guidance_interval: noise levels between which the rollout has guidance (Kynkäänniemi et al.,
            arXiv 2404.07724). A step outside runs one branch only; None guides all steps.
        drift_limit: largest relative L2 distance from an exact rollout. If a check exceeds it, all
            later rollouts are exact. None allows any distance.
        check_every: trajectories from one drift check to the next, starting with the first. A check
            costs one exact rollout. Active dropout adds to the measured drift.

    Raises:
        ValueError: if a value is not as above, ``adapter_scale`` or ``teacache_model`` is given
            without its option, or an option needs ``cache=True``.
    """

    # Drift is after 40 steps of the small world, with FP8 or a stride of 2 at every step
    # (bench/RESULTS.md, "A rollout, by option").
    cache: bool = True  # no drift
    merge_lora: bool = False  # drift 2.3e-7
    # The small world has no distilled adapter; the engine measures the drift of yours.
    adapter: str | tuple[str | None, str | None] | None = None
    adapter_scale: float | tuple[float, float] = 1.0
    compile: Literal["auto", "on", "off"] = "auto"
    fp8_linears: Interval | None = None  # drift 3.0e-2; 1.0e-2 within (0.8, 1), with attention
    fp8_attention: Interval | None = None  # drift 2.4e-3
    sparse_attention: float | Sequence[Density] = 1.0
    sparse_predictor: Predictor = "pooled"
    sparse_dense_layers: Sequence[int] = ()
    teacache: float = 0.0
    teacache_model: TeaCacheModel | None = None
    first_block_cache: float = 0.0
    stride: int | Sequence[ByLevel] = 1  # 2: half of the FLOPs, drift 3.9e-2
    # Drift of orders 1, 2 and 3: 5.2e-2, 3.9e-2 and 4.0e-2 with a stride of 2, 1.3e-1, 9.4e-2 and
    # 9.9e-2 with 4. Order 3 has 0.4 and 0.8 of the error that order 2 causes in the gradient.
    solver_order: int | Sequence[ByLevel] | None = None
    guidance_interval: Interval | None = None
    drift_limit: float | None = None
    check_every: int = 20

    def __post_init__(self) -> None:
        check_choice("compile", self.compile, ("auto", "on", "off"))
        for name in ("fp8_linears", "fp8_attention", "guidance_interval"):
            value = getattr(self, name)
            if value is not None:
                expected = "noise levels (lowest, highest) in 0 … 1, or None"
                ok = isinstance(value, (tuple, list)) and len(value) == 2 and _is_interval(value)
                check(ok, name, value, expected)
                object.__setattr__(self, name, (float(value[0]), float(value[1])))
        for name in ("teacache", "first_block_cache"):
            value = getattr(self, name)
            ok = is_number(value) and 0 <= value < float("inf")
            check(ok, name, value, "a threshold ≥ 0; 0 reuses nothing")
        if self.teacache_model is not None:
            check_choice("teacache_model", self.teacache_model, tuple(COEFFICIENTS))
            check(self.teacache > 0, "teacache_model", self.teacache_model, "None without teacache")
        self._set_pair("adapter", lambda v: v is None or _is_text(v), "a path or None")
        self._set_pair("adapter_scale", is_number, "a number")
        ok = self.adapter is not None or self.adapter_scale == 1
        check(ok, "adapter_scale", self.adapter_scale, "1 without adapter")
        self._set_levels("stride", "stride", check_count)
        self._set_levels("sparse_attention", "density", _check_density)
        check_choice("sparse_predictor", self.sparse_predictor, PREDICTORS)
        self._check_dense_layers()
        if self.solver_order is not None:
            self._set_levels("solver_order", "order", _check_order)
        check_count("check_every", self.check_every)
        if self.drift_limit is not None:
            check_positive("drift_limit", self.drift_limit)
        expected = "True with merge_lora, compile='on', an adapter or approximate blocks"
        check(self.cache or not self.needs_model, "cache", self.cache, expected)

    def _set_pair(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> None:
        """Check one value, or two of experts, and store two as a tuple."""
        value = getattr(self, name)
        pair = isinstance(value, (tuple, list))
        values = [os.fspath(v) if isinstance(v, os.PathLike) else v for v in _listed(value)]
        ok = len(values) == 1 + pair and all(map(is_valid, values))
        check(ok, name, value, f"{expected}, or two for experts (high, low)")
        stored = tuple(values) if pair and any(v is not None for v in values) else values[0]
        object.__setattr__(self, name, stored)

    def _set_levels(self, name: str, word: str, check_one: Callable[[str, Any], None]) -> None:
        """Check a value, or those of intervals of noise levels, and store them as tuples."""
        value = getattr(self, name)
        if not isinstance(value, (tuple, list)):
            check_one(name, value)
            return
        parts = []
        for i, part in enumerate(value):
            ok = isinstance(part, (tuple, list)) and len(part) == 3 and _is_interval(part[:2])
            expected = f"(lowest, highest, {word}) with noise levels in 0 … 1"
            check(ok, f"{name}[{i}]", part, expected)
            check_one(f"{name}[{i}][2]", part[2])
            parts.append((float(part[0]), float(part[1]), part[2]))
        object.__setattr__(self, name, tuple(parts))

    def _check_dense_layers(self) -> None:
        layers = self.sparse_dense_layers
        ok = isinstance(layers, (tuple, list)) and all(is_count(n, 0) for n in layers)
        check(ok, "sparse_dense_layers", layers, "numbers of transformer blocks, from 0")
        object.__setattr__(self, "sparse_dense_layers", tuple(layers))

    def density_at(self, sigma: float) -> float:
        """Return the density of the self-attention at a noise level."""
        density: float = _at(self.sparse_attention, sigma, 1.0)
        return density

    def stride_at(self, sigma: float) -> int:
        """Return the stride of a rollout step that begins at a noise level."""
        return _at(self.stride, sigma, 1)

    def order_at(self, sigma: float) -> int | None:
        """Return the solver's order there; None is the scheduler's own."""
        return _at(self.solver_order, sigma, None)

    @property
    def skips(self) -> bool:
        """Return True if a rollout step may cover several steps of the schedule."""
        return any(n > 1 for n in _numbers(self.stride))

    @property
    def fp8(self) -> bool:
        """Return True if any layer runs in FP8 at some noise level."""
        return self.fp8_linears is not None or self.fp8_attention is not None

    @property
    def sparse(self) -> bool:
        """Return True if attention is sparse at some noise level."""
        return any(n < 1 for n in _numbers(self.sparse_attention))

    @property
    def reuses(self) -> bool:
        """Return True if some steps reuse residuals of blocks."""
        return self.teacache > 0 or self.first_block_cache > 0

    @property
    def needs_all_tokens(self) -> bool:
        """Return True if an option has no effect where ranks share the tokens of a sample."""
        return self.sparse or self.reuses

    @property
    def inexact(self) -> bool:
        """Return True if results may differ from an exact rollout by more than rounding."""
        by_model = self.fp8 or self.sparse or self.reuses or self.adapter is not None
        return by_model or self.changes_sampler

    @property
    def changes_sampler(self) -> bool:
        """Return True if the solver, its steps or guidance differ, which needs no model."""
        by_level = self.solver_order is not None or self.guidance_interval is not None
        return self.skips or by_level

    @property
    def needs_model(self) -> bool:
        """Return True if the user set an option that needs access to the model's blocks."""
        merges = self.merge_lora or self.adapter is not None
        approximate = self.fp8 or self.sparse or self.reuses
        return merges or self.compile == "on" or approximate


def _at(value: Any, sigma: float, outside: Any) -> Any:
    """Return the entry of a noise level: of one value for all levels, or of intervals."""
    if not isinstance(value, tuple):
        return value
    return next((n for low, high, n in value if low <= sigma <= high), outside)


def _numbers(value: Any) -> list[Any]:
    """Return the one number of all noise levels, or those of the intervals."""
    return [n for *_, n in value] if isinstance(value, tuple) else [value]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _check_order(name: str, value: Any) -> None:
    check(is_count(value) and value <= 3, name, value, "1, 2 or 3")


def _check_density(name: str, value: Any) -> None:
    ok = is_number(value) and 0 < value <= 1
    check(ok, name, value, "a density above 0, at most 1, which is dense attention")


def _is_interval(levels: Sequence[object]) -> bool:
    low, high = levels
    return is_number(low) and is_number(high) and 0 <= low <= high <= 1  # type: ignore[operator]
