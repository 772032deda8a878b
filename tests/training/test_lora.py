"""Adapters: those trained here give the same numbers in diffusers, and the other way round."""

import copy
import json

import pytest
import torch
from official_wan import tiny_official
from wan import inputs, tiny_wan

from prfl_fast import patch, unpatch
from prfl_fast.memory.quantized import cast_weights
from prfl_fast.models.experts import Experts
from prfl_fast.models.registry import find_adapter
from prfl_fast.training import sft_loss
from prfl_fast.training.checkpoint import load_model, save_model
from prfl_fast.training.lora import add_lora, merge_lora
from prfl_fast.utils.digests import DIGESTS

safe_open = pytest.importorskip("safetensors").safe_open
safetensors_torch = pytest.importorskip("safetensors.torch")
load_file, save_file = safetensors_torch.load_file, safetensors_torch.save_file

pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")
pytest.importorskip("peft", reason="adapters need peft")
diffusers = pytest.importorskip("diffusers", reason="adapters are loaded by diffusers")

LAYOUTS = ("fp32", "bf16", "fp8", "nf4")
FILE = "pytorch_lora_weights.safetensors"


def base_model(layout, case="t2v"):
    return cast_weights(tiny_wan(case), layout)


def inputs_of(model, case):
    dtype = model.patch_embedding.weight.dtype
    x, timestep, conditions = inputs(case)
    return x.to(dtype), timestep, {name: value.to(dtype) for name, value in conditions.items()}


def call(model, case="t2v"):
    x, timestep, conditions = inputs_of(model, case)
    return find_adapter(model).velocity(model, x, timestep, conditions).detach()


def relative(ours, theirs):
    """Return the relative distance of two models' velocities."""
    ours, theirs = call(ours).float(), call(theirs).float()
    return (ours - theirs).norm() / theirs.norm()


