"""The training loop: updates, skipped updates, averages and out-of-memory errors."""

import math
import weakref

import pytest
import torch
from device_reads import DeviceReads
from runs import NoisyFit, linear, log, trainer
from torch import nn

from prfl_fast.training.checkpoint import list_checkpoints
from prfl_fast.training.trainer import NonFiniteTrainingError, OutOfMemoryError
from prfl_fast.training.updates import read_means
from prfl_fast.utils.io import load_tensors


def test_an_update_is_adamw_on_the_accumulated_clipped_gradient():
    model, reference = linear(), linear()
    torch.manual_seed(5)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "warmup_steps": 2}
    history = trainer(model, steps=3, **options).run().history
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    objective = NoisyFit(reference)
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
    run = trainer(names=("a", "b"), steps=3, gradient_accumulation_steps=2)
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
    class Sometimes(NoisyFit):
        def __call__(self, draw, generator, loss_scale):
            metrics = super().__call__(draw, generator, loss_scale)
            return metrics | ({"drift": float(draw)} if draw in (1, 2, 7) else {})

    model = linear()
    options = {"steps": 3, "gradient_accumulation_steps": 3}
    result = trainer(model, objectives={"a": Sometimes(model)}, **options).run()
    assert [record.get("a/drift") for record in result.history] == [1.5, None, 7.0]


def test_the_metrics_of_all_micro_batches_are_read_at_once():
    first = {"loss": torch.tensor(0.5), "reward": torch.tensor([math.nan]), "drift": 2}
    second = {"loss": torch.tensor(1.5, dtype=torch.bfloat16), "other": torch.tensor(3)}
    with DeviceReads(*first.values(), *second.values()) as mode:
        found = read_means([first, second])
    assert mode.count == 1 and math.isnan(found.pop("reward"))
    assert found == {"loss": 1.0, "drift": 2.0, "other": 3.0}


def test_metrics_are_those_of_their_micro_batch_and_keep_no_graph():
    model, kept, alive = linear(), [], []

    class Reused(NoisyFit):
        loss = torch.zeros(())

        def __call__(self, draw, generator, loss_scale):
            super().__call__(draw, generator, loss_scale)
            alive.append([each() is not None for each in kept])
            activation = torch.ones(4, requires_grad=True)
            kept.append(weakref.ref(activation))
            return {"loss": self.loss.fill_(draw), "other": activation.square().sum()}

    run = trainer(model, objectives={"a": Reused(model)}, steps=1, gradient_accumulation_steps=3)
    assert run.run().history[0]["a/loss"] == 1.0
    assert alive == [[], [False], [False, False]]


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_one_bad_micro_batch_skips_the_whole_update(micro_batch):
    model = linear()
    before = model.weight.detach().clone()
    objectives = {"a": NoisyFit(model, bad=(micro_batch,))}
    run = trainer(model, objectives=objectives, steps=1, gradient_accumulation_steps=2)
    record = run.run().history[0]
    assert record["skipped"] == 1 and record["a/loss"] is None and record["a/half"] is None
    assert objectives["a"].draws == [0, 1] and torch.equal(model.weight, before)


@pytest.mark.parametrize("kind", ["bad", "bad_gradient"])
def test_a_non_finite_update_changes_nothing_and_is_counted(kind):
    model = linear()
    seen = []

    def note(record):
        states = run.optimizer.state_dict()["state"].values()
        tensors = [s[key] for s in states for key in ("exp_avg", "exp_avg_sq", "step")]
        tensors += [*model.parameters(), *run.ema.values()]
        seen.append((record, [tensor.detach().clone() for tensor in tensors]))

    objectives = {"a": NoisyFit(model, **{kind: (2,)})}
    run = trainer(model, objectives=objectives, on_step=note, ema_decay=0.5)
    result = run.run()
    assert [record["skipped"] for record, _ in seen] == [0, 0, 1, 1] and result.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(seen[1][1], seen[2][1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2][1], seen[3][1], strict=True))
    assert seen[2][0]["a/loss" if kind == "bad" else "a/grad_norm"] is None


