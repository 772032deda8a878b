"""A frozen reward computes the gradient of the latents only: count products and kept bytes."""

import copy
from collections import Counter

import pytest
import torch
import wan
from harness import count_flops
from torch.utils._python_dispatch import TorchDispatchMode

import prfl_fast
from prfl_fast.memory.ledger import storage_of
from prfl_fast.models.registry import find_adapter
from prfl_fast.rewards.latent import LatentRewardModel

pytest.importorskip("diffusers")

BLOCKS, DIM, FFN, TEXT, HEADS = 2, 48, 144, 3 * 7, 2
BATCH = 3
TOKENS = BATCH * 18  # of all samples; no width equals it, nor TEXT or BATCH
PRODUCTS = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "addmm_", "bmm")]
PATCHED = pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])


def reward_model(*, patched, frozen=True, blocks=BLOCKS, dtype=torch.float32):
    reward = LatentRewardModel.from_backbone(wan.tiny_wan(layers=4), blocks, num_heads=4)
    if dtype == torch.bfloat16:
        wan.mixed_layout(reward.backbone)
    if patched:
        prfl_fast.patch(reward.backbone)
    return reward.freeze() if frozen else reward.eval()


def inputs():
    x, timestep, conditions = wan.inputs(batch=BATCH, text_tokens=TEXT // BATCH)
    return x.requires_grad_(), timestep, conditions


class Operations(TorchDispatchMode):
    """Record matrix products as (rows, contracted, columns), operations by name, and storages."""

    def __init__(self):
        super().__init__()
        self.products, self.names = Counter(), Counter()
        self.product_inputs, self.attention_outputs, self.masks = {}, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names[func.__name__.partition(".")[0]] += 1
        if func in PRODUCTS:
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.products[a.shape[-2], a.shape[-1], b.shape[-1]] += 1
            self.product_inputs[storage_of(a)._cdata] = a
        if "attention" in func.__name__ and "backward" not in func.__name__:
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.attention_outputs[storage_of(tensor)._cdata] = tensor
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
        return out


def run(reward, x, timestep, conditions):
    """Return operations of forward and backward, and the tensors kept in between by storage."""
    kept = {}
    weights = {storage_of(p)._cdata for p in reward.parameters()}

    def pack(tensor):
        if storage_of(tensor)._cdata not in weights:
            kept[storage_of(tensor)._cdata] = tensor
        return tensor

    with Operations() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        score = reward(x, timestep, conditions)
    with Operations() as backward:
        score.sum().backward()
    return forward, backward, kept


def contracted_over_tokens(operations):
    """Select products that sum over video tokens, text tokens or samples: weight gradients."""
    return {p: n for p, n in operations.products.items() if p[1] in (TOKENS, TEXT, BATCH)}


@PATCHED
def test_no_product_of_the_backward_is_a_weights_gradient(patched):
    _, backward, _ = run(reward_model(patched=patched), *inputs())
    assert contracted_over_tokens(backward) == {}
    per_token = {p: n for p, n in backward.products.items() if p[0] == TOKENS}
    # q, k, v, out of the self-attention, q and out of the cross-attention; never the text's k, v.
    square, up, down = (TOKENS, DIM, DIM), (TOKENS, DIM, FFN), (TOKENS, FFN, DIM)
    assert per_token == {square: 6 * BLOCKS, up: BLOCKS, down: BLOCKS}
    # What is left has one row a sample, or a pool head and sample: the pool and its network.
    assert all(p[0] <= 4 * BATCH for p in backward.products if p[0] != TOKENS)
    assert backward.masks == [[True, False, False]]  # the patch embedding


@PATCHED
def test_the_count_sees_the_weights_gradients_of_a_trainable_reward(patched):
    _, backward, _ = run(reward_model(patched=patched, frozen=False), *inputs())
    found = Counter()
    for (rows, _, columns), n in contracted_over_tokens(backward).items():
        found[rows, columns] += n
    assert found[DIM, DIM] >= 8 * BLOCKS  # every projection, those of the text among them
    assert found[FFN, DIM] == found[DIM, FFN] == BLOCKS


@pytest.mark.cases(1)
@PATCHED
def test_flops_of_the_backward_are_those_of_the_gradient_to_the_input(patched):
    reward = reward_model(patched=patched)
    given = inputs()
    forward = count_flops(lambda: reward(*given))
    both = count_flops(lambda: reward(*given).sum().backward())
    linears = BLOCKS * 2 * TOKENS * (6 * DIM * DIM + 2 * DIM * FFN)
    attention = BLOCKS * 10 * TOKENS * (TOKENS + TEXT) // BATCH * DIM
    patches = 2 * TOKENS * DIM * 16 * 4
    rest = both - forward - linears - attention - patches
    trainable = reward_model(patched=patched, frozen=False)
    all_of_it = count_flops(lambda: trainable(*given).sum().backward())
    head = 2 * BATCH * (DIM * 1024 + 1024 * 512 + 512)
    pool_and_head = 2 * 4 * BATCH * DIM * DIM + head + 8 * 4 * TOKENS * DIM
    assert 0 <= rest <= pool_and_head
    assert all_of_it - both >= linears  # a weight's gradient costs what an input's does


@PATCHED
def test_no_linear_input_is_kept(patched):
    """Attention keeps its output, which the output projection reads: its backward needs it."""
    forward, _, kept = run(reward_model(patched=patched), *inputs())
    both = kept.keys() & forward.product_inputs.keys() - forward.attention_outputs.keys()
    wide = [shape for shape in (tuple(kept[key].shape) for key in both) if 18 in shape]
    assert wide == []


def block_bytes(patched, dtype):
    """Return the bytes that a third block adds to those kept."""
    rewards = [reward_model(patched=patched, blocks=n, dtype=dtype) for n in (2, 3)]
    kept = [run(reward, *inputs())[2].values() for reward in rewards]
    two, three = (sum(storage_of(tensor).nbytes() for tensor in tensors) for tensors in kept)
    return three - two


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_kept_by_a_block(dtype):
    """Count the activations [L, D] that a block keeps.

    A patched block keeps its input; q, k (before their norm), v and output of the self-attention;
    the first sum; q and output of the cross-attention; the second sum; and the hidden layer before
    the activation, FFN / D wide. diffusers' block also keeps q and k after their norm, and in
    bfloat16 its norms' inputs in float32.
    """
    block = block_bytes(True, dtype)
    activation = dtype.itemsize * TOKENS * DIM
    log_sum_exp = 2 * 4 * HEADS * TOKENS
    text = 2 * dtype.itemsize * TEXT * DIM  # k and v
    assert block == (9 + FFN / DIM) * activation + log_sum_exp + text
    assert block_bytes(False, dtype) > (1.7 if dtype == torch.bfloat16 else 1.2) * block


@PATCHED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_is_that_of_a_trainable_copy_bit_for_bit(patched, dtype):
    trainable = reward_model(patched=patched, frozen=False, dtype=dtype)
    frozen = copy.deepcopy(trainable).freeze()
    gradients = []
    for reward in (trainable, frozen):
        x, *rest = inputs()
        reward(x, *rest).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
    assert all(p.grad is None for p in frozen.parameters())


@PATCHED
def test_features_stop_at_the_last_block_and_the_head_is_gone(patched):
    reward = reward_model(patched=patched)
    backbone = reward.backbone
    assert len(backbone.blocks) == BLOCKS and not hasattr(backbone, "scale_shift_table")
    assert type(backbone.norm_out) is type(backbone.proj_out) is torch.nn.Identity
    forward, backward, _ = run(reward, *inputs())
    name = "attention" if patched else "_scaled_dot_product_flash_attention_for_cpu"
    assert forward.names[name] == 2 * BLOCKS
    assert backward.names[f"{name}_backward"] == 2 * BLOCKS
    whole = wan.tiny_wan(layers=4).requires_grad_(False)
    with Operations() as seen:
        find_adapter(whole).features(whole, *inputs(), BLOCKS)
    assert seen.names["_scaled_dot_product_flash_attention_for_cpu"] == 2 * BLOCKS
