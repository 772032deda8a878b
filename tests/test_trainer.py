"""The training loop: what an update is, what is skipped, saved, and repeated by a resume."""

import json
import math
import os
import signal
import weakref

import pytest
import torch
from runs import log, samples
from torch import nn
from wan import tiny_wan

from prfl_fast.data import Batches, Pair
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.patching import patch
from prfl_fast.reward import LatentRewardModel
from prfl_fast.rollout_engine import RolloutPrecision, RolloutSettings
from prfl_fast.schedulers import FlowEuler
from prfl_fast.step import PRFL
from prfl_fast.trainer import (
    NonFiniteTraining,
    OutOfMemory,
    RewardFeedback,
    RewardFit,
    SupervisedFlow,
    Trainer,
    TrainSettings,
    add_lora,
    autocast,
    reward_call,
    velocity_call,
)
from prfl_fast.training_state import latest_checkpoint, list_checkpoints, load_tensors


class Noisy:
    """Fits a linear layer to random targets; NaN or infinite on the draws it is told."""

    def __init__(self, model, bad=(), bad_gradient=()):
        self.model, self.bad, self.bad_gradient = model, bad, bad_gradient
        self.draws = []

    def __call__(self, draw, generator, loss_scale):
        self.draws.append(draw)
        x = torch.randn(4, 3, generator=generator)
        y = self.model(x.to(self.model.weight.dtype))
        loss = (y - torch.randn(4, 2, generator=generator)).square().mean()
        loss = loss * torch.rand(())  # the global generator counts too
        if draw in self.bad:
            loss = loss * math.nan
        (loss * loss_scale).backward()
        if draw in self.bad_gradient:
            self.model.bias.grad.fill_(math.inf)
        return {"loss": loss.detach(), "half": loss.detach() / 2}


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def trainer(model=None, folder=None, names=("a",), **options):
    model = model or linear()
    keys = ("resume", "identity", "on_step", "tensorboard", "objectives", "advise")
    rest = {key: options.pop(key) for key in keys if key in options}
    objectives = rest.pop("objectives", None) or {name: Noisy(model) for name in names}
    settings = TrainSettings(**{"steps": 4, "learning_rate": 0.1, **options})
    return Trainer(model, objectives, settings, folder=folder, **rest)


def test_an_update_is_adamw_on_the_accumulated_clipped_gradient():
    model, reference = linear(), linear()
    torch.manual_seed(5)
    history = trainer(model, steps=3, accumulation=2, clip_norm=0.1, warmup_steps=2).run().history
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=0.1, betas=(0.9, 0.999), weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(0)
    objective = Noisy(reference)
    torch.manual_seed(5)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * min(1, (step + 1) / 2)
        losses = [objective(2 * step + i, generator, 0.5)["loss"] for i in range(2)]
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert history[step]["a/loss"] == pytest.approx(sum(map(float, losses)) / 2, rel=1e-6)
        assert history[step]["a/grad_norm"] == pytest.approx(float(norm), rel=1e-6)
        assert history[step]["lr"] == optimizer.param_groups[0]["lr"]
    assert torch.equal(model.weight, reference.weight) and torch.equal(model.bias, reference.bias)


def test_every_objective_has_its_own_step_and_draws():
    run = trainer(names=("a", "b"), steps=3, accumulation=2)
    steps = []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    result = run.run()
    assert len(steps) == 6
    assert run.objectives["a"].draws == run.objectives["b"].draws == list(range(6))
    assert set(result.history[0]) == {"step", "lr", "skipped", "seconds"} | {
        f"{name}/{key}" for name in "ab" for key in ("loss", "half", "grad_norm")
    }
    assert run.model.weight.grad is None


def test_a_metric_is_the_mean_over_the_micro_batches_that_returned_it():
    class Sometimes(Noisy):
        def __call__(self, draw, generator, loss_scale):
            metrics = super().__call__(draw, generator, loss_scale)
            return metrics | ({"drift": float(draw)} if draw in (1, 2, 7) else {})

    model = linear()
    history = trainer(model, objectives={"a": Sometimes(model)}, steps=3, accumulation=3).run()
    assert [record.get("a/drift") for record in history.history] == [1.5, None, 7.0]


