"""Learning-rate schedules against diffusers' own, in the trainer, and in resumed runs."""

import pytest
import torch
from runs import linear, log, trainer

from prfl_fast.training.schedules import SCHEDULES, schedule_factor


def diffusers_rates(name, steps, warmup, rate):
    """Return the rate of each step of diffusers' scheduler."""
    optimization = pytest.importorskip("diffusers.optimization")
    optimizer = torch.optim.SGD(linear().parameters(), lr=rate)
    options = {"num_warmup_steps": warmup, "num_training_steps": steps}
    scheduler = optimization.get_scheduler(name, optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_diffusers_after_the_warmup(name):
    steps, warmup, rate = 9, 3, 0.2
    done = trainer(schedule=name, steps=steps, warmup_steps=warmup, learning_rate=rate).run()
    rates = [record["lr"] for record in done.history]
    whole = "constant_with_warmup" if name == "constant" else name
    assert rates[warmup:] == pytest.approx(diffusers_rates(whole, steps, warmup, rate)[warmup:])
    assert rates[:warmup] == pytest.approx([rate / 3, rate * 2 / 3, rate])
    assert rates[-1] < rate or name == "constant"
    without = schedule_factor(name, steps, 0, rate)
    wanted = diffusers_rates(name, steps, 0, rate)
    assert [rate * without(step) for step in range(1, steps + 1)] == pytest.approx(wanted)


def test_a_resumed_run_has_the_same_rates_and_bits(tmp_path):
    options = {"schedule": "cosine", "steps": 6, "warmup_steps": 2, "save_every": 3}
    whole = trainer(folder=tmp_path / "whole", **options)
    whole.run()
    half = trainer(folder=tmp_path / "half", **options)
    half.on_step = lambda record: record["step"] < 3 or stop()

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        half.run()
    resumed = trainer(linear(7), folder=tmp_path / "half", **options)
    assert resumed.result.step == 3
    resumed.run()
    assert log(tmp_path / "half") == log(tmp_path / "whole")
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="made with steps = 6, this run has 8"):
        trainer(folder=tmp_path / "half", **{**options, "steps": 8})
    with pytest.raises(ValueError, match="made with schedule = 'cosine', this run has 'linear'"):
        trainer(folder=tmp_path / "half", **{**options, "schedule": "linear"})


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="schedule is 'step', expected"):
        trainer(schedule="step")
    with pytest.raises(ValueError, match="learning_rate is 1e-08, expected above 1e-7"):
        trainer(schedule="polynomial", learning_rate=1e-8)
