"""A tiny float64 Wan, a frozen reward and solvers written by hand, for the tests of PRFL steps."""

import weakref

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from textbook import Euler, UniPC
from torch import nn

from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC

SHAPE = (2, 16, 2, 4, 4)


CONDITIONS = {
    "encoder_hidden_states": torch.randn(
        2, 3, 12, generator=torch.Generator().manual_seed(0)
    ).double()
}


def make_noise(seed=1, shape=SHAPE, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def make_wan(seed=0):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=12,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).double()
    for parameter in model.parameters():  # biases start at zero, which would hide mistakes
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


class TinyReward(nn.Module):
    """A frozen score in (0, 1) that depends on latents, timestep and text."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.conv = nn.Conv3d(16, 8, (2, 3, 3), padding=(0, 1, 1)).double()
        self.head = nn.Linear(8, 1).double()
        for parameter in self.parameters():
            parameter.data = 0.5 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
        self.requires_grad_(False)

    def forward(self, x, timestep, conditions):
        h = (
            self.conv(x).tanh().mean((2, 3, 4))
            + conditions["encoder_hidden_states"].mean((1, 2))[:, None]
        )
        return torch.sigmoid(self.head(h * (1 + timestep[:, None] / 1000)))[:, 0]


class DiffusersSolver:
    def __init__(self, scheduler, count, wide=False):
        self.scheduler = scheduler
        scheduler.set_timesteps(count)
        if wide:
            scheduler.sigmas = scheduler.sigmas.double()
        self.timesteps = list(scheduler.timesteps)

    def step(self, i, v, x):
        return self.scheduler.step(v, self.timesteps[i], x, return_dict=False)[0]


def diffusers_unipc():
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


def diffusers_euler():
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def velocity_of(model, x, t, conditions):
    batch = torch.full((x.shape[0],), float(t), dtype=torch.float64)
    return model(x, batch, conditions["encoder_hidden_states"], return_dict=False)[0]


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def run(step, model, *args, **kwargs):
    model.zero_grad()
    return step(*args, **kwargs), gradients(model)


SOLVERS = {
    "unipc": (FlowUniPC, UniPC),
    "euler": (FlowEuler, Euler),
    "unipc-diffusers-wide": (
        FlowUniPC,
        lambda count: DiffusersSolver(diffusers_unipc(), count, wide=True),
    ),
    "diffusers-unipc": (diffusers_unipc, lambda count: DiffusersSolver(diffusers_unipc(), count)),
    "diffusers-euler": (diffusers_euler, lambda count: DiffusersSolver(diffusers_euler(), count)),
}


def mean(x, timestep, conditions):
    """Return a reward for steps whose velocity is a plain function."""
    return x.mean((1, 2, 3, 4))


class Token:
    """Lives as long as the graph node that holds it."""


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, x, nodes):
        ctx.save_for_backward(x)
        ctx.token = Token()
        nodes.append(weakref.ref(ctx.token))
        return a.to(x.dtype) * x

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).sum().double(), None, None


class Affine(nn.Module):
    """A model no adapter knows; its bound method is the velocity."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.nodes, self.seen = [], []

    def velocity(self, x, timestep, conditions):
        assert timestep.shape == (x.shape[0],)
        v = Scale.apply(
            self.a, x * (1 + timestep.to(x.dtype).view(-1, 1, 1, 1, 1) / 1000), self.nodes
        )
        self.seen.append((v.requires_grad, x.dtype, x.requires_grad))
        return v

    def graphs_alive(self):
        return sum(node() is not None for node in self.nodes)
