"""Trainer on several ranks: one process with the same samples computes the same weights."""

import json

import numpy as np
import pytest
import torch
from rank_training import full, lora, objectives
from ranks import run_ranks

from prfl_fast.parallel import ParallelConfig, make_mesh
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.training.checkpoint import rank_seed

WHOLE = ParallelConfig(shard=1)


class Turns:
    """Run an objective with the generators of several data ranks in turn, in one process."""

    def __init__(self, objective, generators):
        self.objective, self.generators = objective, generators
        ranks = self.ranks = len(generators)
        self.points = [torch.Generator().manual_seed(5) for _ in range(ranks)]

    def __call__(self, draw, generator, loss_scale):
        rank = draw % self.ranks
        if hasattr(self.objective, "points_generator"):
            self.objective.points_generator = self.points[rank]
        return self.objective(draw, self.generators[rank], loss_scale)


def train(make, ranks, accumulation, mesh=None, folder=None, **options):
    model = make()
    found = objectives(model)
    if mesh is None and ranks > 1:
        generators = [torch.Generator().manual_seed(rank_seed(0, r)) for r in range(ranks)]
        found = {name: Turns(o, generators) for name, o in found.items()}
        accumulation *= ranks
    settings = {"steps": 3, "learning_rate": 1e-3, "ema_decay": 0.5, "warmup_steps": 2}
    config = TrainConfig(**settings, gradient_accumulation_steps=accumulation, **options)
    trainer = Trainer(model, found, config, mesh=mesh, folder=folder)
    result = trainer.run()
    weights = {n: p.detach().numpy().copy() for n, p in trainer.parameters.items()}
    return weights, {n: p.numpy() for n, p in trainer.ema.items()}, result.history


def assert_close(ours, theirs, bound=1e-10):
    for name, wanted in theirs.items():
        assert np.abs(ours[name] - wanted).max() <= bound * max(1.0, np.abs(wanted).max()), name


@pytest.mark.parametrize("make", [full, pytest.param(lora, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(make, tmp_path):
    def on_ranks():
        mesh = make_mesh(WHOLE)
        return train(make, 2, 2, mesh, tmp_path / "run")

    weights, ema, history = train(make, 2, 2)
    (first, second) = run_ranks(2, on_ranks)
    for found in (first, second):
        assert_close(found[0], weights)
        assert_close(found[1], ema)
        for ours, theirs in zip(found[2], history, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours.keys() - {"seconds"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-10, abs=1e-12), key
    assert all(np.array_equal(first[0][n], second[0][n]) for n in weights)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == first[2]
