"""Fake tensors with faster dispatch against PyTorch's."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_fast.planning.fake_mode import FastFakeTensorMode


def layout(tensor):
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


OPERATIONS = {
    "addition": lambda x: x + 1,
    "division of whole numbers": lambda x: x.to(torch.int64) / 2,
    "product": lambda x: x @ x.t(),
    "several results": lambda x: torch.var_mean(x, 1)[1],
    "view": lambda x: x.t()[1:],
    "list of views": lambda x: x.chunk(2, 1)[1],
    "conversion": lambda x: x.to(torch.bfloat16),
    "conversion to the same dtype": lambda x: x.to(torch.float32),
    "integers": lambda x: x.new_full((2,), 1, dtype=None) + torch.full((2,), 1),
    "floats": lambda x: torch.full((2,), 1.0),
    "booleans": lambda x: torch.full((2,), True),
    "constant": lambda x: torch.tensor([1.0, 2.0]) * 2,
    "copy of a transposed tensor": lambda x: x.t().clone(),
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_have_the_layout_of_fake_tensors(name):
    found = []
    for mode in (FakeTensorMode, FastFakeTensorMode, FastFakeTensorMode):
        with mode():
            found.append(layout(OPERATIONS[name](torch.zeros(4, 6))))
    assert found[1:] == 2 * found[:1]


def test_views_share_storage_and_new_results_do_not():
    with FastFakeTensorMode():
        x = torch.zeros(4, 6)
        storages = [t.untyped_storage()._cdata for t in (x, x.t(), x.detach(), x + 1, x + 1)]
        assert storages[0] == storages[1] == storages[2]
        assert len(set(storages)) == 3


def test_in_place_operations_return_their_argument():
    with FastFakeTensorMode():
        x = torch.zeros(4, 6)
        for _ in range(2):
            assert x.mul_(2) is x
            assert x.t_() is x
        assert x.shape == (4, 6)
        x.t_()
        assert x.shape == (6, 4)


def test_gradients():
    with FastFakeTensorMode():
        for _ in range(2):
            x = torch.zeros(4, 6, requires_grad=True)
            (x.t() @ x).relu().sum().backward()
            assert layout(x.grad) == layout(x)


def test_booleans_count_as_true():
    with FastFakeTensorMode():
        x, mask = torch.zeros(4, 6, requires_grad=True), torch.zeros(4) > 0
        for _ in range(2):  # the second time with what the first left in the cache
            assert bool((x == 1).all()) and not bool(~mask[0]) and bool(~~mask[0])
            assert layout(x[mask]) == layout(x) and x[~mask].shape == (0, 6)
            assert x[~~mask].shape == (4, 6) and x[x > 0].shape == (24,)
        torch.cat([x[mask], x[~mask]]).sum().backward()
        assert layout(x.grad) == layout(x)
