"""Adapters of rollouts against models whose weights were changed by hand."""

import copy

import pytest
import torch
from engine_world import assert_same, make_wan, walk, wan_inputs
from official_wan import tiny_official
from safetensors.torch import save_file
from tiny_families import tiny
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from wan import tiny_wan

from prfl_fast.memory import MemoryConfig, apply_memory, quantize
from prfl_fast.memory.quantized import QuantizedLinear
from prfl_fast.models.adapter_files import read_adapter
from prfl_fast.models.experts import Experts
from prfl_fast.models.registry import patch
from prfl_fast.models.rollout_adapter import RolloutAdapter
from prfl_fast.models.velocity import ModelCall
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.rollout.trajectory import relative_distance, rollout

SCALE, ALPHA, RANK = 0.7, 6.0, 3
# Official Wan's name of each layer in a file, and diffusers' in the model.
LAYERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0",
    "blocks.1.self_attn.v": "blocks.1.attn1.to_v",
    "blocks.0.cross_attn.k": "blocks.0.attn2.to_k",
    "blocks.1.cross_attn.v": "blocks.1.attn2.to_v",
    "blocks.1.cross_attn.q": "blocks.1.attn2.to_q",
    "blocks.0.ffn.0": "blocks.0.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "patch_embedding": "patch_embedding",
}
# Keys of differences, as lightx2v writes them, and the parameter that each changes.
DIFFERENCES = {
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.1.self_attn.k.diff_b": "blocks.1.attn1.to_k.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
    "blocks.0.norm3.diff": "blocks.0.norm2.weight",
    "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
    "blocks.1.diff_m": "blocks.1.scale_shift_table",
    "head.head.diff": "proj_out.weight",
    "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    "patch_embedding.diff_b": "patch_embedding.bias",
}


def draw(*shape, seed):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(model, layers=LAYERS):
    """Return random factors (down, up) by official name."""
    found = {}
    for number, (theirs, ours) in enumerate(layers.items()):
        rows, columns, *kernel = model.get_submodule(ours).weight.shape
        up = draw(rows, RANK, *[1] * len(kernel), seed=number)
        found[theirs] = (draw(RANK, columns, *kernel, seed=100 + number), up)
    return found


def changed(model, scale=SCALE, layers=LAYERS, differences=DIFFERENCES, alpha=ALPHA):
    """Return a plain copy of the model with the adapter's change in its weights."""
    twin = copy.deepcopy(model)
    parameters = {k.replace(".base_layer", ""): p for k, p in twin.named_parameters()}
    with torch.no_grad():
        for theirs, (down, up) in pairs(model, layers).items():
            weight = parameters[f"{layers[theirs]}.weight"]
            product = up.flatten(1) @ down.flatten(1)
            weight += scale * alpha / RANK * product.view_as(weight)
        for number, name in enumerate(differences.values()):
            parameter = parameters[name]
            parameter += scale * draw(*parameter.shape, seed=200 + number)
    return twin


def write(path, model, style="comfyui", layers=LAYERS, differences=DIFFERENCES, alpha=ALPHA):
    """Write the adapter to a file in the style of one of its trainers."""
    tensors = {}
    for theirs, (down, up) in pairs(model, layers).items():
        ours = layers[theirs]
        name, a, b = {
            "comfyui": (f"diffusion_model.{theirs}", "lora_down", "lora_up"),
            "peft": (f"transformer.{ours}", "lora_A", "lora_B"),
            "kohya": ("lora_unet_" + theirs.replace(".", "_"), "lora_down", "lora_up"),
            "diffsynth": (theirs, "lora_A.default", "lora_B.default"),
        }[style]
        tensors |= {f"{name}.{a}.weight": down, f"{name}.{b}.weight": up}
        if alpha != RANK:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    for number, (key, name) in enumerate(differences.items()):
        shape = dict(model.named_parameters())[name].shape
        tensors[f"diffusion_model.{key}"] = draw(*shape, seed=200 + number)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return str(path)


def distance(x, y):
    return float(relative_distance(x, y))


def sampled(model, config=None, steps=4):
    x, conditions = wan_inputs()
    return rollout(model, x, conditions, FlowUniPC(), steps, rollout_config=config)


def engine_of(model, path, **options):
    engine = RolloutEngine(model, RolloutConfig(adapter=path, adapter_scale=SCALE, **options))
    engine.trajectories = 1  # the first would be checked
    return engine


