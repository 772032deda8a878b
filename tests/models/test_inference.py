"""Rollouts with caches: the bits of the model's own forward, or a clear refusal; a compiled block;
and a model that is afterwards as it was.
"""

import gc
import types
import weakref

import numerics
import pytest
import rollouts
import torch
import wan
from rollouts import FP8, SHARES, Case, add_lora, assert_same, autocast, build, distance, opened
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prfl_fast
from prfl_fast.memory.quantized import cast_weights, quantize
from prfl_fast.models import blocks as modules
from prfl_fast.models import inference as rollout_block
from prfl_fast.models.inference import UnsupportedError
from prfl_fast.models.registry import find_adapter

pytest.importorskip("diffusers")


@pytest.mark.cases(6)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", ["fp32", "bf16", "mixed", "autocast"])
def test_caches_change_no_bit(case, layout, batch):
    work = Case(build(case, layout, head_dim=24), case, batch=batch)
    state = work.state()
    with autocast(layout):
        rollout = work.open()
        assert_same(work.all(rollout), work.plain())
    assert rollout.notes == []
    work.assert_as_before(state)


OTHERS = ["lora-after", "lora-before", "peft", "fused", "chunks", "no-norm", "fp8", "nf4"]


@pytest.mark.cases(4)
@pytest.mark.parametrize("change", OTHERS)
def test_caches_change_no_bit_of_other_models(change, case):
    model = wan.tiny_wan(case, cross_attn_norm=change != "no-norm")
    if change == "nf4":
        pytest.importorskip("bitsandbytes")
    if change in ("fp8", "nf4"):
        quantize(model, change)
    if change in ("lora-before", "fp8", "nf4"):
        add_lora(model)
    elif change == "fused":
        rollouts.fused(model)
    prfl_fast.patch(model)
    if change == "lora-after":
        add_lora(model)
    elif change == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=rollouts.TARGETS, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    elif change == "chunks":
        find_adapter(model).chunk_feed_forward(model, 5)
    work = Case(model, case, batch=1)
    assert_same(work.all(work.open()), work.plain())


def test_steps_in_any_order_and_latents_of_any_values():
    work, rollout = opened(build())
    x = 3 * work.x - 1
    for step in (2, 0, 2, 1):
        assert torch.equal(rollout.velocity(x, step), work.plain(x=x)[step])


def test_what_no_step_changes_is_computed_once(monkeypatch):
    from diffusers.models import embeddings

    work = Case(build("i2v"), "i2v")
    text = rollouts.spied(monkeypatch, embeddings.PixArtAlphaTextProjection, "forward")
    time = rollouts.spied(monkeypatch, embeddings.TimestepEmbedding, "forward")
    rope = rollouts.spied(monkeypatch, modules, "rope_table")
    rollout = work.open()
    work.all(rollout)
    work.all(rollout)
    assert (len(text), len(time), len(rope)) == (1, len(SHARES), 1)


def test_products_that_a_step_no_longer_runs(case):
    work = Case(build(case), case, batch=1)
    rollout, dim, text = work.open(), 64, 512 if case == "i2v" else 7

    def flops(run):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    step = (work.model, work.x, work.timesteps[0], work.conditions)
    plain = flops(lambda: work.adapter.velocity(*step))
    ours = flops(lambda: rollout.velocity(work.x, 0))
    keys = 2 * 2 * text * 2 * dim * dim  # two blocks, keys and values
    embeddings = 2 * (text * (20 + dim) * dim + (32 + dim) * dim + dim * 6 * dim)
    if case == "i2v":
        keys += 2 * 2 * 5 * 2 * dim * dim
        embeddings += 2 * 5 * (20 * 20 + 20 * dim)
    assert plain - ours == keys + embeddings


def test_keys_of_the_context_in_place_of_the_context():
    parts, x = build("i2v").blocks[0].attn2, torch.randn(2, 9, 64)
    context = torch.randn(2, 517, 64, requires_grad=True)
    whole = modules.cross_attention(parts, x, context)
    halves = modules.cross_attention(parts, x, modules.context_keys(parts, context))
    assert torch.equal(whole, halves)
    a, b = (torch.autograd.grad(out.square().sum(), context)[0] for out in (whole, halves))
    assert torch.equal(a, b)


def test_keeps_no_graph_and_saves_nothing():
    work = Case(build())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        x = work.x.requires_grad_()
        out = work.open().velocity(x, 0)
        linears = work.open(merge_lora=True).velocity(x, 0, **FP8)
    assert not saved and not out.requires_grad and not linears.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("how", [{}, FP8])
