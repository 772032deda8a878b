"""Sparse attention of rollouts: dense at density 1, by level and layer, never with gradient."""

import math

import pytest
import torch
from engine_world import EVERYWHERE, assert_same, make_wan, no_warning, walk, wan_inputs
from op_checks import RecordedCalls

from prfl_fast.feedback import PRFL
from prfl_fast.models import sparse_attention as module
from prfl_fast.models.experts import Experts
from prfl_fast.models.registry import patch
from prfl_fast.models.sparse_attention import PREDICTORS, SparseAttention, SparseOptions
from prfl_fast.models.velocity import ModelCall
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import rollout

GRID = (3, 2, 3)  # tokens of wan_inputs
WAN = (21, 30, 52)  # of 81 frames at 480p


def engine_of(model, density, predictor="pooled", **options):
    """Return an engine that checks no drift, so that all calls are those of the rollout."""
    given = {"sparse_attention": density, "sparse_predictor": predictor, "check_every": 1000}
    engine = RolloutEngine(model, RolloutConfig(**{"compile": "off", **given, **options}))
    engine.trajectories = 1
    return engine


def densities(recorded):
    """Return the share of pairs of blocks of each sparse call."""
    calls = recorded.of("sparse_attention")
    return [float(count.double().mean()) / index.shape[-1] for _, _, _, index, count, *_ in calls]


@pytest.mark.cases(1)
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_density_1_is_dense(predictor):
    given = make_wan(), *wan_inputs(), FlowEuler(), 3
    plain = rollout(*given, rollout_config=RolloutConfig())
    with RecordedCalls() as recorded:
        same = rollout(*given, rollout_config=engine_of(given[0], 1.0, predictor))
    assert torch.equal(same, plain) and not recorded.of("sparse_attention")
    # All blocks, in the sparse kernel.
    with RecordedCalls() as recorded:
        full = rollout(*given, rollout_config=engine_of(given[0], 0.999, predictor))
    assert set(densities(recorded)) == {1.0}
    torch.testing.assert_close(full, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_only_steps_without_gradient_are_sparse(predictor):
    model, (x, conditions) = make_wan(), wan_inputs()
    engine = engine_of(model, 0.5, predictor)
    with RecordedCalls() as recorded:
        seen, _ = walk(model, x, conditions, engine, visit=(2, 5))
    assert len(recorded.of("sparse_attention")) == 4 * len(model.blocks)  # steps 0, 1, 3 and 4
    assert all(0 < density < 1 for density in densities(recorded))
    # A gradient step at the same latents has the bits of the exact model.
    plain, _ = walk(model, seen[2], conditions, RolloutConfig(), visit=(2,), start=2)
    own, _ = walk(model, seen[2], conditions, engine, visit=(2,), start=2)
    assert_same(own, plain)


def test_densities_follow_the_noise_level_and_the_layer():
    model, (x, conditions) = make_wan(), wan_inputs()
    levels = ((0.9, 1.0, 0.25), (0.3, 0.9, 0.5))
    engine = engine_of(model, levels, sparse_dense_layers=[0])
    assert engine.config.sparse_dense_layers == (0,)
    with RecordedCalls() as recorded:
        rollout(model, x, conditions, FlowEuler(), 6, rollout_config=engine)
    scheduler = FlowEuler()
    scheduler.set_timesteps(6)
    wanted = [engine.config.density_at(float(s)) for s in scheduler.sigmas[:-1]]
    assert len(set(wanted)) == 3
    # Rounded up to whole blocks, of one token here; six of the 18 are the first frame's.
    each = [max(6, math.ceil(d * 18)) / 18 for d in wanted if d < 1 for _ in model.blocks[1:]]
    assert densities(recorded) == pytest.approx(each)


def test_eight_bits_and_compiled_blocks_are_sparse_too():
    model, (x, conditions) = make_wan(head_dim=32), wan_inputs()
    given = model, x, conditions, FlowEuler(), 2
    exact = rollout(*given, rollout_config=engine_of(model, 0.5))
    with RecordedCalls() as recorded:
        both = engine_of(model, 0.5, fp8_attention=EVERYWHERE)
        eight = rollout(*given, rollout_config=both)
    assert {call[-1] for call in recorded.of("sparse_attention")} == {"auto"} and not both.notes
    assert not recorded.of("rollout_attention")
    assert 0 < float((eight - exact).norm() / exact.norm()) < 0.05


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_compiled_blocks(predictor):
    model, (x, conditions) = make_wan(), wan_inputs()
    outs = [
        rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine_of(
            model, ((0.9, 1.0, 0.25), (0.0, 0.9, 0.5)), predictor, compile=mode))
        for mode in ("off", "on")
    ]  # fmt: skip
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_guidance_and_experts():
    model = Experts(*(make_wan(seed=seed) for seed in (0, 1)), 0.85)
    x, conditions = wan_inputs()
    negative = {key: torch.zeros_like(value) for key, value in conditions.items()}
    for batched in (True, False):
        engine = engine_of(model, 0.5)
        guidance = Guidance(2.0, negative, batched=batched)
        with RecordedCalls() as recorded, no_warning():
            rollout(model, x, conditions, FlowEuler(), 4, guidance=guidance, rollout_config=engine)
        calls = 4 * len(model.high.blocks) * (1 if batched else 2)
        assert len(recorded.of("sparse_attention")) == calls


