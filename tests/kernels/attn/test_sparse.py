"""sparse_attention: the kernel against its reference, the reference against float64, masks."""

import itertools

import pytest
import torch
from attention_cases import sdpa
from dtypes import BF16, FP16, FP32, FP64
from numerics import assert_within_twice
from op_checks import RecordedCalls, assert_same_bits, slack
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import prfl_fast.kernels as kernels
from prfl_fast.kernels.attn import sparse as module
from prfl_fast.kernels.attn import sparse_triton
from prfl_fast.kernels.attn.rollout import rollout_attention
from prfl_fast.kernels.attn.sparse import KeyBlocks, sparse_attention

EIGHT_BITS = ("int8_fp8", "fp8", "int8")


def make(batch, queries, keys, heads, head_dim, dtype=FP16):
    sizes = zip("qkv", (queries, keys, keys), strict=True)
    return {n: torch.randn(batch, length, heads * head_dim).to(dtype) for n, length in sizes}


def draw(batch, queries, keys, heads, block_q=16, block_k=32, share=0.5):
    """Return random lists, the first of which is empty and the last of which is full."""
    mask = torch.rand(batch, heads, -(-queries // block_q), -(-keys // block_k)) < share
    mask[0, 0, 0], mask[-1, -1, -1] = False, True
    return KeyBlocks.from_mask(mask, block_q, block_k)


def plain(q, k, v, blocks, heads):
    """Return masked attention of PyTorch at the inputs' dtype; in float64 it is the oracle."""
    mask = blocks.mask().repeat_interleave(blocks.block_q, 2)[:, :, : q.shape[1]]
    mask = mask.repeat_interleave(blocks.block_k, 3)[..., : k.shape[1]]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(~mask, 0)
    return (weights @ v).transpose(1, 2).flatten(2)


def check(tensors, blocks, heads, variant, backend):
    """Assert the 2× rule in 16 bits; in 8 bits the emulation's result and a bound of the error."""
    out = sparse_attention(**tensors, blocks=blocks, heads=heads, variant=variant)
    oracle = plain(*(t.double() for t in tensors.values()), blocks, heads)
    assert out.is_contiguous() and out.dtype == tensors["q"].dtype
    if variant == "exact":
        # The interpreter truncates weights and results to bfloat16.
        rounding = slack(backend, out.dtype, truncated=6.0)
        assert_within_twice(out, plain(**tensors, blocks=blocks, heads=heads), oracle,
                            rounding=rounding)  # fmt: skip
        return
    kernels.set_backend("reference")
    emulated = sparse_attention(**tensors, blocks=blocks, heads=heads, variant=variant)
    kernels.set_backend(backend)
    scale = oracle.square().mean().sqrt()
    limit = 1e-2 if out.dtype == BF16 else 1e-3
    assert (out.double() - emulated.double()).square().mean().sqrt() <= limit * scale
    # Of few values the errors do not average out: relative to values, as for rollout_attention.
    assert (out.double() - oracle).square().mean().sqrt() <= 0.1 * max(scale, 0.3)


# Lengths that divide and that do not, one token, one block, more keys and more queries.
LENGTHS = [
    (1, 1), (1, 70), (16, 32), (17, 33), (37, 70), (48, 31), (33, 128), (64, 97), (80, 64), (5, 129)
]  # fmt: skip
CASES = [
    (batch, *lengths, heads, head_dim, dtype, variant)
    for lengths in LENGTHS
    for (batch, heads, head_dim) in ((1, 1, 64), (2, 2, 64), (1, 1, 128))
    for dtype, variant in (
        (FP16, "exact"), (BF16, "exact"), *((FP16, v) for v in EIGHT_BITS), (BF16, "int8_fp8"),
        (BF16, "fp8"),
    )
]  # fmt: skip
FAST = [c for c in CASES if c[1:3] in ((37, 70), (5, 129)) and c[0] + c[4] < 128]


@pytest.mark.triton
@pytest.mark.parametrize(
    "case",
    [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    ids=lambda c: "-".join(map(str, c)).replace("torch.", ""),
)
def test_kernel_against_reference(triton_device, case):
    batch, queries, keys, heads, head_dim, dtype, variant = case
    torch.manual_seed(hash(case[:5]) % 2**31)
    blocks = draw(batch, queries, keys, heads)
    check(make(batch, queries, keys, heads, head_dim, dtype), blocks, heads, variant, "triton")


@pytest.mark.parametrize("block_q, block_k", [(32, 64), (128, 64), (64, 128), (16, 128)])
@pytest.mark.parametrize("variant", ["exact", "int8_fp8"])
def test_block_sizes(backend, block_q, block_k, variant):
    blocks = draw(1, 140, 200, 1, block_q, block_k)
    check(make(1, 140, 200, 1, 80), blocks, 1, variant, backend)


@pytest.mark.parametrize("dtype", [FP32, FP64, FP16, BF16])
def test_reference_is_an_oracle(dtype):
    tensors, blocks = make(2, 37, 70, 3, 24, dtype), draw(2, 37, 70, 3)
    wanted = plain(*(t.double() for t in tensors.values()), blocks, 3)
    found = module.reference(
        *tensors.values(), blocks.index, blocks.count, 3, 24**-0.5, 16, 32, "exact", upcast=FP64
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if dtype != FP64:
        check(tensors, blocks, 3, "exact", "auto")


def test_chunks_of_queries_change_nothing(monkeypatch):
    tensors, blocks = make(2, 50, 70, 2, 16, FP64), draw(2, 50, 70, 2)
    whole = sparse_attention(**tensors, blocks=blocks, heads=2)
    monkeypatch.setattr(module, "CHUNK", 2 * 2 * 70 * 16)
    torch.testing.assert_close(sparse_attention(**tensors, blocks=blocks, heads=2), whole)


@pytest.mark.parametrize("variant", ["exact", *EIGHT_BITS])
def test_density_1_is_dense(backend, variant):
    """Compare 8 bits at the tile of rollout_attention on the chip that PyTorch emulates."""
    tensors = make(1, 130, 200, 1, 64)
    tile = {"exact": 64, "int8": 64}.get(variant, 128)
    blocks = KeyBlocks.from_mask(torch.ones(1, 1, 2, -(-200 // tile), dtype=torch.bool), 128, tile)
    out = sparse_attention(**tensors, blocks=blocks, heads=1, variant=variant)
    assert blocks.density() == 1
    if variant == "exact":
        exact = sdpa(*(t.double() for t in tensors.values()), heads=1)
        assert_within_twice(out, sdpa(**tensors, heads=1), exact)
    else:
        dense = rollout_attention(**tensors, heads=1, variant=variant)
        # The ragged block comes first, so weights round against another running maximum.
        assert (out - dense).float().norm() <= 3e-2 * dense.float().norm()


@pytest.mark.parametrize("variant", ["exact", *EIGHT_BITS])
def test_empty_lists_give_zeros(backend, variant):
    blocks = KeyBlocks.from_mask(torch.zeros(1, 1, 2, 3, dtype=torch.bool), 16, 32)
    out = sparse_attention(**make(2, 20, 70, 2, 32), blocks=blocks, heads=2, variant=variant)
    assert not out.any()


@pytest.mark.parametrize("variant", ["exact", "int8_fp8"])
def test_one_list_serves_all_heads_and_samples(backend, variant):
    tensors = make(2, 20, 40, 3, 32)
    for shape in ((1, 1), (1, 3), (2, 1)):
        mask = torch.rand(*shape, 2, 2) < 0.6
        wide = KeyBlocks.from_mask(mask.expand(2, 3, 2, 2).contiguous(), 16, 32)
        few = KeyBlocks.from_mask(mask, 16, 32)
        outs = (
            sparse_attention(**tensors, blocks=b, heads=3, variant=variant) for b in (few, wide)
        )
        assert torch.equal(*outs)


@pytest.mark.parametrize("variant", ["exact", *EIGHT_BITS])
def test_strided_rows_and_the_same_bits_twice(backend, variant):
    strided = torch.randn(2, 80, 3 * 64).half()[:, ::2].chunk(3, dim=-1)
    blocks = draw(2, 40, 40, 2)
    calls = [
        sparse_attention(*given, blocks, heads=2, variant=variant)
        for given in (strided, strided, [t.contiguous() for t in strided])
    ]
    assert_same_bits(calls[:2], calls[1:])


def test_numbers_past_the_count_are_ignored(backend):
    tensors, blocks = make(1, 37, 70, 1, 32), draw(1, 37, 70, 1)
    past = torch.arange(3) >= blocks.count[..., None]
    other = KeyBlocks(blocks.index.masked_fill(past, -7), blocks.count, 16, 32)
    outs = (sparse_attention(**tensors, blocks=b, heads=1) for b in (blocks, other))
    assert torch.equal(*outs)


def test_flops_are_counted_at_the_density():
    tensors, blocks = make(2, 64, 128, 2, 32), draw(2, 64, 128, 2)
    with FlopCounterMode(display=False) as counter:
        sparse_attention(**tensors, blocks=blocks, heads=2)
    dense = 4 * 2 * 64 * 128 * 64
    assert counter.get_total_flops() == pytest.approx(dense * blocks.density())
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        fakes, lists = tree_map_only(torch.Tensor, mode.from_tensor, (tensors, vars(blocks)))
        sparse_attention(**fakes, blocks=KeyBlocks(**lists), heads=2)
    assert counter.get_total_flops() == dense


def test_blocks_of_one_token(backend):
    tensors, mask = make(1, 5, 7, 2, 32), torch.rand(1, 2, 5, 7) < 0.6
    for variant in ("exact", "int8_fp8"):
        check(tensors, KeyBlocks.from_mask(mask, 1, 1), 2, variant, backend)


def test_lists_of_a_mask():
    mask = torch.rand(2, 3, 5, 7) < 0.5
    blocks = KeyBlocks.from_mask(mask, 16, 32)
    assert torch.equal(blocks.mask(), mask) and blocks.density() == mask.double().mean()
    for at in itertools.product(range(2), range(3), range(5)):
        assert blocks.index[at][: blocks.count[at]].tolist() == mask[at].nonzero()[:, 0].tolist()


def test_opcheck_and_fake_tensors(backend):
    with RecordedCalls() as recorded:
        sparse_attention(**make(2, 37, 70, 2, 32), blocks=draw(2, 37, 70, 2), heads=2)
    (arguments,) = recorded.of("sparse_attention")
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.prfl_fast.sparse_attention, arguments, test_utils=tests)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        out = torch.ops.prfl_fast.sparse_attention(*fakes)
    assert (out.shape, out.dtype) == (arguments[0].shape, FP16)


def test_gradients_are_refused():
    tensors, blocks = make(1, 5, 9, 1, 16), draw(1, 5, 9, 1)
    for name in tensors:
        given = tensors | {name: tensors[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=rf"^sparse_attention: {name} is .*no_grad"):
            sparse_attention(**given, blocks=blocks, heads=1)
        with torch.no_grad():
            assert not sparse_attention(**given, blocks=blocks, heads=1).requires_grad


X, ONES = torch.zeros(2, 40, 32, dtype=FP16), torch.ones(1, 1, 3, 2, dtype=torch.bool)
WRONG = [
    (dict(heads=3), "heads is 3"), (dict(k=X[:1]), "k is"), (dict(scale=0.0), "scale is 0.0"),
    (dict(variant="int4"), "variant is 'int4'"),
    (dict(blocks=KeyBlocks.from_mask(ONES, 24, 32)), "block_q is 24"),
    (dict(blocks=KeyBlocks.from_mask(ONES, 16, 16)), "block_k is 16"),
    (dict(blocks=KeyBlocks.from_mask(ONES, 32, 32)), "index is"),
    (dict(blocks=KeyBlocks.from_mask(ONES.expand(3, 1, 3, 2), 16, 32)), "index is"),
    (dict(q=X.float(), k=X.float(), v=X.float(), variant="int8"), "variant is 'int8'"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG, ids=[m for _, m in WRONG])
def test_bad_arguments(change, message):
    given = dict(q=X, k=X, v=X, heads=2, blocks=KeyBlocks.from_mask(ONES, 16, 32)) | change
    with pytest.raises(ValueError, match=f"^sparse_attention: {message}.*, expected "):
        sparse_attention(**given)


def test_auto_is_exact_where_there_are_no_8_bits():
    tensors, blocks = make(1, 20, 40, 1, 24), draw(1, 20, 40, 1)
    outs = [sparse_attention(**tensors, blocks=blocks, heads=1, variant=v)
            for v in ("auto", "exact")]  # fmt: skip
    assert torch.equal(*outs)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_launches_are_sane(capability):
    for variant, block_q, block_k in itertools.product(
        ("exact", *EIGHT_BITS), module.SIZES_Q, module.SIZES_K
    ):
        launch = sparse_triton.sparse_launch(128, variant, block_q, block_k, capability)
        assert (launch.block_m, launch.block_n, launch.block_d) == (block_q, block_k, 128)
        bare = (variant, block_q, block_k, capability[0]) == ("exact", 64, 64, 8)
        assert launch.num_warps in (4, 8) and launch.num_stages in ((1,) if bare else (2, 3))