@pytest.mark.parametrize("kind", ["bad", "bad_gradient"])
def test_a_non_finite_update_changes_nothing_and_is_counted(kind):
    model = linear()
    seen = []

    def note(record):
        state = run.optimizer.state_dict()["state"]
        moments = [
            value[key].clone()
            for value in state.values()
            for key in ("exp_avg", "exp_avg_sq", "step")
        ]
        seen.append(
            (
                record,
                [p.detach().clone() for p in model.parameters()] + moments + list(run.ema.values()),
            )
        )
        seen[-1] = (record, [tensor.clone() for tensor in seen[-1][1]])

    run = trainer(
        model, objectives={"a": Noisy(model, **{kind: (2,)})}, on_step=note, ema_decay=0.5
    )
    result = run.run()
    assert [record["skipped"] for record, _ in seen] == [0, 0, 1, 1] and result.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(seen[1][1], seen[2][1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2][1], seen[3][1], strict=True))
    skipped = seen[2][0]
    assert skipped["a/loss"] is None if kind == "bad" else skipped["a/grad_norm"] is None


def test_five_bad_steps_in_a_row_stop_with_the_last_good_state_on_disk(tmp_path):
    model = linear()
    objectives = {"a": Noisy(model, bad=(1, 3, 4, 5, 6, 7))}
    run = trainer(
        model,
        tmp_path,
        objectives=objectives,
        steps=20,
        on_step=lambda r: weights.append(model.weight.clone()),
    )
    weights = []
    with pytest.raises(
        NonFiniteTraining,
        match=r"5 steps in a row .*a at step 8.*last good state is in .*step-00000008",
    ):
        run.run()
    saved = load_tensors(tmp_path / "step-00000008" / "model" / "model.safetensors")
    assert torch.equal(
        saved["weight"], weights[2]
    )  # the update of step 3 is the last that was taken
    assert [r["skipped"] for r in log(tmp_path)] == [0, 1, 1, 2, 3, 4, 5, 6]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = trainer(folder=tmp_path, steps=2, save_every=1)
    run.on_step = lambda record: run.model.bias.data.fill_(math.nan)
    with pytest.raises(
        NonFiniteTraining, match="bias has NaN or infinite values at step 2: not saved"
    ):
        run.run()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


def test_the_average_follows_its_formula():
    model = linear()
    expected = model.weight.detach().clone()

    def follow(record):
        expected.lerp_(model.weight.detach(), 0.25)

    run = trainer(model, ema_decay=0.75, on_step=follow)
    run.run()
    torch.testing.assert_close(run.ema["weight"], expected)


def test_the_average_of_bfloat16_weights_is_float32():
    model = linear().bfloat16()
    expected = model.weight.detach().float()

    def follow(record):
        expected.lerp_(model.weight.detach().float(), 0.001)

    run = trainer(model, ema_decay=0.999, on_step=follow)
    run.run()
    assert run.ema["weight"].dtype is torch.float32
    torch.testing.assert_close(run.ema["weight"], expected, rtol=1e-6, atol=0)
    assert not torch.equal(run.ema["weight"], run.ema["weight"].bfloat16().float())


KINDS_HERE = ["adamw", "adamw-sr", "adamw8bit", "adamw-cpu"]


@pytest.mark.parametrize("gradients", ["parameter", "fp32"])
@pytest.mark.parametrize("kind", KINDS_HERE)
def test_every_optimizer_resumes_bit_for_bit_on_bfloat16(tmp_path, kind, gradients):
    def run(folder, steps, seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 4096).bfloat16()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        torch.manual_seed(8)
        options = {"optimizer": kind, "gradients": gradients, "accumulation": 2, "clip_norm": 1e-3}
        run = trainer(model, folder, objectives={"a": Wide(model)}, steps=steps, **options)
        run.run()
        return run

    whole = run(tmp_path / "whole", 4, 0)
    before = whole.model.weight.detach().clone()
    run(tmp_path / "broken", 2, 0)
    resumed = run(tmp_path / "broken", 4, 1)
    assert log(tmp_path / "broken") == log(tmp_path / "whole")
    assert torch.equal(resumed.model.weight, before) and before.std() > 0
    states = [
        torch.load(tmp_path / name / "step-00000004" / "state.pt", weights_only=True)["random"]
        for name in ("whole", "broken")
    ]
    assert torch.equal(states[0]["torch"], states[1]["torch"])


