"""Checkpoints of sharded weights: read with any sharding, and complete or absent."""

import copy
import importlib
import os
import signal
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from prfl_world import SHAPE, normal, with_lora
from ranks import run_ranks
from sharded_world import all_full, full
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from wan import tiny_wan

from prfl_fast.memory.optimizers import make_optimizer
from prfl_fast.parallel import OtherRankError, ParallelConfig, make_mesh, shard
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.parallel.sharding import shard_mesh
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.training.checkpoint import list_checkpoints, read_checkpoint
from prfl_fast.training.lora import merge_lora
from prfl_fast.training.model_files import save_reward
from prfl_fast.training.oom import OutOfMemoryError
from prfl_fast.training.sharded_checkpoint import (
    load_optimizer,
    plan_parts,
    read_parts,
    split_optimizer,
)
from prfl_fast.utils.io import digest_of, load_tensors
from prfl_fast.utils.sharded import local_part

PARTS, WHOLE = "step-00000002", "step-00000003"
# Shards of each number of ranks; 2 of 4 are two copies, 1 leaves weights whole.
FEW, MANY = {1: (None,), 2: (2,)}, {1: (None,), 2: (2, 1), 4: (4, 2)}


class Fit:
    """Fit noise with an output of 0, whose gradient reaches all parameters."""

    def __init__(self, model):
        self.model = model

    def fill_device(self):
        """Let the next backward run out of memory."""

        def fail(gradient):
            hook.remove()
            raise torch.OutOfMemoryError("injected")

        def at_output(block, inputs, output):
            output.register_hook(fail)

        hook = self.model.blocks[0].register_forward_hook(at_output)

    def __call__(self, draw, generator, loss_scale):
        x = torch.randn(SHAPE, generator=generator).double()
        text, time = normal(3, (SHAPE[0], 3, 12)), torch.full((SHAPE[0],), 500.0)
        found = self.model(x, time, text, return_dict=False)[0]
        loss = found.square().mean()
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}


def make(shards=None, lora=False, settings=(), **options):
    torch.manual_seed(3)
    model = tiny_wan(seed=0, layers=1, text_dim=12, ffn_dim=64).double()
    model = with_lora(model) if lora else model
    mesh = None if shards is None else make_mesh(ParallelConfig(shard=shards))
    if mesh is not None:
        shard(model, mesh)
    settings = {"steps": 3, "save_every": 2, **dict(settings)}
    config = TrainConfig(learning_rate=1e-3, ema_decay=0.5, **settings)
    return Trainer(model, {"fit": Fit(model)}, config, mesh=mesh, **options)


def snapshot(trainer):
    """Return the whole tensors of a run: weights, averages and states of the optimizer."""
    found = {f"weight {n}": p for n, p in trainer.parameters.items()}
    found |= {f"average {n}": t for n, t in trainer.ema.items()}
    for number, p in enumerate(trainer.parameters.values()):
        found |= {f"{n} {number}": t for n, t in trainer.optimizer.state[p].items()}
    return {name: tensor.numpy() for name, tensor in all_full(found).items()}


def train(folder, shards, lora, resume="auto", full_once=False):
    """Train to step 3; return what was at steps 2 and 3, by checkpoint."""
    found = {}

    def note(record):
        found[f"step-{record['step']:08d}"] = snapshot(trainer)

    trainer = make(shards, lora, folder=folder, resume=resume, on_step=note)
    if trainer.result.step == 0:
        trainer.generator.manual_seed(5)  # all ranks have the samples of one process
    if full_once:
        trainer.objectives["fit"].fill_device()
        with pytest.raises(OutOfMemoryError, match="backward of micro-batch 1") as caught:
            trainer.run()
        own = sum(local_part(t).nbytes for t in trainer.ema.values()) / 2**20
        assert f", average {own:.2f} MiB" in str(caught.value)
    trainer.run()
    return found


def differences(ours, theirs):
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not np.array_equal(ours[name], theirs[name])]


def on(ranks, layouts, function):
    """Return the result of rank 0 for each layout of so many ranks."""
    call = lambda: {shards: function(shards) for shards in layouts}  # noqa: E731
    return call() if ranks == 1 else run_ranks(ranks, call)[0]


