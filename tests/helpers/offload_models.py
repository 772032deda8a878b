"""Small checkpointed and offloaded models, their gradients, and the bytes they hold."""

import functools
import itertools

import pytest
import torch
import wan

import prfl_fast
from prfl_fast.memory import offload as offloading
from prfl_fast.memory.checkpointing import activation_checkpointing, offload_bytes

SMALL = 512  # bytes of a block's tensors that are not offloaded
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def offload_small_tensors(monkeypatch):
    monkeypatch.setattr(offloading, "SMALLEST", 64)


def build(layers=4, mode="none", patched=True, offload="cpu", **limits):
    model = wan.tiny_wan(layers=layers)
    if patched:
        prfl_fast.patch(model)
    return activation_checkpointing(model, mode, offload, **limits)


def loss(model, size=(2, 4, 4), scale=1.0):
    x, timestep, conditions = wan.inputs(size=size)
    out = model(x * scale, timestep, conditions["encoder_hidden_states"], return_dict=False)[0]
    return out.square().sum()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradients_of_loss(model):
    loss(model).backward()
    return gradients(model)


def fill_adapters(model, **options):
    """Draw the B matrices of all adapters, which start at zero, from a normal distribution."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, **options)
    return model


def held(model):
    """Return the bytes that are held now on the device and on the host."""
    now = offload_bytes(model)
    return now["device_now"], now["host_now"]


class InjectedError(Exception):
    pass


def raising(*args):
    raise InjectedError


def fail_in_block(model, index, patch):
    patch.setattr(model.blocks[index].ffn.net[2], "forward", raising)


def fail_in_second_run(model, index, patch):
    """Raise in the recompute, or in the next forward."""
    layer, calls = model.blocks[index].ffn.net[2], itertools.count()

    def forward(x):
        return raising() if next(calls) == 1 else type(layer).forward(layer, x)

    patch.setattr(layer, "forward", forward)