def adapters_of(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def train(model, case="t2v", *, steps=3, **options):
    """Train adapters for a few steps on the patched model, which stays patched."""
    torch.manual_seed(3)
    add_lora(model, 4, 6.0, **options)
    patch(model)
    x, (_, _, conditions) = inputs(case)[0], inputs_of(model, case)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        sft_loss(model, x, conditions, generator=generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    return model


def pipeline(model, adapters=None):
    """Return diffusers' pipeline of a model, with adapters from a folder if one is given."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    absent = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = diffusers.WanPipeline(**absent, scheduler=scheduler, transformer=model)
    if adapters is not None:
        pipe.load_lora_weights(adapters)
    return pipe


def sample(pipe):
    text = inputs()[2]["encoder_hidden_states"].to(pipe.transformer.dtype)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}
    prompts = {"prompt_embeds": text, "negative_prompt_embeds": -text}
    generator = torch.Generator().manual_seed(5)
    out = pipe(**prompts, **size, generator=generator, output_type="latent")
    return out.frames


@pytest.mark.cases(1)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_loads_in_a_pipeline_and_samples_the_same_bits(layout, tmp_path):
    base = base_model(layout)
    untrained = sample(pipeline(base))
    model = train(copy.deepcopy(base))
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32 if layout == "fp32" else torch.bfloat16}
    save_model(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {FILE, DIGESTS}
    pipe = pipeline(base, tmp_path)
    unpatch(model)
    expected = sample(pipeline(model))
    assert torch.equal(sample(pipe), expected)
    assert (expected - untrained).norm() > 0.05 * untrained.norm()
    assert torch.equal(call(base), call(model))
    # The patched model rounds elsewhere, no more.
    assert relative(patch(model), base) < (1e-5 if layout == "fp32" else 0.02)
    # And away again.
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), untrained)


@pytest.mark.parametrize("layout", ("bf16", "nf4"))
def test_an_adapter_from_elsewhere_loads_into_another_layout(layout, tmp_path):
    """Trained over float32, used over bfloat16 and NF4, through diffusers and through ours."""
    model = train(base_model("fp32"))
    save_model(model, tmp_path)
    theirs = pipeline(base_model(layout), tmp_path).transformer
    ours = base_model(layout)
    add_lora(ours, 4, 6.0)
    load_model(ours, tmp_path)
    trained = adapters_of(model)
    for name, parameter in adapters_of(ours).items():
        assert parameter.dtype == torch.bfloat16 and parameter.requires_grad
        assert torch.equal(parameter, trained[name].bfloat16())
    assert relative(theirs, ours) < 0.01
    assert relative(ours, model) < (0.1 if layout == "nf4" else 0.02)


@pytest.mark.parametrize("how", ("pipeline", "pipeline without metadata", "model"))
def test_a_file_that_diffusers_wrote_loads_here(how, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    theirs = base_model("bf16")
    alpha = 4 if how == "pipeline without metadata" else 8
    targets = ["to_q", "to_v"]
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    theirs.add_adapter(config)
    if how == "model":
        theirs.save_lora_adapter(tmp_path)
    else:
        settings = None if "without" in how else theirs.peft_config["default"].to_dict()
        if settings is not None:
            settings["target_modules"] = sorted(settings["target_modules"])
        given = {"transformer_lora_adapter_metadata": settings}
        tensors = get_peft_model_state_dict(theirs)
        diffusers.WanPipeline.save_lora_weights(tmp_path, tensors, **given)
    ours = base_model("bf16")
    add_lora(ours, 4, alpha, target_modules=("to_q", "to_v"))
    load_model(ours, tmp_path)
    # diffusers keeps these adapters in float32; ours are bfloat16.
    assert relative(ours, theirs) < 0.02
    for name, parameter in adapters_of(theirs).items():
        assert torch.equal(ours.get_parameter(name), parameter.bfloat16())


def test_an_adapter_of_another_scale_rank_or_place_is_refused(tmp_path):
    save_model(train(base_model("bf16"), steps=1), tmp_path)

    def adapted(rank=4, alpha=6.0, **options):
        model = base_model("bf16")
        add_lora(model, rank, alpha, **options)
        return model

    for model, message in (
        (adapted(alpha=4), "lora_alpha of the adapter in .* is 6.0, expected this model's 4"),
        (adapted(rank=2), "r of the adapter in .* is 4, expected this model's 2"),
        (adapted(target_modules=("to_q",)), "unexpected"),
        (adapted(target_modules=("to_q", "to_k", "to_v", "to_out.0", "net.2")), "missing"),
    ):
        before = {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            load_model(model, tmp_path)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # A file without settings has alpha equal to its rank: diffusers reads it so.
    (tmp_path / DIGESTS).unlink()
    save_file(load_file(tmp_path / FILE), tmp_path / FILE)
    with pytest.raises(ValueError, match="lora_alpha of .* is 4, expected this model's 6"):
        load_model(adapted(), tmp_path)
    load_model(adapted(alpha=4), tmp_path)


def test_the_file_is_that_of_a_pipeline(tmp_path):
    model = train(base_model("nf4"), steps=1, target_modules=("to_q", "net.0.proj"))
    save_model(model, tmp_path)
    places = ("attn1.to_q", "attn2.to_q", "ffn.net.0.proj")
    layers = [f"{block}.{place}" for block in (0, 1) for place in places]
    names = {f"transformer.blocks.{layer}.lora_{ab}.weight" for layer in layers for ab in "AB"}
    with safe_open(tmp_path / FILE, framework="pt") as opened:
        assert set(opened.keys()) == names
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert settings["transformer.r"] == 4 and settings["transformer.lora_alpha"] == 6.0
    assert settings["transformer.target_modules"] == ["net.0.proj", "to_q"]


def test_alpha_and_rank_are_read_by_a_transformer_alone_and_by_peft(tmp_path):
    import peft

    model = base_model("fp32")
    settings = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_k": 32.0}}
    names = ["to_q", "to_k"]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, **settings)
    model.add_adapter(config)
    model.set_adapters(["default"], [0.3])
    save_model(model, tmp_path)
    theirs, injected = base_model("fp32"), base_model("fp32")
    theirs.load_lora_adapter(tmp_path, use_safetensors=True)
    assert relative(theirs, model) < 1e-6
    with safe_open(tmp_path / FILE, framework="pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    plain = {key.removeprefix("transformer."): value for key, value in settings.items()}
    peft.inject_adapter_in_model(peft.LoraConfig(**plain), injected)
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(tmp_path / FILE).items()}
    peft.set_peft_model_state_dict(injected, tensors)
    assert relative(injected, model) < 1e-6


def test_a_model_that_peft_wrapped_writes_the_same_file(tmp_path):
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    model = peft.get_peft_model(base_model("fp32"), config)
    save_model(model, tmp_path)
    loaded = pipeline(base_model("fp32"), tmp_path).transformer
    assert torch.equal(call(loaded), call(model.get_base_model()))
    fresh = peft.get_peft_model(base_model("fp32"), config)
    load_model(fresh, tmp_path)
    assert torch.equal(call(fresh.get_base_model()), call(loaded))


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
def test_an_image_to_video_adapter(tmp_path):
    """diffusers adds adapters of zeros for the image projections that have none."""
    base = base_model("nf4", "i2v")
    model = train(copy.deepcopy(base), "i2v")
    save_model(model, tmp_path)
    pipeline(base, tmp_path)
    assert torch.equal(call(base, "i2v"), call(unpatch(model), "i2v"))


@pytest.mark.parametrize("variant", ["wan22", "diffsynth"])
def test_the_official_layouts_attentions_get_adapters(variant):
    model = tiny_official(variant)
    add_lora(model, 2)
    trained = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    names = {f"blocks.{i}.{a}_attn.{x}" for i in (0, 1) for a in ("self", "cross") for x in "qkvo"}
    assert trained == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("to_q", "norm_q")}, "blocks.0.attn1.norm_q of .* 'RMSNorm', expected"),
        ({"target_modules": ("to_x",)}, r"target_modules is \('to_x',\), expected suffixes"),
        ({"lora_rank": 0}, "lora_rank is 0, expected a positive integer"),
        ({"lora_alpha": "4"}, "lora_alpha is '4', expected a finite number"),
    ],
)
def test_what_peft_would_refuse_freezes_nothing(options, message):
    model = base_model("fp32")
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"lora_rank": 2, **options})
    assert all(p.requires_grad and "lora_" not in n for n, p in model.named_parameters())
    assert not hasattr(model, "peft_config")


def test_both_experts_are_merged():
    pair = Experts(train(base_model("bf16")), train(base_model("bf16"), steps=2), 0.85)
    expected = copy.deepcopy(pair)
    for expert in expected.children():
        merge_lora(expert)
    merge_lora(pair)
    ours, theirs = pair.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and not any("lora_" in name for name in ours)
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
