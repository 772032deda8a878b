"""Logs of a run beside its own file."""

import sys
import types

import pytest
from runs import log, trainer

from prfl_fast.utils.optional import MissingExtraError


class FakeWandb(types.ModuleType):
    """Stand in for the package and record what a run logs."""

    def __init__(self):
        super().__init__("wandb")
        self.given, self.records, self.finished = [], [], 0

    def init(self, **options):
        self.given.append(options)
        return self

    def log(self, record, step):
        self.records.append((step, record))

    def finish(self):
        self.finished += 1


def test_a_run_is_one_run_of_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "films")
    for steps in (2, 4):
        trainer(folder=tmp_path, steps=steps, wandb=True).run()
    first, second = fake.given
    assert first == second and first["resume"] == "allow" and first["project"] == "films"
    assert (tmp_path / "wandb-id").read_text() == first["id"] and len(first["id"]) == 16
    assert fake.finished == 2 and [step for step, _ in fake.records] == [1, 2, 3, 4]
    for line, (_, record) in zip(log(tmp_path), fake.records, strict=True):
        assert {key: value for key, value in record.items() if key != "seconds"} == line


def test_a_run_goes_on_without_the_service(tmp_path, monkeypatch, caplog):
    fake = FakeWandb()
    fake.init = lambda **options: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", fake)
    plain, other = tmp_path / "plain", tmp_path / "wandb"
    trainer(folder=plain).run()
    trainer(folder=other, wandb=True).run()
    assert log(other) == log(plain)
    assert "run.wandb has no effect: " in caplog.text and caplog.text.count("\n") == 1


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_run_without_the_package_of_a_log_is_refused(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed: pip install 'prfl_"):
        trainer(folder=tmp_path / "out", **{package: True})
    assert not (tmp_path / "out").exists()
