"""Objectives of the trainer: reward feedback, losses of clean latents, reward fitting."""

import contextlib
import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import nn

from prfl_fast.data.dataset import Batch, PairBatch
from prfl_fast.feedback.step import PRFL
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.experts import Experts
from prfl_fast.models.velocity import (
    ModelCall,
    Precision,
    Velocity,
    autocast,
    check_finite,
    check_transformer,
    values_checked,
)
from prfl_fast.rewards.functions import Reward
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.schedulers import training_sigmas
from prfl_fast.training.losses import sft_loss
from prfl_fast.training.noising import model_timestep
from prfl_fast.training.preferences import (
    BETA,
    check_reference,
    dpo_margin,
    mean_loss,
    rwr_loss,
    score_of,
)
from prfl_fast.training.reward_losses import bt_loss, ce_loss, label_of
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import device_of
from prfl_fast.utils.transfers import to_device

Metrics = Mapping[str, torch.Tensor | float]


class Objective(Protocol):
    """Compute the gradient of one loss of a training step.

    An objective with state also has ``state_dict()``, which returns tensors and plain values, and
    ``load_state_dict(state)``; checkpoints contain this state. One of two experts
    (:class:`prfl_fast.models.Experts`) may have ``high_share``, the share of the steps that train
    the expert ``high``; the trainer asks the first objective.
    """

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Metrics:
        """Run forward and backward of one micro-batch; add ``loss_scale`` · gradient to ``.grad``.

        Args:
            draw: number of the micro-batch among those of all ranks; determines the data.
            generator: CPU generator, the only source of randomness.
            loss_scale: factor of the gradient.

        Returns:
            ``"loss"``, unscaled (NaN or infinite if the update must be skipped), and other scalars
            to log. The log has the mean over the micro-batches that returned the scalar. Tensors
            stay on the device: the trainer reads all of an update at once.
        """


def one_expert(
    model: nn.Module, objectives: Mapping[str, Objective], step: int
) -> contextlib.AbstractContextManager[None]:
    """Let a step train one of two experts, each in its share of the steps of the first objective.

    The steps are evenly spread, so that a resumed run needs no state.
    """
    if not isinstance(model, Experts) or len(model.trained) < 2:
        return contextlib.nullcontext()
    share = getattr(next(iter(objectives.values())), "high_share", 0.5)
    high = math.floor((step + 1) * share) > math.floor(step * share)
    return model.only("high" if high else "low")


def states_of(objectives: Mapping[str, Objective]) -> dict[str, Any]:
    """Return copies of the states of the objectives that have one."""
    stateful = {n: o for n, o in objectives.items() if hasattr(o, "state_dict")}
    return {name: copy.deepcopy(o.state_dict()) for name, o in stateful.items()}


def load_states(objectives: Mapping[str, Objective], states: Mapping[str, Any]) -> None:
    """Load the states of :func:`states_of`."""
    for name, state in states.items():
        objectives[name].load_state_dict(state)  # type: ignore[attr-defined]


def velocity_call(transformer: nn.Module, precision: Precision) -> nn.Module | ModelCall:
    """Return the transformer in the form that ``PRFL`` takes, under autocast if bf16."""
    return transformer if precision == "fp32" else ModelCall(transformer, precision)


class RewardCall:
    """Call a latent reward model under autocast."""

    def __init__(self, model: LatentRewardModel, precision: Precision) -> None:
        self.model, self.precision = model, precision

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        with autocast(x.device, self.precision):
            score: torch.Tensor = self.model(x, timestep, conditions)
        return score


def reward_call(reward: LatentRewardModel, precision: Precision) -> LatentRewardModel | RewardCall:
    """Freeze the reward and return it in the form that ``PRFL`` takes, under autocast if bf16."""
    reward.freeze()
    return reward if precision == "fp32" else RewardCall(reward, precision)


def _checked_on(device: torch.device | str, batch: Any) -> Any:
    """Check the latents of a batch, usually still on the host, and return it on ``device``."""
    for side in batch if isinstance(batch, PairBatch) else (batch,):
        check_finite("latents", side.latents)
    return batch.to(device)


