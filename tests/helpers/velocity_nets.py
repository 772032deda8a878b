"""A velocity with parameters and text, for tests of losses."""

import torch
from torch import nn
from toy_flow import gaussian


class Net(nn.Module):
    """Compute a velocity with parameters; called as a function, as no adapter knows its class."""

    def __init__(self, seed):
        super().__init__()
        self.mix = nn.Parameter(gaussian(2, 2, seed=seed))
        self.bias = nn.Parameter(gaussian(5, seed=seed + 50))

    def forward(self, x, timestep, conditions):
        text = (conditions["text"] @ self.bias).view(-1, 1, 1, 1, 1)
        mixed = torch.einsum("dc,bcfhw->bdfhw", self.mix, x)
        return torch.tanh(mixed + text) + x * timestep.view(-1, 1, 1, 1, 1) / 1000


def seeded(seed):
    return torch.Generator().manual_seed(seed)
