"""Choose the options of the rollout whose error stays within one budget.

Each option of a :class:`prfl_fast.rollout.RolloutConfig` that makes a rollout cheaper is measured
alone, from its weakest value to its strongest; then those within the budget are measured together.
A measurement runs a PRFL step on a sample of trajectories: its cost, the drift of its latents, and
the cosine of its gradient with that of the exact rollout at the same gradient points.
"""

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from prfl_fast.feedback.estimator import PRFLOutput
from prfl_fast.feedback.points import Point
from prfl_fast.feedback.step import PRFL
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.compiled_blocks import are_compiled
from prfl_fast.models.velocity import model_of
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.rollout.trajectory import Trajectory, relative_distance
from prfl_fast.utils.checks import check, check_positive
from prfl_fast.utils.flops import flop_counter

LEAST_COSINE = 0.99  # of the gradient with the exact one
# The largest drift of later trajectories exceeds that of the sample, and past the limit all
# rollouts become exact.
HEADROOM = 0.75
# An option must save this part of a step's cost: a smaller gain is noise on a GPU, and no reason to
# add an error.
LEAST_GAIN = 0.01
# Samples that are not timed on a GPU: in the first the engine measures whether compiled blocks pay,
# in the second it compiles them.
WARM_UP = 2
# High noise tolerates larger strides. In the small world, with 40 steps and 5 gradient points, an
# exact rollout runs 6.12 forwards a point. The fourth set runs 1.69 at a drift of 0.0151, a stride
# of 2 everywhere 3.43 at 0.0147 (bench/RESULTS.md). The third drifts least for its cost among ten
# sets that run 2.5 to 3 times fewer forwards.
STRIDES = (
    ((0.9, 1.0, 4),),
    ((0.9, 1.0, 4), (0.7, 0.9, 2)),
    ((0.9, 1.0, 8), (0.8, 0.9, 4), (0.6, 0.8, 2)),
    ((0.9, 1.0, 8), (0.7, 0.9, 4), (0.0, 0.7, 2)),
    ((0.7, 1.0, 8), (0.0, 0.7, 2)),
    ((0.7, 1.0, 8), (0.0, 0.7, 3)),
    ((0.7, 1.0, 8), (0.0, 0.7, 4)),
)
# Of UniPC, tried at each stride. In the small world, at strides of 2 and 4, order 1 has 1.3 to 1.4
# times the drift of order 2, and order 3 has 0.9 of it at step 32 and 1.05 after the last step.
ORDERS = (1, 2, 3)
# Densities of the attention by noise level. The first ones leave those layers dense whose output
# moves most at LAYER_DENSITY, the others none.
DENSITIES = (
    ((0.8, 1.0, 0.75),),
    ((0.8, 1.0, 0.5), (0.3, 0.8, 0.75)),
    ((0.8, 1.0, 0.25), (0.3, 0.8, 0.5)),
    ((0.8, 1.0, 0.25), (0.0, 0.8, 0.5)),
)
STRONG_DENSITIES = (((0.0, 1.0, 0.5),), ((0.0, 1.0, 0.25),))
LAYER_DENSITY = 0.5
DENSE_SHARE = 0.25  # of the layers
# Draws of gradient points, of which the samples get quantiles. The points decide where a stride
# begins, hence the drift: with 12 steps and 2 points, four draws lacked the points that drift by
# 0.09, and theirs drifted by 0.014.
DRAWS = 64
# Options that need two steps of one rollout: a stride merges them, a cache reuses a residual.
OF_SEVERAL_STEPS = ("stride", "first_block_cache", "teacache")
_NEVER = 1 << 30  # trajectories between checks of drift: the measurement compares latents itself

Options = Mapping[str, Any]


