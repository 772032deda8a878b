"""``prfl-fast sample`` on tiny random pipelines."""

import json
import os
import signal

import pytest
import tiny_families
import torch
from commands import one_line
from PIL import Image
from tiny_pipeline import make_clips, make_pipeline

from prfl_fast.cli import main as cli
from prfl_fast.data.codec import load_codec, load_text_encoder
from prfl_fast.data.manifest import Sample, write_dataset
from prfl_fast.data.video import clip_info, read_clip, read_frames, to_uint8, write_image
from prfl_fast.models.loading import load_transformer
from prfl_fast.models.lora_files import write_lora
from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.sampling import generate
from prfl_fast.utils.io import load_tensors, save_tensors

pytest.importorskip("pydantic")
PROMPTS = ["A disc glides.", "A square jerks to the left."]
SMALL = ["--size", "32x48", "--frames", "5", "--num-inference-steps", "3", "--device", "cpu"]


# Two experts, with and without an image (and no CLIP); first and last frame.
OTHERS = {
    "a14b": {},
    "i2v-a14b": {"image_dim": None, "added_kv_proj_dim": None},
    "flf2v": {"pos_embed_seq_len": 10},
}


def other_pipeline(kind, **changes):
    """Return a tiny pipeline with another transformer than the three kinds of the guide have."""
    pipeline = make_pipeline("t2v" if kind == "a14b" else "i2v")
    made = type(pipeline.transformer)
    config = {**pipeline.transformer.config, **changes}
    config.pop("_use_default_values")  # diffusers would drop changes of these
    pipeline.register_modules(transformer=made.from_config(config).eval())
    if kind != "flf2v":
        pipeline.register_modules(transformer_2=made.from_config(config).eval())
        pipeline.register_to_config(boundary_ratio=0.7)
    if kind == "i2v-a14b":
        pipeline.register_modules(image_encoder=None, image_processor=None)
    return pipeline


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Tiny pipelines by kind, clips with captions, and a reward model; read only."""
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("t2v", "i2v", "ti2v"):
        make_pipeline(kind).save_pretrained(root / kind)
    for kind, changes in OTHERS.items():
        other_pipeline(kind, **changes).save_pretrained(root / kind)
    make_clips(root / "clips")
    frame = next(iter(read_frames(root / "clips" / "disc.mp4")))
    write_image(root / "first.png", frame)
    write_image(root / "last.png", frame.flip(1))
    transformer = load_transformer(root / "t2v")
    LatentRewardModel.from_backbone(transformer, num_blocks=1, num_heads=2).save(root / "reward")
    torch.manual_seed(3)
    layer = LoraLayer(torch.randn(2, 48), torch.randn(48, 2), 2.0)
    write_lora({"blocks.0.attn1.to_q": layer}, root / "lora.safetensors", "kohya")
    return root


def sample(pipelines, out, *words, kind="t2v", prompts=PROMPTS, small=SMALL):
    """Run the command and return its exit code."""
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    words = ["sample", str(out), "--model", str(pipelines / kind), *given, *small, *words]
    return cli.main(list(map(str, words)))


def latents(out):
    """Return the latents of a folder by name."""
    return {p.stem: load_tensors(p)["latents"] for p in sorted((out / "latents").iterdir())}


def record(out):
    return json.loads((out / "samples.json").read_text())


@pytest.mark.slow
def test_samples_are_those_of_the_diffusers_pipeline(pipelines, tmp_path, capsys):
    assert sample(pipelines, tmp_path / "a", "--samples", 2, "--seed", 5, "--negative", "Bad.") == 0
    text = capsys.readouterr().out
    assert "cost: 4 videos of 6 forwards of the generator" in text
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "videos: 4 (4 sampled, 4 decoded)\n" in text
    assert "size: 32x48, 5 frames\nsampler: 3 steps, shift 5, guidance scale 5\n" in text
    assert f"prompts: {json.dumps(PROMPTS)[1:-1]}\nsize" in text
    (tmp_path / "a" / "0000-0.mp4").unlink()
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0
    assert "4 (4 sampled, 3 decoded)\n" in capsys.readouterr().out
    assert sample(pipelines, tmp_path / "a", "--samples", 2, "--seed", 5, "--negative", "Bad.") == 0
    found, videos = latents(tmp_path / "a"), record(tmp_path / "a")["videos"]
    assert [v["seed"] for v in videos] == [5, 6, 7, 8]
    pipeline = make_pipeline("t2v")
    pipeline.scheduler = FlowUniPC(5.0, integer_timesteps=True)
    for i, video in enumerate(videos):
        expected = pipeline(
            PROMPTS[i // 2], "Bad.", height=32, width=48, num_frames=5, num_inference_steps=3,
            guidance_scale=5.0, output_type="latent", max_sequence_length=512,
            latents=generate.noise_of(video["seed"], (1, 16, 2, 4, 6)),
        ).frames  # fmt: skip
        name = video["file"].removesuffix(".mp4")
        assert torch.allclose(found[name], expected[0], rtol=1e-4, atol=1e-5)
        info = clip_info(tmp_path / "a" / video["file"])
        assert (info.height, info.width, info.frames) == (32, 48, 5)
        assert round(info.frames / info.seconds) == 16
    sheet = next(iter(read_frames(tmp_path / "a" / "sheet.png")))
    assert sheet.shape == (4 * (16 + 36), 5 * 52, 3)
    assert (sheet[:16] < 128).any()  # a caption


@pytest.mark.slow
def test_a_killed_run_goes_on_and_other_settings_are_refused(pipelines, tmp_path, capsys):
    assert sample(pipelines, tmp_path / "whole") == 0
    out, calls = tmp_path / "part", []

    def kill_once(*arguments):
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(1)
        save_tensors(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "save_tensors", kill_once)
        capsys.readouterr()
        assert sample(pipelines, out) == 130
        stopped = "prfl-fast sample: stopped by SIGINT; run again to continue\n"
        assert capsys.readouterr().err.endswith(stopped)
    assert len(latents(out)) == 1 and not (out / "0000-0.mp4").exists()
    kept = (out / "latents" / "0000-0.safetensors").stat().st_mtime_ns
    assert sample(pipelines, out) == 0
    assert (out / "latents" / "0000-0.safetensors").stat().st_mtime_ns == kept
    for name in ("0000-0.mp4", "0001-0.mp4", "latents/0001-0.safetensors", "samples.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    capsys.readouterr()
    assert sample(pipelines, out, "--shift", 3) == 2
    assert "shift is '5.0', expected 3.0 of this call" in one_line(capsys, "sample")
    assert sample(pipelines, out, "--weights", pipelines / "lora.safetensors") == 2
    assert "weights: fingerprint is 'None'" in one_line(capsys, "sample")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["i2v", "ti2v"])
def test_images_condition_the_videos(pipelines, tmp_path, kind):
    (tmp_path / "prompts.csv").write_text(
        f'prompt,image\n"A disc, moving",{pipelines / "first.png"}\n'
    )
    small = ["--size", "64x64", *SMALL[2:]]
    words = ["--prompts", tmp_path / "prompts.csv"]
    assert sample(pipelines, tmp_path / "a", *words, kind=kind, prompts=[], small=small) == 0
    (found,) = latents(tmp_path / "a").values()
    codec = load_codec(pipelines / kind)
    image = read_clip(pipelines / "first.png", 1, (64, 64))
    if kind == "ti2v":
        assert torch.allclose(found[:, :1], codec.encode(image[None])[0], atol=1e-5)
    else:
        pipeline = make_pipeline(kind)
        pipeline.scheduler = FlowUniPC(5.0, integer_timesteps=True)
        expected = pipeline(
            Image.fromarray(to_uint8(image)[0].numpy()), "A disc, moving", "", height=64, width=64,
            num_frames=5, num_inference_steps=3, guidance_scale=5.0, output_type="latent",
            latents=generate.noise_of(0, (1, 16, 2, 8, 8)),
        ).frames  # fmt: skip
        assert torch.allclose(found, expected[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t2v", "a14b", "i2v", "i2v-a14b", "flf2v", "ti2v"])
def test_the_pipeline_itself_gives_the_same_videos(pipelines, tmp_path, kind):
    words, small = ["--negative", "Bad.", "--latents-only"], ["--size", "64x64", *SMALL[2:]]
    first, last = pipelines / "first.png", pipelines / "last.png"
    if kind == "t2v":
        words += ["--weights", pipelines / "lora.safetensors"]
    if "a14b" in kind:
        words += ["--guidance-scale", "4,3"]
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    for row in prompts if "i2v" in kind or kind == "flf2v" else ():
        row |= {"image": str(first)} | ({"last_image": str(last)} if kind == "flf2v" else {})
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, prompts)))
    words += ["--prompts", file]
    for name, more in (("engine", []), ("pipeline", ["--pipeline"])):
        given = [tmp_path / name, *words, *more]
        assert sample(pipelines, *given, kind=kind, small=small, prompts=[]) == 0
    found, wanted = latents(tmp_path / "engine"), latents(tmp_path / "pipeline")
    assert len(found) == 2
    for name, x in found.items():
        assert torch.allclose(x, wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_a_merged_model_and_a_run_sample_the_same(pipelines, tmp_path):
    lora, merged = pipelines / "lora.safetensors", tmp_path / "merged"
    assert cli.main(["merge", str(pipelines / "t2v"), str(lora), str(merged)]) == 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    (run / "final").symlink_to(merged)
    off = ["--latents-only", "--guidance-scale", 1]
    for name, weights in (("a", lora), ("b", merged), ("c", run), ("d", None)):
        words = [] if weights is None else ["--weights", weights]
        assert sample(pipelines, tmp_path / name, *off, *words) == 0
        assert not list((tmp_path / name).glob("*.mp4"))
    a, b, c, base = (latents(tmp_path / name) for name in "abcd")
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(b[name], c[name])
        assert not torch.allclose(a[name], base[name], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [["best-of", "candidates=3"], ["prune"], ["beam", "beams=2"], ["reno", "iterations=2"],
     ["guide", "weight=5"]],
)  # fmt: skip
def test_methods_say_their_cost_and_their_reward(pipelines, tmp_path, capsys, method):
    name, *options = method
    words = [word for option in options for word in ("--set", option)]
    words += ["--method", name, "--reward", pipelines / "reward", "--latents-only"]
    assert sample(pipelines, tmp_path / "a", *words) == 0
    assert f"cost: {name} (" in capsys.readouterr().out
    videos = record(tmp_path / "a")["videos"]
    if name == "guide":
        assert "reward" not in videos[0]
        return
    reward = LatentRewardModel.load(pipelines / "reward")
    encoder = load_text_encoder(pipelines / "t2v")
    for video, (_, x) in zip(videos, latents(tmp_path / "a").items(), strict=True):
        text = encoder([video["prompt"]])[0][None]
        with torch.no_grad():
            score = reward(x[None], torch.zeros(1), {"encoder_hidden_states": text})
        assert float(score) == pytest.approx(video["reward"], abs=1e-5)


@pytest.mark.slow
def test_conditions_of_a_dataset_are_sampled(pipelines, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            torch.randn(16, 2, 4, width, generator=generator),
            {"encoder_hidden_states": torch.randn(n, 32, generator=generator)},
            id=f"clip-{n}",
            caption="" if n == 3 else f"Clip {n}.",
        )
        for n, width in ((5, 6), (4, 8), (3, 6))
    ]
    write_dataset(tmp_path / "data", samples)
    words = ["--data", tmp_path / "data"]
    small = SMALL[4:]
    assert sample(pipelines, tmp_path / "a", *words, prompts=[], small=small) == 2
    assert "negative.safetensors. Or give --negative TEXT" in one_line(capsys, "sample")
    words += ["--guidance-scale", 1]
    assert sample(pipelines, tmp_path / "a", *words, prompts=[], small=small) == 0
    assert (
        sample(pipelines, tmp_path / "b", *words, "--batch-size", 2, prompts=[], small=small) == 0
    )
    videos = record(tmp_path / "a")["videos"]
    assert [video["id"] for video in videos] == ["clip-5", "clip-4", "clip-3"]
    assert [video["prompt"] for video in videos] == ["Clip 5.", "Clip 4.", "clip-3"]
    one, two = latents(tmp_path / "a"), latents(tmp_path / "b")
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)


BAD = [
    (["--size", "30x48"], "height is 30, expected a multiple of 16"),
    (["--frames", "6"], "frames is 6, expected 4n + 1"),
    (["--method", "prune"], "--reward is None, expected a reward model for prune"),
    (["--method", "prune", "--reward", "REWARD", "--set", "keep=3"], "keep is 3, expected {step"),
    (["--method", "guide", "--reward", "REWARD"], "weight of method guide is None"),
    (["--method", "beam", "--reward", "nowhere"], "--reward is 'nowhere', expected the folder"),
    (["--reward", "REWARD"], "--method is None, expected one of best-of"),
    (["--image", "nowhere.png"], "--image is 1, expected one for each of 2 prompts"),
    (["--weights", "nowhere"], "weights is 'nowhere', expected a file or folder that exists"),
    (["--weights", "BROKEN"], "broken.safetensors: not a whole safetensors file"),
    (["--weights", "WIDE"], "wide.safetensors"),
    (["--weights", "I2V"], "does not fit the videos"),
    (["--guidance-scale", "3,4"], "expected one number for one transformer"),
    (["--device", "cuda:7"], "hardware.device is"),
    (["--pipeline", "--batch-size", "2"], "--batch-size is 2, expected 1 with --pipeline"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), BAD)
def test_errors_are_one_line_and_nothing_is_written(pipelines, tmp_path, capsys, words, message):
    broken, wide = tmp_path / "broken.safetensors", tmp_path / "wide.safetensors"
    broken.write_bytes(b"no weights")
    layer = LoraLayer(torch.randn(2, 64), torch.randn(48, 2), 2.0)
    write_lora({"blocks.0.attn1.to_q": layer}, wide, "kohya")
    places = {"BROKEN": broken, "WIDE": wide}
    places |= {"REWARD": pipelines / "reward", "I2V": pipelines / "i2v"}
    words = [places.get(word, word) for word in words]
    assert sample(pipelines, tmp_path / "a", *words) == 2
    assert message in one_line(capsys, "sample")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_images_of_a_text_model_are_refused(pipelines, tmp_path, capsys):
    words = ["--image", pipelines / "first.png", "--image", pipelines / "first.png"]
    assert sample(pipelines, tmp_path / "a", *words) == 2
    assert "expected none: the model takes none" in one_line(capsys, "sample")
    assert sample(pipelines, tmp_path / "a", kind="i2v") == 2
    assert "expected a file: this is an image-to-video model. Give --image FILE" in one_line(
        capsys, "sample"
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["hunyuan", "hunyuan15", "ltx", "mochi"])
def test_other_families_are_refused(tmp_path, capsys, case):
    model, (x, _, conditions) = tiny_families.tiny(case), tiny_families.inputs(case)
    folder = tmp_path / "model"
    model.save_pretrained(folder / "transformer")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLOther"}')
    (folder / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    text = {"encoder_hidden_states": conditions["encoder_hidden_states"][0]}
    write_dataset(tmp_path / "data", [Sample(x[0], text, id="clip")])
    data = ["--data", tmp_path / "data", "--guidance-scale", 1, "--latents-only"]
    for given in (["--prompt", "A disc."], data):
        words = ["sample", tmp_path / "out", "--model", folder, *given, *SMALL[4:]]
        assert cli.main(list(map(str, words))) == 2
        assert "is 'OtherPipeline', expected" in one_line(capsys, "sample")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_generator_that_is_no_flow_is_refused(tmp_path, capsys):
    model, (x, text, *_) = tiny_families.cogvideox(0, 1, "fp32")
    model.save_pretrained(tmp_path / "model" / "transformer")
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    latents = x[0].transpose(0, 1).contiguous()
    write_dataset(tmp_path / "data", [Sample(latents, {"encoder_hidden_states": text[0]}, id="a")])
    words = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--latents-only"]
    words = ["sample", tmp_path / "out", *words, "--guidance-scale", 1, *SMALL[4:]]
    assert cli.main(list(map(str, words))) == 2
    assert "CogVideoX" in one_line(capsys, "sample")
    assert not (tmp_path / "out").exists()