class Wide(Noisy):
    """Noisy, for a layer of any width."""

    def __call__(self, draw, generator, loss_scale):
        x = torch.randn(4, 3, generator=generator).to(self.model.weight.dtype)
        loss = (self.model(x) * torch.rand(())).square().mean()
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_bfloat16_generator_trains(kind):
    transformer = patch(tiny_wan(layers=1, heads=1)).bfloat16()
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    objectives = {"sft": SupervisedFlow(transformer, Batches(samples(4), 2))}
    settings = TrainSettings(steps=8, learning_rate=3e-3, optimizer=kind, gradients="fp32")
    history = Trainer(transformer, objectives, settings).run().history
    losses = [record["sft/loss"] for record in history]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not any(torch.equal(before[n], p) for n, p in transformer.named_parameters())
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}


class Full(Noisy):
    """Runs out of memory on the given draws, in the forward or in the backward."""

    def __init__(self, model, draws, place="forward"):
        super().__init__(model)
        self.full, self.place, self.kept = list(draws), place, []

    def __call__(self, draw, generator, loss_scale):
        activation = torch.ones(4, requires_grad=True)
        self.kept.append(weakref.ref(activation))
        if draw in self.full:
            self.full.remove(draw)
            torch.randn(3, generator=generator)
            if self.place == "backward":
                activation.register_hook(no_memory)
                activation.sum().backward()
            no_memory()
        return super().__call__(draw, generator, loss_scale)


def no_memory(*_):
    torch.rand(())
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_out_of_memory_says_where_and_what_and_can_be_gone_on_from(tmp_path, place):
    model = linear()
    objectives = {"a": Noisy(model), "b": Full(model, [3], place)}
    other = nn.Linear(256, 256)
    objectives["b"].step = [lambda x, reward=None: other(x)]
    advice = ["attention, offloaded, needs 30 GiB"]
    options = {"steps": 4, "accumulation": 2, "save_every": 1, "ema_decay": 0.9}
    torch.manual_seed(1)
    run = trainer(
        model, tmp_path / "broken", objectives=objectives, advise=lambda: advice[0], **options
    )
    with pytest.raises(OutOfMemory) as caught:
        run.run()
    told = str(caught.value).splitlines()
    assert told[0] == (
        f"out of memory in objective 'b', {place} of micro-batch 2, step 2: "
        "CUDA out of memory. Tried to allocate 7.00 GiB."
    )
    # 8 weights: 4 bytes each of weight, gradient, average, twice that and two counters of states.
    sizes = {"weights": 32, "gradients": 32, "optimizer": 72, "average": 32}
    expected = [f"{n} {b / 2**20:.2f} MiB" for n, b in sizes.items()]
    assert told[1] == "live: " + ", ".join([*expected, "other models 0.25 MiB"])
    assert told[2:] == advice
    # Nothing of the update is left, in memory (though the error is) or on disk.
    assert all(p.grad is None for p in model.parameters())
    assert objectives["b"].kept[-1]() is None
    assert [step for step, _ in list_checkpoints(tmp_path / "broken")] == [1]
    with pytest.raises(ValueError, match="step 2 has had the update of a only: run.. finishes it"):
        run.save()
    run.run()
    whole = linear()
    torch.manual_seed(1)
    trainer(
        whole,
        tmp_path / "whole",
        objectives={"a": Noisy(whole), "b": Full(whole, [])},
        **options,
    ).run()
    assert log(tmp_path / "broken") == log(tmp_path / "whole")
    assert torch.equal(model.weight, whole.weight)


class Counting(Full):
    """Carries a count from call to call, which its loss depends on."""

    def __init__(self, model, draws=()):
        super().__init__(model, draws)
        self.model, self.count = model, 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def __call__(self, draw, generator, loss_scale):
        self.count += 1
        metrics = super().__call__(draw, generator, loss_scale * self.count)
        return metrics | {"count": float(self.count)}


