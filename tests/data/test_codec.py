"""Parts of pipelines encode as diffusers' pipelines do, from both layouts of files."""

import pytest
import torch
from tiers import slow_except
from tiny_pipeline import diffusers, make_pipeline, moving_shape

from prfl_fast.data import codec_files
from prfl_fast.data.codec import (
    VideoCodec,
    load_codec,
    load_image_encoder,
    load_text_encoder,
)
from prfl_fast.data.codec_files import clip_tensors, umt5_name, vae_name
from prfl_fast.data.video import to_uint8

SIZE = (32, 64)


@pytest.fixture(scope="module")
def pipelines():
    """Return tiny pipelines by kind, made once."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = make_pipeline(kind)
        return made[kind]

    return of


@pytest.fixture(scope="module")
def folder(pipelines, tmp_path_factory):
    """Return the folder of the image-to-video pipeline."""
    path = tmp_path_factory.mktemp("pipeline")
    pipelines("i2v").save_pretrained(path)
    return path


def clip(frames=9, size=SIZE):
    return moving_shape("ring", frames, size, 0.1)[None]


def statistics(vae):
    values = (vae.config.latents_mean, vae.config.latents_std)
    return (torch.tensor(v).view(1, -1, 1, 1, 1) for v in values)


@pytest.mark.parametrize("kind", slow_except(["t2v", "ti2v"], ["t2v"]))
def test_latents_are_the_pipelines(pipelines, kind):
    pipeline = pipelines(kind)
    codec, video = VideoCodec(pipeline.vae), clip()
    latents = codec.encode(video)
    mean, std = statistics(pipeline.vae)
    with torch.no_grad():
        expected = (pipeline.vae.encode(video).latent_dist.mode() - mean) * (1.0 / std)
        decoded = pipeline.vae.decode(expected / (1.0 / std) + mean).sample
    assert (latents - expected).abs().max() <= 1e-5
    assert latents.shape[1:] == codec.latent_shape(9, *SIZE) and not latents.requires_grad
    assert 0.6 < latents.std() < 1.6  # as the check of a dataset expects
    assert (codec.decode(latents) - decoded).abs().max() <= 2e-5
    assert [part.shape[2] for part in codec.decode_parts(latents)] == [1, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_conditions_of_images_are_the_pipelines(pipelines, last):
    pipeline, video = pipelines("i2v"), clip()
    first, end = video[:, :, 0], video[:, :, -1] if last else None
    shape = (1, 16, *SIZE, 9, torch.float32, "cpu")
    _, expected = pipeline.prepare_latents(first, *shape, last_image=end)
    found = VideoCodec(pipeline.vae).latent_condition(first, 9, end)
    assert found.shape == (1, 20, 3, 4, 8)
    assert torch.equal(found[:, :4], expected[:, :4])
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.slow
def test_a_first_frame_is_the_pipelines(pipelines):
    pipeline, video = pipelines("ti2v"), clip()
    codec = VideoCodec(pipeline.vae)
    mean, std = statistics(pipeline.vae)
    with torch.no_grad():
        expected = (pipeline.vae.encode(video[:, :, :1]).latent_dist.mode() - mean) / std
    found = codec.first_frame(video[:, :, 0])
    assert found.shape == (1, 48, 1, 2, 4)
    assert (found - expected).abs().max() <= 1e-5
    # Wan's autoencoder is causal: the first latent frame of the video is the same.
    assert (found - codec.encode(video)[:, :, :1]).abs().max() <= 1e-5


PROMPTS = ["A  disc&amp;ring\n moves", "", "läuft "]


def test_texts_are_the_pipelines(pipelines, folder):
    encoder = load_text_encoder(folder)
    expected = pipelines("i2v")._get_t5_prompt_embeds(PROMPTS, max_sequence_length=512)
    found = encoder(PROMPTS)
    assert [len(states) for states in found] == [len("A disc&ring moves") + 1, 1, len("läuft") + 2]
    for states, whole in zip(found, expected, strict=True):
        assert (states - whole[: len(states)]).abs().max() <= 1e-5
        assert not whole[len(states) :].any()
    assert encoder(["x" * 600])[0].shape == (512, 32)
    assert encoder.is_cut("x" * 512) and not encoder.is_cut("x" * 511)
    with pytest.raises(ValueError, match="prompts is 'a disc', expected a list"):
        encoder("a disc")


def test_images_are_the_pipelines(pipelines, folder):
    from PIL import Image

    encoder, video = load_image_encoder(folder), clip()[0]
    pictures = [Image.fromarray(frame.numpy()) for frame in to_uint8(video[:, [0, -1]])]
    with torch.no_grad():
        first = pipelines("i2v").encode_image(pictures[0], "cpu")
        both = pipelines("i2v").encode_image(pictures, "cpu")
    assert (encoder([video[:, 0]]) - first[0]).abs().max() <= 1e-5
    assert (encoder([video[:, 0], video[:, -1]]) - both.flatten(0, 1)).abs().max() <= 1e-5


@pytest.mark.slow
def test_parts_are_frozen_and_in_the_dtype_asked_for(folder):
    codec = load_codec(folder, dtype=torch.bfloat16)
    parameter = next(codec.vae.parameters())
    assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad
    latents = codec.encode(clip())
    assert latents.dtype == torch.float32
    exact = load_codec(folder / "vae").encode(clip())  # the folder of the part alone
    assert 0 < (latents - exact).abs().max() < 0.5
    assert load_text_encoder(folder, dtype=torch.bfloat16)(["a"])[0].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_a_budget_cuts_large_frames_into_tiles(pipelines, kind):
    if kind == "ti2v" and diffusers.__version__.startswith("0.35."):
        with pytest.raises(ValueError, match="diffusers is '0.35.*', expected 0.36 or newer"):
            VideoCodec(pipelines(kind).vae, 18 << 20).encode(clip(5, (192, 320)))
        return
    vae, video = pipelines(kind).vae, clip(5, (96, 160) if kind == "t2v" else (192, 320))
    whole, small = VideoCodec(vae), VideoCodec(vae, 18 << 20)
    latents = whole.encode(video)
    decoded = whole.decode(latents)
    assert not vae.use_tiling
    tiled = small.encode(video)
    assert vae.use_tiling and tiled.shape == latents.shape
    # A random autoencoder attends to whole tiles, so only the shapes and the rough values agree.
    assert (tiled - latents).abs().mean() < latents.abs().mean()
    parts = list(small.decode_parts(latents))
    assert vae.use_tiling and [part.shape[2] for part in parts] == [1, 4]
    assert (torch.cat(parts, 2) - decoded).abs().mean() < 0.5
    with pytest.raises(ValueError, match=r"weights is '.* GiB', expected at least .* GiB for 5 x"):
        VideoCodec(vae, 1 << 20).encode(video)


BAD = [
    (8, 64, 96, r"frames is 8, expected 4n \+ 1"),
    (9, 72, 96, "height is 72, expected a multiple of 16"),
    (9, 64, 90, "width is 90, expected a multiple of 16"),
]


@pytest.mark.parametrize("case", BAD)
def test_other_sizes_are_refused(pipelines, case):
    *shape, reason = case
    with pytest.raises(ValueError, match=reason):
        VideoCodec(pipelines("t2v").vae).encode(torch.zeros(1, 3, *shape))


def official_vae(vae, nested):
    """Return the state of an autoencoder under official Wan's names, found by its own mapping."""
    names = [
        f"{side}coder.{rest}"
        for side, samples in (("en", "down"), ("de", "up"))
        for rest in [
            "conv1.X",
            *(f"head.{i}.X" for i in (0, 2)),
            *(f"middle.1.{n}.X" for n in ("norm", "to_qkv", "proj")),
            *(f"middle.{b}.residual.{i}.X" for b in (0, 2) for i in (0, 2, 3, 6)),
            *(
                f"{samples}samples.{i}{inner}.{part}.X"
                for i in range(16)
                for inner in ([f".{samples}samples.{j}" for j in range(4)] if nested else [""])
                for part in (
                    *(f"residual.{k}" for k in (0, 2, 3, 6)),
                    *("shortcut", "resample.1", "time_conv"),
                )
            ),
        ]
    ] + ["conv1.X", "conv2.X"]
    names = [name.replace("X", kind) for name in names for kind in ("weight", "bias", "gamma")]
    state, found = vae.state_dict(), {}
    for name in names:
        if (ours := vae_name(name, nested)) in state and ours not in found.values():
            found[name] = ours
    assert set(found.values()) == set(state)
    return {name: state[ours] for name, ours in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", "Wan2.2_VAE.pth"])
def test_official_autoencoders_are_read(tmp_path, file):
    from diffusers import AutoencoderKLWan

    from prfl_fast.data import codec_files

    nested = "2.2" in file
    options = codec_files._WAN22 if nested else {}
    if nested:
        options = options | {"latents_mean": codec_files._MEAN22, "latents_std": codec_files._STD22}
    vae = AutoencoderKLWan(base_dim=8, decoder_base_dim=8, **options).eval()
    torch.save(official_vae(vae, nested), tmp_path / file)
    found = load_codec(tmp_path).vae  # the folder of official Wan
    for key in (key for key in vae.config if not key.startswith("_")):
        assert found.config[key] == vae.config[key], key
    for name, tensor in vae.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    torch.save({"blocks.0.attn1.to_q.weight": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(ValueError, match=r"expected those of Wan2.1_VAE.pth or Wan2.2_VAE.pth"):
        load_codec(tmp_path / file)


@pytest.mark.slow
def test_the_official_text_encoder_is_read(pipelines, folder, tmp_path):
    model = pipelines("i2v").text_encoder
    state = {}
    for i in range(len(model.encoder.block)):
        parts = [f"attn.{n}" for n in "qkvo"] + ["norm1", "norm2", "pos_embedding.embedding"]
        parts += ["ffn.gate.0", "ffn.fc1", "ffn.fc2"]
        state |= {f"blocks.{i}.{part}.weight": None for part in parts}
    state |= {"token_embedding.weight": None, "norm.weight": None}
    state = {name: model.state_dict()[umt5_name(name)] for name in state}
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(ValueError, match="tokenizer of .* expected the folder .*umt5-xxl"):
        load_text_encoder(tmp_path)
    pipelines("i2v").tokenizer.save_pretrained(tmp_path / "google" / "umt5-xxl")
    found, expected = load_text_encoder(tmp_path)(PROMPTS), load_text_encoder(folder)(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    del state["blocks.1.ffn.fc1.weight"]
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    with pytest.raises(ValueError, match="1 missing .encoder.block.1.layer.1.DenseReluDense.wi_1"):
        load_text_encoder(tmp_path)


@pytest.mark.slow
def test_the_official_image_encoder_is_read(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    width = 160  # two heads of 80 channels, as ViT-H's
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    ours = model.state_dict()
    prefix = next(iter(ours)).partition("embeddings.")[0]
    state = {"log_scale": torch.zeros([]), "textual.head": torch.zeros(2), "visual.head": None}
    names = ["cls_embedding", "pos_embedding", "patch_embedding.weight"]
    kinds = ("weight", "bias")
    names += [f"{norm}.{kind}" for norm in ("pre_norm", "post_norm") for kind in kinds]
    parts = ("norm1", "norm2", "attn.to_qkv", "attn.proj", "mlp.0", "mlp.2")
    names += [f"transformer.{i}.{p}.{kind}" for i in range(2) for p in parts for kind in kinds]
    for name in names:
        targets = [n for n, _ in clip_tensors(name, torch.zeros(3, 1))]
        values = torch.cat([ours[prefix + target] for target in targets])
        shape = {"cls_embedding": (1, 1, width), "pos_embedding": (1, 5, width)}.get(name)
        state[f"visual.{name}"] = values if shape is None else values.view(shape)
    state["visual.head"] = torch.zeros(width, 16)
    torch.save(state, tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    encoder = load_image_encoder(tmp_path)
    for name, tensor in ours.items():
        assert torch.equal(encoder.model.state_dict()[name], tensor), name
    assert encoder([clip()[0, :, 0]]).shape == (5, width)


def test_missing_files_are_found_before_packages_are_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(codec_files, "need", None)
    for load in (load_codec, load_text_encoder, load_image_encoder):
        with pytest.raises(ValueError, match="nowhere: no such file or folder"):
            load(tmp_path / "nowhere")
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").touch()
    with pytest.raises(ValueError, match="tokenizer of .* expected the folder .*umt5-xxl"):
        load_text_encoder(tmp_path)
    encoder = tmp_path / "image_encoder"
    encoder.mkdir()
    (encoder / "config.json").touch()
    with pytest.raises(ValueError, match="image_processor of .* expected the folder"):
        load_image_encoder(tmp_path)


def test_missing_parts_are_named(tmp_path, folder):
    for load, part in ((load_codec, "vae"), (load_image_encoder, "image_encoder")):
        with pytest.raises(ValueError, match=f"{tmp_path}: has no {part}, expected"):
            load(tmp_path)
        with pytest.raises(ValueError, match="nowhere: no such file or folder"):
            load(tmp_path / "nowhere")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text((folder / "vae" / "config.json").read_text())
    with pytest.raises(ValueError, match="vae cannot be loaded as AutoencoderKLWan: "):
        load_codec(tmp_path)
