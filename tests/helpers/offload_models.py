"""Small offloaded models, their gradients, and the bytes they hold."""

import pytest
import torch
import wan

import prfl_fast
from prfl_fast.memory import offload as offloading
from prfl_fast.memory.checkpointing import activation_checkpointing, offload_bytes

SMALL = 512  # bytes of a block's tensors that are not offloaded


@pytest.fixture(autouse=True)
def offload_small_tensors(monkeypatch):
    monkeypatch.setattr(offloading, "SMALLEST", 64)


def build(layers=4, policy="none", patched=True, **limits):
    model = wan.tiny_wan(layers=layers)
    if patched:
        prfl_fast.patch(model)
    return activation_checkpointing(model, policy, "cpu", **limits)


def loss(model, size=(2, 4, 4)):
    x, timestep, conditions = wan.inputs(size=size)
    out = model(x, timestep, conditions["encoder_hidden_states"], return_dict=False)[0]
    return out.square().sum()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def held(model):
    now = offload_bytes(model)
    return now["device_now"], now["host_now"]


# Bytes.
def drop_gradient(parameter):
    parameter.grad = None