def test_the_drift_is_measured_and_limited():
    model, (x, conditions) = make_wan(), wan_inputs()
    config = {"sparse_attention": 0.25, "compile": "off"}
    engine = RolloutEngine(model, RolloutConfig(**config))
    rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
    assert engine.drift[3] > 1e-3 and engine.inexact
    engine = RolloutEngine(model, RolloutConfig(**config, drift_limit=1e-6))
    with pytest.warns(RuntimeWarning, match="past drift_limit"):
        rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
    with RecordedCalls() as recorded:
        rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
    assert engine.fallen_back and not recorded.of("sparse_attention")


def test_errors_of_layers_leave_the_rollout_dense():
    model, (x, conditions) = make_wan(), wan_inputs()
    exact = rollout(model, x, conditions, FlowEuler(), 2, rollout_config=RolloutConfig())
    engine = engine_of(model, 0.25)
    engine.sparse_errors = {}
    out = rollout(model, x, conditions, FlowEuler(), 2, rollout_config=engine)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    assert sorted(engine.sparse_errors) == list(range(len(model.blocks)))
    assert all(error > 1e-3 for error in engine.sparse_errors.values())


@pytest.mark.cases(2)
@pytest.mark.parametrize("predictor", ["tiles", "radial"])
@pytest.mark.parametrize("density", [0.75, 0.5, 0.25])
def test_masks_of_a_video_have_about_the_density(predictor, density):
    sizes = module.block_sizes(21 * 30 * 52)
    assert sizes == (128, 64)
    blocks, order = module.fixed_blocks(predictor, WAN, density, *sizes)
    assert blocks.density() == pytest.approx(density, abs=0.1)
    first = torch.arange(30 * 52) if order is None else order[1][: 30 * 52]
    assert blocks.mask()[0, 0][:, (first // 64).unique()].all()  # the first frame's keys


def test_attention_that_cannot_be_sparse_says_so():
    def attend(grid=GRID, sharded=False, density=0.5, options=SparseOptions()):  # noqa: B008
        notes = []
        found = SparseAttention(options, notes).attend(
            1, torch.zeros(1, 18, 8), grid, density, eight_bits=False, sharded=sharded
        )
        return found, notes

    assert attend()[0] is not None and attend(density=1.0) == (None, [])
    assert attend(options=SparseOptions(dense_layers=(1,))) == (None, [])
    assert attend(sharded=True) == (
        None, ["attention is not sparse: ranks share the tokens of a sample"])  # fmt: skip
    for grid in (None, (3, 2, 2)):
        note = "attention is not sparse: its 18 tokens are not a grid of frames, rows and columns"
        assert attend(grid) == (None, [note])
    wide = SparseOptions("radial")
    assert "radial masks of (3, 2, 3) tokens keep 0.4" in attend(density=0.2, options=wide)[1][0]


def test_other_families_say_so():
    capabilities = pytest.importorskip("capabilities")
    case = capabilities.tiny_family("ltx")()
    engine = engine_of(patch(case.model), 0.5)
    with pytest.warns(UserWarning, match="attention is not sparse: only that of Wan's blocks"):
        rollout(case.model, case.x, case.conditions, FlowEuler(), 2, rollout_config=engine)


@pytest.mark.parametrize("kind", ["one", "experts", "call"])
def test_layers_beyond_the_blocks_are_refused_with_the_model(kind):
    model = make_wan()
    if kind == "experts":
        model = Experts(model, make_wan(seed=1), 0.85)
    given = ModelCall(model) if kind == "call" else model
    last = len(make_wan().blocks) - 1
    for layers in ((0, last), ()):
        RolloutEngine(given, RolloutConfig(sparse_attention=0.5, sparse_dense_layers=layers))
    config = RolloutConfig(sparse_attention=0.5, sparse_dense_layers=(0, last + 1))
    message = rf"sparse_dense_layers is \(0, {last + 1}\), expected numbers below {last + 1}, the"
    with pytest.raises(ValueError, match=message):
        RolloutEngine(given, config)
    # Before the first step of a training, too.
    options = {"num_inference_steps": 4, "rollout": config}
    with pytest.raises(ValueError, match=message):
        PRFL(given, lambda x, timestep, conditions: x.mean((1, 2, 3, 4)), FlowEuler(), **options)


def test_bad_options():
    for kwargs, message in (
        ({"sparse_attention": 0.0}, "sparse_attention is 0.0, expected a density above 0"),
        ({"sparse_attention": 1.5}, "sparse_attention is 1.5"),
        ({"sparse_attention": [(0.5, 1.0)]}, r"sparse_attention\[0\] is"),
        ({"sparse_attention": [(0.5, 0.1, 0.5)]}, r"sparse_attention\[0\] is"),
        ({"sparse_attention": [(0.5, 1.0, 0)]}, r"sparse_attention\[0\]\[2\] is 0"),
        ({"sparse_predictor": "mean"}, "sparse_predictor is 'mean'"),
        ({"sparse_dense_layers": 3}, "sparse_dense_layers is 3"),
        ({"sparse_dense_layers": (-1,)}, "sparse_dense_layers is"),
        ({"sparse_attention": 0.5, "cache": False}, "cache is False"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutConfig(**kwargs)
    assert not RolloutConfig(sparse_attention=[[0, 1, 1]]).inexact
    assert RolloutConfig(sparse_attention=[[0, 1, 0.5]]).sparse_attention == ((0.0, 1.0, 0.5),)
