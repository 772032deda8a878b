"""``prfl-fast sample`` and ``compare`` on tiny random pipelines of other families than Wan."""

import json

import pytest
import torch
from commands import one_line
from family_pipelines import PIPELINES, Solver, make_family_pipeline
from tiers import slow_except

from prfl_fast.cli import main as cli
from prfl_fast.data.codec import load_codec
from prfl_fast.data.families import FAMILIES
from prfl_fast.models.loading import load_transformer
from prfl_fast.models.lora_files import write_lora
from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.sampling import generate
from prfl_fast.sampling.pipeline import from_layout, to_layout
from prfl_fast.utils.checks import torch_seed
from prfl_fast.utils.io import load_tensors

pytest.importorskip("pydantic")
PROMPTS = ["A disc.", 'A "square" jerks to the left.']
FRAMES = {"ltx": 9, "ltx2": 9, "mochi": 7, "cogvideox": 9}
FLOWS = tuple(family for family in PIPELINES if family != "cogvideox")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function that writes the pipeline of a family once."""
    root = tmp_path_factory.mktemp("families")

    def folder(family):
        if not (root / family).exists():
            make_family_pipeline(family).save_pretrained(root / family)
        return root / family

    return folder


def sample(folder, out, *words, prompts=PROMPTS, frames=None):
    """Run the command and return its exit code."""
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    frames = frames or FRAMES.get(folder.name, 5)
    small = ["--size", "64x64", "--frames", frames, "--num-inference-steps", 4]
    words = ["sample", out, "--model", folder, *given, *small, "--device", "cpu", *words]
    return cli.main(list(map(str, words)))


def latents(out):
    """Return the latents of a folder in the order of the videos."""
    return [load_tensors(path)["latents"] for path in sorted((out / "latents").iterdir())]


def expected(family, pipeline, prompt, seed, like, scale=3.0, output="latent", **options):
    """Return what a pipeline itself makes of a prompt and the noise of a seed."""
    kind = FAMILIES[PIPELINES[family]]
    noise = to_layout(generate.noise_of(seed, like.shape)[None], kind.layout)
    options |= kind.options
    if family == "hunyuan":
        options["guidance_scale"] = scale
    else:
        options["negative_prompt"] = "Bad."
    if family == "hunyuan15":
        pipeline.guider = pipeline.guider.new(guidance_scale=scale)
    elif family != "hunyuan":
        options["guidance_scale"] = scale
    last = []
    if family == "ltx2":
        options["audio_guidance_scale"] = scale
        first = int(noise.flatten()[0].view(torch.int32))
        options["generator"] = torch.Generator().manual_seed(torch_seed(first))
        options["callback_on_step_end"] = lambda p, i, t, given: last.append(given["latents"]) or {}
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        prompt=prompt, height=64, width=64, num_frames=FRAMES.get(family, 5),
        num_inference_steps=4, latents=noise, output_type=output, **options,
    ).frames  # fmt: skip
    if output != "latent":
        return found[0]
    found = from_layout(last[-1] if last else found, kind.layout, like[None])
    return found[0]


def negative(family):
    return () if family == "hunyuan" else ("--negative", "Bad.")


@pytest.mark.parametrize("family", slow_except(FLOWS, ("mochi",)))
def test_samples_are_those_of_the_pipeline_with_our_solver(family, folder_of, tmp_path):
    folder, options = folder_of(family), {}
    words = ["--guidance-scale", 3, "--shift", 2, "--batch-size", 2, *negative(family)]
    assert sample(folder, tmp_path, *words, "--latents-only", "--seed", 5) == 0
    pipeline = make_family_pipeline(family)
    pipeline.scheduler = Solver(FlowUniPC(2.0, integer_timesteps=False), family == "mochi")
    if family.startswith("ltx"):
        options["frame_rate"] = FAMILIES[PIPELINES[family]].fps
    if family == "ltx2":  # the engine denoises the video alone
        forward = pipeline.transformer.forward
        pipeline.transformer.forward = lambda **given: forward(
            **{**given, "isolate_modalities": True}
        )
    for i, found in enumerate(latents(tmp_path)):
        wanted = expected(family, pipeline, PROMPTS[i], 5 + i, found, **options)
        assert found.isfinite().all() and not torch.allclose(found, wanted.flip(1), atol=0.1)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=2e-4), (found - wanted).abs().max()


@pytest.mark.parametrize(
    "family", ["cogvideox", *(pytest.param(f, marks=pytest.mark.slow) for f in FLOWS)]
)
def test_videos_are_decoded_as_by_the_pipeline(family, folder_of, tmp_path):
    folder = folder_of(family)
    words = ["--guidance-scale", 3, "--pipeline", "--seed", 5, *negative(family)]
    assert sample(folder, tmp_path, *words, prompts=PROMPTS[1:]) == 0
    (found,) = latents(tmp_path)
    pipeline, options = make_family_pipeline(family), {}
    if family.startswith("ltx"):
        options["frame_rate"] = FAMILIES[PIPELINES[family]].fps
    wanted = expected(family, pipeline, PROMPTS[1], 5, found, **options)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    frames = expected(family, pipeline, PROMPTS[1], 5, found, output="pt", **options)
    video = load_codec(folder).decode(found[None])[0].transpose(0, 1)
    assert torch.allclose(video / 2 + 0.5, frames, atol=1e-5), (
        (video / 2 + 0.5 - frames).abs().max()
    )
    assert (tmp_path / "0000-0.mp4").is_file() and (tmp_path / "sheet.png").is_file()
    settings = json.loads((tmp_path / "samples.json").read_text())["settings"]
    assert settings["fps"] == FAMILIES[PIPELINES[family]].fps


def test_what_a_family_cannot_do_is_one_line(folder_of, tmp_path, capsys):
    (tmp_path / "image.png").write_bytes(b"")
    hunyuan, cogvideox = folder_of("hunyuan"), folder_of("cogvideox")
    capsys.readouterr()  # transformers' progress as it writes a new pipeline
    cases = [
        (cogvideox, (), "predicts no velocity of a flow, expected one that does"),
        (cogvideox, ("--pipeline", "--shift", 3), "--shift is 3.0, expected no value"),
        (hunyuan, ("--negative", "Bad."), "expected no value for a model with embedded guidance"),
        (hunyuan, ("--image", tmp_path / "image.png"), "expected none: the model takes none"),
        (hunyuan, ("--size", "72x64"), "height is 72, expected a multiple of 16"),
        (cogvideox, ("--pipeline", "--frames", 13), "frames is 13, expected 8n + 1, such as 81"),
    ]
    for folder, words, text in cases:
        assert sample(folder, tmp_path / "out", *words, prompts=PROMPTS[:1]) == 2
        assert text in one_line(capsys, "sample")
    index = tmp_path / "other"
    (index / "vae").mkdir(parents=True)
    (index / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLAllegro"}')
    (index / "model_index.json").write_text('{"_class_name": "AllegroPipeline"}')
    assert sample(index, tmp_path / "out") == 2
    assert "is 'AllegroPipeline', expected a pipeline of Wan, or one of" in one_line(
        capsys, "sample"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_is_compared_with_the_base(folder_of, tmp_path):
    folder = folder_of("ltx")
    generator = torch.Generator().manual_seed(3)
    matrices = (torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator))
    write_lora(
        {"transformer_blocks.0.attn1.to_q": LoraLayer(*matrices, 2.0)},
        tmp_path / "lora.safetensors",
        "diffusers",
    )
    reward = LatentRewardModel.from_backbone(load_transformer(folder), num_blocks=1, num_heads=2)
    reward.save(tmp_path / "reward")
    words = ["compare", f"lora={tmp_path / 'lora.safetensors'}", "--out", tmp_path / "out"]
    words += ["--model", folder, "--prompt", PROMPTS[0], "--size", "64x64", "--frames", 9]
    words += ["--num-inference-steps", 3, "--device", "cpu", "--reward", tmp_path / "reward"]
    assert cli.main(list(map(str, words))) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["scores"]["reward"].keys() == {"base", "lora"}
    assert sum(found["drift"]["lora"].values()) > 0
