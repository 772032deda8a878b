"""Sharded models beside the plans: communication, errors, optimizers, quantized bases, loading."""

import os
import re
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from prfl_world import make_wan, normal
from ranks import run_ranks
from sharded_world import SAMPLES, Case, all_full, build, conditions, full, gather
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from wan import inputs, mixed_layout, tiny_wan

import prfl_fast
from prfl_fast import LatentRewardModel
from prfl_fast.feedback.gradient_plan import GradientPlan as Plan
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.optimizers import clip_gradients, gradient_norm, make_optimizer
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.memory.quantized import quantize
from prfl_fast.models.compiled_blocks import compile_blocks
from prfl_fast.models.experts import Experts
from prfl_fast.models.fp8_blocks import use_fp8_linears
from prfl_fast.models.loading import load_transformer
from prfl_fast.models.registry import find_adapter, patch
from prfl_fast.models.velocity import ModelCall
from prfl_fast.parallel import (
    ParallelConfig,
    average_gradients,
    broadcast_weights,
    load_sharded,
    make_mesh,
    shard,
)
from prfl_fast.parallel import loading as sharded_loading
from prfl_fast.parallel.sharding import shard_mesh
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.training.config import TrainConfig
from prfl_fast.training.lora import add_lora
from prfl_fast.training.updates import Updater

pytest.importorskip("diffusers")
pytest.importorskip("peft")


def own_samples(mesh):
    share = SAMPLES if mesh is None else SAMPLES // dist.get_world_size()
    start = 0 if mesh is None else dist.get_rank() * share
    return slice(start, start + share)


def feedback(model, reward, plan=None, **options):
    return PRFL(model, reward, FlowUniPC(), plan, num_inference_steps=5, **options)


def batch(seed, mesh):
    samples = own_samples(mesh)
    return normal(seed, (SAMPLES, 16, 3, 4, 4))[samples], conditions(Case(""), samples)