@pytest.mark.parametrize(
    ("layouts", "lora"),
    [(FEW, True), *(pytest.param(MANY, lora, marks=pytest.mark.slow) for lora in (False, True))],
)
def test_read_with_any_sharding_and_continued_bit_for_bit(layouts, lora, tmp_path):
    saved, origins = {}, {}
    for ranks, each in layouts.items():
        folders = {shards: tmp_path / f"{ranks}-{shards}" for shards in each}
        results = on(ranks, each, lambda s: train(folders[s], s, lora))  # noqa: B023
        for shards, found in results.items():
            saved[folders[shards]] = found
        origins[ranks] = folders

    def read(shards):
        bad = []
        for path, found in saved.items():
            for name in (PARTS, WHOLE):
                here = snapshot(make(shards, lora, resume=path / name))
                bad += [(path.name, name, n) for n in differences(here, found[name])]
        return bad

    for ranks, each in layouts.items():

        def resumed(shards):
            origin = origins[ranks][shards]  # noqa: B023
            ended = train(None, shards, lora, resume=origin / PARTS, full_once=True)
            return read(shards) + differences(ended[WHOLE], saved[origin][WHOLE])

        assert on(ranks, each, resumed) == dict.fromkeys(each, [])
    for found in saved.values():
        for name, wanted in saved[tmp_path / "1-None"][WHOLE].items():
            assert np.abs(found[WHOLE][name] - wanted).max() <= 1e-10, name
    # Parts alone until the end, which has the files of one process.
    names = lambda path: {p.relative_to(path).as_posix() for p in path.rglob("*")}  # noqa: E731
    for path in saved:
        assert names(path / "final") == names(tmp_path / "1-None" / "final")
        split = path.name not in ("1-None", "2-1")
        assert (path / WHOLE / "sharded").is_dir() == (path / PARTS / "sharded").is_dir() == split
        assert (path / PARTS / "model").is_dir() == (lora or not split)
        one = make(lora=lora, folder=tmp_path / f"{path.name}-one", resume=path / WHOLE).save()
        for name in (*names(path / "final"), "../ema.safetensors"):
            ours, theirs = path / WHOLE / "model" / name, one / "model" / name
            if name.endswith("safetensors"):
                (ours, theirs), both = map(load_tensors, (ours, theirs)), ours.name
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[n], theirs[n]) for n in ours), both
            elif name == "config.json":
                assert ours.read_text() == theirs.read_text()


class Once:
    """Raise an error the first time on one rank; call the function otherwise."""

    def __init__(self, function, rank):
        self.function, self.left = function, torch.distributed.get_rank() == rank

    def __call__(self, *args, **options):
        if self.left:
            self.left = False
            raise OSError(28, "No space left on device")
        return self.function(*args, **options)


@pytest.mark.cases(1)
@pytest.mark.parametrize("lora", [False, True])
def test_an_error_of_one_rank_leaves_nothing_and_the_next_save_works(lora, tmp_path):
    places = [
        ("prfl_fast.training.sharded_checkpoint.digest_of", 1),
        ("safetensors.torch.save", 1),  # DCP's writer
        ("prfl_fast.training.sharded_checkpoint.write_tensors", 0),
        ("prfl_fast.training.checkpoint.file_digests", 0),
    ]

    def failing():
        trainer, found = make(2, lora, folder=tmp_path / "run"), []
        named = f"{tmp_path}/run/step-.*: cannot be written: .*No space left"
        trainer._step(None)
        for place, rank in places:
            with pytest.MonkeyPatch.context() as patch:
                module, _, name = place.rpartition(".")
                text = named if rank else "No space left"  # rank 0 alone reports its own errors
                patch.setattr(place, Once(getattr(importlib.import_module(module), name), rank))
                with pytest.raises((OSError, OtherRankError), match=text):
                    trainer.save()
            torch.distributed.barrier()
            found.append(sorted(p.name for p in (tmp_path / "run").glob("*")))
            torch.distributed.barrier()
        trainer.save()
        return found

    folders, _ = run_ranks(2, failing)
    assert all(names in ([], ["in-use.lock"], [".lock"]) for names in folders), folders
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [1]
    read_checkpoint(tmp_path / "run" / "step-00000001")


DIGEST = "prfl_fast.training.sharded_checkpoint.digest_of"  # at the end of a rank's writing


