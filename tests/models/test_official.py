"""The official Wan layout: patched against unpatched, compact rows of time, adapter protocol."""

import contextlib
import copy

import pytest
import torch
from numerics import PooledErrors
from official_wan import VARIANTS, DiffSynth, call_official, official_inputs, tiny_official
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from wan import float_means_double

import prfl_fast
from prfl_fast import LatentRewardModel
from prfl_fast.models import find_adapter
from prfl_fast.models.inference import UnsupportedError

KINDS = [(v, k) for v in VARIANTS for k in ("t2v", "i2v")]
KINDS += [("wan21", "flf2v"), ("hyprfl", "flf2v")]
PER_TOKEN = ("wan22", "videox22", "musubi22")


# Dtype of weights and inputs, and whether bf16 autocast is on. In bf16 without autocast the class
# of DiffSynth-Studio alone runs.
LAYOUTS = {
    "fp32": (torch.float32, False),
    "autocast": (torch.float32, True),
    "bf16": (torch.bfloat16, True),
}


def run(model, arguments, *, double=False, autocast=False):
    """Return the output and every gradient of one forward and backward."""
    narrow = model.patch_embedding.weight.dtype
    model = copy.deepcopy(model).double() if double else model
    dtype = torch.float64 if double else narrow

    def leaf(value):
        return value.to(narrow).to(dtype, copy=True).requires_grad_()

    given = {k: leaf(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    given["context"] = [leaf(u) for u in arguments["context"]]
    t = arguments["t"].to(narrow) if isinstance(model, DiffSynth) else arguments["t"]
    given["t"] = t.double() if double else t
    with float_means_double() if double else contextlib.nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = call_official(model, **given)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        out.backward(cotangent.to(narrow).to(out.dtype))
    found = {k: v.grad for k, v in given.items() if k in ("x", "y", "clip_fea")}
    found |= {"context": torch.cat([u.grad for u in given["context"]]), "output": out.detach()}
    found |= {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_within_twice(variant, kind, layout="fp32", seeds=6, **options):
    dtype, autocast = LAYOUTS[layout]
    autocast = autocast and not (variant == "diffsynth" and layout == "bf16")
    errors = PooledErrors()
    for seed in range(seeds):
        model = tiny_official(variant, kind, seed=seed).to(dtype)
        given = official_inputs(variant, kind, seed=seed + 10, **options)
        if variant == "wan22" and given["t"].ndim == 1:  # it takes one timestep for B = 1 only
            given["t"] = given["t"][:, None].expand(-1, given["seq_len"])
        runs = [run(model, given, double=True), run(model, given, autocast=autocast)]
        errors.add(*runs, run(prfl_fast.patch(model), given, autocast=autocast))
    errors.assert_within_twice()


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("variant", "kind"), KINDS)
def test_outputs_and_gradients_within_twice(variant, kind, layout, batch):
    assert_within_twice(variant, kind, layout, batch=batch)


@pytest.mark.cases(1)
@pytest.mark.parametrize("variant", PER_TOKEN)
def test_time_of_each_token(variant):
    assert_within_twice(variant, "t2v", per_token=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_residual_stream_keeps_the_dtype_of_its_class(variant):
    """Under autocast Wan's is float32 from block 1 on, DiffSynth-Studio's and musubi's is not."""
    model, dtypes = tiny_official(variant), []
    model.head.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    for change in (prfl_fast.unpatch, prfl_fast.patch):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            call_official(change(model), **official_inputs(variant, batch=1))
    assert dtypes[0] == dtypes[1]


class Sizes(TorchDispatchMode):
    """Note the shape of every result."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(out.shape)} if isinstance(out, torch.Tensor) else set()
        return out


@pytest.mark.cases(2)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("variant", PER_TOKEN)
def test_time_rows_stay_compact(variant, per_token):
    model = tiny_official(variant)
    given = official_inputs(variant, batch=1, per_token=per_token)
    tokens = given["seq_len"]

    def makes_a_row_for_each_token():
        with Sizes() as sizes:
            call_official(model, **given).sum().backward()
        return (1, tokens, 6, 48) in sizes.shapes or (1, tokens, 6 * 48) in sizes.shapes

    assert makes_a_row_for_each_token() or (variant == "videox22" and not per_token)
    prfl_fast.patch(model)
    assert not makes_a_row_for_each_token()


def conditions_of(given):
    names = {"y": "latent_condition", "clip_fea": "encoder_hidden_states_image"}
    found = {names[k]: v for k, v in given.items() if k in names}
    return {"encoder_hidden_states": torch.stack(given["context"]), **found}


@pytest.mark.parametrize("variant", VARIANTS)
def test_velocity_features_and_rollout(variant):
    kind = "i2v"
    model = prfl_fast.patch(tiny_official(variant, kind))
    given = official_inputs(variant, kind, batch=1, text=(5,))
    adapter, conditions, x = find_adapter(model), conditions_of(given), given["x"]
    adapter.check_latents(model, x, conditions)
    with torch.no_grad():
        out = adapter.velocity(model, x, given["t"], conditions)
        torch.testing.assert_close(out, call_official(model, **given), rtol=0, atol=2e-6)
        times = [given["t"], given["t"] * 0.5]
        opened = adapter.open_rollout(model, x, times, conditions)
        for step, t in enumerate(times):
            expected = adapter.velocity(model, x, t, conditions)
            assert torch.equal(opened.velocity(x, step), expected)
    backbone = adapter.backbone(model, 1)
    assert prfl_fast.is_patched(backbone) and len(backbone.blocks) == 1
    ours = adapter.features(backbone, x, given["t"], conditions, 1)
    theirs = adapter.features(model, x, given["t"], conditions, 1)
    assert torch.equal(ours, theirs) and ours.shape == (1, given["seq_len"], 48)
    assert "unpatchify" not in model.__dict__
    with pytest.raises(ValueError, match="channels"):
        adapter.check_latents(model, x[:, :8], conditions)


@pytest.mark.parametrize("variant", ["videox", "musubi"])
def test_features_of_a_batch_without_gradient(variant):
    """VideoX-Fun's forward runs it in halves, the second first."""
    model = tiny_official(variant)
    given = official_inputs(variant, batch=3, text=(5,))
    arguments = model, given["x"], torch.tensor(500.0), conditions_of(given), 1
    expected = find_adapter(model).features(*arguments).detach()
    with torch.no_grad():
        torch.testing.assert_close(find_adapter(model).features(*arguments), expected)


def test_a_reward_is_saved_and_read(tmp_path):
    model = tiny_official("wan21", image_dim=1280)
    reward = LatentRewardModel.from_backbone(model, 1, num_heads=2)
    reward.save(tmp_path / "reward")
    given = official_inputs("wan21", batch=1)
    twin = LatentRewardModel.load(tmp_path / "reward")
    arguments = given["x"], given["t"], conditions_of(given)
    assert torch.equal(twin(*arguments), reward(*arguments))


def test_padded_sequences_and_mixed_grids_run_the_blocks_own_forward():
    model = tiny_official("wan21")
    given = official_inputs("wan21")
    given["seq_len"] += 3
    plain = call_official(model, **given)
    prfl_fast.patch(model)
    with pytest.warns(UserWarning, match="padded"):
        assert torch.equal(call_official(model, **given), plain)


def test_rollouts_refuse_what_skips_blocks():
    model = prfl_fast.patch(tiny_official("videox"))
    given = official_inputs("videox", batch=2, text=(5,))
    with pytest.raises(UnsupportedError, match="halves"):
        find_adapter(model).open_rollout(model, given["x"], [given["t"]], conditions_of(given))


def test_a_subclass_that_overrides_the_block_is_refused():
    model = tiny_official("wan21")

    class Hinted(type(model.blocks[0])):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) + 1

    model.blocks[1].__class__ = Hinted
    with pytest.raises(ValueError, match=r"blocks\.1 is a .*Hinted"):
        prfl_fast.patch(model)


PARTS = ["self_attn", "cross_attn", "norm2", "self_attn.norm_q", "ffn"]


@pytest.mark.parametrize(
    ("part", "of_class"), [*((part, False) for part in PARTS), ("self_attn", True)]
)
def test_a_part_with_anothers_forward_runs(part, of_class, monkeypatch):
    """Sage attention, a user's norm: the kernels would not call them."""
    model, given = tiny_official("wan22"), official_inputs("wan22", batch=1)
    module = model.blocks[1].get_submodule(part)
    original = type(module).forward

    def doubled(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs)

    if of_class:
        monkeypatch.setattr(type(module), "forward", doubled)
    else:
        module.__class__ = type("Doubled", (type(module),), {"forward": doubled})
    plain = call_official(model, **given)
    prfl_fast.patch(model)
    with pytest.warns(UserWarning, match=f"{part} has the forward of .*test_official"):
        ours = call_official(model, **given)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)


def test_rotary_factors_that_are_written_in_place():
    models, given = (tiny_official("wan21"), tiny_official("wan21")), official_inputs("wan21")
    call_official(prfl_fast.patch(models[1]), **given)
    for model in models:
        model.freqs.copy_(model.freqs.flip(0))
    outs = [call_official(model, **given) for model in models]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-4)