def gradients(model):
    return all_full({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


# One function per behavior, run by one process (mesh None) and by ranks.
def averages_and_clips(mesh):
    """Update a model that recomputes blocks and chunks of tokens."""
    model, reward = build(Case("", mode="full"), mesh)
    find_adapter(model).chunk_feed_forward(model, 5)
    config = {"learning_rate": 1e-2, "max_grad_norm": 1e-3, "ema_decay": 0.9}
    updater = Updater(model, TrainConfig(steps=3, optimizer="adamw", **config))
    step, found = feedback(model, reward), {}
    for update in range(2):
        updater.set_rates(update + 1)
        step(*batch(update, mesh), indices=(2,))
        found[f"norm {update}"] = gradient_norm(updater.gradients())
        updater.apply(found[f"norm {update}"], True)
    averages = {f"average {name}": value for name, value in updater.ema.items()}
    return found | all_full(averages | updater.parameters)


def trains_a_reward(mesh):
    reward = LatentRewardModel.from_backbone(patch(make_wan()), 2, num_heads=2).double()
    if mesh is not None:
        shard(reward, mesh)
    x, given = batch(3, mesh)
    timestep = torch.full((len(x),), 500.0)
    for call in (reward, reward.logits):
        call(x, timestep, given).square().mean().backward()
    return gradients(reward)


def survives_errors(mesh, once=True):
    """Drop all gradients after an error between or in backwards, and after a NaN reward."""
    case = Case("", options={"reduce_once": once})
    model, reward = build(case, mesh)
    calls = []

    def failing(x, timestep, given):
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyError("injected")
        return reward(x, timestep, given) * (float("nan") if len(calls) == 4 else 1)

    step = feedback(model, failing, Plan.prfl(2))
    arguments = batch(3, mesh)
    with pytest.raises(KeyError, match="injected"):
        step(*arguments, indices=(0, 1))
    model.zero_grad()
    broken = model.condition_embedder.register_full_backward_hook(calls.index)  # raises
    with pytest.raises(TypeError, match="index"):
        feedback(model, reward, Plan.prfl(2))(*arguments, indices=(0, 1))
    broken.remove()
    model.zero_grad()
    assert not step(*arguments, indices=(0, 1)).finite and not gradients(model)
    assert step(*arguments, indices=(0, 1)).finite
    return gradients(model)


def survives_errors_between_reductions(mesh):
    return survives_errors(mesh, once=False)


def calls_after_errors(mesh):
    """Call the model itself after exceptions in a forward and in a backward."""
    model, _ = build(Case(""), mesh)
    x, given = batch(3, mesh)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)

    def loss():
        return model(x, torch.full((len(x),), 500.0), **given).sample.square().mean()

    def fail(*_):
        raise KeyError("injected")

    def at_output(block, inputs, output):
        output.register_hook(fail)

    broken = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        loss()
    broken.remove()
    broken = model.blocks[0].register_forward_hook(at_output)
    with pytest.raises(KeyError):
        loss().backward()
    broken.remove()
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return gradients(model)


def samples_before_an_update(mesh):
    """Run a forward without gradient on weights that stay from a forward to its backward."""
    model, reward = build(Case("", options={"reshard_after_forward": False}), mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", trained, learning_rate=1e-2)
    step, (x, given) = feedback(model, reward), batch(3, mesh)
    step(x, given, indices=(2,))
    rollout(model, x, given, FlowUniPC(), 1)
    optimizer.step()
    optimizer.zero_grad()
    step(x, given, indices=(2,))
    return gradients(model)


def trains_noise(mesh):
    model, reward = build(Case(""), mesh)
    gradient = feedback(model, reward, Plan.reno())(*batch(3, mesh)).gradient
    assert not gradients(model)
    if mesh is None:
        return {"noise": gradient}
    return {"noise": torch.cat(list(gather(gradient))) / dist.get_world_size()}


def adapters_after_sharding(mesh):
    model, reward = build(Case(""), mesh)
    torch.manual_seed(0 if mesh is None else dist.get_rank())
    add_lora(model, 3)
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    if mesh is not None:
        broadcast_weights(trained)
        assert all((gather(p.detach()) == p).all() for p in trained)
    for p in trained:
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    feedback(model, reward, Plan.draft(2))(*batch(3, mesh))
    if mesh is not None:
        average_gradients(trained, mesh)
    return gradients(model)


def recomputes_chunks(mesh):
    model, reward = build(Case("", mode="full"), mesh)
    find_adapter(model).chunk_feed_forward(model, 5)
    feedback(model, reward, Plan.draft(2))(*batch(3, mesh))
    return gradients(model)


def compiles_blocks(mesh):
    model, reward = build(Case(""), mesh)
    compile_blocks(model, "on", backend="aot_eager")
    feedback(model, reward, Plan.draft(2))(*batch(3, mesh))
    return gradients(model)


def sharded_by_hand(mesh):
    """Call fully_shard as other trainers do."""
    model, reward = build(Case(""), None)
    if mesh is not None:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    step = feedback(model, reward, Plan.prfl(2))
    step(*batch(3, mesh), indices=(1, 3))
    assert not any("call the model as it is" in note for note in step.engine.notes)
    return gradients(model)


BEHAVIORS = (averages_and_clips, trains_a_reward, survives_errors, trains_noise)
BEHAVIORS += (samples_before_an_update, calls_after_errors)
BEHAVIORS += (adapters_after_sharding, sharded_by_hand)
LONG = (compiles_blocks, recomputes_chunks, survives_errors_between_reductions)


@pytest.mark.parametrize(
    "behaviors", [BEHAVIORS, pytest.param(LONG, marks=pytest.mark.slow)], ids=len
)
def test_behaviors_equal_one_process(behaviors):
    expected = {behavior: behavior(None) for behavior in behaviors}

    def errors():
        found, mesh = {}, make_mesh()
        for behavior in behaviors:
            ours, theirs = behavior(mesh), expected[behavior]
            assert ours.keys() == theirs.keys(), behavior
            scale = max(value.abs().max() for value in theirs.values())
            for name, value in theirs.items():
                size = max(value.abs().max(), 1e-6 * scale)
                found[behavior.__name__, name] = float((ours[name] - value).abs().max() / size)
        return found

    found = run_ranks(2, errors)[0]
    worst = max(found, key=found.get)
    print(worst, found[worst])
    assert found[worst] <= 1e-10


# Communication.
class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def test_collectives_of_a_call():
    """Two blocks and the rest are three groups, each gathered once per forward and backward."""

    def counts(model, plan, indices):
        model.zero_grad()
        step = feedback(model, lambda x, t, c: x.square().mean((1, 2, 3, 4)), plan)
        with Collectives() as found:
            step(*batch(1, 1), indices=indices)
        assert all(hasattr(p, "to_local") for p in model.parameters())  # nothing stays gathered
        return found.counts["_allgather_base_"], found.counts["_reduce_scatter_base_"]

    points = (Plan.prfl(2), (1, 3))

    def found():
        names = {"gathered": "keep_gathered", "once": "reduce_once"}
        options = {"plain": {}, "kept": {"reshard_after_forward": False}}
        options |= {name: {option: True} for name, option in names.items()}
        mesh = make_mesh()
        models = {name: build(Case("", options=o), mesh)[0] for name, o in options.items()}
        return {
            **{name: counts(model, *points) for name, model in models.items()},
            "chain": counts(models["plain"], Plan.draft(3), None),
            "chain once": counts(models["once"], Plan.draft(3), None),
        }

    got = run_ranks(2, found)[0]
    # Two rollouts of one step, which gather for the caches and for the step.
    assert got["plain"] == (2 * 6 + 2 * 6, 6)
    assert got["gathered"] == (3 * 2 + 2 * 6, 6)
    assert got["once"] == (got["plain"][0], 3)
    # Blocks stay from a forward with gradient to its backward.
    assert got["kept"] == (2 * 6 + 2 * 4, 6)
    # A chain of three steps has three backwards.
    assert got["chain"][1] == 9 and got["chain once"] == (got["chain"][0], 3)


# Optimizers.
DTYPES = {torch.float64: ("adamw", "adamw-cpu")}
DTYPES |= {d: ("adamw", "adamw-cpu", "adamw-sr", "adamw8bit") for d in (torch.float32,)}
DTYPES |= {torch.bfloat16: DTYPES[torch.float32]}


def optimized(kind, dtype, parts=None):
    """Return weights after three updates of sharded and whole layers, with the norms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 3), nn.Linear(3, 5)).to(dtype)
    shapes = [p.shape for p in model.parameters()]
    if parts is not None:
        fully_shard(model[0], mesh=parts)
        fully_shard(model[1], mesh=parts)
    weights = list(model.parameters())
    optimizer, norms = make_optimizer(kind, weights, learning_rate=1e-2), []
    for update in range(3):
        generator = torch.Generator().manual_seed(update)
        for p, shape in zip(weights, shapes, strict=True):
            gradient = torch.randn(shape, generator=generator).to(dtype)
            sharded = hasattr(p, "device_mesh")
            p.grad = (
                distribute_tensor(gradient, p.device_mesh, p.placements) if sharded else gradient
            )
        norms.append(gradient_norm([p.grad for p in weights]))
        clip_gradients(weights, 1.0, norms[-1])
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return [full(p).double() for p in weights], torch.stack(norms).double()


@pytest.mark.slow
def test_optimizers_of_sharded_and_whole_weights():
    pytest.importorskip("torchao")
    cases = [(kind, dtype) for dtype, kinds in DTYPES.items() for kind in kinds]
    expected = {case: optimized(*case) for case in cases}

    def check():
        parts = shard_mesh(make_mesh(ParallelConfig(shard=2)))
        for case in cases:
            weights, norms = optimized(*case, parts)
            torch.testing.assert_close(norms, expected[case][1], rtol=1e-5, atol=0)
            # Stochastic rounding draws other numbers than one process, and the same on all copies.
            rounding = 2**-7 if case[1] is torch.bfloat16 else 1e-6
            for ours, theirs in zip(weights, expected[case][0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
                assert (gather(ours) == ours).all(), case
        (weight,) = fully_shard(nn.Linear(4, 4, bias=False), mesh=parts).parameters()
        with pytest.raises(ValueError, match="expected another one for sharded weights"):
            make_optimizer("paged-adamw8bit", [weight], learning_rate=1.0)
        weight = fully_shard(nn.Linear(4, 4).bfloat16(), mesh=parts).weight
        with pytest.raises(ValueError, match="FSDP2 reduces gradients of bfloat16 weights"):
            make_optimizer("adamw", [weight], learning_rate=1.0, gradient_dtype="fp32")

    run_ranks(4, check)[0]


# Dtypes.
def narrow(kind, mesh=None):
    """Return gradients of a model in a narrow layout, and the names of its whole weights."""
    torch.manual_seed(0)
    model = tiny_wan(text_dim=16, ffn_dim=64, heads=2, head_dim=32)
    reward = LatentRewardModel.from_backbone(model, 1, num_heads=2).freeze()
    call, options = model, {}
    if kind == "mixed":
        mixed_layout(model)
    elif kind == "gathered in bf16":
        call, options = ModelCall(model, "bf16"), {"param_dtype": torch.bfloat16}
    elif kind == "fp8 linears":
        use_fp8_linears(model)
    elif kind != "fp32":
        quantize(model, kind)
        add_lora(model, 4)
        generator = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = torch.randn(p.shape, generator=generator).to(p.dtype)
    patch(model)
    if mesh is not None:
        shard(model, mesh, **options)
    x, text = normal(1, (SAMPLES, 16, 3, 4, 4), torch.float32), normal(2, (SAMPLES, 3, 16))
    samples = own_samples(mesh)
    given = {"encoder_hidden_states": text.float()[samples]}
    feedback(call, reward, Plan.draft(2))(x[samples], given)
    trained = [p for p in model.parameters() if p.requires_grad]
    if mesh is not None:
        average_gradients(trained, mesh)
    return gradients(model), {n for n, p in model.named_parameters() if not hasattr(p, "to_local")}


@pytest.mark.slow
def test_narrow_weights():
    pytest.importorskip("bitsandbytes")
    kinds = {"fp32": 1e-5, "mixed": 0.03, "gathered in bf16": 0.03, "fp8": 0.03, "nf4": 0.03}
    kinds["fp8 linears"] = 0.03
    expected = {kind: narrow(kind)[0] for kind in kinds}

    def errors():
        found, mesh = {}, make_mesh()
        for kind in kinds:
            ours, whole = narrow(kind, mesh)
            theirs = expected[kind]
            assert {n: g.dtype for n, g in ours.items()} == {n: g.dtype for n, g in theirs.items()}
            # The float32 parts of a narrow model stay whole, and nothing else does.
            wide = kind in ("mixed", "gathered in bf16")
            assert wide == bool(whole) == ("blocks.0.scale_shift_table" in whole), whole
            assert not any("to_q.weight" in name or "ffn" in name for name in whole), whole
            flat = [torch.cat([g[n].double().flatten() for n in theirs]) for g in (ours, theirs)]
            found[kind] = float((flat[0] - flat[1]).norm() / flat[1].norm())
        return found

    found = run_ranks(2, errors)[0]
    print(found)
    assert all(found[kind] <= limit for kind, limit in kinds.items())


# Refusals.
def test_what_cannot_be_sharded():
    def refused(model, message, *args):
        with pytest.raises(ValueError, match=message):
            shard(model, *(args or (make_mesh(),)))

    def check():
        model, _ = build(Case(""), make_mesh())
        refused(model, "a whole model")
        with pytest.raises(ValueError, match="DTensor"):
            apply_memory(model, MemoryConfig(stream_weights=1))
        model = make_wan()
        refused(nn.parallel.DistributedDataParallel(model), "shard takes the place of")
        apply_memory(model, MemoryConfig(stream_weights=1))
        refused(model, "weights wait in host memory")
        experts = Experts(make_wan(), make_wan(), 0.9)
        apply_memory(experts, MemoryConfig(), device="cpu")
        refused(experts, "take turns on the device")
        mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("rows",))
        refused(make_wan(), "one of make_mesh", mesh)
        one = make_mesh(ParallelConfig(shard=1))
        assert not any(hasattr(p, "to_local") for p in shard(make_wan(), one).parameters())

    run_ranks(2, check)[0]


# Loading.
def mapped_bytes(folder):
    """Return the bytes of the folder's mapped files that this process has touched."""
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = str(folder) in line
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mapped bytes from /proc")
def test_a_rank_reads_its_own_rows(tmp_path):
    pytest.importorskip("safetensors")
    model = tiny_wan(layers=3, heads=4, head_dim=128, text_dim=20)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    files = sum(os.path.getsize(file) for file in tmp_path.glob("*.safetensors"))
    x, timestep, given = inputs(batch=1)

    def check():
        read, read_wan, own_rows, kept = [], sharded_loading.read_wan, sharded_loading.own_rows, []

        def keep(path):
            kept.append(read_wan(path))
            return kept[-1]

        def count(*args):
            read.append(own_rows(*args))
            return read[-1]

        sharded_loading.read_wan, sharded_loading.own_rows = keep, count
        model = load_sharded(tmp_path, make_mesh(), torch.bfloat16, prepare=prfl_fast.patch)
        touched = mapped_bytes(tmp_path)
        found = all_full(model.state_dict())
        with torch.no_grad():
            velocity = find_adapter(model).velocity(model, x, timestep, given)
        if dist.get_rank() == 0:  # the others would compare the same tensors
            whole = prfl_fast.patch(load_transformer(tmp_path, torch.bfloat16))
            expected = whole.state_dict()
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
            with torch.no_grad():
                assert torch.equal(
                    velocity, find_adapter(whole).velocity(whole, x, timestep, given)
                )
        return sum(part.nbytes for part in read) / files, touched / files

    read, touched = run_ranks(4, check)[0]
    print("read", read, "touched", touched)
    # A fault of a mapped file brings in neighboring pages, much beside these small tensors.
    assert read < 0.3 and touched < 0.6
