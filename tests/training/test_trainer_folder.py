"""Runs in a folder: resuming, refused checkpoints, signals and logs."""

import os
import signal

import pytest
import torch
from processes import forked
from runs import NoisyFit, linear, log, trainer
from torch import nn

from prfl_fast.training.checkpoint import latest_checkpoint, list_checkpoints
from prfl_fast.utils.folder_lock import FolderInUseError


@pytest.mark.parametrize("gradients", ["parameter", "fp32"])
@pytest.mark.parametrize("kind", ["adamw", "adamw-sr", "adamw8bit", "adamw-cpu"])
def test_every_optimizer_resumes_bit_for_bit_on_bfloat16(tmp_path, kind, gradients):
    options = {"optimizer": kind, "gradient_dtype": gradients}
    options |= {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3}

    def run(name, steps, seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 4096).bfloat16()
        for p in model.parameters():
            p.data.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        torch.manual_seed(8)
        objectives = {"a": Wide(model)}
        trainer(model, tmp_path / name, objectives=objectives, steps=steps, **options).run()
        return model.weight.detach()

    whole = run("whole", 4, 0)
    run("broken", 2, 0)
    assert torch.equal(run("broken", 4, 1), whole) and whole.std() > 0
    assert log(tmp_path / "broken") == log(tmp_path / "whole")
    paths = [tmp_path / name / "step-00000004" / "state.pt" for name in ("whole", "broken")]
    states = [torch.load(path, weights_only=True)["random"]["torch"] for path in paths]
    assert torch.equal(*states)


class Wide(NoisyFit):
    """NoisyFit, for a layer of any width."""

    def __call__(self, draw, generator, loss_scale):
        x = torch.randn(4, 3, generator=generator).to(self.model.weight.dtype)
        loss = (self.model(x) * torch.rand(())).square().mean()
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    options = {"names": ("a", "b"), "ema_decay": 0.9, "save_every": 1, "warmup_steps": 3}
    torch.manual_seed(1)
    whole = trainer(linear(), tmp_path / "whole", **options)
    torch.manual_seed(2)
    whole.run()

    def interrupt(record):
        if record["step"] == stop + 1:
            raise RuntimeError("stop")

    options["save_every"] = stop
    broken = trainer(linear(), tmp_path / "broken", on_step=interrupt, **options)
    torch.manual_seed(2)
    with pytest.raises(RuntimeError, match="stop"):
        broken.run()
    assert [r["step"] for r in log(tmp_path / "broken")][-1] == stop + 1
    (latest_checkpoint(tmp_path / "broken").parent / "step-00000099.tmp-99999901-00000000").mkdir()
    torch.manual_seed(77)
    resumed = trainer(linear(3), tmp_path / "broken", **options)
    assert resumed.result.step == latest_step(tmp_path / "broken")
    resumed.run()
    assert log(tmp_path / "broken") == log(tmp_path / "whole")
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert torch.equal(resumed.ema["bias"], whole.ema["bias"])
    assert not list((tmp_path / "broken").glob("*.tmp-*"))


def latest_step(folder):
    return list_checkpoints(folder)[-1][0]


def test_a_longer_run_goes_on_and_a_finished_one_does_nothing(tmp_path):
    trainer(linear(), tmp_path, steps=2).run()
    state = tmp_path / "step-00000002" / "state.pt"
    before = state.stat().st_mtime_ns
    assert trainer(linear(), tmp_path, steps=2).run().history == []
    assert state.stat().st_mtime_ns == before
    assert [r["step"] for r in trainer(linear(), tmp_path, steps=3).run().history] == [3]


def test_resuming_elsewhere_and_refusing_to_overwrite(tmp_path):
    trainer(linear(), tmp_path / "a", steps=4, save_every=2, keep_last=0).run()
    second = tmp_path / "a" / "step-00000002"
    for name, resume, message in (
        ("a", None, "without step-00000004. Resume from it, or choose a new"),
        ("a", second, "step-00000004, which is not older than step-00000002"),
        ("c", tmp_path / "nowhere", "not a checkpoint of this library"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(linear(), tmp_path / name, resume=resume)
    fork = trainer(linear(), tmp_path / "b", steps=4, resume=second)
    assert [r["step"] for r in fork.run().history] == [3, 4]
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.2}, "made with learning_rate = 0.1, this run has 0.2"),
        ({"seed": 1}, "made with seed = 0, this run has 1"),
        ({"gradient_accumulation_steps": 2}, "made with gradient_accumulation_steps = 1"),
        ({"optimizer": "adamw-sr"}, "made with optimizer = 'adamw', this run has 'adamw-sr'"),
        ({"gradient_dtype": "fp32"}, "made with gradient_dtype = 'parameter', this run has 'fp32'"),
        ({"ema_decay": 0.5}, "made with ema_decay = None, this run has 0.5"),
        ({"identity": {"batch_size": 2}}, "made with batch_size = None, this run has 2"),
        ({"names": ("b",)}, r"made with objectives = \['a'\], this run has \['b'\]"),
        ({"model": nn.Linear(3, 5)}, r"weight float32\[2, 3\], expected float32\[5, 3\]"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, options, message):
    trainer(linear(), tmp_path, steps=1).run()
    with pytest.raises(ValueError, match=message):
        trainer(folder=tmp_path, **options)


