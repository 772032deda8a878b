"""QueryAttentionPool against nn.MultiheadAttention, and the reward head."""

import pytest
import torch
from torch import nn

from prfl_fast.rewards.pooling import QueryAttentionPool, RewardHead


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
    pool = QueryAttentionPool(dim, heads, num_queries)
    pool.multihead_attn.load_state_dict(mha.state_dict())
    with torch.no_grad():
        pool.queries.copy_(queries)
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
        scale = max(1.0, wanted[name].abs().max())
        assert (gradient - wanted[name]).abs().max() <= 1e-5 * scale, name


def test_pool_keeps_samples_apart():
    pool = QueryAttentionPool(32, 4)
    x = torch.randn(3, 10, 32)
    torch.testing.assert_close(pool(x), torch.cat([pool(sample[None]) for sample in x]))
    assert pool(x).shape == (3, 32)


def test_reward_head_is_initialized_as_the_reference():
    head = RewardHead(64)
    shapes = [tuple(p.shape) for p in head.parameters()]
    assert shapes == [(1024, 64), (1024,), (512, 1024), (512,), (1, 512), (1,)]
    for layer in (head.fc1, head.fc2, head.fc3):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.bias.abs().max() == 0
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert head(torch.randn(5, 64)).shape == (5,)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QueryAttentionPool(30, 8), "num_heads is 8, expected a divisor of dim = 30"),
        (lambda: QueryAttentionPool(32, 8, 0), "num_queries is 0"),
        (
            lambda: QueryAttentionPool(32)(torch.randn(2, 32)),
            r"2, 32\] on cpu, expected \[B, L, 32",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
