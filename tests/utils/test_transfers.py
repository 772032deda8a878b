"""Copies to a device."""

import torch

from prfl_fast.utils.transfers import to_device


def test_copies_to_cuda_come_from_pinned_memory_and_do_not_wait(monkeypatch):
    calls = []

    def pin(self):
        calls.append(("pin", self))
        return self

    def to(self, *args, **kwargs):
        calls.append((self, args, kwargs))
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    x = torch.ones(3)
    assert to_device(x, "cuda:0") is x
    assert calls == [("pin", x), (x, (torch.device("cuda:0"),), {"non_blocking": True})]
    calls.clear()
    assert to_device(x, "cpu") is x and calls == [(x, (torch.device("cpu"),), {})]
