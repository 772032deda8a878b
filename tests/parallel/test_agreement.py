"""Ranks with sharded weights decide alike if one of them has too much drift or a NaN."""

import math

import pytest
import torch
import torch.distributed as dist
from prfl_world import normal
from ranks import run_ranks
from sharded_world import Case, build, conditions, float_means_double

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.models import blocks, inference
from prfl_fast.parallel import ParallelConfig, make_mesh
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.sampling import candidates
from prfl_fast.sampling.gradient import optimize_noise
from prfl_fast.sampling.search import beam_search, prune

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:the rollout's drift")

CASE = Case("agreement", size=(1, 2, 4))


def made():
    """Return the models, sharded if there are ranks, and the samples that this rank has."""
    ranks = dist.is_initialized()
    mesh = make_mesh(ParallelConfig(shard=2)) if ranks else None
    samples = slice(dist.get_rank(), dist.get_rank() + 1) if ranks else slice(0, 2)
    noise = normal(10, (4, 16, *CASE.size)) * torch.tensor([1.0, 3, 1, 1]).view(-1, 1, 1, 1, 1)
    return *build(CASE, mesh), noise[samples], conditions(CASE, samples)


def drifts(limit):
    """Run two trajectories of every second step; return their drift and whether they fell back."""
    model, reward, noise, texts = made()
    config = RolloutConfig(stride=2, drift_limit=limit, check_every=1)
    step = PRFL(model, reward, FlowEuler(), num_inference_steps=5, rollout=config)
    found = []
    for row in range(len(noise)):
        x, text = noise[row : row + 1], {k: v[row : row + 1] for k, v in texts.items()}
        found.append(step(x, text, indices=[3]).drift)
        found.append(step.engine.fallen_back)
        step(x, text, indices=[3])
    return found


def reuses():
    """Return latents and saved forwards of rollouts that reuse residuals of blocks."""
    model, _, noise, texts = made()
    found = []
    for threshold in (0.05, 0.1):
        engine = RolloutEngine(model, RolloutConfig(first_block_cache=threshold))
        engine.trajectories = 1  # the first would be checked
        x = rollout(model, noise, texts, FlowEuler(), 8, rollout_config=engine)
        found.append((x, engine.reuse.saved))
    return found


def compiles():
    """Return the outcome of rollouts whose compiler fails on rank 1 only, or is given up there."""
    model, _, noise, texts = made()
    expected = rollout(model, noise, texts, FlowEuler(), 2)
    found, rank = [], dist.get_rank()

    def block(*args):
        found.append("compiled")
        if rank == 1:
            raise torch._dynamo.exc.InternalTorchDynamoError("no compiler here")
        return blocks.transformer_block(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_compiled", lambda: block)
        for wanted in (rank == 0, True):
            patch.setattr(RolloutEngine, "_compiles", lambda *_, wanted=wanted: wanted)
            engine = RolloutEngine(model)
            x = rollout(model, noise, texts, FlowEuler(), 2, rollout_config=engine)
            assert torch.equal(x, expected)
            found.append(" ".join(engine.notes))
    return found


def on_ranks(limit):
    return (drifts(limit), reuses(), compiles()), with_nan()


@pytest.fixture(scope="module")
def alone():
    """Return the drifts of both samples and the limit between them, in one process."""
    first, _, second, _ = drifts(None)
    least, most = sorted((first[2], second[2]))
    limit = (least + most) / 2
    assert most > 1.01 * limit
    return first, second, limit


@pytest.fixture(scope="module")
def ranks(alone):
    """Return what two ranks find, in one launch for both tests."""
    return list(zip(*run_ranks(2, on_ranks, alone[2]), strict=True))


def test_ranks_that_share_weights_fall_back_and_reuse_residuals_together(alone, ranks):
    first, second, _ = alone
    both = reuses()  # decides by both samples; alone, each reuses more
    found = ranks[0]
    for rank, (_, reused, compiled) in enumerate(found):
        for (x, saved), (expected, count) in zip(reused, both, strict=True):
            torch.testing.assert_close(x, expected[rank : rank + 1], rtol=1e-5, atol=1e-5)
            assert saved == count > 0
        reason = ("failed on another rank", "no compiler here")[rank]
        assert compiled[:2] == ["", "compiled"] and len(compiled) == 3 and reason in compiled[2]
    for (drift, fallen_back), *_ in found:
        assert fallen_back
        # The rank below its own limit knows of the other's drift.
        assert drift == pytest.approx({k: max(first[k], second[k]) for k in drift}, rel=1e-6)


class Failing:
    """A reward that is NaN on rank 1 from its call number ``first`` on."""

    def __init__(self, reward, first=0):
        self.members, self.first, self.calls = (reward,), first, 0

    def __call__(self, x, timestep, conditions):
        bad = dist.get_rank() == 1 and self.calls >= self.first
        self.calls += 1
        score = self.members[0](x, timestep, conditions)
        return score * (math.nan if bad else 1.0)


PLANS = {
    "parameters": (GradientPlan.prfl(2), (1, 3)),
    "noise": (GradientPlan.reno(), (4,)),
    "latent": (GradientPlan.flow_nrg(), None),
}


def with_nan():
    found = {}
    with float_means_double():
        model, reward, noise, texts = made()
        for name, (plan, indices) in PLANS.items():
            failing = Failing(reward)
            step = PRFL(model, failing, FlowEuler(), plan, num_inference_steps=5)
            out = step(noise, texts, indices=indices)
            gradients = [p.grad is None for p in model.parameters()]
            found[name] = out.finite, failing.calls, all(gradients)
        failing = Failing(reward, 2)
        sampler = Sampler(model, FlowEuler(), 3)
        result = optimize_noise(sampler, failing, noise, texts, iterations=4)
        found["optimized"] = len(result.history), failing.calls

        def searched(search, failing, **options):
            with pytest.raises(ValueError, match="NaN or infinite on at least one rank"):
                search(sampler, failing, noise, texts, candidates=2, **options)
            return failing.calls

        found["pruned"] = searched(prune, Failing(reward, 1), keep={0: 1})
        found["beams"] = searched(beam_search, Failing(reward), beams=1)
        with pytest.MonkeyPatch.context() as patch:
            value = math.nan if dist.get_rank() == 1 else 1.0
            patch.setattr(candidates, "draw", lambda shape, *_: torch.full(shape, value).double())
            found["children"] = searched(beam_search, Failing(reward), beams=1)
        out = PRFL(model, Failing(reward), FlowEuler(), num_inference_steps=5)
        found["later"] = bool(out(noise, texts, indices=[2], wait=False).finite)
    return found


def test_ranks_that_share_weights_stop_together_at_a_nan(ranks):
    first, second = ranks[1]
    assert first == second
    # Gradients of parameters are dropped on both ranks; the others stop at their first reward.
    assert first["parameters"] == (False, 2, True)
    assert first["noise"][:2] == first["latent"][:2] == (False, 1)
    assert first["optimized"] == (3, 3) and first["later"] is False
    assert [first[name] for name in ("pruned", "beams", "children")] == [2, 1, 0]
