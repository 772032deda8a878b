"""Norm, rotation and attention as one step of autograd: the same bits, less kept."""

import pytest
import torch
from op_checks import assert_same_bits, saved_bytes

from prfl_fast.kernels import attention, qk_norm_rope, rope_table
from prfl_fast.models.block_autograd import norm_attention

HEADS, DIM, GRID = 2, 32, (2, 3, 4)
LENGTH = 24
NAMES = ("q", "k", "v", "q_weight", "k_weight")


def inputs(keys, dtype, needed):
    shapes = [(2, LENGTH, DIM), (2, keys, DIM), (2, keys, DIM), (DIM,), (DIM,)]
    return [
        torch.randn(shape, dtype=dtype).requires_grad_(name in needed)
        for shape, name in zip(shapes, NAMES, strict=True)
    ]


def rope():
    cos, sin = rope_table(16, DIM // HEADS)
    return {"cos": cos, "sin": sin, "grid": GRID, "offset": (1, 0, 2)}


def in_two_steps(q, k, v, q_weight, k_weight, **turn):
    q, k = qk_norm_rope(q, k, q_weight, k_weight, heads=HEADS, eps=1e-6, **turn)
    return attention(q, k, v, heads=HEADS)[0]


def in_one_step(*tensors, cos=None, sin=None, grid=None, offset=(0, 0, 0)):
    return norm_attention(*tensors, cos, sin, grid, offset, HEADS, 1e-6)


NEEDED = [NAMES, ("q", "k", "v"), ("q",), ("v",), ("q_weight",), ("k_weight", "v")]


@pytest.mark.cases(8)
@pytest.mark.parametrize("needed", NEEDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("keys, turn", [(LENGTH, rope()), (7, {})], ids=["self", "cross"])
def test_same_bits_as_two_steps(keys, turn, dtype, needed):
    tensors = inputs(keys, dtype, needed)
    grad = torch.randn(2, LENGTH, DIM, dtype=dtype)
    found = []
    for function in (in_two_steps, in_one_step):
        out = function(*tensors, **turn)
        leaves = [t for t in tensors if t.requires_grad]
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert_same_bits(*found)


def test_keeps_queries_and_keys_once():
    tensors = inputs(LENGTH, torch.float32, NAMES)
    two, one = (saved_bytes(lambda f=f: f(*tensors, **rope())) for f in (in_two_steps, in_one_step))
    assert two - one == 2 * tensors[0].nbytes


def test_without_gradient_nothing_is_kept():
    tensors = inputs(LENGTH, torch.float32, ())
    assert not in_one_step(*tensors, **rope()).requires_grad
    tensors[0].requires_grad_()
    with torch.no_grad():
        out = in_one_step(*tensors, **rope())
    assert out.grad_fn is None and torch.equal(out, in_two_steps(*tensors, **rope()))


def with_image(needed, dtype):
    tensors = inputs(7, dtype, needed)
    for name in ("extra_k", "extra_v"):
        tensors.append(torch.randn(2, 5, DIM, dtype=dtype).requires_grad_(name in needed))
    return tensors


def image_in_two_steps(q, k, v, q_weight, k_weight, *extra):
    q, k = qk_norm_rope(q, k, q_weight, k_weight, heads=HEADS, eps=1e-6)
    return attention(q, k, v, heads=HEADS, extra_k=extra[0], extra_v=extra[1])[0]


def image_in_one_step(*tensors):
    rope = (None, None, None, (0, 0, 0))
    return norm_attention(*tensors[:5], *rope, HEADS, 1e-6, None, *tensors[5:])


IMAGE_NEEDED = [(*NAMES, "extra_k", "extra_v"), ("q",), ("extra_k",), ("v", "extra_v"), ("k",)]


@pytest.mark.parametrize("needed", IMAGE_NEEDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_a_second_key_set(dtype, needed):
    tensors = with_image(needed, dtype)
    grad = torch.randn(2, LENGTH, DIM, dtype=dtype)
    found = []
    for function in (image_in_two_steps, image_in_one_step):
        out = function(*tensors)
        leaves = [t for t in tensors if t.requires_grad]
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert_same_bits(*found)


def test_a_second_key_set_keeps_its_keys_and_values_alone():
    tensors = with_image((*NAMES, "extra_k", "extra_v"), torch.float32)
    with_text, both = (
        saved_bytes(lambda f=f, n=n: f(*tensors[:n]))
        for f, n in ((in_one_step, 5), (image_in_one_step, 7))
    )
    assert both - with_text == 2 * tensors[5].nbytes