@pytest.mark.cases(2)
@pytest.mark.parametrize("style", ["comfyui", "peft", "kohya", "diffsynth"])
def test_a_rollout_is_that_of_the_model_with_changed_weights(tmp_path, style):
    model = make_wan()
    differences = DIFFERENCES if style == "comfyui" else {}
    path = write(tmp_path / "few.safetensors", model, style, differences=differences)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = sampled(model, engine_of(model, path))
    expected = sampled(changed(model, differences=differences))
    assert distance(found, expected) < 1e-5
    assert distance(sampled(model), expected) > 1e-2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert isinstance(model.proj_out.weight, torch.nn.Parameter)


@pytest.mark.parametrize("name", [*DIFFERENCES, *LAYERS])
def test_each_layer_changes_alone(tmp_path, name):
    model = make_wan()
    layers = {k: v for k, v in LAYERS.items() if k == name}
    differences = {k: v for k, v in DIFFERENCES.items() if k == name}
    given = {"layers": layers, "differences": differences, "alpha": float(RANK)}
    path = write(tmp_path / "few.safetensors", model, **given)
    found = sampled(model, engine_of(model, path), steps=2)
    expected = sampled(changed(model, **given), steps=2)
    assert distance(found, expected) < 1e-5
    assert distance(sampled(model, steps=2), expected) > 1e-4


def by_steps(model, twin, exact, steps=7):
    """Sample by the two models' own forwards; steps ``exact`` are the first one's."""
    x, conditions = wan_inputs()
    scheduler, seen = FlowUniPC(), {}
    scheduler.set_timesteps(steps)
    for index, t in enumerate(scheduler.timesteps):
        which = model if index in exact else twin
        with torch.no_grad():
            v = which(x, t.float().expand(len(x)), **conditions, return_dict=False)[0]
        (x,) = scheduler.step(v, t, x)
        seen[index + 1] = x
    return seen


@pytest.mark.cases(1)
@pytest.mark.parametrize("merge_lora", [False, True])
def test_steps_with_gradient_run_without_it_below_adapters_that_train(tmp_path, merge_lora):
    model = make_wan(lora=True)
    path = write(tmp_path / "few.safetensors", tiny_wan())
    found, trajectory = walk(
        model, *wan_inputs(), engine_of(model, path, merge_lora=merge_lora), visit=(2, 5)
    )
    expected = by_steps(model, changed(model), exact=(2, 5))
    for step, x in found.items():
        assert distance(x, expected[step]) < 1e-5, step
    assert trajectory.drift is None
    exact = by_steps(model, model, ())
    assert distance(expected[2], exact[2]) > 1e-3


