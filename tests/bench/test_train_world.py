"""The small world's models: training, the file of weights and its digest."""

import json
import signal

import pytest
import torch
from bench_runs import CPU
from experiments import small_world, train_world, world
from offload_models import assert_same

from prfl_fast.utils.io import load_tensors

pytest.importorskip("diffusers")

TINY = train_world.Settings(clips=64, generator_steps=2, reward_steps=1, pixel_steps=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train all models briefly; return the folders of the run and of the weights."""
    out, folder = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("weights")
    train_world.train(TINY, 0, out, folder)
    return out, folder


def test_the_weights_of_the_repository_are_small_and_whole():
    assert (small_world.FOLDER / small_world.WEIGHTS).stat().st_size <= 8 << 20
    generator, reward, pixel = small_world.read_models(CPU)
    for model in (generator, reward, pixel):
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    clips = small_world.Clips.make(2, 0)
    text = {"encoder_hidden_states": clips.text}
    assert reward(clips.latents, torch.zeros(2), text).shape == (2,)
    assert pixel(world.decode(clips.latents)).shape == (2,)


def test_trained_models_are_read_back_in_half_precision(trained):
    out, folder = trained
    state = load_tensors(folder / small_world.WEIGHTS)
    assert {v.dtype for v in state.values()} == {torch.float16}
    generator, *_ = small_world.read_models(CPU, folder)
    average = load_tensors(out / "generator" / "step-00000002" / "ema.safetensors")
    for name, value in generator.state_dict().items():
        torch.testing.assert_close(value, average[name].half().float(), rtol=0, atol=0)


def test_a_second_run_reads_its_checkpoints_and_writes_the_same_weights(trained, tmp_path):
    out, folder = trained
    train_world.train(TINY, 0, out, tmp_path)
    assert_same(*(load_tensors(f / small_world.WEIGHTS) for f in (folder, tmp_path)))


def test_a_signal_ends_the_command_and_a_later_one_continues(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return loss(*args)

    loss = train_world.small_world.Supervised.func.__call__
    with monkeypatch.context() as patch:
        patch.setattr(train_world.small_world.Supervised.func, "__call__", interrupted)
        with pytest.raises(SystemExit) as ended:
            train_world.train(TINY, 0, tmp_path, tmp_path)
    assert ended.value.code == 130
    assert "generator is saved at step 1; run the command again" in capsys.readouterr().out
    assert not (tmp_path / small_world.WEIGHTS).exists()


def test_damaged_weights_are_refused_with_the_command_that_trains_them(trained, tmp_path):
    for path in trained[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / small_world.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="SHA-256 of .*train_world.py") as refused:
        small_world.read_models(CPU, tmp_path)
    assert len(str(refused.value).splitlines()) == 1
    digests = json.loads((tmp_path / "digests.json").read_text())
    weights.unlink()
    with pytest.raises(ValueError, match=f"expected {digests[small_world.WEIGHTS]}"):
        small_world.read_models(CPU, tmp_path)
