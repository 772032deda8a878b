"""Counted functions and choices of the searches that tests write as plain loops."""

import pytest
import torch
from textbook import Euler, UniPC
from toy_flow import CONDITIONS, NEGATIVE, NOISE, reward, velocity

from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.sampling.search import beam_search, prune

STEPS = 6
EULER = Sampler(velocity, FlowEuler(), STEPS)
UNIPC = Sampler(velocity, FlowUniPC(), STEPS)
SOLVERS = pytest.mark.parametrize(
    ("ours", "hand"), [(FlowEuler(), Euler), (FlowUniPC(), UniPC)], ids=["euler", "unipc"]
)


class Counted:
    """Samples and calls that go through a function, the largest call, and the timesteps."""

    def __init__(self, function, graph=False):
        self.function, self.samples, self.largest, self.timesteps = function, 0, 0, []
        self.graph = graph

    def __call__(self, x, timestep, conditions):
        assert timestep.shape == x.shape[:1] and conditions["text"].shape[0] == len(x)
        assert self.graph or not torch.is_grad_enabled()
        self.samples += len(x)
        self.largest = max(self.largest, len(x))
        self.timesteps += [round(t, 2) for t in timestep.tolist()]
        return self.function(x, timestep, conditions)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def pruned(sampler, judge=reward, noise=NOISE, conditions=CONDITIONS, **options):
    return prune(sampler, judge, noise, conditions, generator=seeded(), **options)


def beamed(sampler, judge=reward, noise=NOISE, conditions=CONDITIONS, **options):
    return beam_search(sampler, judge, noise, conditions, generator=seeded(), **options)


def drawn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def guided(x, timestep, text, scale):
    v = velocity(x, timestep, {"text": text})
    if scale is None:
        return v
    negative = velocity(x, timestep, {"text": NEGATIVE["text"]})
    return negative + scale * (v - negative)


def judged(x, timestep, text):
    return reward(x, torch.tensor([timestep], dtype=torch.float64), {"text": text}).item()


def level(timestep):
    return torch.tensor([timestep], dtype=torch.float64)


def best(pool, count):
    """Return the ``count`` best (score, …) of a pool, in its order; ties go to the earlier."""
    ranked = sorted(range(len(pool)), key=lambda i: -pool[i][0])
    return [pool[i] for i in sorted(ranked[:count])]


def assert_same(found, expected, history):
    assert found.chosen.tolist() == [i for _, i, *_ in expected]
    torch.testing.assert_close(found.latents, torch.cat([x for _, _, x, *_ in expected]))
    torch.testing.assert_close(
        found.scores, torch.tensor([score for score, *_ in expected], dtype=torch.float64)
    )
    assert list(found.history) == list(history)
    for step, scores in history.items():
        torch.testing.assert_close(
            found.history[step], scores, equal_nan=True, rtol=1e-6, atol=1e-6
        )