class RewardFeedback:
    """Train a generator with the reward, by a :class:`prfl_fast.feedback.step.PRFL` step.

    The log has the loss, the weighted sum of the rewards as ``reward``, each of several rewards as
    ``reward/<name>``, the ``divergence``, and the largest measured ``drift`` of the rollouts.

    Args:
        step: a step whose plan sends the gradient to the parameters.
        batches: ``batches[n]`` returns the :class:`prfl_fast.data.dataset.Batch` of micro-batch n.
            Plans that start from data noise its latents; for other plans the latents give only the
            shape of the noise.
        points_generator: generator of the gradient points, whose state is the same on all ranks;
            with None the generator of the noise draws them.

    Raises:
        ValueError: if the plan of ``step`` sends the gradient to the noise or the latents.
    """

    def __init__(
        self,
        step: PRFL,
        batches: Any,
        device: torch.device | str = "cpu",
        points_generator: torch.Generator | None = None,
    ) -> None:
        hint = "Nothing would train; see prfl_fast.sampling.gradient"
        check(step.plan.to == "parameters", "step.plan.to", step.plan.to, "'parameters'", hint=hint)
        self.step, self.batches, self.device = step, batches, device
        self.points_generator = points_generator

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Metrics:
        batch: Batch = self.batches[draw]
        # Drawn on the CPU, so that a run has the same noise on every device.
        shape, source = batch.latents.shape, generator.device
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device=source)
        noise = to_device(noise, self.device)
        from_data = self.step.plan.start == "data"
        batch = _checked_on(self.device, batch) if from_data else batch.to(self.device)
        drawn = self.points_generator
        with values_checked():
            out = self.step(
                noise,
                batch.conditions,
                latents=batch.latents if from_data else None,
                generator=generator,
                indices=None if drawn is None else self.step.draw_points(drawn),
                loss_scale=loss_scale,
                wait=False,  # the trainer reads the loss with the norm of the gradients
            )
        finite = torch.as_tensor(out.finite, device=out.loss.device)
        metrics: dict[str, torch.Tensor | float] = {
            "loss": torch.where(finite, out.loss, math.nan),
            "reward": out.rewards.mean(),
        }
        if len(out.by_reward) > 1:
            metrics |= {f"reward/{name}": r.mean() for name, r in out.by_reward.items()}
        if out.divergence is not None:
            metrics["divergence"] = out.divergence
        if out.drift:
            metrics["drift"] = max(out.drift.values())
        return metrics

    @property
    def high_share(self) -> float:
        """Share of the gradient points that the expert ``high`` of two experts gets."""
        return self.step.high_share

    def state_dict(self) -> dict[str, Any]:
        """Return the rollout engine's count of trajectories, and the state of the points."""
        state = self.step.engine.state_dict()
        if self.points_generator is not None:
            state["points"] = self.points_generator.get_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state_dict`, of one process or of several ranks."""
        state = dict(state)
        points = state.pop("points", None)
        if points is not None and self.points_generator is not None:
            self.points_generator.set_state(points)
        self.step.engine.load_state_dict(state)

    @property
    def fallen_back(self) -> bool:
        """Return True if too much drift was measured, so that all rollouts are exact."""
        return self.step.engine.fallen_back

    @fallen_back.setter
    def fallen_back(self, value: bool) -> None:
        self.step.engine.fallen_back = value


class SupervisedFlow:
    """Train a generator on clean latents with :func:`prfl_fast.training.losses.sft_loss`.

    ``transformer`` is a supported model, or a function ``(x, timestep [B], conditions) ->
    velocity``, which gets batches on ``device``. ``batches[n]`` returns the
    :class:`prfl_fast.data.dataset.Batch` of micro-batch n. ``precision`` is ``"bf16"`` for autocast
    of a model, else ``"fp32"``; a function enters its own.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        batches: Any,
        *,
        shift: float = 5.0,
        integer_timesteps: bool = True,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.velocity: Any = transformer
        self.device: torch.device | str = device
        if isinstance(transformer, nn.Module):
            self.velocity = velocity_call(transformer, precision)
            self.device = device_of(transformer)
        else:
            hint = "Enter torch.autocast in the function"
            check(precision == "fp32", "precision", precision, "fp32 for a function", hint=hint)
        check_transformer(self.velocity)
        self.batches = batches
        self.levels: dict[str, Any] = {"shift": shift, "integer_timesteps": integer_timesteps}
        self._experts = transformer if isinstance(transformer, Experts) else None

    @property
    def high_share(self) -> float:
        """Share of the noise levels that are of the expert ``high`` of two experts."""
        assert self._experts is not None
        levels = training_sigmas(self.levels["shift"])
        timesteps = model_timestep(levels, self.levels["integer_timesteps"])
        return float(self._experts.is_high(timesteps).double().mean())

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Metrics:
        batch = _checked_on(self.device, self.batches[draw])
        with values_checked():
            loss, metrics = self._loss(batch, generator)
        (loss * loss_scale).backward()
        return {"loss": loss.detach(), **metrics}

    def _loss(self, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        """Return the loss of a batch with its graph, and scalars to log."""
        given: Any = {"generator": generator, **self.levels}
        return sft_loss(self.velocity, batch.latents, batch.conditions, **given), {}


class FlowDPO(SupervisedFlow):
    """Train a generator on preference pairs with :func:`prfl_fast.training.preferences.dpo_loss`.

    The log has the loss, the mean ``margin`` of the pairs, and the ``accuracy``, the share of the
    pairs whose margin is positive, ties counting half.

    Args:
        transformer, options: as of :class:`SupervisedFlow`.
        batches: ``batches[n]`` returns the :class:`prfl_fast.data.dataset.PairBatch` of
            micro-batch n.
        reference: the frozen initial model; None is ``transformer`` with its trained adapters off.
        beta: strength with which the model is held to the reference.

    Raises:
        ValueError: if ``reference`` is missing for a model without adapters or for a function.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        batches: Any,
        *,
        reference: nn.Module | Velocity | None = None,
        beta: float = BETA,
        **options: Any,
    ) -> None:
        super().__init__(transformer, batches, **options)
        check_reference(self.velocity, reference)
        if isinstance(reference, nn.Module):
            reference = velocity_call(reference, options.get("precision", "fp32"))
        self.reference, self.beta = reference, beta

    def _loss(self, batch: PairBatch, generator: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        win, lose = batch
        pair = (win.latents, lose.latents, win.conditions, lose.conditions)
        given: Any = {"generator": generator, **self.levels}
        given |= {"reference": self.reference, "beta": self.beta}
        margin = dpo_margin(self.velocity, *pair, **given)
        found = margin.detach()
        accuracy = ((found > 0).double() + 0.5 * (found == 0)).mean()
        metrics = {"margin": found.mean(), "accuracy": accuracy}
        return mean_loss(margin), metrics


class FlowRWR(SupervisedFlow):
    """Train a generator on clean latents with :func:`prfl_fast.training.preferences.rwr_loss`.

    The log has the loss and the mean ``reward``.

    Args:
        transformer, batches, options: as of :class:`SupervisedFlow`.
        reward: a function ``(x, timestep [B], conditions) -> [B]``, which scores the clean latents
            at timestep 0, or the name of a label, which is a number.
        temperature: the weight of a sample is ``exp(reward / temperature)``.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        batches: Any,
        reward: Reward | str,
        *,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(transformer, batches, **options)
        self.reward, self.temperature = reward, temperature

    def _loss(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        latents, conditions = batch.latents, batch.conditions
        if isinstance(self.reward, str):
            found = [score_of(record, self.reward) for record in batch.labels]
            numbers = torch.tensor(found, dtype=latents.dtype, device="cpu")
            rewards = to_device(numbers, latents.device)
        else:
            with torch.no_grad():
                rewards = self.reward(latents, latents.new_zeros(len(latents)), conditions)
        given: Any = {"generator": generator, "temperature": self.temperature, **self.levels}
        loss = rwr_loss(self.velocity, latents, conditions, rewards, **given)
        return loss, {"reward": rewards.mean()}


class RewardFit:
    """Train a latent reward model on 0/1 labels (``ce``) or preference pairs (``bt``).

    Args:
        batches: ``batches[n]`` returns a :class:`prfl_fast.data.dataset.Batch` for ``ce``, a
            :class:`prfl_fast.data.dataset.PairBatch` for ``bt``.
        label: name of the label that ``ce`` fits.
        missing_label: label of records that lack it; None refuses them.
        shift: shift of the noise levels, see :func:`prfl_fast.rollout.schedulers.training_sigmas`.
        integer_timesteps: False calls the model at 1000·σ, not at that number rounded down.
        precision: ``"bf16"`` for autocast, else ``"fp32"``.
    """

    def __init__(
        self,
        reward: LatentRewardModel,
        batches: Any,
        *,
        loss: Literal["ce", "bt"] = "ce",
        label: str = "motion_quality",
        missing_label: float | None = None,
        shift: float = 5.0,
        integer_timesteps: bool = True,
        precision: Precision = "fp32",
    ) -> None:
        self.reward, self.batches, self.loss = reward, batches, loss
        self.label, self.missing_label = label, missing_label
        self.precision = precision
        self.levels: dict[str, Any] = {"shift": shift, "integer_timesteps": integer_timesteps}
        self.device = next(reward.parameters()).device

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Metrics:
        batch = _checked_on(self.device, self.batches[draw])
        draws: dict[str, Any] = {"generator": generator, **self.levels}
        with values_checked(), autocast(self.device, self.precision):
            if isinstance(batch, PairBatch):
                win, lose = batch
                clean = (win.latents, lose.latents, win.conditions, lose.conditions)
                loss = bt_loss(self.reward, *clean, **draws)
            else:
                found = [label_of(r, self.label, self.missing_label) for r in batch.labels]
                labels = torch.tensor(found, dtype=torch.float32, device="cpu")
                loss = ce_loss(self.reward, batch.latents, batch.conditions, labels, **draws)
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}
