"""A small velocity field and reward in float64: not linear, and different for every sample, level
and prompt.
"""

import torch

SIZE = (3, 2, 2, 2)


def gaussian(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


NOISE = gaussian(2, *SIZE)
CONDITIONS = {"text": gaussian(2, 4, seed=2)}
NEGATIVE = {"text": gaussian(1, 4, seed=3)}
MIX = gaussian(3, 3, seed=4)


def velocity(x, timestep, conditions):
    mixed = torch.einsum("dc,bcfhw->bdfhw", MIX, x)
    text = conditions["text"].mean(1).view(-1, 1, 1, 1, 1)
    return torch.sin(mixed + text) + x * (0.3 + timestep.view(-1, 1, 1, 1, 1) / 1000)


def reward(x, timestep, conditions):
    level = 1 + timestep / 1000
    return torch.tanh(x * conditions["text"][:, :1, None, None, None]).mean((1, 2, 3, 4)) * level