def test_five_bad_steps_in_a_row_stop_with_the_last_good_state_on_disk(tmp_path):
    model, weights = linear(), []
    objectives = {"a": NoisyFit(model, bad=(1, 3, 4, 5, 6, 7))}
    run = trainer(model, tmp_path, objectives=objectives, steps=20)
    run.on_step = lambda record: weights.append(model.weight.clone())
    message = r"5 steps in a row .*a at step 8.*last good state is in .*step-00000008"
    with pytest.raises(NonFiniteTrainingError, match=message):
        run.run()
    saved = load_tensors(tmp_path / "step-00000008" / "model" / "model.safetensors")
    assert torch.equal(saved["weight"], weights[2])  # step 3 has the last update that was taken
    assert [r["skipped"] for r in log(tmp_path)] == [0, 1, 1, 2, 3, 4, 5, 6]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = trainer(folder=tmp_path, steps=2, save_every=1)
    run.on_step = lambda record: run.model.bias.data.fill_(math.nan)
    message = "bias has NaN or infinite values at step 2: not saved"
    with pytest.raises(NonFiniteTrainingError, match=message):
        run.run()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("dtype", "decay", "rtol"), [(torch.float32, 0.75, 1.3e-6), (torch.bfloat16, 0.999, 1e-6)]
)
def test_the_average_follows_its_formula_in_float32(dtype, decay, rtol):
    model = linear().to(dtype)
    expected = model.weight.detach().float().clone()

    def follow(record):
        expected.lerp_(model.weight.detach().float(), 1 - decay)

    run = trainer(model, ema_decay=decay, on_step=follow)
    run.run()
    assert run.ema["weight"].dtype is torch.float32
    atol = 1e-5 if rtol > 1e-6 else 0
    torch.testing.assert_close(run.ema["weight"], expected, rtol=rtol, atol=atol)
    if dtype is torch.bfloat16:
        assert not torch.equal(run.ema["weight"], run.ema["weight"].bfloat16().float())


class Full(NoisyFit):
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
    objectives = {"a": NoisyFit(model), "b": Full(model, [3], place)}
    other = nn.Linear(256, 256)
    objectives["b"].step = [lambda x, reward=None: other(x)]
    advice = ["attention, offloaded, needs 30 GiB"]
    options = {"steps": 4, "gradient_accumulation_steps": 2, "save_every": 1, "ema_decay": 0.9}
    torch.manual_seed(1)
    options["advise"] = lambda: advice[0]
    run = trainer(model, tmp_path / "broken", objectives=objectives, **options)
    with pytest.raises(OutOfMemoryError) as caught:
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
    with pytest.raises(ValueError, match="Step 2 is incomplete: only a was updated. Call run"):
        run.save()
    run.run()
    whole = linear()
    torch.manual_seed(1)
    objectives = {"a": NoisyFit(whole), "b": Full(whole, [])}
    trainer(whole, tmp_path / "whole", objectives=objectives, **options).run()
    assert log(tmp_path / "broken") == log(tmp_path / "whole")
    assert torch.equal(model.weight, whole.weight)


class Counting(Full):
    """Carry a count from call to call, on which the loss depends."""

    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]

    def __call__(self, draw, generator, loss_scale):
        self.count += 1
        metrics = super().__call__(draw, generator, loss_scale * self.count)
        return metrics | {"count": float(self.count)}


def test_what_an_objective_carries_is_saved_and_resumed(tmp_path):
    def make(name, steps, draws=()):
        model = linear()
        objectives = {"a": Counting(model, draws), "b": NoisyFit(model)}
        options = {"gradient_accumulation_steps": 2, "save_every": 1, "max_grad_norm": 0.1}
        return trainer(model, tmp_path / name, objectives=objectives, steps=steps, **options)

    whole = make("whole", 4)
    whole.run()
    make("halves", 2).run()
    resumed = make("halves", 4)
    assert resumed.objectives["a"].count == 4
    resumed.run()
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    assert torch.equal(resumed.model.weight, whole.model.weight)
    # A micro-batch that found the device full is not counted twice.
    full = make("full", 4, draws=[5])
    with pytest.raises(OutOfMemoryError):
        full.run()
    assert full.objectives["a"].count == 4
    full.run()
    assert log(tmp_path / "full") == log(tmp_path / "whole")


def test_out_of_memory_in_the_norm_is_of_no_micro_batch(monkeypatch):
    monkeypatch.setattr("prfl_fast.training.trainer.gradient_norm", no_memory)
    with pytest.raises(OutOfMemoryError, match="objective 'a', norm of the gradients, step 1"):
        trainer().run()
    # The run can be continued even if the report fails.
    run = trainer()
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("prfl_fast.training.trainer.report", lambda *_, **held: held["nothing"])
        run.run()
    monkeypatch.undo()
    run.run()
    assert run.objectives["a"].draws == [0, *range(run.result.step)]