def test_drift_is_that_from_the_model_without_it_and_past_its_limit_rollouts_are_exact(tmp_path):
    model = make_wan(lora=True)
    path = write(tmp_path / "few.safetensors", tiny_wan())
    exact, _ = walk(model, *wan_inputs(), None)
    engine = RolloutEngine(model, RolloutConfig(adapter=path, adapter_scale=SCALE))
    found, trajectory = walk(model, *wan_inputs(), engine)
    drift = distance(found[2], exact[2])
    assert engine.inexact and trajectory.drift[2] == pytest.approx(drift, rel=1e-6)
    assert drift > 1e-3
    config = RolloutConfig(adapter=path, adapter_scale=SCALE, drift_limit=1e-6)
    engine = RolloutEngine(model, config)
    with pytest.warns(RuntimeWarning, match="past drift_limit"):
        found, _ = walk(model, *wan_inputs(), engine)
    assert_same(found, exact)
    assert engine.fallen_back and not engine.inexact and not engine.adds
    again, _ = walk(model, *wan_inputs(), engine)
    assert_same(again, exact)
    resumed = RolloutEngine(model, config)
    resumed.load_state_dict(engine.state_dict())
    assert_same(walk(model, *wan_inputs(), resumed)[0], exact)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "options,limit",
    [
        ({"stride": 2, "solver_order": 1}, 1e-5),
        ({"first_block_cache": 0.3}, 1e-5),
        ({"teacache": 0.3}, 1e-5),
        ({"guidance_interval": (0.6, 0.95)}, 1e-5),
        # A weight whose last bit differs may have another code.
        ({"fp8_linears": (0.0, 1.0)}, 2e-3),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options_run_on_the_changed_weights(tmp_path, options, limit):
    model = make_wan(heads=4, head_dim=32)
    path = write(tmp_path / "few.safetensors", model)
    x, conditions = wan_inputs()
    guidance = None
    if "guidance_interval" in options:
        guidance = Guidance(3.0, {k: -v for k, v in conditions.items()})

    def sample(of, **more):
        engine = RolloutEngine(of, RolloutConfig(**options, **more))
        engine.trajectories = 1
        given = {"guidance": guidance, "rollout_config": engine}
        return rollout(of, x, conditions, FlowUniPC(), 6, **given)

    found = sample(model, adapter=path, adapter_scale=SCALE)
    expected = sample(changed(model))
    assert distance(found, expected) < limit
    assert distance(sample(model), expected) > 10 * limit


def test_weights_are_rounded_once_and_restored(tmp_path):
    model = patch(tiny_wan().bfloat16())
    path = write(tmp_path / "few.safetensors", model)
    adapter = RolloutAdapter(read_adapter(path, SCALE), model, model.blocks)
    twin = changed(model.float())
    model.bfloat16()
    block, before = model.blocks[0], dict(model.named_parameters())
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16):
        with adapter.within(block, torch.bfloat16):
            weight, bias = block.attn1.to_q.weight, block.attn1.to_q.bias
            raise KeyError
    own = twin.blocks[0].attn1.to_q
    torch.testing.assert_close(weight.float(), own.weight, rtol=2**-8, atol=1e-6)
    assert (weight != own.weight.bfloat16()).float().mean() < 0.01  # of sums in another order
    assert weight.dtype == torch.bfloat16 and torch.equal(bias, own.bias.bfloat16())
    assert all(p is before[name] for name, p in model.named_parameters())


def test_autocast_does_not_round_the_change(tmp_path):
    model = make_wan()
    path = write(tmp_path / "few.safetensors", model)
    found = sampled(ModelCall(model, "bf16"), engine_of(ModelCall(model, "bf16"), path))
    expected = sampled(ModelCall(changed(model), "bf16"))
    assert distance(found, expected) < 1e-3


@pytest.mark.cases(2)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_quantized_weights_get_it_in_the_dtype_of_the_latents(tmp_path, kind, lora):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    path = write(tmp_path / "few.safetensors", tiny_wan())
    model = make_wan(lora=lora)
    quantize(model, kind)
    plain = make_wan(lora=lora)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = module.dequantize(torch.float32)
    found = sampled(model, engine_of(model, path))
    assert distance(found, sampled(changed(plain))) < 1e-5
    assert distance(sampled(model), found) > 1e-2
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 20


def test_streamed_weights_get_it(tmp_path):
    model, plain = make_wan(lora=True), make_wan(lora=True)
    path = write(tmp_path / "few.safetensors", tiny_wan())
    apply_memory(model, MemoryConfig("fp32", "full", stream_weights=1))
    found, _ = walk(model, *wan_inputs(), engine_of(model, path))
    expected, _ = walk(plain, *wan_inputs(), engine_of(plain, path))
    assert_same(found, expected)


def test_two_experts_have_one_or_two(tmp_path):
    def make(change=lambda model, scale: model):
        pair = (change(tiny_wan(seed=seed), scale) for seed, scale in ((0, SCALE), (1, 0.5)))
        return patch(Experts(*pair, 0.9))

    path = write(tmp_path / "few.safetensors", tiny_wan())
    other = write(tmp_path / "low.safetensors", tiny_wan(), "peft", differences={})
    model = make()
    x, conditions = wan_inputs()

    def sample(of, **options):
        engine = None
        if options:
            engine = RolloutEngine(of, RolloutConfig(**options))
            engine.trajectories = 1
        return rollout(of, x, conditions, FlowUniPC(), 6, rollout_config=engine)

    both = sample(make(changed))
    found = sample(model, adapter=path, adapter_scale=(SCALE, 0.5))
    assert distance(found, both) < 1e-5 < 1e-2 < distance(sample(model), both)
    low = lambda m, s: changed(m, s, differences={} if s == 0.5 else DIFFERENCES)  # noqa: E731
    found = sample(model, adapter=(path, other), adapter_scale=(SCALE, 0.5))
    assert distance(found, sample(make(low))) < 1e-5
    one = lambda m, s: changed(m, s) if s == SCALE else m  # noqa: E731
    found = sample(model, adapter=[path, None], adapter_scale=SCALE)
    assert distance(found, sample(make(one))) < 1e-5


