"""LoRA files of every trainer: keys are written out here as their code writes them."""

import json
import re

import pytest
import torch
from wan import inputs, tiny_wan

from prfl_fast.models.lora_files import KOHYA, LoraLayer, read_lora, write_lora
from prfl_fast.training.model_files import save_model
from prfl_fast.utils.io import load_tensors, open_tensors, save_tensors

pytest.importorskip("safetensors")

# (diffusers, official) of layers whose underscored names are easy to split wrongly.
LAYERS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.1.attn2.add_k_proj": "blocks.1.cross_attn.k_img",
    "blocks.11.attn2.to_k": "blocks.11.cross_attn.k",
    "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
}
OTHERS = {
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "proj_out": "head.head",
}


def dotted(prefix, a, b):
    return lambda name: (f"{prefix}{name}.{a}.weight", f"{prefix}{name}.{b}.weight", None)


def underscored(prefix, alpha):
    def keys(name):
        name = prefix + name.replace(".", "_")
        down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
        return down, up, f"{name}.alpha" if alpha else None

    return keys


# The writer's keys for a layer of official Wan: down, up and alpha.
WRITERS = {
    "HY-Video-PRFL, peft": dotted("base_model.model.", "lora_A", "lora_B"),
    "HY-Video-PRFL, diffusers": dotted("diffusion_model.", "lora_A", "lora_B"),
    "HY-Video-PRFL, kohya": underscored("lora_", alpha=False),
    "VideoX-Fun": underscored("lora_unet__", alpha=True),
    "musubi-tuner": underscored("lora_unet_", alpha=True),
    "DiffSynth-Studio": dotted("", "lora_A.default", "lora_B.default"),
    "DiffSynth-Studio, prefix kept": dotted("pipe.dit.", "lora_A.default", "lora_B.default"),
    "ComfyUI, with lora_down": dotted("diffusion_model.", "lora_down", "lora_up"),
}


def pair(name, rank=3):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_reads_the_keys_of_every_trainer(tmp_path, writer, suffix):
    layers = LAYERS | (OTHERS if writer == "VideoX-Fun" else {})
    tensors = {}
    for name in layers.values():
        down, up, alpha = WRITERS[writer](name)
        tensors[down], tensors[up] = pair(name)
        if alpha:
            tensors[alpha] = torch.tensor(1.5, dtype=torch.bfloat16)
    path = tmp_path / f"lora{suffix}"
    torch.save(tensors, path) if suffix == ".pth" else save_tensors(tensors, path)
    lora = read_lora(path)
    assert lora.keys() == layers.keys()
    for ours, name in layers.items():
        down, up = pair(name)
        assert torch.equal(lora[ours].down, down) and torch.equal(lora[ours].up, up)
        assert lora[ours].alpha == (1.5 if alpha else 3.0)
        change = up @ down * lora[ours].alpha / 3
        torch.testing.assert_close(lora[ours].delta(), change)


