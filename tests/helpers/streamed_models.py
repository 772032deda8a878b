"""Small models whose weights wait in host memory, with slots that are poisoned when released."""

import itertools

import pytest
import torch
import wan
from offload_models import fill_adapters

import prfl_fast
from prfl_fast.memory import stream as streaming
from prfl_fast.memory.checkpointing import MODES
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.training.lora import add_lora

LAYERS = 5
POLICIES = list(itertools.product(MODES, (None, "cpu")))


@pytest.fixture(autouse=True)
def poison_released_slots(monkeypatch):
    """Fill the memory of a slot with NaN as soon as its block is forgotten."""
    original = streaming.Slots._empty

    def empty(slot):
        original(slot)
        slot.memory.fill_(255)

    monkeypatch.setattr(streaming.Slots, "_empty", staticmethod(empty))


def build(policy=("none", None), ahead=1, *, patched=True, lora=False, **options):
    model = wan.tiny_wan(layers=LAYERS)
    if patched:
        prfl_fast.patch(model)
    apply_memory(model, MemoryConfig("fp32", *policy, stream_weights=ahead, **options))
    if lora:
        torch.manual_seed(0)
        add_lora(model, 2)
        fill_adapters(model)
    return model


def slots_of(model):
    return model.blocks[0].__dict__[streaming.STREAMED].slots


def check_home(model):
    """Check that no block is open and every parameter is where it waits."""
    for block in model.blocks:
        weights = block.__dict__[streaming.STREAMED]
        home = weights.host.untyped_storage().data_ptr()
        assert weights.depth == 0 and not weights.saved_by_place
        for parameter in weights.parameters():
            assert parameter.untyped_storage().data_ptr() == home
            assert torch.isfinite(parameter).all()