def test_a_gradient_step_right_after_is_the_same(how):
    model = add_lora(build())
    before = wan.run(model, *wan.inputs())
    work = Case(model)
    work.all(work.open(merge_lora=True), **how)
    after = wan.run(model, *wan.inputs())
    assert torch.equal(before[0], after[0])
    assert any(gradient is not None for gradient in after[1].values())
    for name, gradient in before[1].items():
        assert (gradient is None) == (after[1][name] is None), name
        assert gradient is None or torch.equal(gradient, after[1][name]), name


def test_dropping_it_frees_the_caches(request):
    work, rollout = opened(build())
    rollout.velocity(work.x, 0, **FP8)
    watched = [weakref.ref(tensor) for keys in rollout._keys for tensor in keys[:2]]
    watched.append(weakref.ref(rollout))
    assert all(ref() is not None for ref in watched)
    request.addfinalizer(gc.enable)
    gc.disable()
    del rollout
    assert all(ref() is None for ref in watched)


class StopError(Exception):
    pass


@pytest.mark.cases(2)
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("linears", ["exact", "fp8"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(merge, linears, monkeypatch):
    work = Case(add_lora(build()))
    expected, state = work.plain(), work.state()
    original, calls = rollout_block.transformer_block, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 2:  # the second block
            raise StopError
        return original(*args)

    monkeypatch.setattr(rollout_block, "transformer_block", stops)
    rollout = work.open(merge_lora=merge)
    with pytest.raises(StopError):
        rollout.velocity(work.x, 0, linears=linears)
    monkeypatch.undo()
    work.assert_as_before(state)
    assert_same(work.plain(), expected)
    if not merge and linears == "exact":
        assert_same(work.all(rollout), expected)


def test_an_instance_forward_comes_back_as_the_same_object():
    work = Case(build())
    forwards = [(block, block.__dict__["forward"]) for block in work.model.blocks]
    embedder = work.model.condition_embedder.__dict__["forward"]
    work.open().velocity(work.x, 0)
    assert all(block.__dict__["forward"] is forward for block, forward in forwards)
    assert work.model.condition_embedder.__dict__["forward"] is embedder


# A compiled block.
@pytest.fixture
def graphs(monkeypatch):
    """Compiles with a backend that counts, and traces what a real one would."""
    from torch._dynamo.backends.debugging import aot_eager

    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(rollout_block.transformer_block, dynamic=False, backend=backend)
    monkeypatch.setattr(rollout_block, "_compiled", lambda: compiled)
    yield counted
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["exact", "lora", "merged", "quantized", "fp8"])
def test_one_graph_for_all_blocks_and_steps(change, graphs):
    model = build(layers=3)
    if change == "quantized":
        quantize(model, "fp8")
    if change in ("lora", "merged"):
        add_lora(model)
    work = Case(model)
    how = FP8 if change == "fp8" else {}
    options = {"merge_lora": change == "merged"}
    eager = work.all(work.open(**options), **how)
    compiled = work.all(work.open(**options, compile=True), **how)
    assert len(graphs) == 1
    again = Case(model)
    again.x = again.x + 1
    again.all(again.open(**options, compile=True), **how)
    assert len(graphs) == 1, "another rollout compiled again"
    if change == "fp8":  # a value that falls on the other side of a step of e4m3
        assert distance(compiled, eager) < 0.02
        return
    for out, plain, oracle in zip(compiled, work.plain(), work.double(), strict=True):
        numerics.assert_within_twice(out, plain, oracle, rounding=4)


@pytest.mark.slow
def test_blocks_compiled_one_by_one(graphs):
    work = Case(build())
    plain = work.plain()
    for block in work.model.blocks:
        block.compile(backend="aot_eager")
    state = work.state()
    with pytest.raises(UnsupportedError, match="blocks.0 is compiled.*let the rollout compile"):
        work.open()
    compiled = work.all(work.open(compile=True))
    work.assert_as_before(state)
    assert len(graphs) == 1
    assert distance(compiled, plain) < 1e-5


@pytest.mark.slow
def test_the_default_compiler():
    torch._dynamo.reset()
    work = Case(build())
    for how in ({}, FP8):
        eager = work.all(work.open(), **how)
        assert distance(work.all(work.open(compile=True), **how), eager) < (0.02 if how else 1e-5)


# Refusals.
def test_models_that_are_not_patched():
    partly = build()
    del partly.blocks[1].forward
    for model in (wan.tiny_wan(), partly):
        with pytest.raises(UnsupportedError, match=r"Call prfl_fast\.patch\(model\)"):
            Case(model).open()


def with_accelerate(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.blocks[0], hooks.ModelHook())


def with_own_forward(model):
    layer = model.blocks[0].attn2.to_k
    layer.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x), layer)