def test_what_an_objective_carries_is_saved_and_resumed(tmp_path):
    def run(folder, steps, draws=()):
        model = linear()
        objectives = {"a": Counting(model, draws), "b": Noisy(model)}
        options = {"steps": steps, "accumulation": 2, "save_every": 1, "clip_norm": 0.1}
        return trainer(model, folder, objectives=objectives, **options)

    torch.manual_seed(5)
    whole = run(tmp_path / "whole", 4)
    whole.run()
    torch.manual_seed(5)
    run(tmp_path / "halves", 2).run()
    resumed = run(tmp_path / "halves", 4)
    assert resumed.objectives["a"].count == 4
    resumed.run()
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    assert torch.equal(resumed.model.weight, whole.model.weight)
    # A micro-batch that found the device full is not counted twice.
    torch.manual_seed(5)
    full = run(tmp_path / "full", 4, draws=[5])
    with pytest.raises(OutOfMemory):
        full.run()
    assert full.objectives["a"].count == 4
    full.run()
    assert log(tmp_path / "full") == log(tmp_path / "whole")


def test_out_of_memory_in_the_optimizer_step_ends_the_run(tmp_path, monkeypatch):
    run = trainer(folder=tmp_path, save_every=1, advise=lambda: 1 / 0)
    run.on_step = lambda record: monkeypatch.setattr(run.optimizer, "step", no_memory)
    with pytest.raises(OutOfMemory, match="in the optimizer step of objective 'a', step 2") as e:
        run.run()
    assert "(no advice: division by zero)" in str(e.value)
    assert run.model.weight.grad is None
    for call in (run.run, run.save):
        with pytest.raises(ValueError, match="start again from the last checkpoint"):
            call()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


def test_other_errors_pass_as_they_are():
    def fail(*_):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        trainer(objectives={"a": fail}).run()
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    options = {"names": ("a", "b"), "ema_decay": 0.9, "save_every": 1, "warmup_steps": 3}
    torch.manual_seed(1)
    whole = trainer(linear(), tmp_path / "whole", **options)
    torch.manual_seed(2)
    whole.run()

    class Stop(Exception):
        pass

    def interrupt(record):
        if record["step"] == stop + 1:
            raise Stop

    options["save_every"] = stop
    model = linear()
    broken = trainer(model, tmp_path / "broken", on_step=interrupt, **options)
    torch.manual_seed(2)
    with pytest.raises(Stop):
        broken.run()
    assert [r["step"] for r in log(tmp_path / "broken")][-1] == stop + 1
    (latest_checkpoint(tmp_path / "broken").parent / "step-00000099.tmp-1-00000000").mkdir()
    torch.manual_seed(77)
    resumed = trainer(linear(3), tmp_path / "broken", **options)
    assert resumed.result.step == latest_step(tmp_path / "broken")
    resumed.run()
    assert log(tmp_path / "broken") == log(tmp_path / "whole")
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.ema["bias"], whole.ema["bias"])
    assert not list((tmp_path / "broken").glob("*.tmp-*"))


def latest_step(folder):
    return list_checkpoints(folder)[-1][0]


def test_a_longer_run_goes_on_and_a_finished_one_does_nothing(tmp_path):
    trainer(linear(), tmp_path, steps=2).run()
    before = (tmp_path / "step-00000002" / "state.pt").stat().st_mtime_ns
    assert trainer(linear(), tmp_path, steps=2).run().history == []
    assert (tmp_path / "step-00000002" / "state.pt").stat().st_mtime_ns == before
    assert [r["step"] for r in trainer(linear(), tmp_path, steps=3).run().history] == [3]


