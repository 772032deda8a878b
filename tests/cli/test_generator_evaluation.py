"""The ``eval`` section of ``prfl-fast train``: rewards of held-out prompts, samples, resuming."""

import json
import shutil

import pytest
import torch
from commands import call, negative_file, refused, train
from runs import log, samples

pytest.importorskip("pydantic")
pytest.importorskip("diffusers")

from diffusers import AutoencoderKLWan

from prfl_fast.data.manifest import write_dataset
from prfl_fast.models.loading import load_transformer
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.rollout.trajectory import rollout

NAMES = {"prfl/loss", "prfl/reward", "prfl/grad_norm", "sft/loss", "sft/grad_norm"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two prompts of another size and length of text than the data's."""
    sizes = ({"size": (1, 4, 2), "rows": 2}, {"size": (2, 2, 2), "rows": 5})
    made = [samples(1, seed=9 + i, **size)[0]._replace(id=f"{i}") for i, size in enumerate(sizes)]
    return str(write_dataset(tmp_path_factory.mktemp("prompts") / "p", made).folder)


def numbers(records):
    return [{name: r[name] for name in NAMES} for r in records if r["step"]]


def test_rewards_along_the_sampler_without_effect_on_the_training(root, tmp_path, prompts):
    changes = {"run.steps": 3, "prfl.num_inference_steps": 4, "run.save_every": 2}
    negative = negative_file(tmp_path / "n.safetensors", 3, 20)
    changes["prfl.guidance"] = {"guidance_scale": 3.0, "negative": negative}
    evaluated = {"eval": {"prompts": prompts, "every": 2, "seeds": [3, 4]}}
    records = train(root, tmp_path / "eval", {**changes, **evaluated})
    plain = train(root, tmp_path / "plain", changes)
    assert numbers(records) == numbers(plain)
    weights = [
        (tmp_path / name / "final" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("eval", "plain")
    ]
    assert weights[0] == weights[1]
    found = [r for r in records if "eval/reward" in r]
    assert [r["step"] for r in found] == [0, 2]
    levels = {name for name in found[0] if name.startswith("eval/reward/t")}
    assert len(levels) == 3 and found[0]["eval/reward"] != found[1]["eval/reward"]
    train(root, tmp_path / "halves", {**changes, **evaluated, "run.steps": 1})
    assert train(root, tmp_path / "halves", {**changes, **evaluated}) == records


def test_the_reward_at_the_end_is_that_of_the_samples(root, tmp_path, prompts):
    changes = {"run.steps": 1, "eval": {"prompts": prompts, "every": 9, "seeds": [3]}}
    (first, *_) = train(root, tmp_path / "out", {**changes, "prfl.num_inference_steps": 4})
    model = load_transformer(str(root / "model"), torch.float32)
    reward, scores = LatentRewardModel.load(root / "reward"), []
    for seed, size in ((9, (1, 4, 2)), (10, (2, 2, 2))):
        text = samples(1, seed=seed, size=size, rows=2 if seed == 9 else 5)[0].conditions
        conditions = {name: value[None] for name, value in text.items()}
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(1, 16, *size, generator=generator)
        x = rollout(model, noise, conditions, FlowUniPC(5.0), 4)
        with torch.no_grad():
            scores.append(reward(x, torch.zeros(1), conditions).item())
    assert first["step"] == 0
    assert first["eval/reward"] == pytest.approx(sum(scores) / 2, rel=1e-4)


def test_samples_are_written_and_rewards_are_not_needed(root, tmp_path, prompts):
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_scales": []}
    AutoencoderKLWan(z_dim=16, **sizes).save_pretrained(tmp_path / "vae")
    section = {"prompts": prompts, "every": 1, "codec": str(tmp_path / "vae")}
    changes = {"run.steps": 2, "objectives": ["sft"], "reward": ..., "eval": section}
    changes |= {"prfl.num_inference_steps": 2, "run.tensorboard": True}
    changes["optimizer.learning_rate"] = 0.1
    records = train(root, tmp_path / "out", changes)
    assert not any(name.startswith("eval") for r in records for name in r)
    names = [f"step-{step:08d}.png" for step in range(3)]
    paths = sorted((tmp_path / "out" / "samples").iterdir())
    assert [path.name for path in paths] == names
    # Two rows: one frame of 32 x 16 pixels, five of 16 x 16; 4 pixels between frames.
    assert image.open(paths[0]).size == (5 * (16 + 4), 32 + 4 + 16 + 4)
    shutil.rmtree(tmp_path / "out" / "step-00000002")
    before = [path.read_bytes() for path in paths]
    train(root, tmp_path / "out", changes)
    assert [path.read_bytes() for path in paths] == before and before[0] != before[2]
    assert json.dumps(log(tmp_path / "out")) == json.dumps(records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"prompts": "nowhere"}}, "nowhere: no manifest.jsonl there"),
        ({"eval": {}}, "eval.prompts is missing"),
        ({"eval.seeds": []}, "eval.seeds is [], expected a list of one or more"),
        ({"eval.codec": "nowhere"}, "eval.codec: nowhere"),
        ({"reward": ..., "objectives": ["sft"]}, "reward is missing, expected a reward model or"),
    ],
)
def test_bad_evaluations_are_refused(root, tmp_path, capsys, prompts, changes, message):
    changes = {"eval.prompts": prompts, **changes}
    assert message in refused(capsys, "train", root, tmp_path / "out", changes)
    assert not (tmp_path / "out").exists()


def test_prompts_that_do_not_fit_the_model_are_refused(root, tmp_path, capsys):
    folder = write_dataset(tmp_path / "wide", samples(1, width=24)).folder
    error = refused(capsys, "train", root, tmp_path / "out", {"eval.prompts": str(folder)})
    assert "does not fit" in error and call("train", root, tmp_path / "x", None, "--check") == 0
