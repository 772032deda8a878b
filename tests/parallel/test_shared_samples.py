"""One model call whose tokens several ranks share: values, gradients, what travels, errors."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from capabilities import any_other, diffusers_wan, official, relative, tiny_family
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from wan import float_means_double, inputs, mixed_layout, tiny_wan

from prfl_fast import LatentRewardModel
from prfl_fast.memory.checkpointing import activation_checkpointing
from prfl_fast.models import sequence
from prfl_fast.models.registry import find_adapter, patch, unpatch
from prfl_fast.models.sequence import check_heads, shards_of
from prfl_fast.parallel import ParallelConfig, average_gradients, make_mesh, shard_sequence
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.training.reward_losses import ce_loss
from prfl_fast.utils import collectives

pytest.importorskip("diffusers")

KINDS = ("t2v", "i2v", "flf", "per-token", "first-frame")
ODD = (3, 2, 6)  # 9 tokens


def shared_mesh():
    return make_mesh(ParallelConfig(sequence=dist.get_world_size()))


def both(kind="t2v", dtype=torch.float64, mesh=None, **options):
    """Return a patched model that runs whole, and the same model on all ranks."""
    whole = patch(tiny_wan(kind, **options).to(dtype))
    shared = copy.deepcopy(whole)
    return whole, shard_sequence(shared, shared_mesh() if mesh is None else mesh)


def given(kind, dtype=torch.float64, **options):
    x, timestep, conditions = inputs(kind, **options)
    return x.to(dtype), timestep.to(dtype), {k: v.to(dtype) for k, v in conditions.items()}


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gradients_of(loss, module, x, mesh=None):
    loss.backward()
    if mesh is not None:
        average_gradients(module.parameters(), mesh)
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    found["x"], x.grad = x.grad, None
    return found


def worst(found, expected):
    assert found.keys() == expected.keys()
    # A gradient that is zero in exact arithmetic, as that of a key's bias, is rounding.
    least = 1e-6 * max(float(g.norm()) for g in expected.values())
    return max(
        float((found[n] - g).norm() / g.norm().clamp(min=least)) for n, g in expected.items()
    )


def every_kind():
    found, mesh = {}, shared_mesh()
    with float_means_double():
        for kind in KINDS:
            x, timestep, conditions = given(kind, size=ODD)
            results = []
            for model, where in zip(both(kind), (None, mesh), strict=True):
                x = x.detach().requires_grad_()
                v = find_adapter(model).velocity(model, x, timestep, conditions)
                results.append((v.detach(), gradients_of(v.square().mean(), model, x, where)))
            (v, d), (v_shared, d_shared) = results
            found[kind] = distance(v_shared, v), worst(d_shared, d)
    return found


def low_precision():
    """Return errors against float64, of the whole model and of the shared one."""
    found = {}
    for name, cast in {"bf16": mixed_layout, "fp32": lambda m: m}.items():
        exact = tiny_wan("i2v").double()
        whole = patch(cast(tiny_wan("i2v")))
        shared = shard_sequence(copy.deepcopy(whole), shared_mesh())
        x, timestep, conditions = inputs("i2v", size=ODD)
        with torch.no_grad():
            ours, theirs, true = (
                find_adapter(m).velocity(m, *given("i2v", dtype, size=ODD))
                for m, dtype in ((shared, x.dtype), (whole, x.dtype), (exact, torch.float64))
            )
        found[name] = distance(ours, true), distance(theirs, true)
    return found


def recomputed():
    """Run the backward of nine tokens after a forward of twelve."""
    mesh, results = shared_mesh(), []
    with float_means_double():
        for model, where in zip(both(layers=3), (None, mesh), strict=True):
            activation_checkpointing(model, "full")
            adapter = find_adapter(model)
            x, *others = given("t2v", size=ODD)
            x.requires_grad_()
            v = adapter.velocity(model, x, *others)
            with torch.no_grad():
                adapter.velocity(model, *given("t2v", size=(3, 4, 4)))
            results.append(gradients_of(v.square().mean(), model, x, where))
    return worst(*reversed(results))


def rollouts():
    """Return drift of 8 bits, that of the shared model, and the distance between both."""
    models = both(dtype=torch.float32, head_dim=32)
    x, _, conditions = inputs(size=ODD)
    config = RolloutConfig(fp8_linears=(0, 1), fp8_attention=(0, 1))
    found = []
    for model in models:
        engine = RolloutEngine(model, config)
        found.append((rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine), engine))
    (x, whole), (x_shared, shared) = found
    assert not any("exact" in note for note in shared.notes), shared.notes
    return whole.drift[3], shared.drift[3], distance(x_shared, x)


def compiled():
    model = both(dtype=torch.float32, head_dim=32)[1]
    x, _, conditions = inputs(size=ODD)
    results = [
        rollout(model, x, conditions, FlowEuler(), 2, rollout_config=RolloutConfig(compile=mode))
        for mode in ("off", "on")
    ]
    return distance(*results)


def copies():
    """Run copies, a reward's backbone and an unpatched model, on one rank only."""
    whole, shared = both()
    x, timestep, conditions = given("t2v")
    if dist.get_rank() == 0:
        with torch.no_grad(), float_means_double():
            expected = find_adapter(whole).velocity(whole, x, timestep, conditions)
            copied = copy.deepcopy(shared)
            found = [find_adapter(copied).velocity(copied, x, timestep, conditions)]
            scores = [LatentRewardModel.from_backbone(m, 2, 2).backbone for m in (whole, shared)]
            adapter = find_adapter(scores[0])
            one, other = (adapter.features(m, x, timestep, conditions, 2) for m in scores)
            assert torch.equal(one, other)
            unpatch(shared)
            assert not any(shards_of(m) or "forward" in vars(m) for m in shared.modules())
            patch(shared)
            found.append(find_adapter(shared).velocity(shared, x, timestep, conditions))
        assert all(torch.equal(v, expected) for v in found)
    return True


