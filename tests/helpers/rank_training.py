"""Objectives and models of tests that train on several ranks."""

import torch
from prfl_world import REWARD, SHAPE, make_wan, prfl, with_lora
from torch import nn

from prfl_fast.data.dataset import Batches
from prfl_fast.data.manifest import Sample
from prfl_fast.models.registry import patch
from prfl_fast.training.objectives import RewardFeedback, SupervisedFlow


def samples(count=6):
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [
        Sample(draw(*SHAPE[1:]), {"encoder_hidden_states": draw(3, 12)}, {}) for _ in range(count)
    ]


class Data(list):
    """A dataset of samples in memory."""


class Doubled:
    """Batches in float64, as the models of these tests are."""

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, n):
        batch = self.batches[n]
        conditions = {k: v.double() for k, v in batch.conditions.items()}
        return batch._replace(latents=batch.latents.double(), conditions=conditions)


class Wide(nn.Module):
    """Score latents in float64; an objective draws its noise in float32."""

    def __init__(self):
        super().__init__()
        self.inner = REWARD

    def forward(self, x, timestep, conditions):
        return self.inner(x.double(), timestep, conditions)


def objectives(model, plan=None):
    batches = Doubled(Batches(Data(samples()), 2, seed=1))
    step = prfl(model, plan, steps=3, reward=Wide())
    points = torch.Generator().manual_seed(5)
    feedback = RewardFeedback(step, batches, points_generator=points)
    return {"prfl": feedback, "sft": SupervisedFlow(model, batches)}


def full():
    return patch(make_wan())


def lora():
    torch.manual_seed(3)
    return patch(with_lora(make_wan()))