@pytest.mark.cases(2)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("variant", ["wan21", "diffsynth"])
def test_official_wan_gets_it(tmp_path, variant, wrapped):
    model = patch(tiny_official(variant))
    layers = {name: name for name in LAYERS}
    differences = {
        "blocks.0.self_attn.q.diff_b": "blocks.0.self_attn.q.bias",
        "blocks.1.cross_attn.norm_k.diff": "blocks.1.cross_attn.norm_k.weight",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.head.diff_b": "head.head.bias",
    }
    given = {"layers": layers, "differences": differences}
    path = write(tmp_path / "few.safetensors", model, **given)
    expected = sampled(changed(model, **given))
    if wrapped:
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    found = sampled(model, engine_of(model, path))
    assert distance(found, expected) < 1e-5 < 1e-2 < distance(sampled(model), expected)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = make_wan()
    path = write(tmp_path / "few.safetensors", model)

    def refused(match, of=model, error=ValueError, **options):
        with pytest.raises(error, match=match):
            RolloutEngine(of, RolloutConfig(**{"adapter": path, **options}))

    refused("gone.safetensors: no such file", error=FileNotFoundError, adapter="gone.safetensors")
    save_file({"blocks.0.weight": torch.ones(1)}, tmp_path / "plain.safetensors")
    plain = str(tmp_path / "plain.safetensors")
    refused("no LoRA in it", error=FileNotFoundError, adapter=plain)
    refused("48, 16.*as in the model|is .*48", of=patch(tiny_wan(head_dim=16)))
    refused(r"blocks.1.*missing.*in the model", of=patch(tiny_wan(layers=1)))
    refused("adapter is .*expected None for .*LTX.*: Wan alone", of=patch(tiny("ltx")))
    refused("adapter is .*function", of=lambda x, t, c: x)
    refused("one value: the model has no experts", adapter=(path, path))
    refused("one value: the model has no experts", adapter_scale=(1.0, 2.0))
    fused = tiny_wan()
    fused.fuse_qkv_projections()
    refused("fused projection.*unfuse_qkv", of=fused)
    head = {"diffusion_model.head.modulation.diff": torch.ones(1, 2, 48)}
    save_file(head, tmp_path / "head.safetensors")
    refused("scale_shift_table.*missing", adapter=str(tmp_path / "head.safetensors"))
    lokr = {"diffusion_model.blocks.0.self_attn.q.lokr_w1": torch.ones(2, 2)}
    save_file(lokr, tmp_path / "lokr.safetensors")
    refused("lokr_w1 is 'LoKr'", adapter=str(tmp_path / "lokr.safetensors"))
    unpatched = tiny_wan()
    engine = engine_of(unpatched, path)
    with pytest.raises(ValueError, match="adapter .*few.safetensors cannot be added: .*patch"):
        sampled(unpatched, engine)


def test_bad_configurations_are_refused():
    for options, message in (
        ({"adapter": ""}, "adapter is ''"),
        ({"adapter": 3}, "adapter is 3, expected a path or None, or two for experts"),
        ({"adapter": ("a", "b", "c")}, "adapter is"),
        ({"adapter": "a", "adapter_scale": "1"}, "adapter_scale is '1', expected a number"),
        ({"adapter": "a", "adapter_scale": (1.0,)}, "adapter_scale is"),
        ({"adapter_scale": 2.0}, "adapter_scale is 2.0, expected 1 without adapter"),
        ({"adapter": "a", "cache": False}, "cache is False"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutConfig(**options)
    config = RolloutConfig(adapter=["a", None], adapter_scale=[1, 2.0])
    assert config.adapter == ("a", None) and config.adapter_scale == (1, 2.0)
    assert config.inexact and config.needs_model and not config.changes_sampler


@pytest.mark.slow
def test_compiled_blocks_run_on_the_changed_weights(tmp_path):
    model = make_wan(lora=True)
    path = write(tmp_path / "few.safetensors", tiny_wan())
    eager, _ = walk(model, *wan_inputs(), engine_of(model, path))
    for options in ({}, {"merge_lora": True}):
        found, _ = walk(model, *wan_inputs(), engine_of(model, path, compile="on", **options))
        assert all(distance(found[step], x) < 1e-5 for step, x in eager.items())