def save_while_training(folder, lora):
    """Save step 3 until step 4 is over; SIGTERM on rank 1 after step 5.

    Return the checkpoints seen after each step, and the tensors of steps 3 and 6.
    """
    seen, tensors, may_end = {}, {}, threading.Event()

    def held(path):
        assert may_end.wait(60)
        return digest_of(path)

    def note(record):
        seen[record["step"]] = [step for step, _ in list_checkpoints(folder)]
        if record["step"] % 3 == 0:
            tensors[record["step"]] = snapshot(trainer)
        if record["step"] == 4:
            may_end.set()
            trainer._saving.written.result(60)
        if record["step"] == 5 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        torch.distributed.barrier()

    settings = {"steps": 9, "save_every": 3, "save_async": True, "keep_last": 0}
    trainer = make(2, lora, settings, folder=folder, on_step=note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DIGEST, held)
        trainer.run()
    seen["end"] = [step for step, _ in list_checkpoints(folder)]
    assert trainer.result.stopped_by == signal.SIGTERM
    return seen, tensors


def fail_while_saving(folder, lora):
    """Let rank 1 fail to write step 1, and the run at step 3; return what each and the end left."""
    found, barrier = [], torch.distributed.barrier

    def note(record):
        if record["step"] == 3:
            trainer._saving.written.result(60)
            barrier()
            raise RuntimeError("of the user")

    def names():
        barrier()
        found.append(sorted(p.name for p in folder.iterdir() if p.name.startswith("step")))
        barrier()

    settings = {"steps": 4, "save_every": 1, "save_async": True, "keep_last": 1}
    trainer = make(2, lora, settings, folder=folder, on_step=note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save", Once(safetensors.torch.save, 1))
        with pytest.raises((OSError, OtherRankError), match="sharded: cannot .* No space left"):
            trainer.run()
    names()
    with pytest.raises(RuntimeError, match="of the user"):
        trainer.run()
    names()
    trainer.run()
    names()
    return found


@pytest.mark.cases(1)
@pytest.mark.parametrize("lora", [False, True])
def test_a_save_in_the_background_has_the_bits_of_its_step(lora, tmp_path):
    with pytest.raises(ValueError, match="save_async is True, expected False, as the weights are"):
        make(lora=lora, settings={"save_async": True})

    def runs():
        seen, tensors = save_while_training(tmp_path / "run", lora)
        resumed = make(2, lora, {"steps": 6}, resume=tmp_path / "run" / "step-00000003")
        bad = differences(snapshot(resumed), tensors[resumed.result.step])
        resumed.run()
        bad += differences(snapshot(resumed), tensors[6])
        return seen, bad, fail_while_saving(tmp_path / "failing", lora)

    seen = {1: [], 2: [], 3: [], 4: [], 5: [3], 6: [3], "end": [3, 6]}
    failing = [[], [], ["step-00000004"]]
    assert run_ranks(2, runs) == [(seen, [], failing)] * 2
    ends = [tmp_path / "run" / "step-00000006", tmp_path / "failing" / "step-00000004"]
    for path in (tmp_path / "run" / "step-00000003", *ends):
        assert read_checkpoint(path)["files"].keys() > {"state.pt"}
        assert (path / "sharded").is_dir() and (path / "model").is_dir() == (lora or path in ends)


def test_a_damaged_part_is_found_and_the_last_good_one_is_read(tmp_path):
    def damaged():
        train(tmp_path / "run", 2, True)
        path = next((tmp_path / "run" / WHOLE / "sharded").glob("shard-00002-*"))
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            content = bytearray(path.read_bytes())
            content[-5] ^= 1
            path.write_bytes(content)
        torch.distributed.barrier()
        with pytest.raises((ValueError, OtherRankError), match=f"SHA-256 of .*{path.name}"):
            make(2, True, folder=tmp_path / "run")
        return make(2, True, folder=tmp_path / "run", resume="last-good").result.step

    assert run_ranks(2, damaged) == [2, 2]
    assert make(lora=True, resume=tmp_path / "run" / PARTS).result.step == 2


def test_uneven_parts_on_other_meshes(tmp_path):
    whole = {"model.a": normal(1, (5, 3)), "model.b": normal(2, (1, 7)), "ema.c": normal(3, ())}

    def split(shards, zero):
        mesh = shard_mesh(make_mesh(ParallelConfig(shard=shards)))
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        return {
            name: distribute_tensor(tensor * (not zero), mesh, placements) if tensor.ndim else
            tensor * (not zero)
            for name, tensor in whole.items()
        }  # fmt: skip

    def save():
        for shards in (4, 2):
            ranks = Ranks(make_mesh(ParallelConfig(shard=shards)))
            plan_parts(tmp_path / f"{shards}", split(shards, False), {}, ranks)()

    def read(*sizes):
        for shards in sizes:
            ranks = Ranks(make_mesh(ParallelConfig(shard=shards)))
            for path in (tmp_path / "4", tmp_path / "2"):
                targets = split(shards, True)
                read_parts(path, targets, ranks)
                assert all(torch.equal(full(t), whole[n]) for n, t in targets.items())
        return True

    def both():
        save()
        torch.distributed.barrier()
        return read(4, 2)

    assert all(run_ranks(4, both)) and all(run_ranks(2, read, 2))
    targets = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    read_parts(tmp_path / "4", targets, Ranks())
    assert all(torch.equal(t, whole[n]) for n, t in targets.items())
    with pytest.raises(ValueError, match="1 of another shape or dtype .model.a"):
        read_parts(tmp_path / "4", {**targets, "model.a": torch.zeros(5, 4).double()}, Ranks())


def test_states_of_8_bits_are_read_on_the_same_mesh_only(tmp_path):
    pytest.importorskip("torchao")

    def optimizer(mesh=None):
        torch.manual_seed(0)
        weights = [torch.randn(129, 64), torch.randn(64), torch.randn(128, 64)]
        if mesh is not None:
            weights = [distribute_tensor(w, shard_mesh(mesh), [Shard(0)]) for w in weights]
        parameters = [torch.nn.Parameter(w) for w in weights]
        return parameters, make_optimizer("adamw8bit", parameters, learning_rate=0.1)

    def step(parameters, optimizer):
        for p in parameters:
            p.grad = p.detach() * 0.5
        optimizer.step()

    def save_and_read():
        mesh = make_mesh(ParallelConfig(shard=2))
        ranks, found = Ranks(mesh), optimizer(mesh)
        step(*found)
        rest, parts, quantized = split_optimizer(found[1].state_dict(), ranks)
        assert len(quantized) == 4 and len(parts) == 2
        write = plan_parts(tmp_path / "sharded", parts, quantized, ranks, copied=True)
        rest, other = copy.deepcopy(rest), optimizer(mesh)
        with torch.no_grad():
            for p, q in zip(other[0], found[0], strict=True):
                local_part(p).copy_(local_part(q))
        step(*found)  # which changes no bit of the copies
        write()
        ranks.agree()
        load_optimizer(other[1], rest, tmp_path, ranks)
        step(*other)
        pairs = zip(other[0], found[0], strict=True)
        assert all(torch.equal(local_part(p), local_part(q)) for p, q in pairs)
        whole = optimizer()
        step(*whole)
        with pytest.raises(ValueError, match="of a whole weight.*Resume with shard: 1"):
            load_optimizer(other[1], whole[1].state_dict(), tmp_path / "none", ranks)
        return rest

    rest, _ = run_ranks(2, save_and_read)
    with pytest.raises(ValueError, match="ranks with 8-bit .* 2, expected 1, .*on the mesh"):
        load_optimizer(optimizer()[1], rest, tmp_path, Ranks())


@pytest.mark.cases(1)
@pytest.mark.parametrize("lora", [False, True])
def test_a_sharded_reward_model_is_saved_as_that_of_one_process(lora, tmp_path):
    def reward(mesh=None):
        torch.manual_seed(3)
        model = tiny_wan(seed=0, layers=1, text_dim=12, ffn_dim=64)
        reward = LatentRewardModel.from_backbone(model, 1, num_heads=2)
        if lora:
            torch.manual_seed(4)
            with_lora(reward.backbone).float()
        if mesh is not None:
            shard(reward, mesh)
        if lora:
            merge_lora(reward.backbone)
        return reward

    def save():
        mesh = make_mesh(ParallelConfig(shard=2))
        save_reward(reward(mesh), tmp_path / "two", Ranks(mesh))

    reward().save(tmp_path / "one")
    run_ranks(2, save)
    ours, theirs = (LatentRewardModel.load(tmp_path / n).state_dict() for n in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[n], theirs[n], rtol=1e-6, atol=1e-7) for n in ours)
