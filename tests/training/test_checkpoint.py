"""Atomic files, checkpoint folders, and rejected checkpoints."""

import copy
import errno
import json
import os
import random
import shutil
from unittest import mock

import pytest
import torch
from torch import nn

from prfl_fast.training.checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from prfl_fast.utils.io import (
    clean_temporaries,
    clean_temporaries_of,
    load_tensors,
    save_checkpoint_dir,
    save_tensors,
    write_atomic,
)

safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checkpoint(folder, step=3, model=None, **options):
    model = model or nn.Linear(3, 2)
    return save_checkpoint(folder, step, model, {"step": step, "x": torch.arange(4)}, **options)


@pytest.fixture
def old(tmp_path):
    (tmp_path / "a.json").write_text("old")
    return tmp_path / "a.json"


def test_write_atomic_replaces_the_file_and_keeps_the_suffix_last(tmp_path, old):
    with write_atomic(old) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".json"
        temporary.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new" and names(tmp_path) == ["a.json"]


def test_write_atomic_leaves_the_old_file_and_no_temporary_on_error(tmp_path, old):
    with pytest.raises(RuntimeError, match="mine"), write_atomic(old) as temporary:
        temporary.write_text("half")
        raise RuntimeError("mine")
    assert old.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_write_atomic_names_the_file_that_a_full_disk_refuses(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left on device: .*a.json"):
        with write_atomic(tmp_path / "a.json"):
            raise full
    assert list(tmp_path.iterdir()) == []


def test_write_atomic_needs_a_folder(tmp_path):
    with pytest.raises(OSError, match="nowhere"), write_atomic(tmp_path / "nowhere" / "a") as path:
        path.write_text("x")
    assert names(tmp_path) == []


def test_a_folder_is_whole_or_not_there(tmp_path):
    with save_checkpoint_dir(tmp_path / "a") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "f").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "sub" / "f").read_text() == "1"
    with pytest.raises(KeyError), save_checkpoint_dir(tmp_path / "a") as temporary:
        raise KeyError
    assert (tmp_path / "a" / "sub" / "f").read_text() == "1" and names(tmp_path) == ["a"]
    with save_checkpoint_dir(tmp_path / "a") as temporary:
        (temporary / "g").write_text("2")
    assert names(tmp_path / "a") == ["g"] and names(tmp_path) == ["a"]


def test_clean_temporaries_removes_only_ours(tmp_path):
    for name in ("step-00000001.tmp-99999912-0123abcd", "b.tmp-x", "log.jsonl"):
        (tmp_path / name).mkdir()
    (tmp_path / "log.tmp-99999907-89abcdef.jsonl").write_text("x")
    assert len(clean_temporaries(tmp_path)) == 2
    assert names(tmp_path) == ["b.tmp-x", "log.jsonl"]


def test_temporaries_of_one_file_are_removed_without_those_of_others(tmp_path):
    for name in ("out.tmp-99999912-0123abcd", "other.tmp-99999912-0123abcd"):
        (tmp_path / name).mkdir()
    clean_temporaries_of(tmp_path / "out")
    clean_temporaries_of(tmp_path / "nowhere" / "out")
    assert names(tmp_path) == ["other.tmp-99999912-0123abcd"]


def test_tensors_survive_views_ties_and_dtypes(tmp_path):
    base = torch.arange(6.0)
    tensors = {"a": base, "b": base, "c": base.view(2, 3).t(), "d": base[2:4]}
    tensors |= {"e": base.bfloat16(), "f": base[:0]}
    save_tensors(tensors, tmp_path / "t.safetensors")
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


def test_tensors_truncated_or_missing(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="t.safetensors: not a whole safetensors file"):
        load_tensors(path)
    with pytest.raises(FileNotFoundError, match="no.safetensors: no such file"):
        load_tensors(tmp_path / "no.safetensors")


def test_a_full_disk_is_an_oserror_and_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1)
    before = contents(tmp_path)
    no_space = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    failed = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    for owner, name, error, message in (
        (safetensors_torch, "save_file", no_space, "No space left"),
        (torch, "save", failed, "state.pt: cannot be written"),
    ):
        with monkeypatch.context() as patched, pytest.raises(OSError, match=message):
            patched.setattr(owner, name, mock.Mock(side_effect=error))
            checkpoint(tmp_path, 2)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_real_enospc_is_an_oserror(tmp_path):
    with pytest.raises(OSError), write_atomic(tmp_path / "a") as temporary:
        temporary.write_text("x")
        with open("/dev/full", "w") as full:
            full.write("x" * 100_000)
    assert names(tmp_path) == []


def test_checkpoint_round_trip_and_keep_last(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    ema = {"weight": torch.randn(2, 3)}
    for step in (1, 2, 30):
        checkpoint(tmp_path, step, source, ema=ema, settings={"betas": (0.9, 0.99)}, keep_last=2)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [2, 30]
    path = latest_checkpoint(tmp_path)
    state, averaged = load_checkpoint(path, target, settings={"betas": (0.9, 0.99)})
    assert state["step"] == 30 and torch.equal(state["x"], torch.arange(4))
    assert torch.equal(averaged["weight"], ema["weight"])
    assert torch.equal(target.weight, source.weight) and torch.equal(target.bias, source.bias)
    assert names(path) == ["checkpoint.json", "ema.safetensors", "model", "state.pt"]


def test_incomplete_folders_are_not_checkpoints(tmp_path):
    (tmp_path / "step-00000009.tmp-1-00000000").mkdir()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000007").write_text("a file")
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_only_plain_values_are_unpickled(tmp_path):
    path = checkpoint(tmp_path)

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch pwned",))

    torch.save({"step": Evil()}, path / "state.pt")
    content = json.loads((path / "checkpoint.json").read_text())
    content["files"]["state.pt"] = (path / "state.pt").stat().st_size
    content["format"] = "prfl_fast checkpoint 2"  # without digests
    del content["sha256"], content["digest"]
    (path / "checkpoint.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="state.pt: cannot be read"):
        load_checkpoint(path, nn.Linear(3, 2))


def damage(name, keep):
    def cut(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * keep)])

    return cut


