"""Calls recognize arguments like those that they were made of, and no others."""

import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prfl_fast.kernels.runtime.calls import Call, recent_call


def _other_arguments():
    x, row = torch.randn(4, 6), torch.randn(6)
    bare, turned = x.clone(), torch.randn(6, 4).t()
    return {
        "as before": ((x.clone(), row.clone(), None, [2, 3], 0.5), True),
        "shape": ((torch.randn(5, 6), row, None, [2, 3], 0.5), False),
        "strides": ((turned, row, None, [2, 3], 0.5), False),
        "dtype": ((x.double(), row, None, [2, 3], 0.5), False),
        "device": ((x.to("meta"), row, None, [2, 3], 0.5), False),
        "gradient": ((bare.requires_grad_(), row, None, [2, 3], 0.5), False),
        "class": ((x, torch.nn.Parameter(row, requires_grad=False), None, [2, 3], 0.5), False),
        "lazy negative": ((torch._neg_view(x), row, None, [2, 3], 0.5), False),
        "no tensor": ((x, None, None, [2, 3], 0.5), False),
        "one more tensor": ((x, row, row.clone(), [2, 3], 0.5), False),
        "one more argument": ((x, row, None, [2, 3], 0.5, None), False),
        "one less argument": ((x, row, None, [2, 3]), False),
        "list": ((x, row, None, [3, 2], 0.5), False),
        "number": ((x, row, None, [2, 3], 0.25), False),
    }


@pytest.mark.parametrize("change", _other_arguments())
def test_a_recent_call_is_that_of_equal_arguments(change):
    numbers = [2, 3]
    call = Call.of((torch.randn(4, 6), torch.randn(6), None, numbers, 0.5), None, None)
    numbers[0] = 3  # belongs to the caller
    args, found = _other_arguments()[change]
    assert (recent_call([call], args) is call) == found


@pytest.mark.parametrize("name", ["autocast", "inference", "mode", "transform", "tangents"])
def test_a_recent_call_is_none_in_another_mode(name):
    args = (torch.randn(4, 6), torch.randn(6))
    call, seen = Call.of(args, None, None), []

    def look(_=None):
        seen.append(recent_call([call], args))
        return torch.zeros(())

    if name == "transform":
        torch.func.vmap(look)(torch.ones(2))
    else:
        with {
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "inference": torch.inference_mode,
            "mode": lambda: FlopCounterMode(display=False),
            "tangents": torch.autograd.forward_ad.dual_level,
        }[name]():
            look()
    look()
    assert seen == [None, call]


def test_a_recent_call_keeps_no_tensor():
    x = torch.randn(4, 6)
    alive = weakref.ref(x)
    call = Call.of((x, None), None, None)
    del x
    assert alive() is None and call.fits is not None