def test_out_of_memory_in_the_optimizer_step_ends_the_run(tmp_path, monkeypatch):
    run = trainer(folder=tmp_path, save_every=1, advise=lambda: 1 / 0)
    run.on_step = lambda record: monkeypatch.setattr(run.optimizer, "step", no_memory)
    message = "in the optimizer step of objective 'a', step 2"
    with pytest.raises(OutOfMemoryError, match=message) as e:
        run.run()
    assert "(no advice: division by zero)" in str(e.value)
    assert run.model.weight.grad is None
    for call in (run.run, run.save):
        with pytest.raises(ValueError, match="Start again from the last checkpoint"):
            call()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


def test_other_errors_pass_as_they_are():
    def fail(*_):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        trainer(objectives={"a": fail}).run()
    assert type(caught.value) is RuntimeError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": {}}, "objectives is {}, expected at least one"),
        ({"model": linear().requires_grad_(False)}, "trainable parameters is 0, expected at least"),
        ({"model": linear().half()}, "weight is torch.float16, expected torch.float32"),
        ({"optimizer": "adam8bit"}, "optimizer is 'adam8bit', expected one of 'adamw', 'adamw-sr'"),
        ({"gradient_dtype": "bf16"}, "gradient_dtype is 'bf16', expected one of 'parameter'"),
        ({"tensorboard": True}, "folder is None, expected a path for tensorboard"),
        ({"head_learning_rate": 0.1}, "head_learning_rate is 0.1, expected None. Only a Latent"),
        ({"head_learning_rate": -1}, "head_learning_rate is -1, expected a positive number"),
        ({"clip": "head"}, "clip is 'head', expected one of 'all', 'blocks'"),
        ({"keep_last": -1}, "keep_last is -1, expected an integer of at least 0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected a number below 1"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0, expected a positive number"),
        ({"max_grad_norm": 10**400}, "max_grad_norm is 1000.*, expected a positive number"),
        ({"steps": 0}, "steps is 0, expected a positive integer"),
        ({"learning_rate": math.inf}, "learning_rate is inf, expected a number of at least 0"),
        ({"ema_decay": math.nan}, "ema_decay is nan, expected a positive number"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps is 1.5, expected"),
        ({"objectives": {"a": lambda *_: {"loss": 1.0}}}, "gradient of objective 'a' is None"),
        ({"folder": __file__}, "test_trainer.*py', expected a folder, not a file"),
    ],
)
def test_bad_runs(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options).run()


class Parts(nn.Module):
    """A model with the parts of a latent reward model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.backbone, self.pool, self.head = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1)


def fit_parts(model):
    def objective(draw, generator, loss_scale):
        x = torch.randn(4, 3, generator=generator)
        loss = model.head(model.pool(model.backbone(x))).square().sum()
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}

    return objective


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-cpu"])
@pytest.mark.parametrize("clip", ["all", "blocks"])
def test_pool_and_head_have_their_own_rate_and_may_stay_unclipped(clip, optimizer):
    ours, theirs = Parts(), Parts()
    options = {"head_learning_rate": 0.3, "clip": clip, "max_grad_norm": 0.1, "warmup_steps": 2}
    options |= {"objectives": {"a": fit_parts(ours)}, "optimizer": optimizer}
    history = trainer(ours, steps=3, **options).run().history
    rest = [*theirs.pool.parameters(), *theirs.head.parameters()]
    groups = [{"params": theirs.backbone.parameters()}, {"params": rest}]
    adamw = torch.optim.AdamW(groups, weight_decay=0.01)
    generator, objective = torch.Generator().manual_seed(0), fit_parts(theirs)
    clipped = list((theirs if clip == "all" else theirs.backbone).parameters())
    for step, record in enumerate(history):
        warm = min(1, (step + 1) / 2)
        for group, rate in zip(adamw.param_groups, (0.1, 0.3), strict=True):
            group["lr"] = rate * warm
        objective(step, generator, 1.0)
        norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
        assert record["a/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        nn.utils.clip_grad_norm_(clipped, 0.1)
        adamw.step()
        adamw.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_rate_of_parts_resumes_with_the_same_bits(tmp_path):
    ends = []
    for name, stops in (("whole", (4,)), ("halves", (2, 4))):
        for steps in stops:
            model = Parts()
            options = {"head_learning_rate": 0.3, "objectives": {"a": fit_parts(model)}}
            trainer(model, tmp_path / name, steps=steps, **options).run()
        ends.append(model)
    assert all(torch.equal(*pair) for pair in zip(*(m.parameters() for m in ends), strict=True))