@pytest.mark.parametrize("first", ["diffusers", "official", "comfyui", "kohya"])
@pytest.mark.parametrize("second", ["diffusers", "official", "comfyui", "kohya"])
def test_layouts_round_trip_with_patterns(tmp_path, first, second):
    alphas = (4.0, 3.0, 0.1, 16.0, 3.0)  # the rank, and a value that float32 does not hold
    lora = {}
    for i, name in enumerate(LAYERS | OTHERS):
        down, up = pair(name, rank=2 + i % 3)
        lora[name] = LoraLayer(down.bfloat16() if i % 2 else down, up, alphas[i % 5])
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    write_lora(lora, paths[0], first)
    write_lora(read_lora(paths[0]), paths[1], second)
    write_lora(read_lora(paths[1]), paths[2], first)
    for path in paths:
        found = read_lora(path)
        assert found.keys() == lora.keys()
        for name, layer in lora.items():
            assert found[name].alpha == layer.alpha
            for a, b in zip(found[name][:2], layer[:2], strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
    assert paths[0].read_bytes() == paths[2].read_bytes()
    with open_tensors(paths[1]) as file:
        names = list(file.keys())
    marks = {"diffusers": "transformer.", "comfyui": "diffusion_model.", "kohya": KOHYA}
    assert all(name.startswith(marks.get(second, "")) for name in names)
    if second == "kohya":
        assert f"{KOHYA}blocks_1_cross_attn_k_img.lora_down.weight" in names
        assert sum(name.endswith(".alpha") for name in names) == len(lora)


def lora_model(complete, ranks=True, **kind):
    """Return a model with a peft adapter that has patterns."""
    peft = pytest.importorskip("peft")
    model = tiny_wan("t2v").eval()
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=layers if complete else layers[1::2],
        rank_pattern={"blocks.1.attn1.to_k": 2} if ranks else {},
        alpha_pattern={"ffn.net.2": 0.1, "attn2.to_k": 4},
        **kind,
    )
    model.add_adapter(config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
        elif "lora_magnitude_vector" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return model


@pytest.mark.cases(1)
@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "kohya"])
def test_diffusers_reads_what_is_written_with_the_same_effect(tmp_path, layout):
    import diffusers
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    # diffusers reads complete kohya files only, and 0.35 scales layers of another rank wrongly.
    ranks = layout == "diffusers" or not diffusers.__version__.startswith("0.35.")
    model = lora_model(complete=layout == "kohya", ranks=ranks)
    x, timestep, conditions = inputs("t2v", batch=1)
    text = conditions["encoder_hidden_states"]
    with torch.no_grad():
        wanted = model(x, timestep, text, return_dict=False)[0]
        without = tiny_wan("t2v").eval()(x, timestep, text, return_dict=False)[0]
    save_model(model, tmp_path / "final")
    path = tmp_path / "lora.safetensors"
    write_lora(read_lora(tmp_path / "final"), path, layout)
    states, _ = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    assert states

    class Pipeline(WanLoraLoaderMixin):
        transformer = fresh = tiny_wan("t2v").eval()
        components = {"transformer": fresh}
        hf_device_map = None

    Pipeline().load_lora_weights(str(path))
    with torch.no_grad():
        found = Pipeline.fresh(x, timestep, text, return_dict=False)[0]
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-6 * scale < 0.01 * (wanted - without).abs().max()


