"""Tiny Wans and trajectories for the tests of the rollout engine."""

import contextlib
import warnings

import torch
from textbook import Euler
from toy_flow import gaussian
from wan import inputs, tiny_wan

from prfl_fast.models.registry import patch
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.training.lora import add_lora

EVERYWHERE = (0.0, 1.0)


def make_wan(case="t2v", lora=False, **config):
    model = patch(tiny_wan(case, **config))
    if lora:
        add_lora(
            model, 4, target_modules=("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
        )
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def wan_inputs(case="t2v", batch=2, seed=1):
    x, _, conditions = inputs(case, batch=batch, seed=seed)
    return x, conditions


def walk(
    model, x, conditions, config, *, visit=(2, 5), steps=7, scheduler=None, guidance=None, start=0
):
    """Latents wherever a gradient step begins and ends, and the trajectory; an engine if given."""
    engine = config if isinstance(config, RolloutEngine) else None
    scheduler = FlowUniPC() if scheduler is None else scheduler
    sampler = Sampler(model, scheduler, steps, guidance, None if engine else config)
    trajectory = Trajectory(sampler, x, conditions, engine=engine, visit=visit, start=start)
    seen = {}
    for step in visit:
        trajectory.run(step)
        seen[step] = trajectory.x
        with torch.enable_grad():
            trajectory.move_to(trajectory.solve(trajectory.velocity()))
        seen[step + 1] = trajectory.x
    return seen, trajectory


def assert_same(left, right):
    assert left.keys() == right.keys()
    for step, x in left.items():
        assert torch.equal(x, right[step]), step


@contextlib.contextmanager
def no_warning(category=Warning):
    with warnings.catch_warnings():
        warnings.simplefilter("error", category)
        yield


def field(x, timestep, conditions):
    return 0.5 * x


SIGMAS = Euler(6).sigmas


def make_x(batch=2, dtype=torch.float64):
    return gaussian(batch, 16, 2, 4, 4, seed=0).to(dtype)