def test_a_time_embedding_that_a_patched_model_shares():
    first, second = (prfl_fast.patch(tiny_official("diffsynth")) for _ in range(2))
    first.time_embedding = second.time_embedding
    second = prfl_fast.patch(second)
    prfl_fast.patch(first)
    prfl_fast.unpatch(second)
    given = official_inputs("diffsynth", batch=1)
    plain = tiny_official("diffsynth")
    outs = [call_official(model, **given) for model in (first, plain)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_first_frame_needs_time_of_each_token(variant):
    model, given = tiny_official(variant), official_inputs(variant, batch=1)
    conditions = conditions_of(given) | {"first_frame": given["x"][:, :, :1]}
    expected = pytest.raises(ValueError, match="expected no first_frame: this Wan takes one")
    with expected if variant in ("wan21", "hyprfl", "musubi") else contextlib.nullcontext():
        find_adapter(model).check_latents(model, given["x"], conditions)


def test_times_of_tokens_that_cannot_be_read():
    """Fake tensors have no values: the model makes a row for each token, as unpatched."""
    with FakeTensorMode(), Sizes() as sizes:
        model = prfl_fast.patch(tiny_official("wan22"))
        given = official_inputs("wan22", batch=1, per_token=True)
        arguments = given["x"], given["t"], conditions_of(given)
        find_adapter(model).features(model, *arguments, 0)
    assert (1, given["seq_len"], 6 * 48) in sizes.shapes
