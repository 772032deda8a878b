"""Checkpoints of sharded weights: read with any sharding, complete or absent, and never unpickled."""

import numpy as np
import pytest
import torch
from prfl_world import SHAPE, make_wan, normal, with_lora
from ranks import run_ranks
from sharded_world import full

from prfl_fast.parallel import ParallelConfig, make_mesh, shard
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.utils.io import load_tensors

PARTS, WHOLE = "step-00000002", "step-00000003"
# Shards of each number of ranks; 2 of 4 are two copies, 1 leaves weights whole.
LAYOUTS = {1: (None,), 2: (2, 1), 4: (4, 2)}


class Fit:
    """Fit noise with an output of 0, whose gradient reaches all parameters."""

    def __init__(self, model):
        self.model = model

    def __call__(self, draw, generator, loss_scale):
        x = torch.randn(SHAPE, generator=generator).double()
        text, time = normal(3, (SHAPE[0], 3, 12)), torch.full((SHAPE[0],), 500.0)
        found = self.model(x, time, text, return_dict=False)[0]
        loss = found.square().mean()
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}


def make(shards=None, lora=False, **options):
    torch.manual_seed(3)
    model = with_lora(make_wan()) if lora else make_wan()
    mesh = None if shards is None else make_mesh(ParallelConfig(shard=shards))
    if mesh is not None:
        shard(model, mesh)
    config = TrainConfig(3, learning_rate=1e-3, ema_decay=0.5, save_every=2)
    return Trainer(model, {"fit": Fit(model)}, config, mesh=mesh, **options)


def snapshot(trainer):
    """Return the whole tensors of a run: weights, averages and states of the optimizer."""
    found = {f"weight {n}": p for n, p in trainer.parameters.items()}
    found |= {f"average {n}": t for n, t in trainer.ema.items()}
    for number, p in enumerate(trainer.parameters.values()):
        found |= {f"{n} {number}": t for n, t in trainer.optimizer.state[p].items()}
    return {name: full(tensor).numpy() for name, tensor in found.items()}


def train(folder, shards, lora, resume="auto"):
    """Train to step 3; return what was at steps 2 and 3, by checkpoint."""
    found = {}

    def note(record):
        found[f"step-{record['step']:08d}"] = snapshot(trainer)

    trainer = make(shards, lora, folder=folder, resume=resume, on_step=note)
    trainer.run()
    return found


def differences(ours, theirs):
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not np.array_equal(ours[name], theirs[name])]


def on(ranks, function):
    """Return the result of rank 0 for each layout of so many ranks."""
    call = lambda: {shards: function(shards) for shards in LAYOUTS[ranks]}  # noqa: E731
    return call() if ranks == 1 else run_ranks(ranks, call)[0]


@pytest.mark.parametrize("lora", [False, True])
def test_read_with_any_sharding_and_continued_bit_for_bit(lora, tmp_path):
    saved = {}
    for ranks in LAYOUTS:
        folder = lambda shards: tmp_path / f"{ranks}-{shards}"  # noqa: B023, E731
        for shards, found in on(ranks, lambda s: train(folder(s), s, lora)).items():  # noqa: B023
            saved[folder(shards)] = found

    def read(shards):
        bad = []
        for path, found in saved.items():
            for name in (PARTS, WHOLE):
                here = snapshot(make(shards, lora, resume=path / name))
                bad += [(path.name, name, n) for n in differences(here, found[name])]
        return bad

    for ranks in LAYOUTS:
        assert on(ranks, read) == dict.fromkeys(LAYOUTS[ranks], [])

    def resumed(shards):
        origin = (
            tmp_path / f"{'1' if shards is None else torch.distributed.get_world_size()}-{shards}"
        )
        ended = train(None, shards, lora, resume=origin / PARTS)
        return differences(ended[WHOLE], saved[origin][WHOLE])

    for ranks in LAYOUTS:
        assert on(ranks, resumed) == dict.fromkeys(LAYOUTS[ranks], [])
    # Parts alone until the end, which has the files of one process.
    names = lambda path: {p.relative_to(path).as_posix() for p in path.rglob("*")}  # noqa: E731
    for path in saved:
        assert names(path / "final") == names(tmp_path / "1-None" / "final")
        split = path.name not in ("1-None", "2-1")
        assert (path / WHOLE / "sharded").is_dir() == (path / PARTS / "sharded").is_dir() == split
        assert (path / PARTS / "model").is_dir() == (lora or not split)
        # Files of one process with the same weights have the same content.
        one = make(lora=lora, folder=tmp_path / f"{path.name}-one", resume=path / WHOLE)
        whole = one.save()
        for name in (*names(path / "final"), "../ema.safetensors"):
            if name.endswith(".safetensors"):
                ours, theirs = (load_tensors(p / "model" / name) for p in (path / WHOLE, whole))
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[n], theirs[n]) for n in ours)
