"""The ``eval`` section of ``prfl-fast train``: rewards of held-out prompts, samples, resuming."""

import pytest
import torch
from commands import negative_file, refused, train
from runs import samples
from wan import tiny_wan

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


def evaluated(prompts, folder, **changes):
    """Return changes of a configuration with an evaluation that writes pictures."""
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_scales": []}
    AutoencoderKLWan(z_dim=16, **sizes).save_pretrained(folder / "vae")
    section = {"prompts": prompts, "every": 2, "seeds": [3, 4], "codec": str(folder / "vae")}
    return {"eval": {**section, **changes}}


def weights(out):
    return (out / "final" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_rewards_and_samples_without_effect_on_the_training(root, tmp_path, prompts):
    image = pytest.importorskip("PIL.Image")
    changes = {"run.steps": 1, "prfl.num_inference_steps": 2}
    negative = negative_file(tmp_path / "n.safetensors", 3, 20)
    changes["prfl.guidance"] = {"guidance_scale": 3.0, "negative": negative}
    section = evaluated(prompts, tmp_path, seeds=[3], every=1)
    records = train(root, tmp_path / "eval", {**changes, **section})
    assert numbers(records) == numbers(train(root, tmp_path / "plain", changes))
    assert weights(tmp_path / "eval") == weights(tmp_path / "plain")
    found = [r for r in records if "eval/reward" in r]
    assert [r["step"] for r in found] == [0, 1]
    assert sum(name.startswith("eval/reward/t") for name in found[0]) == 1
    paths = sorted((tmp_path / "eval" / "samples").iterdir())
    assert [path.name for path in paths] == ["step-00000000.png", "step-00000001.png"]
    # Two rows: one frame of 32 x 16 pixels, five of 16 x 16; 4 pixels between frames.
    assert image.open(paths[0]).size == (5 * (16 + 4), 32 + 4 + 16 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["workers", "sft", "experts", "dpo"])
def test_a_resumed_run_writes_the_same_log_and_samples(root, tmp_path, prompts, case):
    pytest.importorskip("PIL.Image")
    lora = {"lora": {"lora_rank": 2}, "run.ema_decay": ...}
    if case == "experts":
        tiny_wan(layers=1, heads=1, text_tokens=512, seed=3).save_pretrained(tmp_path / "low")
        model = {"high": str(root / "model"), "low": str(tmp_path / "low"), "boundary": 0.9}
        lora["model"] = model
    changes = {
        "workers": {"run.workers": 2},
        "sft": {"objectives": ["sft"], "reward": ..., "run.tensorboard": True},
        "experts": lora,
        "dpo": {"objectives": ["dpo", "prfl"], "data": str(root / "pairs"), **lora},
    }[case]
    changes |= {"run.steps": 4, "prfl.num_inference_steps": 4, "optimizer.learning_rate": 0.1}
    section = evaluated(prompts, tmp_path)
    whole = train(root, tmp_path / "whole", {**changes, **section})
    for steps in (1, 3, 4):
        half = train(root, tmp_path / "half", {**changes, **section, "run.steps": steps})
    assert half == whole
    pictures = [
        [path.read_bytes() for path in sorted((tmp_path / name / "samples").iterdir())]
        for name in ("whole", "half")
    ]
    assert pictures[0] == pictures[1] and len(set(pictures[0])) == 3
    if case == "sft":
        assert not any(name.startswith("eval") for r in whole for name in r)
    plain = train(root, tmp_path / "plain", changes)
    assert plain == [{k: v for k, v in r.items() if "eval" not in k} for r in whole if r["step"]]


@pytest.mark.slow
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
    assert "does not fit" in error