def test_resuming_elsewhere_and_refusing_to_overwrite(tmp_path):
    trainer(linear(), tmp_path / "a", steps=4, save_every=2, keep_last=0).run()
    with pytest.raises(ValueError, match="holds step-00000004; resume it, or choose a new folder"):
        trainer(linear(), tmp_path / "a", resume=None)
    with pytest.raises(
        ValueError, match="holds step-00000004, which is not older than step-00000002"
    ):
        trainer(linear(), tmp_path / "a", resume=tmp_path / "a" / "step-00000002")
    fork = trainer(linear(), tmp_path / "b", steps=4, resume=tmp_path / "a" / "step-00000002")
    assert [r["step"] for r in fork.run().history] == [3, 4]
    with pytest.raises(ValueError, match="not a checkpoint of this library"):
        trainer(linear(), tmp_path / "c", resume=tmp_path / "nowhere")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.2}, "made with learning_rate = 0.1, this run has 0.2"),
        ({"seed": 1}, "made with seed = 0, this run has 1"),
        ({"accumulation": 2}, "made with accumulation = 1"),
        ({"optimizer": "adamw-sr"}, "made with optimizer = 'adamw', this run has 'adamw-sr'"),
        ({"gradients": "fp32"}, "made with gradients = 'parameter', this run has 'fp32'"),
        ({"ema_decay": 0.5}, "made with ema_decay = None, this run has 0.5"),
        ({"identity": {"batch_size": 2}}, "made with batch_size = None, this run has 2"),
        ({"names": ("b",)}, r"made with objectives = \['a'\], this run has \['b'\]"),
        ({"model": nn.Linear(3, 5)}, "does not fit this model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, options, message):
    trainer(linear(), tmp_path, steps=1).run()
    with pytest.raises(ValueError, match=message):
        trainer(folder=tmp_path, **options)


def test_frozen_parameters_must_be_the_same(tmp_path):
    trainer(linear(), tmp_path, steps=1).run()
    model = linear()
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="trained other parameters"):
        trainer(model, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_saved(tmp_path, number):
    before = signal.getsignal(number)
    run = trainer(
        folder=tmp_path, steps=50, on_step=lambda r: r["step"] == 3 and os.kill(os.getpid(), number)
    )
    result = run.run()
    assert result.stopped_by is number and result.step == 3
    assert latest_step(tmp_path) == 3 and signal.getsignal(number) is before


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer(save_every=1)
    assert [r["step"] for r in run.run().history] == [1, 2, 3, 4]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no folder to save to"):
        run.save()


def test_logs_are_json_and_tensorboard(tmp_path):
    trainer(folder=tmp_path, steps=2, tensorboard=True).run()
    trainer(folder=tmp_path, steps=4, tensorboard=True).run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {e.step: e.value for e in events.Scalars("a/loss")}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] == sorted(shown)
    assert all(shown[line["step"]] == pytest.approx(line["a/loss"]) for line in lines)


def test_a_log_with_a_cut_line_is_repaired(tmp_path):
    trainer(folder=tmp_path, steps=2).run()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3, "a/lo')
    trainer(folder=tmp_path, steps=3).run()
    assert [r["step"] for r in log(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trainer(linear(), {}, TrainSettings(steps=1)), "objectives is empty"),
        (lambda: trainer(linear().requires_grad_(False)), "nothing to train"),
        (
            lambda: trainer(linear().half()),
            "weight is torch.float16: adamw trains torch.float32, torch.float64, torch.bfloat16",
        ),
        (
            lambda: trainer(optimizer="adam8bit"),
            "optimizer is 'adam8bit', expected one of adamw, adamw-sr, adamw8bit",
        ),
        (
            lambda: trainer(gradients="bf16"),
            "gradients is 'bf16', expected one of parameter, fp32",
        ),
        (lambda: trainer(tensorboard=True), "tensorboard is on, but there is no folder"),
        (lambda: trainer(steps=0), "steps is 0, expected a whole number, at least 1"),
        (lambda: trainer(accumulation=1.5), "accumulation is 1.5"),
        (
            lambda: trainer(objectives={"a": lambda *_: {"loss": 1.0}}).run(),
            "objective 'a' left no gradient",
        ),
    ],
)
def test_bad_runs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(ValueError, match="f: is a file, expected a folder"):
        trainer(folder=tmp_path / "f")


def feedback(transformer, precision="fp32", plan=None, rewards=("reward",), **options):
    torch.manual_seed(4)
    models = {
        name: LatentRewardModel.from_backbone(transformer, num_blocks=1, num_heads=2)
        for name in rewards
    }
    step = PRFL(
        velocity_call(transformer, precision),
        {name: reward_call(model, precision) for name, model in models.items()},
        FlowEuler(),
        plan,
        **{"num_steps": 4, **options},
    )
    return RewardFeedback(step, Batches(samples(4)))


