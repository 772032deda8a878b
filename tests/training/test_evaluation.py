"""Evaluation in a training: no effect on it, early stopping, signals and resumed runs."""

import os
import random
import signal

import pytest
import torch
from runs import linear, log, make_world, samples, trainer

from prfl_fast.data.manifest import LatentDataset, write_dataset
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training.checkpoint import list_checkpoints
from prfl_fast.training.evaluation import Evaluated, PeriodicEvaluation, RewardEvaluator, labels_of


class Draws:
    """Evaluate a linear layer on random inputs; ``on`` names calls in which to act."""

    def __init__(self, model, **on):
        self.model, self.on, self.calls = model, on, 0

    def __call__(self, tick):
        self.calls += 1
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 3, generator=generator)
        torch.rand(3), random.random()  # must change nothing
        self.on.get(f"call_{self.calls}", lambda: None)()
        tick()
        return Evaluated({"accuracy": self.model(x).sum().item(), "bad": float("nan")})


class Listed:
    """Return given accuracies in turn."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, tick):
        return Evaluated({"accuracy": self.values.pop(0)})


def evaluated(folder=None, every=2, patience=None, evaluate=None, on=None, **options):
    model = linear()
    evaluate = evaluate or Draws(model, **(on or {}))
    evaluation = PeriodicEvaluation(evaluate, every, patience=patience)
    return trainer(model, folder, evaluation=evaluation, **{"steps": 6, **options})


def test_an_evaluation_changes_no_number_of_a_training(tmp_path):
    plain = trainer(steps=6, folder=tmp_path / "plain")
    plain.run()
    seen = evaluated(tmp_path / "seen")  # seeds the global generator again
    seen.run()
    assert torch.equal(plain.model.weight, seen.model.weight)
    assert torch.equal(plain.generator.get_state(), seen.generator.get_state())
    records = log(tmp_path / "seen")
    assert [r["step"] for r in records if "eval/accuracy" in r] == [0, 2, 4, 6]
    assert all(r["eval/bad"] is None for r in records if r["step"] % 2 == 0)
    without = [{k: v for k, v in r.items() if "eval" not in k} for r in records[1:]]
    assert without == log(tmp_path / "plain") and len(seen.result.history) == 7


@pytest.mark.cases(2)
@pytest.mark.parametrize("call", [2, 1, 3])
@pytest.mark.parametrize("how", ["signal", "error"])
def test_a_run_that_ends_in_an_evaluation_repeats_it(tmp_path, how, call):
    evaluated(tmp_path / "whole", save_every=3).run()

    def stop():
        if how == "error":
            raise ValueError("no such file")
        os.kill(os.getpid(), signal.SIGTERM)

    first = evaluated(tmp_path / "halves", save_every=3, on={f"call_{call}": stop})
    if how == "error":
        with pytest.raises(ValueError, match="no such file"):
            first.run()
    else:
        assert first.run().stopped_by == signal.SIGTERM
    assert first.result.step == max(0, 2 * call - 3)
    second = evaluated(tmp_path / "halves", save_every=3)
    second.run()
    assert log(tmp_path / "halves") == log(tmp_path / "whole")


def test_a_run_that_is_killed_gives_the_same_log(tmp_path):
    evaluated(tmp_path / "whole", save_every=3).run()

    def die(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "halves", save_every=3, on_step=die).run()
    assert [at for at, _ in list_checkpoints(tmp_path / "halves")] == [3]
    evaluated(tmp_path / "halves", save_every=3).run()
    assert log(tmp_path / "halves") == log(tmp_path / "whole")


def test_early_stopping_keeps_the_best_checkpoint(tmp_path):
    options = {"every": 1, "patience": 2, "steps": 9, "save_every": 1, "keep_last": 1}
    values = [0.9, 0.5, 0.7, 0.6, 0.7, 0.8]  # the one before the first step does not count
    run = evaluated(tmp_path, evaluate=Listed(values), **options)
    assert run.run().step == 4 and run.evaluation.exhausted
    assert (run.evaluation.best, run.evaluation.best_step) == (0.7, 2)
    assert [at for at, _ in list_checkpoints(tmp_path)] == [2, 4]
    again = evaluated(tmp_path, evaluate=Listed([]), **options)
    assert again.run().step == 4 and again.evaluation.best_step == 2
    # A longer patience goes on, and a better step takes the place of the best.
    more = evaluated(tmp_path, evaluate=Listed([0.8, 0.1, 0.1]), **{**options, "patience": 3})
    more.config = more.config.__class__(**{**vars(more.config), "steps": 7})
    assert more.run().step == 7 and more.evaluation.best_step == 5
    assert [at for at, _ in list_checkpoints(tmp_path)] == [5, 7]


def test_the_best_step_is_saved_between_checkpoints(tmp_path):
    values = [0.0, 0.5, 0.4, 0.3]
    evaluated(tmp_path, evaluate=Listed(values), patience=9, save_every=5).run()
    assert [at for at, _ in list_checkpoints(tmp_path)] == [2, 5, 6]


@pytest.mark.parametrize("name", ["every", "patience"])
def test_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected a positive integer"):
        PeriodicEvaluation(Listed([]), **{name: 0})


def test_a_split_depends_on_the_ids_alone(tmp_path):
    named = [s._replace(id=f"clip {i}") for i, s in enumerate(samples(20, size=(1, 2, 2)))]
    dataset = write_dataset(tmp_path / "a", named)
    train, held_out = dataset.split(0.25)
    assert len(held_out) == 5 and set(train.ids()) | set(held_out.ids()) == set(dataset.ids())
    assert [held_out[i].id for i in range(5)] == held_out.ids() and len(dataset) == 20
    turned = write_dataset(tmp_path / "b", named[::-1]).split(0.25)[1]
    assert set(turned.ids()) == set(held_out.ids()) and turned.ids() != held_out.ids()
    grown = write_dataset(tmp_path / "c", [*named, named[0]._replace(id="new")]).split(0.25)[1]
    assert len(set(grown.ids()) & set(held_out.ids())) >= 4
    assert len(dataset.split(0.001)[1]) == 1
    sized = [*named[:3], *(s._replace(id=f"{s.id}b") for s in samples(3, size=(1, 4, 4)))]
    sized = [s._replace(id=f"{i}") for i, s in enumerate(sized)]
    for part in write_dataset(tmp_path / "d", sized).split(0.5):
        shapes = {i: bucket.shapes["latents"] for bucket in part.buckets for i in bucket.indices}
        assert shapes == {i: part[i].latents.shape for i in range(3)}
    with pytest.raises(ValueError, match="held_out is 0.99, expected a share that leaves some"):
        dataset.split(0.99)


def test_a_reward_is_evaluated_on_labels_and_on_pairs(tmp_path):
    root = make_world(tmp_path)
    reward = LatentRewardModel.load(root / "reward").train()
    for name, options in (("data", {"label": "motion_quality"}), ("pairs", {})):
        dataset = LatentDataset(root / name)
        evaluator = RewardEvaluator(dataset, timesteps=(201, 800), batch_size=3, **options)
        figures = evaluator(reward).figures
        expected = evaluator.metrics(evaluator.logits(reward))
        for key in ("accuracy", "loss"):
            values = [expected[t][key] for t in (201, 800)]
            assert [figures[f"{key}/t{t}"] for t in (201, 800)] == values
            assert figures[key] == pytest.approx(sum(values) / 2)
    assert reward.training
    with pytest.raises(ValueError, match="manifest.jsonl:1: label blur_quality is None"):
        RewardEvaluator(LatentDataset(root / "data"), label="blur_quality")


def test_a_label_may_have_any_name(tmp_path):
    named = [s._replace(labels={"sharp": i % 2} if i else {}) for i, s in enumerate(samples(4))]
    dataset = write_dataset(tmp_path / "d", named)
    assert labels_of(dataset, "sharp", 0) == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="manifest.jsonl:1: label sharp is None"):
        labels_of(dataset, "sharp", None)
    with pytest.raises(ValueError, match=r"label is 'shrp', expected .* which has \['sharp'\]"):
        labels_of(dataset, "shrp", 0)