MANIFEST = "checkpoint.json"
FOREIGN = '{"format": "x", "files": {}}'
NO_CHECKPOINT = "not a checkpoint of this library"
DAMAGE = {
    "truncated weights": (damage("model/model.safetensors", 0.5), "safetensors is .*, expected .*"),
    "truncated state": (damage("state.pt", 0.9), "size of .*state.pt is .*, expected .* bytes"),
    "empty manifest": (damage("checkpoint.json", 0), NO_CHECKPOINT),
    "missing weights": (lambda p: shutil.rmtree(p / "model"), "model.safetensors is None"),
    "missing manifest": (lambda p: (p / "checkpoint.json").unlink(), NO_CHECKPOINT),
    "foreign format": (lambda p: (p / MANIFEST).write_text(FOREIGN), "format of .* is 'x'"),
    "deep json": (lambda p: (p / MANIFEST).write_text("[" * 99_999), NO_CHECKPOINT),
    "foreign json": (lambda p: (p / MANIFEST).write_text("[1]"), NO_CHECKPOINT),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_refused_and_change_nothing(tmp_path, case):
    path = checkpoint(tmp_path)
    DAMAGE[case][0](path)
    model = nn.Linear(3, 2)
    weight = model.weight.detach().clone()
    with pytest.raises(ValueError, match=DAMAGE[case][1]):
        load_checkpoint(path, model)
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 4), r"weight float32\[2, 3\], expected float32\[4, 3\]"),
        (nn.Linear(3, 2, bias=False), r"1 unexpected \(bias float32"),
        (nn.Sequential(nn.Linear(3, 2)), r"2 missing \(0.weight .*; 0.bias .*\), 2 unex"),
        (nn.Linear(3, 2).double(), "expected float64"),
    ],
)
def test_checkpoints_of_another_model_are_refused(tmp_path, model, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_checkpoint(checkpoint(tmp_path), model)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_other_settings_are_refused_by_name(tmp_path):
    path = checkpoint(tmp_path, settings={"learning_rate": 1e-3, "seed": 0})
    with pytest.raises(ValueError, match="made with learning_rate = 0.001, this run has 0.01"):
        load_checkpoint(path, nn.Linear(3, 2), settings={"learning_rate": 1e-2, "seed": 0})


def test_random_state_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(3)
    torch.save(random_state(generator), tmp_path / "r.pt")

    def draw():
        draws = torch.rand(3), torch.rand(3, generator=generator)
        return random.random(), *(x for values in draws for x in values.tolist())

    drawn = draw()
    restore_random_state(torch.load(tmp_path / "r.pt", weights_only=True), generator)
    assert draw() == drawn


def test_every_flipped_bit_is_refused_by_name(tmp_path):
    path = checkpoint(tmp_path, ema={"weight": torch.randn(2, 3)})
    model, draws = nn.Linear(3, 2), random.Random(0)
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for _ in range(25):
            data = bytearray(whole)
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
            file.write_bytes(data)
            with pytest.raises(ValueError, match=file.name.replace(".", r"\.")):
                load_checkpoint(path, model)
        file.write_bytes(whole)
    load_checkpoint(path, model)


def test_a_checkpoint_of_another_step_is_refused(tmp_path):
    path = checkpoint(tmp_path, 3).rename(tmp_path / "step-00000004")
    with pytest.raises(ValueError, match="step in .*checkpoint.json is 3, expected 4"):
        load_checkpoint(path, nn.Linear(3, 2))


def test_checkpoints_without_digests_are_read_with_a_note(tmp_path, caplog):
    path = checkpoint(tmp_path)
    content = json.loads((path / "checkpoint.json").read_text())
    content = {name: content[name] for name in ("step", "settings", "files")}
    content["format"] = "prfl_fast checkpoint 2"
    (path / "checkpoint.json").write_text(json.dumps(content))
    assert load_checkpoint(path, nn.Linear(3, 2), settings={"new": 1})[0]["step"] == 3
    assert "without digests: damage goes unnoticed" in caplog.text
    assert "it does not note new, which may differ now" in caplog.text


def test_last_good_skips_damaged_checkpoints(tmp_path, caplog):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    damage("state.pt", 0.5)(tmp_path / "step-00000003")
    assert find_checkpoint(tmp_path, "last-good") == tmp_path / "step-00000002"
    assert "step-00000003/state.pt" in caplog.text
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "step-00000003"
    assert find_checkpoint(tmp_path / "new", "last-good") is None
    checkpoint(tmp_path, 2, keep_last=1)  # the damaged later one does not count
    assert (tmp_path / "final").resolve() == tmp_path / "step-00000002" / "model"
    assert names(tmp_path) == ["final", "step-00000002", "step-00000003"]


def test_changed_inputs_are_refused_or_accepted(tmp_path, caplog):
    path = checkpoint(tmp_path, inputs={"data: number of samples": 4})
    model, inputs = nn.Linear(3, 2), {"data: number of samples": 3}
    with pytest.raises(ValueError, match="began with data: number of samples = 4, now it is 3"):
        load_checkpoint(path, model, inputs=inputs)
    load_checkpoint(path, model, inputs=inputs, accept_inputs=True)
    assert "going on as asked" in caplog.text
