"""Wan models in the files of diffusers, official Wan and ComfyUI: read, converted, merged."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wan import mixed_layout, tiny_wan

from prfl_fast.models.conversion import convert_wan, merge_lora
from prfl_fast.models.loading import load_transformer, named_wan, read_wan, transformer_class
from prfl_fast.models.lora_files import write_lora
from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.models.wan_weights import rename
from prfl_fast.planning.presets import MODELS, model_config
from prfl_fast.utils.io import load_tensors, save_tensors
from prfl_fast.utils.shards import write_tensors

safetensors = pytest.importorskip("safetensors.torch")


def equal(ours, theirs):
    """Compare state dicts bit for bit, with dtypes."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.fixture(params=["t2v", "i2v", "flf"])
def model(request):
    """Return a tiny model in diffusers' bf16 layout."""
    return mixed_layout(tiny_wan(request.param, rope_max_seq_len=1024)).eval()


@pytest.fixture
def folder(model, tmp_path):
    """Return the model's folder in diffusers' layout."""
    model.save_pretrained(tmp_path / "diffusers")
    return tmp_path / "diffusers"


@pytest.mark.cases(1)
def test_every_layout_round_trips_bit_for_bit(model, folder, tmp_path):
    names = {"diffusers": "d{}", "official": "o{}", "comfyui": "c{}.safetensors"}
    shutil.copy(folder / "config.json", tmp_path / "config.json")  # beside the single file
    source = folder
    circle = ("official", "comfyui", "diffusers", "comfyui", "official", "diffusers")
    for i, layout in enumerate(circle):  # every ordered pair
        out = tmp_path / names[layout].format(i)
        convert_wan(source, out, layout, shard_bytes=30_000)
        equal(read_wan(out).weights, model.state_dict())
        loaded = load_transformer(out, torch.bfloat16)
        equal(loaded.state_dict(), model.state_dict())
        fresh = type(model).from_config(model.config)  # a cast changes buffers too
        equal(dict(loaded.named_buffers()), dict(fresh.named_buffers()))
        assert not loaded.training
        if layout != "comfyui":
            assert len(list(out.glob("*.index.json"))) == 1 and len(list(out.iterdir())) > 4
        source = out
    config = json.loads((source / "config.json").read_text())
    before = json.loads((folder / "config.json").read_text())
    assert {k: v for k, v in config.items() if k[0] != "_"} == {
        k: v for k, v in before.items() if k[0] != "_"
    }


def test_other_readers_take_what_is_written(model, folder, tmp_path):
    from diffusers import WanTransformer3DModel

    convert_wan(folder, tmp_path / "o", "official", shard_bytes=30_000)
    convert_wan(tmp_path / "o", tmp_path / "d", "diffusers", shard_bytes=30_000)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "d", torch_dtype=torch.bfloat16)
    equal(theirs.state_dict(), model.state_dict())
    for file in (tmp_path / "o").glob("*.safetensors"):  # safetensors' own reader
        header = safetensors.load_file(file)
        assert all(not n.startswith("condition_embedder") for n in header)


@pytest.mark.cases(3)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_single_pth_without_a_config(tmp_path, prefix, wrapped):
    model = tiny_wan("t2v", heads=1, head_dim=128, layers=1, rope_max_seq_len=1024)
    state = {prefix + rename(n, to_reference=True): t for n, t in model.state_dict().items()}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "model.pth")
    loaded = load_transformer(tmp_path / "model.pth")
    equal(loaded.state_dict(), model.state_dict())
    equal(load_transformer(tmp_path).state_dict(), model.state_dict())
    assert model_config(tmp_path / "model.pth")["num_attention_heads"] == 1
    kind, config = transformer_class(tmp_path)
    assert kind is type(model) and config["ffn_dim"] == 384


WAN = {name: config for name, config in MODELS.items() if name.startswith("wan")}
RELEASED = {
    **{n: {k: v for k, v in c.items() if k != "boundary_ratio"} for n, c in WAN.items()},
    "fun-control": MODELS["wan2.1-i2v-14b"] | {"in_channels": 48},
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_configuration_follows_from_shapes(name):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**RELEASED[name] | {"num_layers": 2})
    state = {rename(n, to_reference=True): t for n, t in model.state_dict().items()}
    config = named_wan(state, "official", {}, name).config
    assert {k: model.config[k] for k in config} == config


