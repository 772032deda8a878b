"""Checkpoints of runs with several ranks: resumed on as many, on others, and after errors."""

import json
import os
import signal

import numpy as np
import pytest
from ranks import run_ranks
from runs import NoisyFit, linear

from prfl_fast.parallel import OtherRankError, ParallelConfig, make_mesh
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.training.checkpoint import read_checkpoint
from prfl_fast.utils.io import load_tensors


def make(folder, steps, mesh=None, objective=NoisyFit):
    model = linear()
    config = TrainConfig(steps, learning_rate=0.1, ema_decay=0.5, gradient_accumulation_steps=2)
    return Trainer(model, {"a": objective(model)}, config, folder=folder, mesh=mesh)


def run(folder, steps, **options):
    trainer = make(folder, steps, **options)
    before = {n: p.detach().numpy().copy() for n, p in trainer.parameters.items()}
    trainer.run()
    draws = trainer.objectives["a"].draws
    return before, {n: p.detach().numpy().copy() for n, p in trainer.parameters.items()}, draws


def on(ranks, folder, steps):
    """Train on so many ranks; return the result of each."""
    if ranks == 1:
        return [run(folder, steps)]
    return run_ranks(ranks, lambda: run(folder, steps, mesh=make_mesh(ParallelConfig(shard=1))))


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in b)


def records(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_on_any_number_of_ranks(ranks, tmp_path):
    whole = on(ranks, tmp_path / "whole", 4)
    for others in (1, 2, 4):
        folder = tmp_path / f"to{others}"
        first = on(ranks, folder, 2)
        saved = load_tensors(folder / "final" / "model.safetensors")
        resumed = on(others, folder, 4)
        for before, _, _ in resumed:
            assert all(np.array_equal(before[n], t.numpy()) for n, t in saved.items())
        assert all(same(after, resumed[0][1]) for _, after, _ in resumed)
        # One pass over the data is shared, and goes on where the checkpoint was.
        drawn = sorted(d for _, _, draws in (*first, *resumed) for d in draws)
        assert drawn == list(range(4 * ranks + 4 * others))
        assert [r["step"] for r in records(folder)] == [1, 2, 3, 4]
        if others == ranks:
            assert all(same(a[1], b[1]) for a, b in zip(resumed, whole, strict=True))
            assert records(folder) == records(tmp_path / "whole")
        read_checkpoint(folder / "step-00000004")


class FailsOnce(NoisyFit):
    """Fail on one rank at a micro-batch of the third step."""

    def __call__(self, draw, generator, loss_scale):
        if draw == 9:
            raise ValueError("sample 9 cannot be read")
        return super().__call__(draw, generator, loss_scale)


def test_an_error_of_one_rank_is_known_to_all_and_the_steps_before_are_saved(tmp_path):
    def failing():
        trainer = make(tmp_path, 4, make_mesh(ParallelConfig(shard=1)), FailsOnce)
        with pytest.raises((ValueError, OtherRankError)) as caught:
            trainer.run()
        return type(caught.value).__name__, str(caught.value)

    first, second = run_ranks(2, failing)
    assert first == ("OtherRankError", "rank 1 failed: sample 9 cannot be read")
    assert second[0] == "ValueError" and "Step 2 is saved" in second[1]
    assert read_checkpoint(tmp_path / "step-00000002")["step"] == 2


class Signaled(NoisyFit):
    """Send the process of one rank a signal in the second step."""

    def __call__(self, draw, generator, loss_scale):
        if draw == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(draw, generator, loss_scale)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    def stopped():
        trainer = make(tmp_path, 4, make_mesh(ParallelConfig(shard=1)), Signaled)
        result = trainer.run()
        return result.step, result.stopped_by

    assert run_ranks(2, stopped) == [(2, signal.SIGTERM)] * 2
    assert read_checkpoint(tmp_path / "step-00000002")["step"] == 2