def on_two_ranks():
    return {
        function.__name__: function()
        for function in (every_kind, low_precision, recomputed, rollouts, copies)
    }


def test_a_shared_model_equals_a_whole_one():
    found = run_ranks(2, on_two_ranks)[0]
    print(found)
    for kind in KINDS:
        v, gradients = found["every_kind"][kind]
        assert v <= 1e-12 and gradients <= 1e-10, kind
    for ours, theirs in found["low_precision"].values():
        assert ours <= 1.5 * theirs
    assert found["recomputed"] <= 1e-10
    whole, shared, between = found["rollouts"]
    assert 1e-4 < whole < 0.1 and shared == pytest.approx(whole, rel=0.2) and between < whole


@pytest.mark.slow
def test_compiled_rollouts():
    assert run_ranks(2, compiled)[0] < 1e-5


def training():
    """Return the errors of a reward's loss and of its gradients, of blocks, pool and head."""
    found, mesh = {}, shared_mesh()
    labels = torch.tensor([1.0, 0.0])
    with float_means_double():
        for kind, queries in (("t2v", 1), ("i2v", 3)):
            generator = tiny_wan(kind, heads=4, head_dim=12).double()
            whole = LatentRewardModel.from_backbone(generator, 2, 4, queries).double()
            patch(whole.backbone)
            shared = shard_sequence(copy.deepcopy(whole), mesh)
            x, _, conditions = given(kind, size=(3, 2, 10))
            results = []
            for reward, where in ((whole, None), (shared, mesh)):
                x = x.detach().requires_grad_()
                noise = torch.ones_like(x)
                loss = ce_loss(reward, x, conditions, labels, sigma=0.5, noise=noise)
                results.append((loss.item(), gradients_of(loss, reward, x, where)))
            (loss, d), (loss_shared, d_shared) = results
            parts = {".".join(name.split(".")[:2]) for name in d}
            assert {"backbone.blocks", "pool.queries", "head.fc1"} <= parts, parts
            found[kind] = abs(loss_shared - loss), worst(d_shared, d)
    return found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_of_a_reward_equals_one_process(ranks):
    for found in run_ranks(ranks, training):
        assert max(max(errors) for errors in found.values()) <= 1e-10, found


