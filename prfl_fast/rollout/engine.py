"""Rollout engine: run the steps without gradient according to a :class:`RolloutConfig`.

With 40 steps and one gradient point there are 19 of them on average. They take 70 % of a gradient
point's FLOPs at 14B and 480p, supervised step included (counted, bench/RESULTS.md).
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from prfl_fast.models.adapter import Conditions
from prfl_fast.models.block_timer import WAITING, BlockTimer, describe_ratio
from prfl_fast.models.compiled_blocks import are_compiled
from prfl_fast.models.compiler_errors import is_compiler_error
from prfl_fast.models.experts import members
from prfl_fast.models.inference import (
    LayerPrecision,
    RolloutModel,
    RolloutOptions,
    UnsupportedError,
)
from prfl_fast.models.other import VelocityModel
from prfl_fast.models.registry import find_adapter, find_blocks
from prfl_fast.models.sparse_attention import SparseOptions
from prfl_fast.models.step_cache import ReuseCounts, StepCacheOptions
from prfl_fast.models.velocity import ModelCall, Velocity, check_transformer, model_of
from prfl_fast.rollout.adapters import read_adapters, shared_adapters
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.utils.checks import check, reason_of
from prfl_fast.utils.modules import unwrap, weights_of
from prfl_fast.utils.sharded import (
    find_owners,
    holds_on_all_ranks,
    rollout_weights,
    shares_weights,
)

logger = logging.getLogger(__name__)
# A message of the logger.
SAVED_SO_FAR = "step caching saved %.1f of the first %d forwards of rollouts"

Branches = Literal["all", "first"]


def why_not_compiled(
    mode: Literal["auto", "on", "off"], *, device: str, ratio: float | None, same_shape: bool
) -> str | None:
    """Return the reason why blocks are not compiled; None if they are.

    ``ratio`` is that of :class:`BlockTimer`, None before it is measured. ``same_shape`` is True if
    this engine compiled for no other shapes before.
    """
    # Compiling fuses the operations between kernels, so that a slow host launches less. It takes
    # time for each new shape, and large blocks do not wait for launches.
    if mode == "on":
        return None
    if mode == "off":
        return "compile is 'off'"
    if device != "cuda":
        return f"the latents are on {device}, where no bit must change and launches cost little"
    if ratio is None:
        return "the first rollout measures their times"
    if ratio < WAITING:
        return describe_ratio(ratio)
    if not same_shape:
        return "these latents or conditions have other shapes than those compiled for before"
    return None


class RolloutSession:
    """Hold the model and the caches of one run of a trajectory.

    ``open(compiled, branches, adapted)`` opens the model for ``steps`` with or without compiled
    blocks, and with or without the rollout's adapter: once for each call with ``"all"`` branches of
    guidance, or for the ``"first"`` branch of a batch.
    """

    def __init__(
        self,
        engine: "RolloutEngine",
        open: Callable[[bool, Branches, bool], list[RolloutModel]],
        steps: Sequence[int],
        compiled: bool,
        guidance: Sequence[Guidance] | None,
    ) -> None:
        self._engine, self._open, self._compiled = engine, open, compiled
        self._models: dict[tuple[Branches, bool], list[RolloutModel]] = {}
        self._adds = engine.adds  # as it was opened: after too much drift the engine adds nothing
        self._opened("all", self._adds)
        self._guidance = guidance
        self._positions = {step: position for position, step in enumerate(steps)}

    def velocity(self, x: torch.Tensor, step: int, sigma: float | None) -> torch.Tensor:
        """Return the guided velocity ``[B, C, F, H, W]`` at latents ``x`` before a solver step.

        The noise level ``sigma`` decides the precision; None gives an exact velocity.
        """
        engine, position = self._engine, self._positions[step]
        guidance: Guidance | None = None
        branches: Branches = "all"
        if self._guidance is not None and engine.guides(sigma):
            guidance = self._guidance[step]
        elif self._guidance is not None:
            branches = "first"
        precisions: dict[str, Any] = {} if sigma is None else engine.precisions(sigma)
        if sigma is not None and engine.reuses:
            precisions["reuse"] = True
        # One call of twice the batch: two calls take 1.26 times as long on a CPU, and 0.61 of the
        # peak bytes (bench/RESULTS.md).
        x = torch.cat([x, x]) if guidance is not None and guidance.batched else x
        outputs: list[torch.Tensor] = []
        adapted = self._adds and sigma is not None  # an exact rollout has no adapter
        while len(outputs) < len(models := self._opened(branches, adapted)):
            try:
                with engine.context():
                    v = models[len(outputs)].velocity(x, position, **precisions)
                outputs.append(v)
            except RuntimeError as error:
                if not self._compiled or not engine.stop_compiling_after(error):
                    raise
                self._compiled, self._models = False, {}
        return outputs[0] if guidance is None else guidance.combine(outputs)

    def _opened(self, branches: Branches, adapted: bool) -> list[RolloutModel]:
        if branches == "first" and self._guidance is not None and not self._guidance[0].batched:
            return self._opened("all", adapted)[:1]
        if (branches, adapted) not in self._models:
            opened = self._open(self._compiled, branches, adapted)
            self._models[branches, adapted] = opened
        return self._models[branches, adapted]

    def notes(self) -> list[str]:
        """Return the reasons why layers stay unmerged or exact."""
        return [note for models in self._models.values() for m in models for note in m.notes]


class RolloutEngine:
    """Run the steps without gradient of all of one model's trajectories.

    An engine is an argument of :class:`prfl_fast.rollout.trajectory.Trajectory`. Between runs it
    holds no tensor. For a velocity function, ``stride``, ``solver_order`` and
    ``guidance_interval`` are the only options that apply.

    Attributes:
        fallen_back: True after a check measured more drift than allowed; rollouts are then exact.
        trajectories: number of trajectories that had inexact steps.
        drift: drift of the last check, by solver step; None before the first.
        reuse: forwards that could reuse residuals of blocks, and the part of them that was saved;
            a forward that runs one of four blocks adds 0.75.
        sparse_errors: None; or a dict, which keeps attention dense and receives the distance of
            sparse attention's output, summed over calls, by transformer block.
        notes: reasons why options of the configuration do not apply. Each is reported once: as a
            warning if the user set the option, else to this module's logger.

    Raises:
        TypeError: if the model is unsupported.
        FileNotFoundError: if there is no file ``config.adapter``.
        ValueError: if the adapter cannot be read or does not fit the model, or
            ``sparse_dense_layers`` has a number that no block of the model has.
    """

    def __init__(
        self, transformer: nn.Module | ModelCall | Velocity, config: RolloutConfig | None = None
    ) -> None:
        check_transformer(transformer)
        self.config = RolloutConfig() if config is None else config
        self.model = model_of(transformer)
        self.context: Callable[[], contextlib.AbstractContextManager[Any]] = (
            transformer.context if isinstance(transformer, ModelCall) else contextlib.nullcontext
        )
        self._call_precision = transformer.precision if isinstance(transformer, ModelCall) else None
        self.fallen_back = False
        self.trajectories = 0
        self.drift: dict[int, float] | None = None
        self.reuse = ReuseCounts()
        self._forwards_reported = 0
        self.sparse_errors: dict[int, float] | None = None
        self.notes: list[str] = []
        # A VelocityModel runs its function at each step, as a plain function does.
        plain = self.model is None or isinstance(unwrap(self.model), VelocityModel)
        self._opens = self._supported = not plain
        self._adapter = read_adapters(None if plain else self.model, self.config)
        if not plain and self.config.sparse_dense_layers:
            _check_layers(self.model, self.config.sparse_dense_layers)
        self._compiled_shapes: Any = None
        self._compiler_fails = False
        self._timer = BlockTimer()

    def runs(self, transformer: object) -> bool:
        """Return True if the engine was made for this model in this precision."""
        precision = transformer.precision if isinstance(transformer, ModelCall) else None
        return model_of(transformer) is self.model and precision == self._call_precision

    @property
    def _active(self) -> RolloutConfig:
        # After too much drift, all rollouts run with the exact defaults.
        return RolloutConfig() if self.fallen_back else self.config

    def stride_at(self, sigma: float) -> int:
        """Return the steps of the schedule that a step of the next rollout covers at a level."""
        return self._active.stride_at(sigma)

    @property
    def skips(self) -> bool:
        """Return True if the next rollout may leave out steps of the schedule."""
        return self._active.skips

    def order_at(self, sigma: float) -> int | None:
        """Return the solver's order in the next rollout at a level; None is the scheduler's own."""
        return self._active.order_at(sigma)

    @property
    def sets_order(self) -> bool:
        """Return True if the next rollout chooses the solver's order."""
        return self._active.solver_order is not None

    def guides(self, sigma: float | None) -> bool:
        """Return True if steps at this noise level have guidance; None is an exact step."""
        interval = self._active.guidance_interval
        return sigma is None or interval is None or interval[0] <= sigma <= interval[1]

    @property
    def changes_sampler(self) -> bool:
        """Return True if the next rollout has another solver, fewer steps or fewer branches."""
        return self._active.changes_sampler

    @property
    def inexact(self) -> bool:
        """Return True if the next rollout has inexact steps."""
        active = self._active
        by_model = active.fp8 or active.sparse or active.reuses or self.adds
        return self.changes_sampler or (by_model and self._supported)

    @property
    def adds(self) -> bool:
        """Return True if steps of the next rollout run with an adapter of its own."""
        return self._active.adapter is not None

    @property
    def reuses(self) -> bool:
        """Return True if steps of the next rollout may reuse residuals of blocks."""
        return self._active.reuses

    def precisions(self, sigma: float) -> dict[str, LayerPrecision | float]:
        """Return precisions of linear layers and attention at a noise level, and its density."""
        intervals = {"linears": self._active.fp8_linears, "attention": self._active.fp8_attention}
        found: dict[str, LayerPrecision | float] = {
            name: "fp8" if interval and interval[0] <= sigma <= interval[1] else "exact"
            for name, interval in intervals.items()
        }
        if self._active.sparse:
            found["density"] = self._active.density_at(sigma)
        return found

    def should_check_drift(self) -> bool:
        """Return True if an exact rollout should run beside the next inexact one."""
        return self.trajectories % self._active.check_every == 0

    @contextlib.contextmanager
    def open(
        self,
        x: torch.Tensor,
        timesteps: Mapping[int, torch.Tensor],
        branches: Sequence[Conditions],
        guidance: Sequence[Guidance] | None = None,
    ) -> Iterator[RolloutSession | None]:
        """Open the model for some steps of a trajectory; yield None if it cannot be opened.

        Args:
            x: latents of a model call, ``[B, C, F, H, W]``.
            timesteps: ``[B]`` of each step that may be taken.
            branches: conditions of the calls at each step.
            guidance: of each step of the schedule.
        """
        with contextlib.nullcontext() if self.model is None else rollout_weights(self.model):
            session = self._session(x, timesteps, branches, guidance) if timesteps else None
            try:
                yield session
            finally:
                for note in session.notes() if session is not None else ():
                    self._report_once(note)
                done = self.reuse
                # Each time the number has doubled: a run has thousands of rollouts.
                if done.forwards and done.forwards >= 2 * self._forwards_reported:
                    self._forwards_reported = done.forwards
                    logger.info(SAVED_SO_FAR, done.saved, done.forwards)

    def _session(
        self,
        x: torch.Tensor,
        timesteps: Mapping[int, torch.Tensor],
        branches: Sequence[Conditions],
        guidance: Sequence[Guidance] | None,
    ) -> RolloutSession | None:
        if not self._opens:
            self._report_once(
                "rollouts call the transformer as it is: it is a function, not a supported model "
                "or a ModelCall of one"
            )
            return None
        if not self.config.cache:
            return None
        assert self.model is not None
        model, adapter, shared = self.model, find_adapter(self.model), shares_weights(self.model)
        adapters = shared_adapters(self._adapter)

        def open(compiled: bool, wanted: Branches, adapted: bool) -> list[RolloutModel]:
            timer = self._timer if x.device.type == "cuda" and not compiled else None
            config = self._active
            thresholds = config.teacache, config.first_block_cache, config.teacache_model
            reuse = StepCacheOptions(*thresholds, self.reuse, shared)
            stop = self._stop_compiling if shared and self.config.compile == "auto" else None
            added = adapters if adapted else None
            chosen = config.sparse_predictor, tuple(config.sparse_dense_layers), self.sparse_errors
            choices = reuse, SparseOptions(*chosen), stop, added
            options = RolloutOptions(self.config.merge_lora, compiled, timer, *choices)
            find_owners(model)
            inputs: tuple[Any, ...] = (x, list(timesteps.values()), branches)
            if wanted == "first":
                inputs = _first_half(*inputs)
            latents, times, several = inputs
            # The values to cache read embeddings outside a call of the model.
            with self.context(), weights_of(unwrap(model)):
                return [
                    adapter.open_rollout(model, latents, times, conditions, options)
                    for conditions in several
                ]

        compiled = self._compiles(x, branches, are_compiled(model))
        if shared and self.config.compile == "auto":  # ranks agree on errors of compiled blocks
            compiled = bool(holds_on_all_ranks(torch.tensor(compiled, device=x.device)))
        try:
            session = RolloutSession(self, open, list(timesteps), compiled, guidance)
        except UnsupportedError as reason:
            if self.adds:  # the steps would be too few for the model without it
                raise ValueError(
                    f"adapter {self.config.adapter} cannot be added: {reason}"
                ) from None
            self._supported = False
            self._report_once(f"rollouts call the model as it is: {reason}")
            return None
        self._supported = True
        return session

    def _compiles(self, x: torch.Tensor, branches: Sequence[Conditions], others: bool) -> bool:
        """Return True if blocks are compiled; ``others`` is True if other steps do too."""
        # Eager blocks beside compiled ones would round differently.
        ratio = WAITING if others else self._timer.ratio()
        shapes = [x.shape, *({k: v.shape for k, v in c.items()} for c in branches)]
        reason = why_not_compiled(
            self.config.compile,
            device=x.device.type,
            ratio=ratio,
            same_shape=self._compiled_shapes in (None, shapes),
        )
        if reason is None and self._compiler_fails:
            return False
        if reason is None:
            self._compiled_shapes = shapes
            if self.config.compile == "auto":
                why = "steps with gradient compile them" if others else describe_ratio(ratio or 0.0)
                self._report_once(f"the rollout's blocks are compiled: {why}", asked=False)
        elif self.config.compile != "off":
            self._report_once(f"the rollout's blocks are not compiled: {reason}", asked=False)
        return reason is None

    def stop_compiling_after(self, error: RuntimeError) -> bool:
        """Stop compiling and return True if ``compile="auto"`` and the error is the compiler's."""
        if self.config.compile != "auto" or not is_compiler_error(error):
            return False
        if shares_weights(self.model):  # the other ranks go on
            return False
        self._stop_compiling(error)
        return True

    def _stop_compiling(self, error: RuntimeError) -> None:
        self._compiler_fails = True
        kind = type(error).__name__
        self._report_once(f"the rollout's blocks are not compiled: {kind}: {reason_of(error)}")

    def _report_once(self, note: str, *, asked: bool | None = None) -> None:
        if note in self.notes:
            return
        self.notes.append(note)
        if self.config.needs_model if asked is None else asked:
            warnings.warn(note, stacklevel=2)
        else:
            logger.info(note)

    def record_drift(self, drift: Mapping[int, float], sigmas: Sequence[float]) -> bool:
        """Store the measured drift; return True, and become exact, if it exceeds ``drift_limit``.

        The last entry of ``drift`` is new; ``sigmas`` is the noise level before every step.
        """
        self.drift = dict(drift)
        step, found = list(drift.items())[-1]
        limit = self._active.drift_limit
        # A comparison with NaN is False, so NaN exceeds every limit.
        if limit is None or found <= limit:
            return False
        self.fallen_back = True
        figures = ", ".join(f"{value:.3g} at step {step}" for step, value in drift.items())
        text = (
            f"the rollout's drift from an exact one is {found:.3g} at step {step} "
            f"(sigma {sigmas[step]:.3g}), past drift_limit {limit:g}. This rollout continues from "
            f"the exact latents, and all later rollouts are exact. Drift: {figures}. Begin a new "
            "run with weaker options or a larger drift_limit (rollout.drift, if it chose them)"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the counts that a resumed run needs to check the same trajectories."""
        return {"trajectories": self.trajectories, "fallen_back": self.fallen_back}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; raise ``ValueError`` if the entries differ."""
        ok, expected = set(state) == set(self.state_dict()), "fallen_back and trajectories"
        check(ok, "the rollout engine's state", sorted(state), expected)
        self.trajectories = int(state["trajectories"])
        self.fallen_back = bool(state["fallen_back"])
        if self.fallen_back and self.config.inexact:
            text = "all rollouts are exact: before the checkpoint their drift was past drift_limit"
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def _check_layers(model: Any, layers: Sequence[int]) -> None:
    """Raise ``ValueError`` if a number is that of no block of the model or of its experts."""
    for member in members(unwrap(model)):
        count = len(find_blocks(member).blocks(member))
        expected = f"numbers below {count}, the model's blocks"
        check(all(n < count for n in layers), "sparse_dense_layers", layers, expected)


def _first_half(
    x: torch.Tensor, timesteps: list[torch.Tensor], branches: Sequence[Conditions]
) -> tuple[torch.Tensor, list[torch.Tensor], Sequence[Conditions]]:
    """Return the arguments of a call without the negative prompt's half of the batch."""
    half = len(x) // 2
    first = {key: value[:half] for key, value in branches[0].items()}
    return x[:half], [t[:half] for t in timesteps], (first,)