def test_feedback_from_data_takes_the_batchs_latents():
    transformer = patch(tiny_wan(layers=1, heads=1))
    objective = feedback(transformer, plan=GradientPlan.rg_lcd())
    metrics = objective(3, torch.Generator().manual_seed(0), 0.5)
    gradients = [p.grad.clone() for p in transformer.parameters()]
    transformer.zero_grad()
    batch, generator = objective.batches[3], torch.Generator().manual_seed(0)
    noise = torch.randn(batch.latents.shape, generator=generator)
    given = {"latents": batch.latents, "generator": generator, "loss_scale": 0.5}
    out = objective.step(noise, batch.conditions, **given)
    assert torch.equal(out.loss, metrics["loss"]) and set(metrics) == {"loss", "reward"}
    assert all(
        torch.equal(a, p.grad) for a, p in zip(gradients, transformer.parameters(), strict=True)
    )


def test_feedback_reports_every_reward_the_divergence_and_the_largest_drift():
    transformer = patch(tiny_wan(layers=1, heads=1))
    add_lora(transformer, 2)
    objective = feedback(
        transformer,
        plan=GradientPlan.prfl(points=2),
        rewards=("a", "b"),
        num_steps=9,
        divergence=0.1,
        rollout=RolloutSettings(precision=RolloutPrecision(stride=3, check_every=2)),
    )
    first, second = (objective(0, torch.Generator().manual_seed(i), 1.0) for i in range(2))
    assert set(second) == {"loss", "reward", "reward/a", "reward/b", "divergence"}
    assert set(first) == {*second, "drift"}
    assert first["drift"] == max(objective.step.engine.drift.values()) > 0
    assert first["divergence"] == 0  # adapters start at zero
    torch.testing.assert_close(first["reward"], first["reward/a"] + first["reward/b"])
    assert objective.step.engine.trajectories == 2
    again = feedback(transformer, num_steps=9)
    again.load_state_dict(objective.state_dict())
    assert again.state_dict() == objective.state_dict()


def test_feedback_that_would_train_nothing_is_refused():
    with pytest.raises(ValueError, match="sends its gradient to the noise, expected 'parameters'"):
        feedback(tiny_wan(layers=1, heads=1), plan=GradientPlan.reno())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_parameter_gets_its_gradient_in_either_precision(precision):
    transformer = patch(tiny_wan(layers=1, heads=1))
    objective = feedback(transformer, precision, GradientPlan.prfl(points=2))
    metrics = objective(0, torch.Generator().manual_seed(0), 1.0)
    assert math.isfinite(metrics["loss"]) and 0 < float(metrics["reward"]) < 1
    without = [n for n, p in transformer.named_parameters() if p.grad is None or not p.grad.any()]
    # A softmax does not feel what is added to all its scores.
    assert [n for n in without if not n.endswith("to_k.bias")] == []
    supervised = SupervisedFlow(transformer, Batches(samples(4)), precision=precision)
    transformer.zero_grad()
    assert math.isfinite(supervised(0, torch.Generator(), 1.0)["loss"])
    assert all(p.grad is not None for p in transformer.parameters())


def test_bf16_runs_the_linears_in_bf16_and_keeps_float32_weights():
    transformer = tiny_wan(layers=1, heads=1)
    seen = set()
    transformer.blocks[0].ffn.net[2].register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    SupervisedFlow(transformer, Batches(samples(4)), precision="bf16")(0, torch.Generator(), 1.0)
    assert seen == {torch.bfloat16}
    assert (
        {p.dtype for p in transformer.parameters()}
        == {torch.float32}
        == {p.grad.dtype for p in transformer.parameters()}
    )
    with autocast(torch.device("cpu"), "fp32"):
        assert not torch.is_autocast_enabled("cpu")


def test_alternation_raises_the_reward_and_lowers_the_supervised_loss():
    transformer = patch(tiny_wan(layers=1, heads=1))
    objectives = {
        "prfl": feedback(transformer),
        "sft": SupervisedFlow(transformer, Batches(samples(4), 2)),
    }
    history = (
        Trainer(transformer, objectives, TrainSettings(steps=12, learning_rate=3e-3)).run().history
    )

    def mean(key, part):
        return sum(record[key] for record in part) / len(part)

    assert mean("sft/loss", history[-4:]) < mean("sft/loss", history[:4])
    assert mean("prfl/reward", history[-4:]) > mean("prfl/reward", history[:4])


