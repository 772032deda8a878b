"""What trainers do with the blocks of a patched model in the official layout."""

import copy
import io
import types

import official_layout
import official_wan
import pytest
import torch
from official_wan import VARIANTS, DiffSynth, call_official, official_inputs, tiny_official
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

import prfl_fast
from prfl_fast.models import find_adapter

pytestmark = pytest.mark.filterwarnings("error:a patched block runs its own forward")
I2V = ("wan21", "videox", "diffsynth", "musubi")  # these have image tokens


def inputs(variant, kind="t2v", **options):
    # Wan2.2's own forward takes one timestep for a batch of one only.
    return official_inputs(variant, kind, batch=1, size=(2, 4, 4), **options)


def gradients(model, arguments, parameters=None):
    """Return the output and the gradients of latents and parameters by name."""
    x = arguments["x"].clone().requires_grad_()
    out = call_official(model, **{**arguments, "x": x})
    names = dict(model.named_parameters()) if parameters is None else parameters
    grads = torch.autograd.grad(out.square().mean(), [x, *names.values()], allow_unused=True)
    return out.detach(), dict(zip(["x", *names], grads, strict=True))


@pytest.fixture(autouse=True)
def _attention_in_float32(monkeypatch):
    """musubi-tuner casts float32 to bfloat16 in attention, which would hide differences."""
    monkeypatch.setattr(official_wan, "attend_in_half", official_wan.attend)


def assert_close(ours, theirs, tolerance=3e-6, of_gradients=8e-5):
    """Compare with tolerances of at most five times the largest difference seen."""
    (out, grads), (plain, expected) = ours, theirs
    torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)
    assert grads.keys() == expected.keys()
    total = sum(g.square().sum() for g in expected.values() if g is not None).sqrt()
    for name, grad in expected.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            distance = (grads[name] - grad).norm() / (grad.norm() + 1e-2 * total)
            assert distance <= of_gradients, (name, float(distance))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_blocks_own_call_stays_the_trainers(variant):
    """Blocks take the same arguments as before; a residual may be added between them."""
    model, arguments = tiny_official(variant), inputs(variant)

    def with_residual(block, given, out):
        return out + 0.1 * torch.linspace(-1, 1, out.shape[-1])

    for block in model.blocks:
        block.register_forward_hook(with_residual)
    plain = gradients(model, arguments)
    prfl_fast.patch(model)
    assert_close(gradients(model, arguments), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trainers_own_checkpointing(variant):
    model, arguments = tiny_official(variant), inputs(variant)
    plain = gradients(model, arguments)
    prfl_fast.patch(model)
    calls = []
    for block in model.blocks:
        block.ffn[2].register_forward_hook(lambda *_: calls.append(1))
    if isinstance(model, DiffSynth):
        arguments["use_gradient_checkpointing_offload"] = True
    elif variant.startswith("musubi"):
        model.train().enable_gradient_checkpointing()
    elif variant.startswith("videox"):
        model.gradient_checkpointing = True
    else:  # HY-Video-PRFL wraps blocks, which adds a level to their names
        checkpoint_wrapper.apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=checkpoint_wrapper.checkpoint_wrapper,
            check_fn=lambda module: isinstance(module, official_layout.Block),
        )
    assert_close(gradients(model, arguments), plain_names(plain, model))
    assert len(calls) == 2 * len(model.blocks)


def plain_names(plain, model):
    """Return gradients under the names that the wrapped model has."""
    out, grads = plain
    names = {k.replace("_checkpoint_wrapped_module.", ""): k for k, _ in model.named_parameters()}
    return out, {names.get(name, name): grad for name, grad in grads.items()}


def usp_forward(self, *args, **kwargs):
    """Stand for a sequence-parallel forward, as trainers set it on self-attention."""
    return type(self).forward(self, *args, **kwargs) * 2


@pytest.mark.parametrize("variant", ["wan22", "videox", "diffsynth"])
def test_sequence_parallel_attention_is_never_lost(variant):
    """Set before, patch refuses it by name; set after, the block runs its own forward."""
    model, arguments = tiny_official(variant), inputs(variant)
    parallel = copy.deepcopy(model)
    for block in parallel.blocks:
        block.self_attn.forward = types.MethodType(usp_forward, block.self_attn)
    with pytest.raises(ValueError, match="self_attn"):
        prfl_fast.patch(parallel)
    plain = gradients(parallel, arguments)
    prfl_fast.patch(model)
    for block in model.blocks:
        block.self_attn.forward = types.MethodType(usp_forward, block.self_attn)
    with pytest.warns(UserWarning, match="self_attn"):
        ours = gradients(model, arguments)
    assert_close(ours, plain, 2e-6, 3e-5)


def test_a_sequence_parallel_model_gets_a_time_row_for_each_token():
    """VideoX-Fun's forward splits the rows over ranks, in as many parts as the tokens."""
    model, arguments = tiny_official("videox22"), inputs("videox22", per_token=True)
    prfl_fast.patch(model)
    for block in model.blocks:
        block.self_attn.forward = types.MethodType(usp_forward, block.self_attn)
    rows = []
    model.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["e"].shape[1]), with_kwargs=True
    )
    with pytest.warns(UserWarning, match="self_attn"):
        call_official(model, **arguments)
    assert rows == [arguments["seq_len"]]


def test_hy_video_prfls_sequence_parallelism_is_refused(monkeypatch):
    model = tiny_official("hyprfl")
    monkeypatch.setattr(official_layout, "get_sequence_parallel_state", lambda: True)
    with pytest.raises(ValueError, match="sequence"):
        prfl_fast.patch(model)