class Sampled(NamedTuple):
    """Inputs of one PRFL step: noise, conditions, and latents if the plan starts from data."""

    noise: torch.Tensor
    conditions: Conditions
    latents: torch.Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """Hold the figures of one rollout configuration.

    Attributes:
        options: fields of the configuration that differ from the exact one.
        flops: of a gradient point, its share of the rollout included.
        rollout_flops: of the rollout's share alone.
        seconds: of a gradient point; None on a CPU, where ``flops`` are the cost.
        drift: the largest of all steps and samples.
        cosine, distance: of the sum of the samples' gradients with the exact one; ``distance`` is
            relative.

    If the drift of a sample ended the measurement, ``seconds`` is None, and all but ``drift`` NaN.
    """

    options: Options
    flops: float
    rollout_flops: float
    seconds: float | None
    drift: float
    cosine: float
    distance: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file; NaN becomes None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    @property
    def cost(self) -> float:
        """Return the seconds of a gradient point, or its FLOPs on a CPU."""
        return self.flops if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Calibration:
    """Hold a chosen configuration, whose ``drift_limit`` is the budget, and all measurements.

    The first of ``measured`` is the exact rollout, ``chosen`` is that of ``config``.
    """

    config: RolloutConfig
    chosen: Measured
    measured: Sequence[Measured] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file; NaN becomes None."""
        return {
            "config": asdict(self.config),
            "chosen": self.chosen.as_dict(),
            "measured": [each.as_dict() for each in self.measured],
        }


def ladders(
    step: PRFL, device: torch.device, dense_layers: Sequence[int] | None = ()
) -> dict[str, list[Options]]:
    """Return the values of each option by name, from the weakest to the strongest.

    ``dense_layers`` are the transformer blocks that stay dense in the weaker values of
    ``sparse_attention``; None leaves that option out.
    """
    model = model_of(step.sampler.transformer)
    found: dict[str, list[Options]] = {"stride": [{"stride": stride} for stride in STRIDES]}
    if step.sampler.guidance is not None:
        # Drift 0.023, 0.081 and 0.14 in the small world, with a scale of 5; a lower end costs most.
        intervals = ((0.0, 0.99), (0.0, 0.97), (0.3, 0.97))
        found["guidance_interval"] = [{"guidance_interval": each} for each in intervals]
    if model is None or not step.engine.config.cache:
        return found
    for name, thresholds in (
        ("first_block_cache", (0.02, 0.05, 0.1, 0.2)),
        ("teacache", (0.05, 0.1, 0.2, 0.4)),
    ):
        found[name] = [{name: threshold} for threshold in thresholds]
    if dense_layers is not None:
        layers = [tuple(dense_layers)] * len(DENSITIES) + [()] * len(STRONG_DENSITIES)
        found["sparse_attention"] = [
            {"sparse_attention": density, "sparse_dense_layers": dense}
            for density, dense in zip((*DENSITIES, *STRONG_DENSITIES), layers, strict=True)
        ]
    if device.type == "cuda":  # a CPU emulates 8 bits, which saves it nothing
        levels = ((0.8, 1.0), (0.3, 1.0), (0.0, 1.0))
        found["fp8_linears"] = [{"fp8_linears": each} for each in levels]
        found["fp8_attention"] = [{"fp8_attention": each} for each in levels]
    return found


def other_orders(step: PRFL) -> list[int]:
    """Return the orders that a rollout may have in place of the scheduler's; none but of UniPC."""
    scheduler = step.sampler.scheduler
    if not isinstance(scheduler, FlowUniPC):
        return []
    return [order for order in ORDERS if order != scheduler.order]


