"""Feed-forward layers in chunks of tokens: the same gradients, and no complete hidden layer."""

import copy
import functools

import numerics
import pytest
import torch
import wan
from rollouts import add_lora
from torch.utils.checkpoint import checkpoint

import prfl_fast
from prfl_fast.memory.ledger import Ledger
from prfl_fast.models import blocks as modules
from prfl_fast.models.registry import find_adapter

pytest.importorskip("diffusers")
L = 3 * 2 * 3
CHUNKS = (1, 4, 9, 17)  # 17 leaves one token for the last piece


PATCHED = pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])


def build(patched, case="t2v", layers=2, chunk=None):
    model = chunked(wan.tiny_wan(case, layers=layers), chunk)
    return prfl_fast.patch(model) if patched else model


def chunked(model, tokens):
    find_adapter(model).chunk_feed_forward(model, tokens)
    return model


def joined(gradients, oracles):
    """Return all gradients as one vector, each divided by its own size."""
    found = {name: g.double().flatten() for name, g in gradients.items() if g is not None}
    return torch.cat([g / oracles[name].square().mean().sqrt() for name, g in found.items()])


def assert_same_gradients(model, case="t2v"):
    """Check output and gradients of ``model`` in chunks by the 2x rule."""
    plain, plain_gradients = wan.run(model, *wan.inputs(case))
    oracle, oracles = wan.run(model, *wan.inputs(case), double=True)
    for tokens in CHUNKS:
        out, gradients = wan.run(chunked(model, tokens), *wan.inputs(case))
        numerics.assert_within_twice(out, plain, oracle, rounding=4)
        parts = [joined(g, oracles) for g in (gradients, plain_gradients, oracles)]
        numerics.assert_within_twice(*parts, "gradients", rounding=4, dtype=plain.dtype)


@pytest.mark.cases(2)
@PATCHED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_those_of_the_whole(patched, dtype):
    model = build(patched)
    assert_same_gradients(wan.mixed_layout(model) if dtype == torch.bfloat16 else model)


@PATCHED
def test_lora_on_the_feed_forward(patched):
    model = build(patched).requires_grad_(False)
    targets = ["to_q", "to_v", "ffn.net.0.proj", "ffn.net.2"]
    assert_same_gradients(add_lora(model, rank=3, lora_alpha=3, target_modules=targets))


@PATCHED
@pytest.mark.parametrize("case", ["i2v", "per-token"])
def test_other_models_in_double_precision(case, patched):
    model = build(patched, case, layers=1).double()
    expected, gradients = wan.run(model, *wan.inputs(case))
    out, found = wan.run(chunked(model, 5), *wan.inputs(case))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradients, rtol=1e-11, atol=1e-12)


def test_undone_and_done_again_and_copied():
    model = wan.tiny_wan(layers=1)
    names = set(vars(model.blocks[0].ffn))
    chunked(chunked(model, 4), 7)
    assert model.blocks[0].ffn.chunk == 7
    copied = chunked(copy.deepcopy(model), 3)
    assert copied.blocks[0].ffn.forward.args[0] is copied.blocks[0].ffn
    assert model.blocks[0].ffn.chunk == 7
    chunked(model, None)
    assert set(vars(model.blocks[0].ffn)) == names
    chunked(model, None)


def test_errors():
    model = wan.tiny_wan(layers=1)
    with pytest.raises(ValueError, match="tokens is 0, expected a positive integer"):
        chunked(model, 0)
    model.blocks[0].ffn.forward = lambda x: x
    with pytest.raises(ValueError, match="FeedForward has a replaced forward"):
        chunked(model, 4)


@PATCHED
def test_within_a_checkpointed_block_the_gradients_are_the_same_bits(patched):
    model = build(patched, chunk=5)
    expected = wan.run(model, *wan.inputs())
    model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    out, gradients = wan.run(model, *wan.inputs())
    torch.testing.assert_close((out, gradients), expected, rtol=0, atol=0)


@pytest.mark.slow
@PATCHED
def test_compiled_block(patched):
    model = build(patched, layers=1, chunk=5)
    expected = wan.run(model, *wan.inputs())
    model.blocks[0].compile()
    out, gradients = wan.run(model, *wan.inputs())
    torch.testing.assert_close((out, gradients), expected, rtol=1e-4, atol=1e-5)


HIDDEN = 96


def feed_forward(chunk, tokens, dim):
    up, down = torch.nn.Linear(dim, HIDDEN), torch.nn.Linear(HIDDEN, dim)
    x = torch.randn(1, tokens, dim, requires_grad=True)
    up.weight.requires_grad_(False), down.requires_grad_(False)
    return x, lambda: modules.feed_forward(up, down, x, chunk)


def test_the_hidden_layer_never_exists_whole_and_pieces_are_not_joined():
    """Beyond one piece, the forward allocates the output only, the backward only two gradients."""
    tokens, dim, chunk = 4096, 8, 64
    activation, piece = 4 * tokens * dim, 4 * chunk * HIDDEN
    assert 8 * piece < 4 * tokens * HIDDEN / 4
    x, run = feed_forward(chunk, tokens, dim)
    with torch.no_grad(), Ledger(open_operations=True) as rollout:
        run()
    assert rollout.peak <= activation * 1.05 + 4 * piece
    with Ledger(open_operations=True) as forward:
        out = run()
    assert forward.live <= activation * 1.05  # pieces keep views of x and nothing else
    assert forward.peak <= activation * 1.05 + 4 * piece
    cotangent = torch.ones_like(out)
    with Ledger(open_operations=True) as backward:
        out.backward(cotangent)
    assert backward.peak <= activation * 1.05 + 8 * piece
    assert x.grad.shape == x.shape
