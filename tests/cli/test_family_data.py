"""Datasets of other families than Wan: ``encode``, ``train``, ``train-reward`` and ``sample``."""

import pytest
import torch
import yaml
from commands import one_line
from family_pipelines import PIPELINES, make_family_pipeline
from tiny_pipeline import make_clips

from prfl_fast.cli import main as cli
from prfl_fast.data import Batches, LatentDataset
from prfl_fast.data.codec import load_codec, load_prompt_encoder
from prfl_fast.data.video import read_clip
from prfl_fast.models.conditions import OF_PROMPT, TEXT
from prfl_fast.models.registry import find_adapter
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.utils.io import save_tensors

pytest.importorskip("pydantic")
FRAMES = {"ltx": 9, "ltx2": 9, "mochi": 7}
FLOWS = tuple(family for family in PIPELINES if family != "cogvideox")


def encode(clips, out, folder, *words):
    frames = FRAMES.get(folder.name, 5)
    words = ["encode", clips, out, "--model", folder, "--size", "64x64", "--frames", frames, *words]
    assert cli.main(list(map(str, [*words, "--device", "cpu"]))) == 0
    return LatentDataset(out)


@pytest.mark.parametrize(
    "family", ["ltx", *(pytest.param(f, marks=pytest.mark.slow) for f in FLOWS if f != "ltx")]
)
def test_a_dataset_of_prompts_trains_and_samples(family, tmp_path):
    folder, data = tmp_path / family, tmp_path / "data"
    pipeline = make_family_pipeline(family)
    pipeline.save_pretrained(folder)
    (tmp_path / "prompts.txt").write_text('A disc.\nA square jerks to the "left".\n')
    dataset = encode(tmp_path / "prompts.txt", data, folder, "--negative", "Bad.")
    assert dataset.prompts_only and dataset.shapes["latents"] == load_codec(folder).latent_shape(
        FRAMES.get(family, 5), 64, 64
    )
    batch = Batches(dataset, 2, text_drop=0.5)[0]
    if len(OF_PROMPT & dataset.shapes.keys()) > 1:
        save_tensors({TEXT: dataset.empty_prompt()[TEXT]}, tmp_path / "text.safetensors")
        with pytest.raises(ValueError, match="tensors is .*, expected .* and beside them only"):
            dataset.read_prompt(tmp_path / "text.safetensors")
    wanted = load_prompt_encoder(folder).conditions(['A square jerks to the "left".'])[0]
    sample = dataset[1].conditions
    assert sample.keys() == wanted.keys()
    assert all(torch.allclose(sample[n].float(), wanted[n].float(), atol=1e-5) for n in wanted)
    adapter = find_adapter(pipeline.transformer)
    adapter.check_latents(pipeline.transformer, torch.zeros_like(batch.latents), batch.conditions)

    reward = LatentRewardModel.from_backbone(pipeline.transformer, num_blocks=2, num_heads=2)
    reward.save(tmp_path / "reward")
    config = {
        "model": str(folder),
        "data": str(data),
        "objectives": ["prfl"],
        "reward": str(tmp_path / "reward"),
        "lora": {"lora_rank": 2},
        "prfl": {
            "num_inference_steps": 2,
            "guidance": {
                "negative": str(data / "negative.safetensors"),
                "guidance_scale": 2.0,
                "batched": False,
            },
        },
        "out": str(tmp_path / "run"),
        "run": {"steps": 1},
        "hardware": {"device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    words = ["sample", tmp_path / "out", "--model", folder, "--data", data, "--latents-only"]
    words += ["--weights", tmp_path / "run", "--num-inference-steps", 2, "--device", "cpu"]
    words += ["--method", "best-of", "--set", "candidates=2", "--reward", tmp_path / "reward"]
    assert cli.main(list(map(str, words))) == 0


@pytest.mark.slow
def test_clips_are_encoded_for_text_to_video(tmp_path, capsys):
    folder, clips = tmp_path / "ltx", tmp_path / "clips"
    make_family_pipeline("ltx").save_pretrained(folder)
    make_clips(clips)
    dataset = encode(clips / "clips.csv", tmp_path / "data", folder, "--fps", 16, "--preview")
    assert not dataset.prompts_only and not dataset.short and len(dataset) == 3
    clip = read_clip(clips / "disc.mp4", 9, (64, 64), fps=16)
    expected = load_codec(folder).encode(clip[None])[0]
    assert torch.allclose(dataset[0].latents, expected, atol=1e-5)
    scale = dataset[0].conditions["rope_interpolation_scale"]
    assert torch.allclose(scale, torch.tensor([8 / 16, 32.0, 32.0]))
    words = ["encode", clips / "clips.csv", tmp_path / "other", "--model", folder]
    words += ["--condition", "first", "--size", "64x64", "--frames", 9, "--device", "cpu"]
    capsys.readouterr()  # bars of the first run
    assert cli.main(list(map(str, words))) == 2
    assert "expected none for other families than Wan" in one_line(capsys, "encode")
