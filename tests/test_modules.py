"""The plain modules: they load a Wan block's weights and compute what it computes; the folded query
pool.
"""

import numerics
import pytest
import torch
import wan
from torch import nn

from prfl_fast import modules

pytest.importorskip("diffusers")
L = 3 * 2 * 3


def block_inputs(block, dtype=torch.float32):
    torch.manual_seed(5)
    dim = block.attn1.inner_dim
    x, time = torch.randn(2, L, dim), torch.randn(2, 6, dim)
    context = torch.randn(2, 9, dim)
    return x.to(dtype), time.to(dtype), context.to(dtype)


def rotary(model, dtype):
    latents = torch.zeros(1, 16, 3, 4, 6, dtype=dtype)
    return model.rope(latents), modules.Rope.from_grid((3, 2, 3), model.config.attention_head_dim)


def three_modules(block, x, time, context, rope):
    attn = modules.TimestepConditionedAttention.from_wan_block(block)
    cross = modules.CrossAttention.from_wan_block(block)
    ffn = modules.ModulatedFeedForward.from_wan_block(block)
    x = attn(x, time[:, :3], rope)
    return ffn(cross(x, context), time[:, 3:]), (attn, cross, ffn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_with_a_wan_blocks_weights_compute_the_wan_block(dtype):
    model = wan.tiny_wan(layers=1).to(dtype)
    block = model.blocks[0]
    x, time, context = block_inputs(block, dtype)
    cos_sin, rope = rotary(wan.tiny_wan(layers=1), dtype)
    ours, parts = three_modules(block, x, time, context, rope)
    ours.float().square().mean().backward()
    plain = block(x, context, time, cos_sin)
    plain.float().square().mean().backward()
    gradients = {
        "attn1.to_q.weight": parts[0].to_q.weight.grad,
        "attn1.norm_k.weight": parts[0].norm_k.weight.grad,
        "attn2.to_v.weight": parts[1].to_v.weight.grad,
        "norm2.weight": parts[1].norm.weight.grad,
        "ffn.net.0.proj.bias": parts[2].up.bias.grad,
    }
    theirs = {name: block.get_parameter(name).grad.clone() for name in gradients}
    table, tables = (
        block.scale_shift_table.grad.clone(),
        [parts[i].scale_shift_table.grad for i in (0, 2)],
    )
    double = model.double().blocks[0]
    double.zero_grad()
    with wan.float_means_double():
        oracle = double(x.double(), context.double(), time.double(), cos_sin)
        oracle.square().mean().backward()
    numerics.assert_within_twice(ours, plain, oracle)
    for name, gradient in gradients.items():
        numerics.assert_within_twice(
            gradient, theirs[name], double.get_parameter(name).grad, name, rounding=2
        )
    numerics.assert_within_twice(
        torch.cat(tables),
        table[0],
        double.scale_shift_table.grad[0],
        "scale_shift_table",
        rounding=2,
    )


def test_image_tokens():
    model = wan.tiny_wan("i2v", layers=1)
    block = model.blocks[0]
    cross = modules.CrossAttention.from_wan_block(block)
    x, context = torch.randn(2, L, 48), torch.randn(2, 512 + 5, 48)
    expected = x + block.attn2(block.norm2(x), context, None, None)
    torch.testing.assert_close(cross(x, context), expected, rtol=1e-5, atol=1e-5)


def test_per_frame_and_per_token_rows_agree_with_an_index():
    attn = modules.TimestepConditionedAttention(48, 2)
    x, time, rope = (
        torch.randn(2, L, 48),
        torch.randn(6, 3, 48),
        modules.Rope.from_grid((3, 2, 3), 24),
    )
    frames = torch.arange(6).repeat_interleave(6).view(2, L)
    by_rule = attn(x, time, rope)
    torch.testing.assert_close(by_rule, attn(x, time, rope, frames))
    torch.testing.assert_close(by_rule, attn(x, time[frames.flatten()], rope))


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_folded_pool_is_multihead_attention(batch, num_queries):
    torch.manual_seed(0)
    dim, heads, tokens = 64, 8, 301
    mha = nn.MultiheadAttention(dim, heads, batch_first=True)
    with torch.no_grad():
        mha.in_proj_bias.normal_()
        mha.out_proj.bias.normal_()
    queries = torch.randn(num_queries, dim)
    pool = modules.QueryAttentionPool.from_multihead_attention(mha, queries)
    queries = queries.requires_grad_()
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    attended, _ = mha(queries.expand(batch, -1, -1), x, x, need_weights=False)
    expected = (attended + queries).mean(1)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    wanted = {"x": x.grad, "queries": queries.grad}
    wanted |= {f"multihead_attn.{name}": p.grad for name, p in mha.named_parameters()}
    x2 = x.detach().requires_grad_()
    out = pool(x2)
    out.backward(cotangent)
    got = {"x": x2.grad} | {name: p.grad for name, p in pool.named_parameters()}
    assert got.keys() == wanted.keys()
    assert (out - expected).abs().max() <= 1e-5
    for name, gradient in got.items():
        assert (gradient - wanted[name]).abs().max() <= 1e-5 * max(1.0, wanted[name].abs().max()), (
            name
        )


def test_pool_keeps_samples_apart():
    pool = modules.QueryAttentionPool(32, 4)
    x = torch.randn(3, 10, 32)
    torch.testing.assert_close(pool(x), torch.cat([pool(sample[None]) for sample in x]))
    assert pool(x).shape == (3, 32)


def test_reward_head_is_initialised_as_the_reference():
    head = modules.RewardHead(64)
    assert [tuple(p.shape) for p in head.parameters()] == [
        (1024, 64),
        (1024,),
        (512, 1024),
        (512,),
        (1, 512),
        (1,),
    ]
    for layer in (head.fc1, head.fc2, head.fc3):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.bias.abs().max() == 0
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert head(torch.randn(5, 64)).shape == (5,)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: modules.QueryAttentionPool(30, 8),
            "num_heads is 8, expected a divisor of dim = 30",
        ),
        (lambda: modules.QueryAttentionPool(32, 8, 0), "num_queries is 0"),
        (
            lambda: modules.QueryAttentionPool(32)(torch.randn(2, 32)),
            r"x is \[2, 32\], expected \[B, L, 32\]",
        ),
        (lambda: modules.TimestepConditionedAttention(48, 5), "heads is 5"),
        (
            lambda: modules.QueryAttentionPool.from_multihead_attention(
                nn.MultiheadAttention(32, 4, kdim=16), torch.randn(1, 32)
            ),
            "packed in-projection",
        ),
        (
            lambda: modules.QueryAttentionPool.from_multihead_attention(
                nn.MultiheadAttention(32, 4), torch.randn(32)
            ),
            r"queries is \[32\]",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