@pytest.fixture
def mesh():
    """Make four ranks of which this process is the first, and which receive nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        yield make_mesh(ParallelConfig(sequence=4))
    finally:
        dist.destroy_process_group()


class Sent(TorchDispatchMode):
    """Count the elements that this rank gives to collectives, by operation."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            tensors = args[0] if isinstance(args[0], (list, tuple)) else args[1:2]
            self.sent.append((name, sum(t.numel() for t in tensors)))
        return function(*args, **(kwargs or {}))


def test_a_pool_sends_a_row_of_each_head(mesh):
    generator = patch(tiny_wan(heads=4, head_dim=12, layers=1))
    reward = LatentRewardModel.from_backbone(generator, 1, num_heads=3)
    shard_sequence(reward, mesh)
    x, timestep, conditions = inputs(batch=1, size=(3, 4, 12))
    with torch.no_grad(), Sent() as counter:
        reward.logits(x, timestep, conditions)
    part, width, heads = 9, 48, 3  # 36 tokens on four ranks
    exchanges = [("alltoall_base_", part * width)] * 4
    assert counter.sent == [*exchanges, ("_allgather_base_", heads), ("allreduce_", heads * width)]


def test_values_travel_while_queries_and_keys_are_normed(mesh, monkeypatch):
    events = []

    def noted(name, function):
        return lambda *args, **named: (events.append(name), function(*args, **named))[1]

    for owner, name in (
        (collectives._Exchange, "start"),
        (collectives._Exchange, "wait"),
        (sequence, "qk_norm_rope"),
        (sequence, "attention"),
    ):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    model = shard_sequence(patch(tiny_wan(heads=4, head_dim=12, layers=1)), mesh)
    weight = model.blocks[0].attn1.norm_q.weight
    weight.register_hook(noted("norm", lambda gradient: None))  # when its gradient is there
    x, timestep, conditions = inputs(batch=1, size=(3, 4, 12))
    velocity = find_adapter(model).velocity(model, x, timestep, conditions)
    assert events == ["start", "qk_norm_rope", "wait", "attention"]
    events.clear()
    velocity.sum().backward()
    assert events == ["start", "norm", "wait"]


def test_shapes_in_fake_mode(mesh):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = patch(tiny_wan("i2v", heads=4, head_dim=12))
        shard_sequence(model, mesh)
        x, timestep, conditions = inputs("i2v", size=(3, 4, 10))
        x.requires_grad_()
        v = find_adapter(model).velocity(model, x, timestep, conditions)
        assert v.shape == x.shape
        v.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_heads_that_do_not_divide(mesh):
    model = patch(tiny_wan(heads=6, head_dim=12))
    with pytest.raises(ValueError, match=r"is 4, expected a divisor of the model's 6 heads.* is 3"):
        shard_sequence(model, mesh)
    check_heads(6, 3)


def test_too_few_tokens(mesh):
    model = shard_sequence(patch(tiny_wan(heads=4, head_dim=12)), mesh)
    # Parts of two tokens leave none for the last rank.
    with pytest.raises(
        ValueError, match="number of tokens is 6, expected enough to give each of 4"
    ):
        find_adapter(model).velocity(model, *inputs(size=(3, 2, 4)))


OTHERS = {
    "hunyuan": tiny_family("hunyuan"),
    "vace": relative("vace"),
    "velocity": any_other,
    "official": official("wan21"),
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_other_families(build, mesh):
    model = build().model
    with pytest.raises(ValueError, match="expected .*diffusers' WanTransformer3DModel"):
        shard_sequence(model, mesh)


def test_models_whose_blocks_cannot_exchange_tokens(mesh):
    model = diffusers_wan(heads=4)().model
    with pytest.raises(ValueError, match=re.escape("prfl_fast.patch(model)")):
        shard_sequence(model, mesh)
    shard_sequence(patch(model), mesh)
    model.blocks[0].attn1.norm_q.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match="norm_q has .*hook.*expected one that runs on the kernels"
    ):
        find_adapter(model).velocity(model, *inputs(size=(3, 4, 8)))