def damaged(folder, tmp_path, change, settings=None):
    """Return a folder of official weights after a change."""
    convert_wan(folder, tmp_path / "o", "official")
    file = tmp_path / "o/diffusion_pytorch_model.safetensors"
    state = {n: t.clone() for n, t in load_tensors(file).items()}
    change(state)
    save_tensors(state, file)
    config = json.loads((tmp_path / "o/config.json").read_text()) | (settings or {})
    (tmp_path / "o/config.json").write_text(json.dumps(config))
    return tmp_path / "o"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda s: s.pop("blocks.1.ffn.0.bias"), {}, "1 missing (blocks.1.ffn.net.0.proj.bias"),
        (lambda s: s.update({"ref_conv.weight": torch.ones(2)}), {}, "1 unexpected (ref_conv.wei"),
        (lambda s: s.update({"control_adapter.conv.bias": torch.ones(2)}), {}, "(control_adapter"),
        (lambda s: s.update({"head.head.bias": torch.ones(2)}), {}, "proj_out.bias [2], expected"),
        (lambda s: s.pop("patch_embedding.weight"), {}, "patch_embedding.weight is None"),
        (lambda s: None, {"num_layers": 3}, "num_layers of config.json is 3, expected the weights"),
        (lambda s: None, {"num_heads": 0}, "num_heads is 0, expected a divisor of 48"),
        (lambda s: None, {"num_heads": 5}, "num_heads is 5, expected a divisor of 48"),
        (lambda s: None, {"text_len": 226}, "text_len of config.json is 226"),
        (
            lambda s: s.pop("blocks.0.self_attn.q.weight"),
            {},
            "1 missing (blocks.0.attn1.to_q.weight",
        ),
        (lambda s: [s.pop(n) for n in list(s) if "_attn.q" in n], {}, "a Wan transformer under"),
        (lambda s: s.update({"scaled_fp8": torch.ones(2)}), {}, "1 unexpected (scaled_fp8 [2])"),
        (
            lambda s: s.update({"diffusion_model.head.head.bias": torch.ones(64)}),
            {},
            "head.head.bias is 'a second one', expected one tensor proj_out.bias",
        ),
    ],
)
def test_foreign_or_incomplete_weights_are_refused(tmp_path, change, settings, message):
    tiny_wan("t2v").save_pretrained(tmp_path / "d")
    bad = damaged(tmp_path / "d", tmp_path, change, settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_transformer(bad)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_wan(bad, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_and_a_failure_leaves_nothing(tmp_path):
    tiny_wan("t2v").save_pretrained(tmp_path / "d")
    shown = []

    def fail(name):
        shown.append(name)
        if len(shown) > 20:
            raise KeyboardInterrupt

    for layout, out in (("official", "o"), ("comfyui", "c.safetensors")):
        shown.clear()
        with pytest.raises(KeyboardInterrupt):
            convert_wan(tmp_path / "d", tmp_path / out, layout, show=fail)
        assert [p.name for p in tmp_path.iterdir()] == ["d"]
    for layout, out in (("diffusers", "d"), ("comfyui", "folder"), ("diffusers", "x.safetensors")):
        with pytest.raises(ValueError, match="OUT is"):
            convert_wan(tmp_path / "d", tmp_path / out, layout)
    (tmp_path / "p/transformer").mkdir(parents=True)
    (tmp_path / "p/transformer_2").mkdir()
    for name in ("high_noise_model", "low_noise_model"):
        (tmp_path / "w" / name).mkdir(parents=True)
    for folder, second in (("p", "transformer_2"), ("w", "low_noise_model")):
        with pytest.raises(ValueError, match=f" or .*/{folder}/{second}, one expert at a time"):
            convert_wan(tmp_path / folder, tmp_path / "x", "official")
        with pytest.raises(ValueError, match=f"LORA is .*/{folder}/{second}, one expert"):
            merge_lora(tmp_path / "d", tmp_path / folder, tmp_path / "x")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    tiny_wan("t2v").save_pretrained(tmp_path / "d")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prfl_fast.utils.io._flush", full)
    for layout, out in (("official", "o"), ("comfyui", "c.safetensors")):
        with pytest.raises(OSError, match=r"safetensors: cannot be written: .*No space left"):
            convert_wan(tmp_path / "d", tmp_path / out, layout)
        assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge_rounds_once(tmp_path, dtype):
    model = tiny_wan("i2v").to(dtype)
    model.save_pretrained(tmp_path / "d")
    q, head = "blocks.1.attn1.to_q", "proj_out"
    lora = {
        q: LoraLayer(torch.randn(3, 48), torch.randn(48, 3), 1.5),
        head: LoraLayer(torch.randn(2, 48).bfloat16(), torch.randn(64, 2).bfloat16(), 2.0),
        "patch_embedding": LoraLayer(torch.randn(2, 36, 1, 2, 2), torch.randn(48, 2, 1, 1, 1), 1.0),
    }
    write_lora(lora, tmp_path / "lora.safetensors", "kohya")
    merge_lora(tmp_path / "d", tmp_path / "lora.safetensors", tmp_path / "m", shard_bytes=40_000)
    merged, before = read_wan(tmp_path / "m").weights, model.state_dict()
    for name, old in before.items():
        layer = lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if layer is None:
            assert torch.equal(merged[name], old), name
            continue
        product = layer.up.double().flatten(1) @ layer.down.double().flatten(1)
        wanted = old.double() + (layer.alpha / len(layer.down) * product).view(old.shape)
        error = (merged[name].double() - wanted).abs()
        unit = wanted.abs() * max(torch.finfo(dtype).eps, 2e-7) + 4e-6
        assert merged[name].dtype == dtype and (error <= unit).all(), name
    (lora[q],) = (LoraLayer(torch.randn(3, 40), torch.randn(48, 3), 1.5),)
    write_lora(lora, tmp_path / "wide.safetensors", "kohya")
    with pytest.raises(ValueError, match=re.escape(f"{q} is [48, 40], expected a layer (48, 48)")):
        merge_lora(tmp_path / "d", tmp_path / "wide.safetensors", tmp_path / "w")


# Runs in a process of its own, since the peak of a process never falls.
PEAK = """
import re, sys
from pathlib import Path
from diffusers import WanTransformer3DModel
from prfl_fast.models.conversion import convert_wan, merge_lora
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
before, root = peak(), Path(sys.argv[1])
convert_wan(root / "d", root / "o", "official", 10_000_000)
convert_wan(root / "d", root / "c.safetensors", "comfyui")
merge_lora(root / "o", root / "lora.safetensors", root / "m", shard_bytes=10_000_000)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_no_more_than_a_few_shards_are_in_memory(tmp_path):
    model = tiny_wan("t2v", heads=4, head_dim=128, layers=20)
    size = sum(t.nbytes for t in model.state_dict().values()) >> 20
    model.save_pretrained(tmp_path / "d", max_shard_size="10MB")
    layer = LoraLayer(torch.randn(4, 512), torch.randn(512, 4), 4.0)
    write_lora({"blocks.9.attn1.to_q": layer}, tmp_path / "lora.safetensors", "kohya")
    words = [sys.executable, "-c", PEAK, str(tmp_path)]
    rise = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert rise < 60 < size / 3, (rise, size)


def test_tensors_are_written_as_safetensors_does(tmp_path):
    dtypes = (torch.float64, torch.bool, torch.float8_e4m3fn, torch.int64, torch.bfloat16)
    state = {str(d): torch.arange(5).to(d) for d in dtypes}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "t": torch.eye(3)[:, :2].T}
    write_tensors(dict(state), tmp_path / "a.safetensors")
    equal(safetensors.load_file(tmp_path / "a.safetensors"), state)
    with pytest.raises(ValueError, match="complex64"):
        write_tensors({"z": torch.zeros(1).to(torch.complex64)}, tmp_path / "b.safetensors")