@pytest.mark.parametrize("loss", ["ce", "bt"])
def test_a_reward_model_learns_its_data(loss):
    torch.manual_seed(0)
    reward = LatentRewardModel.from_backbone(tiny_wan(layers=1, heads=1), num_blocks=1, num_heads=2)
    frozen = [p.detach().clone() for p in reward.backbone.patch_embedding.parameters()]
    good, bad = (
        [
            s._replace(latents=s.latents + shift, labels={"motion_quality": label})
            for s in samples(4, seed=label)
        ]
        for shift, label in ((1.0, 1), (-1.0, 0))
    )
    data = good + bad if loss == "ce" else [Pair(*pair) for pair in zip(good, bad, strict=True)]
    fit = RewardFit(reward, Batches(data, 4), loss=loss)
    history = (
        Trainer(reward, {"reward": fit}, TrainSettings(steps=12, learning_rate=2e-3)).run().history
    )
    assert history[-1]["reward/loss"] < 0.9 * history[0]["reward/loss"]
    now = list(reward.backbone.patch_embedding.parameters())
    assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))


def test_lora_trains_saves_and_resumes_the_adapter_alone(tmp_path):
    def build():
        transformer = patch(tiny_wan(layers=1, heads=1))
        torch.manual_seed(6)
        add_lora(transformer, 2, targets=("to_q", "to_v"))
        return transformer, {"sft": SupervisedFlow(transformer, Batches(samples(4)))}

    whole, objectives = build()
    base = {n: p.detach().clone() for n, p in whole.named_parameters() if not p.requires_grad}
    Trainer(
        whole, objectives, TrainSettings(steps=4, learning_rate=1e-2), folder=tmp_path / "whole"
    ).run()
    assert all(torch.equal(base[n], p) for n, p in whole.named_parameters() if n in base)
    half, objectives = build()
    Trainer(
        half, objectives, TrainSettings(steps=2, learning_rate=1e-2), folder=tmp_path / "half"
    ).run()
    again, objectives = build()
    Trainer(
        again, objectives, TrainSettings(steps=4, learning_rate=1e-2), folder=tmp_path / "half"
    ).run()
    assert log(tmp_path / "half") == log(tmp_path / "whole")
    weights = "step-00000004/model/pytorch_lora_weights.safetensors"
    resumed, uninterrupted = (load_tensors(tmp_path / name / weights) for name in ("half", "whole"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
    assert (
        set(resumed)
        == set(uninterrupted)
        == {
            f"transformer.blocks.0.attn{i}.to_{x}.lora_{ab}.weight"
            for i in (1, 2)
            for x in "qv"
            for ab in "AB"
        }
    )
    # What diffusers reads back is the adapter that was trained.
    fresh = tiny_wan(layers=1, heads=1)
    fresh.load_lora_adapter(tmp_path / "half" / weights)
    trained = {n: p for n, p in whole.named_parameters() if "lora" in n}
    loaded = {n: p for n, p in fresh.named_parameters() if "lora" in n}
    assert {n.replace("default_0", "default") for n in loaded} == set(trained)
    for name, parameter in loaded.items():
        assert torch.equal(parameter, trained[name.replace("default_0", "default")])


def test_a_full_checkpoint_is_a_diffusers_model(tmp_path):
    from diffusers import WanTransformer3DModel

    transformer = patch(tiny_wan(layers=1, heads=1))
    objectives = {"sft": SupervisedFlow(transformer, Batches(samples(4)))}
    Trainer(
        transformer, objectives, TrainSettings(steps=1, learning_rate=1e-2), folder=tmp_path
    ).run()
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "step-00000001" / "model")
    state = transformer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())


def test_lora_refuses_two_adapters_and_training_beside_one(tmp_path):
    transformer = tiny_wan(layers=1, heads=1)
    add_lora(transformer, 2)
    with pytest.raises(ValueError, match="already has adapter 'default'"):
        add_lora(transformer, 2)
    transformer.proj_out.requires_grad_(True)
    objectives = {"sft": SupervisedFlow(transformer, Batches(samples(4)))}
    run = Trainer(transformer, objectives, TrainSettings(steps=1), folder=tmp_path)
    with pytest.raises(ValueError, match="proj_out.weight is trained beside adapter 'default'"):
        run.run()