CHANGES = [  # in place, or to another model
    (
        lambda m: m.condition_embedder.text_embedder.register_forward_hook(print),
        r"\.text_embedder has hooks",
    ),
    (lambda m: m.register_forward_pre_hook(print), "pre-hooks"),
    (with_accelerate, "WanTransformerBlock has a replaced forward over prfl_fast's"),
    (with_own_forward, r"blocks\.0\.attn2\.to_k has hooks or a replaced forward"),
    (lambda m: add_lora(m, lora_dropout=0.1).train(), r"has dropout p=0\.1"),
    (lambda m: m.compile(backend="aot_eager"), "compiled as a whole"),
    (lambda m: torch.compile(m, backend="aot_eager"), "compiled as a whole"),
    (nn.DataParallel, "DataParallel"),
]


@pytest.mark.parametrize("change, reason", CHANGES)
def test_models_whose_rollouts_run_as_they_are(change, reason):
    model = build()
    changed = change(model)
    work = Case(changed if isinstance(changed, nn.Module) else model)
    with pytest.raises(UnsupportedError, match=reason):
        work.open()


def test_a_subclass_with_a_forward_of_its_own():
    model = build()

    class Other(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.__class__ = Other
    with pytest.raises(UnsupportedError, match="Other has a forward that is not diffusers'"):
        Case(model).open()


def test_what_is_harmless_is_not_refused():
    model = add_lora(build(), lora_dropout=0.1).eval()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    work = Case(model)
    work.all(work.open())
    assert len(seen) == len(SHARES)


def test_inside_distributed_data_parallel(tmp_path, request):
    dist = torch.distributed
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    work = Case(nn.parallel.DistributedDataParallel(build()), batch=1)
    assert_same(work.all(work.open()), work.plain())


def test_bad_arguments():
    work, rollout = opened(build())
    for x, step, how, message in (
        (work.x[:1], 0, {}, r"x is float32\[1, 16, 3, 4, 6\].*expected \[2, 16, 3, 4, 6\]"),
        (work.x, -1, {}, "step is -1, expected 0 to 2"),
        (work.x, 3, {}, "step is 3, expected 0 to 2"),
        (work.x, 0, {"linears": "int8"}, "linears is 'int8', expected one of 'exact', 'fp8'"),
        (work.x, 0, {"attention": None}, "attention is None, expected one of 'exact', 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            rollout.velocity(x, step, **how)
    with autocast("autocast"), pytest.raises(ValueError, match="autocast is torch.bfloat16"):
        rollout.velocity(work.x, 0)
    first, second, third = work.timesteps
    for name, value, message in (
        ("timesteps", [first, second[:1], third], r"timesteps\[1\] is float32\[1\].*shape \[2\]"),
        ("timesteps", [], r"timesteps is \[\], expected one tensor"),
        ("conditions", {}, "encoder_hidden_states"),
    ):
        bad = Case(work.model)
        setattr(bad, name, value)
        with pytest.raises(ValueError, match=message):
            bad.open()


def test_fake_tensors_of_a_simulation():
    with torch._subclasses.FakeTensorMode():
        model = prfl_fast.patch(wan.tiny_wan(head_dim=32))
        x, text = torch.empty(2, 16, 3, 4, 6), torch.empty(2, 7, 20)
        rollout = find_adapter(model).open_rollout(
            model, x, [torch.ones(2)], {"encoder_hidden_states": text}
        )
        for how in ("exact", "fp8"):
            assert rollout.velocity(x, 0, linears=how, attention=how).shape == x.shape
    assert rollout.notes == []


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["bf16", "mixed"])
def test_on_a_gpu(layout):
    model = build("i2v", layout, heads=2, head_dim=64, layers=2).cuda()
    work = Case(cast_weights(model, "bf16"), "i2v", size=(3, 8, 8))
    work.x = work.x.cuda()
    work.timesteps = [t.cuda() for t in work.timesteps]
    work.conditions = {name: value.cuda() for name, value in work.conditions.items()}
    rollout, plain = work.open(), work.plain()
    assert_same(work.all(rollout), plain)
    assert 0.001 < distance(work.all(rollout, **FP8), plain) < 0.08
    assert distance(work.all(work.open(compile=True)), plain) < 0.02