def test_frozen_parameters_must_be_the_same(tmp_path):
    trainer(linear(), tmp_path, steps=1).run()
    model = linear()
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="trained other parameters"):
        trainer(model, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_saved(tmp_path, number):
    before = signal.getsignal(number)
    run = trainer(folder=tmp_path, steps=50)
    run.on_step = lambda record: record["step"] == 3 and os.kill(os.getpid(), number)
    result = run.run()
    assert result.stopped_by is number and result.step == 3
    assert latest_step(tmp_path) == 3 and signal.getsignal(number) is before


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer(save_every=1)
    assert [r["step"] for r in run.run().history] == [1, 2, 3, 4]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="folder is None, expected a folder to save to"):
        run.save()


def test_logs_are_json_and_tensorboard(tmp_path):
    trainer(folder=tmp_path, steps=2, tensorboard=True).run()
    trainer(folder=tmp_path, steps=4, tensorboard=True).run()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {e.step: e.value for e in events.Scalars("a/loss")}
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] == sorted(shown)
    assert all(shown[line["step"]] == pytest.approx(line["a/loss"]) for line in lines)


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    found = []

    def second():
        try:
            trainer(folder=tmp_path).run()
        except FolderInUseError:
            return 7
        return 0

    trainer(folder=tmp_path, on_step=lambda record: found.append(forked(second))).run()
    assert found == [7] * 4 and [step for step, _ in list_checkpoints(tmp_path)] == [4]


def test_a_run_that_another_one_overtook_is_refused(tmp_path):
    first, second = trainer(folder=tmp_path), trainer(folder=tmp_path)
    first.run()
    with pytest.raises(ValueError, match="Another run has worked in the folder since"):
        second.run()


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("draw", [2, 3])
def test_an_exception_saves_the_steps_before_it(tmp_path, draw, error):
    class Bad(NoisyFit):
        def __call__(self, at, generator, loss_scale):
            if at == draw and self.broken:
                torch.rand(())
                raise error("sample 7 has NaN")
            return super().__call__(at, generator, loss_scale)

    def run(folder, broken):
        model = linear()
        objectives = {"a": NoisyFit(model), "b": Bad(model)}
        objectives["b"].broken = broken
        torch.manual_seed(4)
        made = trainer(model, folder, objectives=objectives, ema_decay=0.9)
        return made, model

    whole, model = run(tmp_path / "whole", False)
    whole.run()
    broken, _ = run(tmp_path / "broken", True)
    with pytest.raises(error, match="sample 7 has NaN") as caught:
        broken.run()
    if error is ValueError:
        assert f"NaN. Step {draw} is saved in {tmp_path / 'broken'}" in str(caught.value)
    if error is KeyboardInterrupt:  # a second Ctrl-C saves nothing; the same process may go on
        mended, mended.objectives["b"].broken = broken, False
    else:
        assert [step for step, _ in list_checkpoints(tmp_path / "broken")] == [draw]
        mended, _ = run(tmp_path / "broken", False)
    mended.run()
    assert torch.equal(mended.model.weight, model.weight)
    assert torch.equal(mended.model.bias, model.bias)


def test_the_first_signal_says_what_happens(tmp_path, capfd):
    def stop(record):
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
    result = trainer(folder=tmp_path, on_step=stop).run()
    signal.signal(signal.SIGHUP, before)
    assert result.stopped_by == signal.SIGHUP and latest_checkpoint(tmp_path).name.endswith("1")
    assert "finishing this step, then saving; again to stop at once" in capfd.readouterr().err


BAD_LINES = ['{"step": 3, "a/lo', "[1]", "7", *(f'{{"step": {s}}}' for s in ("null", '"x"', "1.5"))]


def test_a_log_is_repaired(tmp_path):
    """Cut lines and those without a step go; of a step twice the last line counts."""
    trainer(folder=tmp_path, steps=2).run()
    lines, path = log(tmp_path), tmp_path / "log.jsonl"
    path.write_text('{"step": 2, "of": "another run"}\n' + path.read_text() + "\n".join(BAD_LINES))
    trainer(folder=tmp_path, steps=3).run()
    assert log(tmp_path)[:2] == lines and [record["step"] for record in log(tmp_path)] == [1, 2, 3]
