"""One patched Wan block runs no operation of the tokens' size that is not listed here."""

from collections import Counter

import harness
import pytest
import torch
from suites import kept
from torch.utils._python_dispatch import TorchDispatchMode

import prfl_fast

diffusers = pytest.importorskip("diffusers")

SIZE = (6, 20, 20)  # latents: 600 tokens
TOKENS, DIM, HEADS, FFN, TEXT, IMAGE = 600, 32, 2, 64, 512, 4

# One T2V block. Products: q, k, v and out of the self-attention, q and out of the cross-attention,
# up and down; the text's keys and values are smaller than the tokens. On a GPU the product of "up"
# leaves its bias to bias_gelu.
FORWARD = {
    "prfl_fast::norm_modulate": 1,
    "aten::addmm": 8,
    "prfl_fast::qk_norm_rope": 2,
    "prfl_fast::attention": 2,
    "prfl_fast::residual_norm_modulate": 2,
    "prfl_fast::bias_gelu": 1,
    "prfl_fast::gated_residual": 1,
}
# A frozen block (a reward model, the base of LoRA): the inputs' gradients alone.
BACKWARD = {
    "prfl_fast::gated_residual_backward": 1,
    "aten::mm": 6,
    "aten::addmm_": 2,  # k and v add to q's share of the normed input's gradient
    "prfl_fast::bias_gelu_backward": 1,
    "prfl_fast::residual_norm_modulate_backward": 2,
    # Normed queries and keys are made again rather than kept beside what they are made of.
    "prfl_fast::qk_norm_rope": 2,
    "prfl_fast::attention_backward": 2,
    "prfl_fast::qk_norm_rope_backward": 2,
    "prfl_fast::norm_modulate_backward": 1,
    # The residual stream enters the first norm and the first residual sum; autograd adds the two
    # gradients: to do that itself, an operation would have to return its input, which none may.
    "aten::add": 1,
}
# Training adds a weight gradient for each product and the sum over tokens for each bias.
TRAINED = {"aten::mm": 8, "aten::sum": 8}
# Image-to-video attends to a second key set: one more call, one sum of two outputs or gradients.
IMAGE_FORWARD = {"prfl_fast::attention": 1, "aten::add": 1}
# The image's output is recomputed, like the normed queries.
IMAGE_BACKWARD = {"prfl_fast::attention": 1, "prfl_fast::attention_backward": 1, "aten::add_": 1}


class Listing(TorchDispatchMode):
    """Count the operations that read or write a tensor at least as large as the tokens'."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, Counter()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        large = any(isinstance(t, torch.Tensor) and t.numel() >= self.size for t in leaves)
        returns = function._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if large and not view:
            self.names[function._schema.name] += 1
        return out


def block(case):
    image = {"image_dim": 8, "added_kv_proj_dim": DIM} if case == "i2v" else {}
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, ffn_dim=FFN, num_layers=1,
        text_dim=16, freq_dim=32, rope_max_seq_len=1024, **image,
    )  # fmt: skip
    return model.bfloat16()


def arguments(model, case):
    x = torch.randn(1, TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
    context = torch.randn(1, TEXT + (IMAGE if case == "i2v" else 0), DIM, dtype=torch.bfloat16)
    return x, context, torch.randn(1, 6, DIM), model.rope(torch.empty(1, 16, *SIZE))


@pytest.mark.parametrize("freeze", [False, True])
def test_operations_of_a_patched_block(case, freeze):
    model = prfl_fast.patch(block(case)).requires_grad_(not freeze)
    inputs = arguments(model, case)
    grad = torch.randn(1, TOKENS, DIM, dtype=torch.bfloat16)
    with Listing(TOKENS * DIM) as forward:
        out = model.blocks[0](*inputs)
    with Listing(TOKENS * DIM) as backward:
        out.backward(grad)
    image = case == "i2v"
    assert forward.names == Counter(FORWARD) + Counter(IMAGE_FORWARD if image else {})
    expected = Counter(BACKWARD) + Counter(IMAGE_BACKWARD if image else {})
    assert backward.names == expected + Counter({} if freeze else TRAINED)


def test_the_listing_sees_what_the_unpatched_block_runs():
    model = block("t2v")
    with Listing(TOKENS * DIM) as forward:
        model.blocks[0](*arguments(model, "t2v"))
    assert forward.names["aten::mul"] > 5 and forward.names["aten::_to_copy"] > 5


@pytest.mark.cases(1)
@pytest.mark.parametrize("train, limit", [(True, 0.47), (False, 0.52)])
def test_a_14b_block_at_720p_keeps_little(train, limit):
    context = harness.Context(torch.device("cpu"), harness.PRESETS["wan14b-720p"])
    ours, theirs = (
        kept.kept_bytes(context.preset, context, patched=patched, train=train)
        for patched in (True, False)
    )
    assert 8e9 < ours <= limit * theirs
