"""Modules with a Wan block's weights compute what the block computes."""

import numerics
import pytest
import torch
import wan

from prfl_fast.models import blocks as modules
from prfl_fast.models import layers

pytest.importorskip("diffusers")
L = 3 * 2 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_with_a_wan_blocks_weights_compute_the_wan_block(dtype):
    model = wan.tiny_wan(layers=1).to(dtype)
    block = model.blocks[0]
    torch.manual_seed(5)
    x, time, context = (torch.randn(2, size, 48).to(dtype) for size in (L, 6, 9))
    cos_sin = wan.tiny_wan(layers=1).rope(torch.zeros(1, 16, 3, 4, 6, dtype=dtype))
    rope = modules.Rope.from_grid((3, 2, 3), model.config.attention_head_dim)
    attn = layers.TimestepConditionedAttention.from_wan_block(block)
    cross = layers.CrossAttention.from_wan_block(block)
    ffn = layers.ModulatedFeedForward.from_wan_block(block)
    ours = ffn(cross(attn(x, time[:, :3], rope), context), time[:, 3:])
    plain = block(x, context, time, cos_sin)
    for out in (ours, plain):
        out.float().square().mean().backward()
    gradients = {
        "attn1.to_q.weight": attn.to_q.weight.grad,
        "attn1.norm_k.weight": attn.norm_k.weight.grad,
        "attn2.to_v.weight": cross.to_v.weight.grad,
        "norm2.weight": cross.norm.weight.grad,
        "ffn.net.0.proj.bias": ffn.up.bias.grad,
    }
    theirs = {name: block.get_parameter(name).grad.clone() for name in gradients}
    gradients["scale_shift_table"] = torch.cat([m.scale_shift_table.grad for m in (attn, ffn)])
    theirs["scale_shift_table"] = block.scale_shift_table.grad[0].clone()
    double = model.double().blocks[0]
    double.zero_grad()
    with wan.float_means_double():
        oracle = double(x.double(), context.double(), time.double(), cos_sin)
        oracle.square().mean().backward()
    numerics.assert_within_twice(ours, plain, oracle)
    for name, gradient in gradients.items():
        exact = double.get_parameter(name).grad.view_as(gradient)
        numerics.assert_within_twice(gradient, theirs[name], exact, name, rounding=2)


def test_image_tokens():
    block = wan.tiny_wan("i2v", layers=1).blocks[0]
    cross = layers.CrossAttention.from_wan_block(block)
    x, context = torch.randn(2, L, 48), torch.randn(2, 512 + 5, 48)
    expected = x + block.attn2(block.norm2(x), context, None, None)
    torch.testing.assert_close(cross(x, context), expected, rtol=1e-5, atol=1e-5)


def test_per_frame_and_per_token_rows_agree_with_an_index():
    attn = layers.TimestepConditionedAttention(48, 2)
    x, time = torch.randn(2, L, 48), torch.randn(6, 3, 48)
    rope = modules.Rope.from_grid((3, 2, 3), 24)
    frames = torch.arange(6).repeat_interleave(6).view(2, L)
    by_rule = attn(x, time, rope)
    torch.testing.assert_close(by_rule, attn(x, time, rope, frames))
    torch.testing.assert_close(by_rule, attn(x, time[frames.flatten()], rope))


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="heads is 5, expected a divisor of dim = 48"):
        layers.TimestepConditionedAttention(48, 5)


def test_a_context_without_tokens():
    """PyTorch's attention on the CPU would end the process."""
    cross = layers.CrossAttention.from_wan_block(wan.tiny_wan(layers=1).blocks[0])
    with pytest.raises(ValueError, match=r"context is .*, expected at least one text token"):
        cross(torch.randn(1, 4, 48), torch.randn(1, 0, 48))