def test_a_kohya_file_has_the_effect_of_its_peft_form(tmp_path):
    from prfl_fast.models.conversion import merge_lora
    from prfl_fast.models.loading import load_transformer

    model = lora_model(complete=False)
    tiny_wan("t2v").save_pretrained(tmp_path / "model")
    save_model(model, tmp_path / "final")
    write_lora(read_lora(tmp_path / "final"), tmp_path / "k.safetensors", "kohya")
    merge_lora(tmp_path / "model", tmp_path / "k.safetensors", tmp_path / "merged")
    x, timestep, conditions = inputs("t2v", batch=1)
    args = (x, timestep, conditions["encoder_hidden_states"])
    with torch.no_grad():
        wanted = model(*args, return_dict=False)[0]
        found = load_transformer(tmp_path / "merged")(*args, return_dict=False)[0]
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["use_dora", "use_rslora", "lora_bias"])
def test_kinds_of_peft_keep_their_effect(tmp_path, kind):
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    from prfl_fast.models.conversion import merge_lora
    from prfl_fast.models.loading import read_wan

    model = lora_model(complete=False, **{kind: True})
    save_model(model, tmp_path / "final")
    lora, path = read_lora(tmp_path / "final"), tmp_path / "lora.safetensors"
    write_lora(lora, path, "diffusers")
    wanted = load_tensors(tmp_path / "final" / "pytorch_lora_weights.safetensors")
    found = load_tensors(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    for layout in ("official", "comfyui", "kohya"):
        other = tmp_path / f"{layout}.safetensors"
        if kind == "use_rslora":
            write_lora(lora, other, layout)
            assert all(read_lora(other)[n].alpha == layer.alpha for n, layer in lora.items())
            continue
        with pytest.raises(ValueError, match=f"for layout {layout} is .* expected a plain LoRA"):
            write_lora(lora, other, layout)
        assert not other.exists()

    class Pipeline(WanLoraLoaderMixin):
        transformer = fresh = tiny_wan("t2v").eval()
        components = {"transformer": fresh}
        hf_device_map = None

    Pipeline().load_lora_weights(str(path))
    base = tiny_wan("t2v")
    base.save_pretrained(tmp_path / "model")
    merge_lora(tmp_path / "model", path, tmp_path / "merged")
    merged = read_wan(tmp_path / "merged").weights
    for theirs in (model, Pipeline.fresh):  # peft's own merge
        theirs.fuse_lora()
        theirs.unload_lora()
        for name, tensor in theirs.state_dict().items():
            limit = 1e-6 * tensor.abs().max()
            assert (merged[name] - tensor).abs().max() <= limit, name
    name = f"blocks.1.attn2.to_k.{'bias' if kind == 'lora_bias' else 'weight'}"
    assert (merged[name] - base.state_dict()[name]).abs().max() > 0.01


def test_alpha_of_a_peft_folder(tmp_path):
    down, up = pair("x")
    keys = dotted("base_model.model.", "lora_A", "lora_B")("blocks.0.self_attn.q")
    save_tensors(dict(zip(keys, (down, up), strict=False)), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 9, "alpha_pattern": {"self_attn.q": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_lora(tmp_path)["blocks.0.attn1.to_q"].alpha == 6
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert read_lora(tmp_path)["blocks.0.attn1.to_q"].alpha == pytest.approx(6 * 3**0.5, rel=1e-15)
    for key, value, message in (
        ("use_dora", True, "number of layers with magnitude is 0, expected 1, as use_dora is"),
        ("peft_type", "LOHA", "peft_type is 'LOHA', expected 'LORA'"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', expected True or"),
        ("lora_alpha", "x", "q: no alpha in its adapter's configuration: could not convert"),
        ("alpha_pattern", {"(": 2}, "q: no alpha in its adapter's configuration: missing"),
        ("alpha_pattern", [2], "q: no alpha in its adapter's configuration: "),
    ):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps(config | {"alpha_pattern": {}, key: value})
        )
        with pytest.raises(ValueError, match=message):
            read_lora(tmp_path)


Q = "lora_unet_blocks_0_self_attn_q"


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (f"{Q}.dora_scale", (6, 1), "dora_scale is 'DoRA of another trainer than peft', expected"),
        ("blocks.0.self_attn.q.lora_magnitude_vector", (5,), "'magnitude': [5], 'down'"),
        (f"{Q}.alpha", (2,), "blocks_0_self_attn_q: alpha is "),
        ("proj_out.lora_A.weight", (0, 8), "'down': [0, 8]}, expected down [rank, in]"),
        (f"{Q}.hada_w1_a", (6, 3), "is 'LoHa'"),
        (f"{Q}.lokr_w1", (6, 3), "is 'LoKr'"),
        ("transformer.blocks.0.attn1.to_q.lora_B.bias", (3,), "'bias': [3]"),
        (f"{Q}.lora_up.bias", (6,), "lora_up.bias is 'unknown'"),
        ("diffusion_model.blocks.0.self_attn.q.diff_b", (6,), "is 'weight differences'"),
        ("blocks.0.self_attn.q.weight", (6, 6), "is 'unknown', expected a LoRA's"),
        ("transformer_2.blocks.0.attn1.to_q.lora_A.weight", (3, 8), "expected a linear layer of"),
        ("lora_unet_blocks_0_attn_q.lora_down.weight", (3, 8), "is 'blocks_0_attn_q', expected a"),
        ("lora_unet_double_blocks_0_img_mod.lora_up.weight", (3, 8), "expected a linear layer of"),
        ("blocks.0.self_attn.q.lora_down.weight", (3, 8), "is 'a second one', expected one down"),
        (f"{Q.replace('_q', '_k')}.lora_down.weight", (3, 8), "expected down [rank, in] and up"),
        (f"{Q.replace('_q', '_k')}.alpha", (), "is {'alpha': []}, expected down"),
        ("proj_out.lora_magnitude_vector", (6,), "layers with magnitude is 1, expected 2"),
    ],
)
def test_what_is_no_lora_of_wan_is_refused(tmp_path, key, shape, message):
    down, up = pair("x")
    tensors = {f"{Q}.lora_down.weight": down, f"{Q}.lora_up.weight": up, key: torch.ones(shape)}
    save_tensors(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_lora(tmp_path / "lora.safetensors")