def spread_points(step: PRFL, count: int) -> list[tuple[Point, ...]]:
    """Return gradient points for some trajectories: quantiles of :data:`DRAWS` sorted draws.

    The last quantile comes first, as its rollout is long: on the first sample layers are compared.
    On a GPU it and the first quantile are not timed, the middle ones are.
    """
    draws = sorted(step.draw_points(torch.Generator().manual_seed(n)) for n in range(DRAWS))
    found = [draws[(2 * number + 1) * DRAWS // (2 * count)] for number in range(count)]
    return found[-1:] + found[:-1]


def calibrate(
    step: PRFL,
    samples: Sequence[Sampled],
    drift: float,
    *,
    on_measured: Callable[[Measured], object] = lambda measured: None,
) -> Calibration:
    """Return the cheapest configuration of a step's rollout within a budget of drift.

    The cost is that of the whole step: seconds on a GPU, FLOPs on a CPU. Each stride has the order
    of UniPC that drifts least. Nothing of the step changes;
    ``step.use_rollout(calibration.config)`` takes the result. :data:`OF_SEVERAL_STEPS` are not
    tried if no rollout of the samples has two steps before a gradient point.

    Args:
        step: a step whose plan sends the gradient to the parameters, with an exact rollout.
        samples: inputs of the steps that are measured; on a GPU at least three.
        drift: largest drift of the latents from an exact rollout, :data:`HEADROOM` of which a
            sample may have. It becomes the ``drift_limit`` of the result.
        on_measured: called after each measurement, of the exact rollout first.

    Raises:
        ValueError: if the step has an approximate rollout or sharded weights, its parameters have
            gradients, there are too few samples, or the exact gradient is zero or not finite.
    """
    check_positive("drift", drift)
    base = step.engine.config
    check(not base.inexact, "rollout", base, "an exact one, whose options are chosen here")
    # Active dropout draws from the global generator, which a run must find as it was.
    on_gpu = torch.cuda.is_available()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else ()):
        best, found = _search(_Bench(step, samples, drift * HEADROOM), on_measured)
    return Calibration(replace(base, **best.options, drift_limit=drift), best, found)


def _search(
    bench: "_Bench", on_measured: Callable[[Measured], object]
) -> tuple[Measured, list[Measured]]:
    """Return the best measurement that fits, and all of them, the exact rollout's first."""
    found = [bench.exact]
    on_measured(bench.exact)

    def measure(options: Options) -> Measured:
        known = next((m for m in found if m.options == options), None)
        if known is None:
            known = bench.measure(options)
            found.append(known)
            on_measured(known)
        return known

    allowed: dict[str, list[Measured]] = {}
    for name, values in ladders(bench.step, bench.device, bench.moving_layers()).items():
        if bench.longest < 2 and name in OF_SEVERAL_STEPS:
            continue
        orders = other_orders(bench.step) if name == "stride" else []
        for options in values:
            own = measure(options)
            others = [measure({**options, "solver_order": order}) for order in orders]
            # An order that drifts more at one stride did so at longer ones too.
            orders = [m.options["solver_order"] for m in others if m.drift < own.drift]
            fitting = [m for m in (own, *others) if bench.fits(m)]
            if not fitting:
                break
            allowed.setdefault(name, []).append(min(fitting, key=lambda m: m.drift))
    best = bench.exact
    for singles in sorted(allowed.values(), key=lambda each: min(m.cost for m in each)):
        # From the strongest value down, because the errors of several options add up.
        for single in reversed(singles):
            both = measure({**best.options, **single.options})
            if bench.fits(both) and both.cost < (1 - LEAST_GAIN) * best.cost:
                best = both
                break
    return best, found


class _Bench:
    """Measure configurations of a step's rollout on the same samples, points and random numbers."""

    def __init__(self, step: PRFL, samples: Sequence[Sampled], limit: float) -> None:
        model = model_of(step.sampler.transformer)
        hint = "Calibrate in one process, and pass the result to the others."
        check(not step.spec.shares_weights(), "step", step, "one of whole weights", hint=hint)
        check(model is not None, "step", step, "one of a model, not of a function")
        check(step.plan.to == "parameters", "step.plan.to", step.plan.to, "'parameters'")
        assert model is not None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        clean = all(p.grad is None for p in self.parameters)
        hint = "Call zero_grad() first."
        check(clean, "gradients of the step's parameters", "set", "None", hint=hint)
        self.step, self.samples, self.limit = step, samples, limit
        # Not that of the parameters, which may wait in host memory.
        self.device = samples[0].noise.device if samples else torch.device("cpu")
        least = WARM_UP + 1 if self.device.type == "cuda" else 1
        check(len(samples) >= least, "the number of samples", len(samples), f"at least {least}")
        self.points = spread_points(step, len(samples))
        self._latents: dict[int, dict[int, torch.Tensor]] = {}  # by sample, then by step
        self._gradient: list[torch.Tensor | None] = []
        self.longest = 0  # steps of a rollout before a gradient point
        self.exact = self.measure({})

    def fits(self, measured: Measured) -> bool:
        """Return True if errors are within the budget; NaN is not."""
        return measured.drift <= self.limit and measured.cosine >= LEAST_COSINE

    def moving_layers(self) -> tuple[int, ...] | None:
        """Return the layers of which sparse attention moves the output most, on the first sample.

        They are :data:`DENSE_SHARE` of all; None if the model's attention cannot be sparse.
        """
        if not self.step.engine.config.cache:  # nor does the engine open the model
            return None
        model = model_of(self.step.sampler.transformer)
        if model is not None and are_compiled(model):  # which no eager rollout opens
            return ()
        step, errors = copy.copy(self.step), dict[int, float]()
        options: Options = {"sparse_attention": LAYER_DENSITY, "compile": "off"}
        step.use_rollout(replace(step.engine.config, **options, check_every=_NEVER))
        step.engine.trajectories, step.engine.sparse_errors = 1, errors
        try:
            with warnings.catch_warnings():  # the reason why it cannot
                warnings.simplefilter("ignore", UserWarning)
                self._call(step, 0, self.samples[0])
        finally:
            for parameter in self.parameters:
                parameter.grad = None
        most = sorted(errors, key=lambda layer: -errors[layer])
        return tuple(sorted(most[: math.ceil(DENSE_SHARE * len(most))])) if errors else None

    def measure(self, options: Options) -> Measured:
        """Return the figures of the exact configuration with some options."""
        config = replace(self.step.engine.config, **options, drift_limit=None, check_every=_NEVER)
        step, work = copy.copy(self.step), _Work()
        step.use_rollout(config)
        step.engine.trajectories = 1  # the first would be checked
        exact, drift = not self._gradient, 0.0
        try:
            for number, sample in enumerate(self.samples):
                drift = max(drift, self._run(step, number, sample, work))
                if not drift <= self.limit:  # NaN is past every limit
                    # Its cost is of other gradient points than that of measurements which end.
                    unknown = math.nan
                    return Measured(dict(options), unknown, unknown, None, drift, unknown, unknown)
            gradients = [p.grad for p in self.parameters]
            if exact:
                self._gradient = [None if g is None else g.cpu().clone() for g in gradients]
            close = _compare(gradients, self._gradient)
            hint, expected = "Raise the target if all rewards exceed it", "one that is not zero"
            check(not exact or close[0] > 0, "the exact gradient", "zero", expected, hint=hint)
            return work.measured(options, drift, close)
        finally:
            for parameter in self.parameters:
                parameter.grad = None

    def _run(self, step: PRFL, number: int, sample: Sampled, work: "_Work") -> float:
        """Add the gradient and the work of a sample; return the drift, NaN if not finite."""
        exact = self._latents.get(number)
        seen: dict[int, torch.Tensor] = {}
        distances: list[torch.Tensor] = []

        def on_latents(index: int, x: torch.Tensor) -> None:
            if exact is None:
                seen[index] = x.cpu()
            else:
                distances.append(relative_distance(x, exact[index].to(x.device)))

        step.trajectory_type = partial(_Watched, work=work, on_latents=on_latents)
        timed = self.device.type == "cuda" and number >= WARM_UP
        points = len(self.points[number]) + step.plan.renoised
        with work.timed(self.device, points) if timed else work.counted(points):
            found = self._call(step, number, sample)
        if exact is None:
            check(bool(found.finite), "the exact loss", "not finite", "a finite number")
            self._latents[number] = seen
            self.longest = max(self.longest, work.longest)
        largest = float(torch.stack(distances).max()) if distances else 0.0
        return largest if found.finite else math.nan

    def _call(self, step: PRFL, number: int, sample: Sampled) -> PRFLOutput:
        return step(
            sample.noise,
            sample.conditions,
            latents=sample.latents,
            generator=torch.Generator().manual_seed(number),
            indices=self.points[number],
        )


class _Work:
    """Add up the work of steps, and that of their rollouts."""

    def __init__(self) -> None:
        self.flops = self.rollout_flops = self.points = self.timed_points = 0
        self.seconds = 0.0
        self.longest = 0  # steps of a rollout
        self._counter: FlopCounterMode | None = None

    @contextlib.contextmanager
    def counted(self, points: int) -> Iterator[None]:
        """Count the FLOPs of a step with a number of gradient points."""
        with flop_counter() as self._counter:
            yield
        self.flops += self._counter.get_total_flops()
        self.points += points
        self._counter = None

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        """Count the FLOPs within as those of a rollout, in a step that is counted."""
        before = 0 if self._counter is None else self._counter.get_total_flops()
        yield
        after = 0 if self._counter is None else self._counter.get_total_flops()
        self.rollout_flops += after - before

    @contextlib.contextmanager
    def timed(self, device: torch.device, points: int) -> Iterator[None]:
        """Time a step with a number of gradient points."""
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        yield
        torch.cuda.synchronize(device)
        self.seconds += time.perf_counter() - began
        self.timed_points += points

    def measured(self, options: Options, drift: float, close: tuple[float, float]) -> Measured:
        """Return the figures of a gradient point."""
        flops, rollout = self.flops / self.points, self.rollout_flops / self.points
        seconds = self.seconds / self.timed_points if self.timed_points else None
        return Measured(dict(options), flops, rollout, seconds, drift, *close)


class _Watched(Trajectory):
    """Report the latents after each step, and the work of steps without gradient."""

    def __init__(
        self,
        *args: Any,
        work: _Work,
        on_latents: Callable[[int, torch.Tensor], None],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._work, self._on_latents = work, on_latents

    def follow(self, x: torch.Tensor) -> None:
        """Continue from ``x``, and report it."""
        super().follow(x)
        self._on_latents(self.index, self.x.detach())

    def run(self, stop: int, *args: Any, **options: Any) -> None:
        """Take steps without gradient until step ``stop``."""
        self._work.longest = max(self._work.longest, self.steps_to(stop))
        with self._work.rollout():
            super().run(stop, *args, **options)


def _compare(
    gradients: Sequence[torch.Tensor | None], exact: Sequence[torch.Tensor | None]
) -> tuple[float, float]:
    """Return the cosine of two gradients, and their relative L2 distance; 0 and NaN for zeros."""
    product, own, norm, off = 0.0, 0.0, 0.0, 0.0
    for gradient, other in zip(gradients, exact, strict=True):
        if gradient is None or other is None:
            continue
        a, b = gradient.double().flatten(), other.to(gradient.device).double().flatten()
        product, own = product + float(a @ b), own + float(a @ a)
        norm, off = norm + float(b @ b), off + float((a - b).square().sum())
    if own == 0 or norm == 0:
        return 0.0, math.nan
    return product / math.sqrt(own * norm), math.sqrt(off / norm)
