"""Weights that wait in host memory: the same bits, no view of a slot that another block took."""

import itertools

import pytest
import torch
import wan
from offload_models import assert_same, fill_adapters, gradients_of_loss, held

import prfl_fast
from prfl_fast.memory import stream as streaming
from prfl_fast.memory.checkpointing import MODES
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.training.lora import add_lora

pytest.importorskip("diffusers")

LAYERS = 5
POLICIES = list(itertools.product(MODES, (None, "cpu")))
EACH_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=str)


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


@EACH_POLICY
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_gradients_are_bit_identical(policy, lora, patched):
    plain = gradients_of_loss(build(policy, None, patched=patched, lora=lora))
    assert len(plain) > 40
    for ahead in (1, 2, 7):
        model = build(policy, ahead, patched=patched, lora=lora)
        for _ in range(2):
            assert_same(gradients_of_loss(model), plain)
            check_home(model)
        assert held(model) == (0, 0)
        assert len(slots_of(model).order) >= ahead + 1