def test_hy_video_prfls_reward_has_no_head():
    """Its training script removes the head, and reads features from the model's own forward."""
    model, arguments = tiny_official("hyprfl"), inputs("hyprfl")
    del model.head
    model.head = None
    given = {**arguments, "x": list(arguments["x"])}
    options = {"output_features": True, "selected_layers": [1, 2]}
    expected = model(**given, **options)
    ours = prfl_fast.patch(model)(**given, **options)
    torch.testing.assert_close(ours, expected, rtol=3e-6, atol=3e-6)
    conditions = {"encoder_hidden_states": torch.stack(arguments["context"])}
    features = find_adapter(model).features(model, arguments["x"], arguments["t"], conditions, 1)
    torch.testing.assert_close(features, expected[0], rtol=3e-6, atol=3e-6)
    prfl_fast.unpatch(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp_around_blocks_with_checkpoint_wrappers(tmp_path, use_orig_params):
    """HY-Video-PRFL shards each block with FSDP1; its weights are then tensors, not parameters."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model, arguments = tiny_official("hyprfl"), inputs("hyprfl")
    expected = gradients(model, arguments, {})
    prfl_fast.patch(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        policy = ModuleWrapPolicy({official_layout.Block})
        sharded = FullyShardedDataParallel(
            model,
            auto_wrap_policy=policy,
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
        )
        checkpoint_wrapper.apply_activation_checkpointing(
            sharded, check_fn=lambda module: isinstance(module, official_layout.Block)
        )
        assert_close(gradients(sharded, arguments, {}), expected, 2e-6, 2e-6)
    finally:
        dist.destroy_process_group()


class Offloader:
    """Keep the weights of each block elsewhere, except while the block runs."""

    def __init__(self, blocks):
        self.blocks, self.stored, self.calls = blocks, {}, []
        for index, block in enumerate(blocks):
            self.take(index)
            block.register_full_backward_pre_hook(lambda *_, i=index: self.put(i))
            block.register_full_backward_hook(lambda *_, i=index: self.take(i))

    def take(self, index):
        weights = dict(self.blocks[index].named_parameters())
        self.stored[index] = {name: p.data for name, p in weights.items()}
        for parameter in weights.values():
            parameter.data = torch.full_like(parameter.data, float("nan"))

    def put(self, index):
        for name, parameter in self.blocks[index].named_parameters():
            parameter.data = self.stored[index][name]

    def wait_for_block(self, index):
        self.calls.append(("wait", index))
        self.put(index)

    def submit_move_blocks_forward(self, blocks, index):
        self.calls.append(("submit", index))
        self.take(index)


@pytest.mark.parametrize("variant", ["musubi", "musubi22"])
def test_block_swap(variant):
    """Weights of a block are elsewhere except while its forward or its backward runs."""
    model, arguments = tiny_official(variant).requires_grad_(False), inputs(variant)
    model.train().enable_gradient_checkpointing()
    expected = gradients(prfl_fast.patch(model), arguments, {})
    model.blocks_to_swap, model.offloader = 2, Offloader(model.blocks)
    assert_close(gradients(model, arguments, {}), expected, 0, 0)
    assert model.offloader.calls == [("wait", 0), ("submit", 0), ("wait", 1), ("submit", 1)]


class Lora(nn.Module):
    """LoRA as VideoX-Fun and musubi-tuner add it: it replaces the forward of a Linear."""

    def __init__(self, linear):
        super().__init__()
        self.down, self.up = (
            nn.Linear(linear.in_features, 2, bias=False),
            nn.Linear(2, linear.out_features, bias=False),
        )
        self.original = [linear.forward]
        linear.forward = self.forward

    def forward(self, x):
        return self.original[0](x) + self.up(self.down(x))


@pytest.mark.cases(2)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("variant", I2V)
def test_lora_by_replaced_forwards(variant, before):
    model, arguments = tiny_official(variant, "i2v"), inputs(variant, "i2v")
    ours = copy.deepcopy(model)
    if before:
        prfl_fast.patch(ours)
    results = []
    for candidate in (model, ours):
        torch.manual_seed(5)
        linears = [m for m in candidate.modules() if isinstance(m, nn.Linear)]
        network = nn.ModuleList(Lora(linear) for linear in linears)
        if candidate is ours and not before:
            prfl_fast.patch(ours)
        results.append(gradients(candidate, arguments, dict(network.named_parameters())))
    assert_close(results[1], results[0], 3e-6, 6e-6)


@pytest.mark.cases(1)
@pytest.mark.parametrize("variant", VARIANTS)
def test_state_copies_pickles_and_swapped_weights(variant):
    model, arguments = tiny_official(variant), inputs(variant)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = tiny_official(variant, seed=3)
    plain, theirs = gradients(model, arguments), gradients(other, arguments)
    prfl_fast.patch(model)
    assert list(model.state_dict()) == list(state)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert prfl_fast.is_patched(twin)
        assert_close(gradients(twin, arguments), plain)
        prfl_fast.unpatch(twin)
        assert_close(gradients(twin, arguments), plain, 0, 0)
        assert prfl_fast.is_patched(model)
    model.load_state_dict(other.state_dict(), assign=True)  # as musubi-tuner swaps its experts
    assert_close(gradients(model, arguments), theirs)
    prfl_fast.unpatch(model)
    assert_close(gradients(model, arguments), theirs, 0, 0)
    assert not any("forward" in module.__dict__ for module in model.modules())
