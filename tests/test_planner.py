"""The planner: its search against brute force, predictions against full depth, what it writes."""

import dataclasses
import io
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from prfl_fast import plan_search, planner
from prfl_fast.config import Memory, TrainConfig
from prfl_fast.config_file import load_config
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.machines import MACHINES, Machine, machine, this_machine
from prfl_fast.plan_report import frontier
from prfl_fast.plan_search import (
    CHUNK,
    GIB,
    POLICIES,
    SLOWER,
    Candidate,
    Search,
    memory_of,
    phase_seconds,
)
from prfl_fast.rollout_engine import RolloutSettings
from prfl_fast.simulation import Cost, Simulation, Workload, simulate

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

# Wide enough that a block's input is worth offloading, and otherwise as small as it gets.
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "text_dim": 64,
    "freq_dim": 64,
}
SIZE = {"frames": 33, "height": 480, "width": 832, "reward_blocks": 4}
_, ATTENTION, ATTENTION_CPU, _, FULL_CPU = POLICIES
SHALLOW = {"layers": 3, "reward_layers": 3}
BOTH = list(itertools.product(POLICIES, POLICIES))
KEPT = {"none": 10, "attention": 3, "full": 1}
WEIGHTS = {"bf16": 8, "fp8": 4, "nf4": 2}
STATES = {"adamw": 12, "adamw-sr": 8, "adamw8bit": 2, "adamw-cpu": 0}
RATES = Machine("unit", 1e12, 1e12, 1e15, 1e9, 1e9, 1 << 40)


def made_up(workload, memory, *, layers=None, reward_layers=None):
    """A step in round numbers: MiB per block, seconds per block."""
    depth = layers or workload.config["num_layers"]
    reward_depth = reward_layers or workload.reward_blocks
    chunked = memory.feed_forward_chunk is not None
    work, states = 14 - 4 * chunked, STATES[memory.optimizer] * (workload.train == "full")
    kept, reward_kept = KEPT[memory.policy] * depth, KEPT[memory.reward_policy] * reward_depth
    window, reward_window = 2 * KEPT[memory.policy], 2 * KEPT[memory.reward_policy]
    here = window if memory.offload else kept
    there = reward_window if memory.reward_offload else reward_kept
    left = 0 if memory.offload and memory.reward_offload else here
    base = {
        "weights": WEIGHTS[memory.weights] * depth + 3,
        "reward": WEIGHTS[memory.reward_weights] * reward_depth + 2,
        "optimizer": states * depth,
    }

    def moment(phase, checkpoints, workspace):
        live = base | {"checkpoints": checkpoints, "workspace": workspace}
        return phase, {name: value << 20 for name, value in live.items()}

    timeline = [
        moment("rollout", 0, 6),
        moment("forward", here, 5),
        moment("reward", here, 0),
        moment("reward", left + there, 4),
        moment("reward backward", left + there, 0),
        moment("reward backward", left + there, work - 1),
        moment("backward", here, work),
        moment("optimizer", 0, 1),
    ]
    again = {"none": 0, "attention": 1, "full": 2}
    extra = 0.25 * chunked

    def cost(blocks, seconds, to_host=0, to_device=0):
        return Cost(int(1e12 * blocks * seconds), 0, 0, to_host << 20, to_device << 20)

    out = KEPT[memory.policy] * bool(memory.offload)
    reward_out = KEPT[memory.reward_policy] * bool(memory.reward_offload)
    # A block's tensors leave when the next block comes, whosever it is.
    sent = (depth - 1) * out, bool(reward_out) * (out + (reward_depth - 1) * reward_out)
    repeated = again[memory.reward_policy] + extra
    costs = {
        "": Cost(moved_bytes=1),
        "rollout": cost(depth, 1),
        "forward": cost(depth, 1, sent[0]),
        "reward": cost(reward_depth, 1, sent[1]),
        "reward backward": cost(reward_depth, 1 + repeated, 0, reward_depth * reward_out),
        "backward": cost(depth, 2 + again[memory.policy] + extra, 0, depth * out),
        "optimizer": cost(depth, 1),
    }
    if workload.sft:
        timeline += [moment(f"sft {p}", here, work - 1) for p in ("forward", "backward")]
        costs |= {f"sft {p}": costs[p] for p in ("forward", "backward")}
    phase, high = max(timeline, key=lambda m: sum(m[1].values()))
    host = (sum(sent) + (memory.optimizer == "adamw-cpu") * depth) << 20
    return Simulation(sum(high.values()), phase, high, host, timeline, costs)


@pytest.fixture
def calls(monkeypatch):
    """``simulate`` in round numbers; the list of its calls."""
    seen = []

    def called(*args, **options):
        seen.append((args, options))
        return made_up(*args, **options)

    monkeypatch.setattr(plan_search, "simulate", called)
    return seen


def make_search(budget, host_budget=None, **workload):
    work = Workload(config={"num_layers": 40}, **workload)
    return Search(work, RATES, budget=budget, host_budget=host_budget, rollout_forwards=19.0)


def all_candidates(search, tier):
    """Every candidate of the search's space at full depth: (seconds, peak, host, memory)."""
    found = []
    for chunk, (ours, theirs) in itertools.product((None, CHUNK), BOTH):
        if chunk is None or "none" not in (ours[0], theirs[0]):
            memory = memory_of(tier, ours, theirs, chunk)
            run = made_up(search.workload, memory)
            found.append((search._seconds(run.costs), run.peak, run.host, memory))
    return found


def test_every_pair_follows_from_shallow_runs(calls):
    search = make_search(1 << 40)
    for _, _, _, memory in all_candidates(search, ("bf16", "adamw")):
        run = made_up(search.workload, memory)
        ours = (memory.policy, memory.offload), (memory.reward_policy, memory.reward_offload)
        found = search._candidate(("bf16", "adamw"), *ours, memory.feed_forward_chunk)
        assert found.memory == memory
        assert (found.peak, found.host) == (run.peak, run.host)
        assert found.seconds == pytest.approx(search._seconds(run.costs))
    assert len(calls) == 2 * (2 * len(POLICIES) - 1)  # none is not run in chunks


@pytest.mark.parametrize("host", [None, 50, 200])
@pytest.mark.parametrize("mib", [410, 415, 430, 470, 520, 640, 800, 1000])
def test_takes_the_fastest_that_fits(calls, mib, host):
    budget = plan_search.RESERVE_LEAST + (mib << 20)
    search = make_search(budget, None if host is None else host << 20)
    fits = [
        (seconds, peak)
        for seconds, peak, used, _ in all_candidates(search, ("bf16", "adamw"))
        if peak <= search.limit and (host is None or used <= host << 20)
    ]
    found = search.run([("bf16", "adamw")])
    assert found.feasible == bool(fits)
    if fits:
        chosen = next(c for c in found.candidates if c.reason == "chosen")
        assert (chosen.seconds, chosen.peak) == pytest.approx(min(fits))
        assert chosen.memory == found.memory
        for candidate in found.candidates:
            faster = candidate.seconds < chosen.seconds
            assert not (faster and candidate.reason in (SLOWER, "chosen")), candidate
    else:
        assert all("over" in c.reason for c in found.candidates)


def test_faithful_weights_first(calls):
    room = {"bf16": 440, "fp8": 250, "nf4": 150}
    for weights, mib in room.items():
        search = make_search(plan_search.RESERVE_LEAST + (mib << 20))
        found = search.run(planner._tiers("lora", "auto", "auto"))
        assert found.feasible and found.memory.weights == weights == found.memory.reward_weights
        more_faithful = list(room)[: list(room).index(weights)]
        considered = {c.memory.weights: c.reason for c in found.candidates[: len(more_faithful)]}
        assert list(considered) == more_faithful and all("over" in r for r in considered.values())
        assert [u[0] for u in found.unused] == list(room)[len(more_faithful) + 1 :]


def test_faithful_optimizer_first(calls):
    for optimizer, mib in {
        "adamw": 950,
        "adamw-sr": 750,
        "adamw8bit": 520,
        "adamw-cpu": 430,
    }.items():
        search = make_search(plan_search.RESERVE_LEAST + (mib << 20), train="full")
        found = search.run(planner._tiers("full", "auto", "auto"))
        assert found.feasible and found.memory.optimizer == optimizer, optimizer
        assert found.memory.weights == "bf16"


def test_next_candidate_when_full_depth_is_larger_than_predicted(monkeypatch, calls):
    search = make_search(plan_search.RESERVE_LEAST + (640 << 20))
    first = search.run([("bf16", "adamw")]).memory

    def larger(workload, memory, **depths):
        run = made_up(workload, memory, **depths)
        if depths or memory != first:
            return run
        return Simulation(run.peak + GIB, "backward", run.categories, 0, run.timeline, run.costs)

    monkeypatch.setattr(plan_search, "simulate", larger)
    search = make_search(plan_search.RESERVE_LEAST + (640 << 20))
    found = search.run([("bf16", "adamw")])
    assert found.feasible and found.memory != first
    (wrong,) = [c for c in found.candidates if c.memory == first]
    assert "over" in wrong.reason


def test_nothing_fits(calls):
    plan = planner.plan(SMALL, budget=plan_search.RESERVE_LEAST + (20 << 20), **SIZE)
    assert not plan.feasible and plan.missing == plan.peak + plan.reserve - plan.budget > 0
    assert plan.memory == memory_of(("nf4", "adamw"), POLICIES[-1], POLICIES[-1], CHUNK)
    assert len(plan.candidates) == 3  # the leanest of each kind of weights
    text = plan.table()
    assert "no plan fits" in text and "MiB" not in text
    assert f"{plan.missing / GIB:.2f} GiB of device memory" in text


def test_only_the_host_is_too_small(calls):
    budget = plan_search.RESERVE_LEAST + (415 << 20)
    search = make_search(budget, 10 << 20)
    found = search.run([("bf16", "adamw")])
    assert not found.feasible
    assert any("on the host" in c.reason for c in found.candidates)


@pytest.mark.parametrize("peak", [1, GIB, 23 * GIB + 1, 24 * GIB, 40 * GIB, 200 * GIB + 12345])
def test_the_budget_for_a_peak_holds_it(peak):
    budget = plan_search.budget_for(peak)
    assert peak + plan_search.reserve_of(budget) <= budget + 2
    short = budget - GIB // 50
    assert peak + plan_search.reserve_of(short) > short


def test_seconds():
    rates = Machine("m", 1e12, 5e11, 1e9, to_device=1e9, to_host=2e9, memory=1)
    cost = Cost(matmul_flops=10**12, attention_flops=10**12, moved_bytes=10**9)
    assert phase_seconds(cost, rates) == pytest.approx(1 + 2 + 1)
    hidden = Cost(10**12, 0, 0, to_host_bytes=10**9, to_device_bytes=10**9)
    assert phase_seconds(hidden, rates) == pytest.approx(1)  # both directions at once, behind it
    assert phase_seconds(Cost(10**12, 0, 0, 0, 3 * 10**9), rates) == pytest.approx(3)


def test_step_counts_every_phase_as_often_as_it_runs():
    one = Cost(matmul_flops=10**12)
    names = ("rollout", "forward", "reward", "reward backward", "backward", "optimizer")
    work = Workload(config=SMALL, points=5, **SIZE)
    found = plan_search.step_seconds(dict.fromkeys(names, one), RATES, work, 30.0)
    assert found == {
        "rollout": 30,
        **dict.fromkeys(names[1:5], 5),
        "optimizer": 2,
        "sft forward": 1,
        "sft backward": 1,
    }
    work = Workload(config=SMALL, points=5, accumulation=3, **SIZE)
    several = plan_search.step_seconds(dict.fromkeys(names, one), RATES, work, 30.0)
    assert several == {k: v if k == "optimizer" else 3 * v for k, v in found.items()}


@pytest.mark.parametrize("points", [1, 2, 5])
def test_expected_forwards(points):
    plan, generator = GradientPlan(points), torch.Generator().manual_seed(0)
    draws = [plan.draw(40, generator)[-1].step + 1 - points for _ in range(4000)]
    mean = sum(draws) / len(draws)
    spread = (sum((d - mean) ** 2 for d in draws) / len(draws) ** 2) ** 0.5
    assert abs(plan.expected_forwards(40) - mean) < 4 * spread
    assert points > 1 or plan.expected_forwards(40) == 19


# Predictions against the real simulation.
def workload(**options):
    return Workload(config=SMALL, **{**SIZE, **options})


_runs = {}


def once(work, memory, *, layers=None, reward_layers=None):
    """``simulate``, which gives the same for the same arguments: tests share its results."""
    key = (repr(work), memory, layers, reward_layers)
    if key not in _runs:
        _runs[key] = simulate(work, memory, layers=layers, reward_layers=reward_layers)
    return _runs[key]


@pytest.fixture
def remembered(monkeypatch):
    monkeypatch.setattr(plan_search, "simulate", once)


def check_prediction(pair, chunk=None, optimizer="adamw", **options):
    work = workload(**options)
    search = Search(work, RATES, budget=1 << 40, host_budget=None, rollout_forwards=19.0)
    predicted = search._candidate(("bf16", optimizer), *pair, chunk)
    run = once(work, predicted.memory)
    assert predicted.peak == pytest.approx(run.peak, rel=2e-3)
    assert predicted.seconds == pytest.approx(search._seconds(run.costs), rel=2e-3)
    assert predicted.host == pytest.approx(run.host, rel=0.01)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[-1]], ids=str)
def test_a_supervised_step_is_never_the_peak(policy, train):
    memory = memory_of(("bf16", "adamw"), policy, policy, None)
    with_it, without = (
        simulate(workload(train=train, sft=sft), memory, **SHALLOW) for sft in (True, False)
    )
    assert with_it.peak == without.peak and "sft" not in with_it.peak_phase


@pytest.mark.parametrize("pair", [(ATTENTION, FULL_CPU)], ids=str)
def test_prediction_is_what_full_depth_says(remembered, pair):
    check_prediction(pair)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 2048])
@pytest.mark.parametrize("pair", BOTH, ids=str)
def test_every_prediction_is_what_full_depth_says(remembered, pair, chunk):
    check_prediction(pair, chunk)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-sr", "adamw8bit", "adamw-cpu"])
def test_prediction_with_all_parameters(remembered, optimizer):
    check_prediction((FULL_CPU, ATTENTION), None, optimizer, train="full", accumulation=2)


@pytest.fixture(scope="module")
def real():
    """A plan of the small model that has to leave the fastest policies out."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_search, "simulate", once)
        both = (("none", None), ("none", None))
        whole = once(workload(), memory_of(("bf16", "adamw"), *both, None), **SHALLOW)
        budget = plan_search.RESERVE_LEAST + int(0.8 * whole.peak)
        return planner.plan(SMALL, budget=budget, machine="h100", **SIZE)


def test_plan_of_a_small_model(real):
    assert real.feasible and real.memory.weights == "bf16" and real.missing == 0
    assert real.peak == sum(real.categories.values())
    assert real.peak == max(sum(live.values()) for _, live in real.timeline)
    chosen = next(c for c in real.candidates if c.memory == real.memory)
    assert chosen.reason == "chosen" and chosen.peak == real.peak
    assert chosen.seconds == pytest.approx(real.step_seconds)
    faster = [c for c in real.candidates if c.seconds < 0.99 * chosen.seconds]
    assert faster and all("over" in c.reason for c in faster)
    smaller = real.smaller(real.memory)
    assert smaller is None or smaller.peak < real.peak
    assert real.smaller(Memory(policy="full")) is None


def test_what_to_try_next_has_room_on_the_host(real):
    now = Candidate(Memory(), 3, 0, 1.0, "chosen")
    offloaded = Candidate(Memory(policy="full", offload="cpu"), 1, 9, 2.0, "over on the host")
    full = Candidate(Memory(policy="full"), 2, 0, 3.0, "fits, slower")
    plan = dataclasses.replace(real, candidates=[now, offloaded, full], host_budget=5)
    assert plan.smaller(now.memory) == full
    assert dataclasses.replace(plan, host_budget=None).smaller(now.memory) == offloaded


def test_table_says_what_there_is_to_know(real):
    text = str(real)
    assert max(map(len, text.splitlines())) <= 100
    for name, value in real.categories.items():
        if value:
            assert f"  {name:<12}{value / GIB:>8.2f} GiB" in text
    for phase in real.seconds:
        assert f"\n  {phase} " in text
    assert text.count("chosen") == 1 and "19 forwards expected" in text
    for candidate in frontier(real.candidates):
        assert candidate.reason in text
    assert "fp8 with adamw, nf4 with adamw" in text


def test_frontier():
    def candidate(seconds, peak, reason=""):
        return plan_search.Candidate(Memory(), peak, 0, seconds, reason)

    a, b, c, d = (candidate(*v) for v in ((1, 9), (2, 9), (3, 5, "chosen"), (4, 7)))
    assert frontier([a, b, c, d]) == [a, c]


def test_timeline_figure(real):
    pytest.importorskip("matplotlib")
    figure = real.timeline_figure()
    (axes,) = figure.axes
    image = io.BytesIO()
    figure.savefig(image, format="png")
    assert image.getvalue()[:4] == b"\x89PNG"
    shown = [name for name, value in real.categories.items() if value]
    assert {t.get_text() for t in axes.get_legend().get_texts()} >= set(shown)
    names = {t.get_text().split("\n")[0] for t in axes.texts}
    assert names >= {"rollout", "forward", "reward", "backward", "optimizer"}
    top = max(path.vertices[:, 1].max() for c in axes.collections for path in c.get_paths())
    assert top == pytest.approx(real.peak / GIB)
    assert any(line.get_ydata()[0] == pytest.approx(real.budget / GIB) for line in axes.lines)
    # Names of neighbouring phases do not run into each other.
    figure.draw_without_rendering()
    labels = [t for t in axes.texts if "\n" in t.get_text() or t.get_text() == "optimizer"]
    boxes = sorted((t.get_window_extent() for t in labels), key=lambda box: box.x0)
    assert all(a.x1 <= b.x0 + 1 for a, b in itertools.pairwise(boxes))


# What it writes.
FILE = """# my run
model: wan  # the generator
data: latents
out: runs/a
reward: reward
run:
  steps: 10   # short

memory:
  policy: none
  # an old remark

# on which machine
hardware: {device: cuda}
optimizer:
  learning_rate: 1.0e-5
"""


def test_apply_keeps_the_rest_of_the_file(real, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(FILE)
    real.apply(path)
    text = path.read_text()
    for line in ("# my run", "model: wan  # the generator", "  steps: 10   # short"):
        assert line in text.splitlines()
    assert "# on which machine\nhardware:" in text
    config = load_config(TrainConfig, path)
    assert config.memory == real.memory
    assert config.hardware.precision == "bf16" and config.hardware.device == "cuda"
    assert config.lora is not None and config.lora.rank == 16
    assert config.optimizer.learning_rate == 1e-5
    before = path.read_text()
    real.apply(path)
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["", "model: a\ndata: b\nout: c\nrun: {steps: 1}\nreward: d"])
def test_apply_to_a_new_or_short_file(real, tmp_path, text):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "train.yaml"
    if text:
        path.write_text(text)
    real.apply(path)
    found = yaml.safe_load(path.read_text())
    # What the run is, the file says if it can.
    assert found == {**yaml.safe_load(real.to_yaml()), **(yaml.safe_load(text) or {})}


def test_apply_refuses(real, calls, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="holds list, expected keys"):
        real.apply(path)
    path.write_text("a: [\n")
    with pytest.raises(ValueError, match="not YAML"):
        real.apply(path)
    nothing = planner.plan(SMALL, budget=plan_search.RESERVE_LEAST + 1, **SIZE)
    with pytest.raises(ValueError, match="no plan fits"):
        nothing.apply(tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()


# Arguments.
@pytest.mark.parametrize(
    "value, expected",
    [("24GiB", 24 << 30), ("1.5 gib", 3 << 29), ("80GB", 80 * 10**9), (123, 123), ("7", 7)],
)
def test_sizes(value, expected):
    assert planner.size_of(value, "budget") == expected


@pytest.mark.parametrize("value", ["24 G", "much", 0, -1, True, "GiB", "0GiB"])
def test_bad_sizes(value):
    with pytest.raises(ValueError, match="budget is .*expected bytes or a size"):
        planner.size_of(value, "budget")


def test_models(tmp_path):
    assert planner.model_config("WAN2.1-T2V-14B")["num_layers"] == 40
    assert planner.model_config("wan2.1-i2v-14b")["in_channels"] == 36
    assert planner.model_config({"_class_name": "x", "a": 1}) == {"a": 1}
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**SMALL)
        for name, config in planner.MODELS.items():
            assert diffusers.WanTransformer3DModel(**{**config, "num_layers": 1}), name
    assert planner.model_config(model)["ffn_dim"] == 512
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(SMALL))
    assert planner.model_config(tmp_path) == SMALL
    (tmp_path / "transformer" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a configuration"):
        planner.model_config(tmp_path)
    with pytest.raises(ValueError, match="expected one of wan2.1-t2v-1.3b"):
        planner.model_config("wan9")
    with pytest.raises(TypeError, match="does not know"):
        planner.model_config(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": "int4"}, "weights is 'int4', expected auto or one of bf16"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ({"train": "full", "weights": "nf4"}, "weights is 'nf4', which cannot be trained"),
        ({"machine": "tpu"}, "machine is 'tpu', expected one of h200"),
        ({"frames": 80}, "frames is 80"),
        ({"train": "half"}, "train is 'half'"),
        ({"host_budget": "some"}, "host_budget is 'some'"),
    ],
)
def test_bad_arguments(calls, options, message):
    with pytest.raises(ValueError, match=message):
        planner.plan(SMALL, **{**SIZE, **options})
    assert not calls


def test_a_rollout_is_a_gradient_plan(calls):
    with pytest.raises(TypeError, match=r"rollout is RolloutSettings\(.*expected a GradientPlan"):
        planner.plan(SMALL, **SIZE, rollout=RolloutSettings())
    assert not calls


# Machines.
def test_the_device_at_hand(monkeypatch):
    found = {"name": "NVIDIA H100 80GB HBM3", "total_memory": 5}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**found))
    here = this_machine("cuda")
    assert here == dataclasses.replace(MACHINES["h100"], name=found["name"], memory=5)
    found["name"] = "NVIDIA T4"
    assert this_machine("cuda").name == "NVIDIA T4 (at an A100's rates)"
    assert this_machine("cuda").matmul == MACHINES["a100"].matmul


def test_presets():
    h200 = machine("h200")
    assert (h200.matmul, h200.attention, h200.copy) == (790e12, 620e12, 4.3e12)
    for name, preset in MACHINES.items():
        assert preset.name == name and machine(preset) is preset
        assert preset.attention < preset.matmul
    with pytest.raises(ValueError, match="expected a CUDA device"):
        this_machine("cpu")
    with pytest.raises(ValueError, match="copy is 0"):
        Machine("m", 1, 1, 0, 1, 1, 1)


def record(*without):
    cases = [
        {"fact": "device copy, read + write", "bytes_per_s": 4e12},
        {"fact": "matmul bf16, 8192³", "flops_per_s": 7e14},
        {"fact": "host to device, pinned", "bytes_per_s": 5e10},
        {"fact": "device to host, pinned", "bytes_per_s": 4e10},
    ]
    for name, tokens, rate in (
        ("flash", 75600, 5e14),
        ("cuDNN", 75600, 6e14),
        ("flash", 32760, 9e14),
    ):
        rates = {"forward": rate, "backward": rate / 2}
        case = {"fact": f"attention {name}, x", "tokens": tokens, "heads": 40, "flops_per_s": rates}
        cases.append(case)
    cases.append({"fact": "attention efficient, x", "tokens": 75600, "heads": 40, "skipped": "no"})
    kept = [case for case in cases if not case["fact"].startswith(without)] if without else cases
    return {"run": {"device": {"name": "Some GPU"}}, "suites": {"facts": {"cases": kept}}}


def test_machine_from_a_bench_record(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record()))
    found = Machine.from_record(path, 80 << 30)
    assert found == Machine("Some GPU", 7e14, 6e14, 4e12, 5e10, 4e10, 80 << 30)
    for missing, message in (("matmul", "no flops_per_s of 'matmul bf16'"), ("attention", "ran")):
        path.write_text(json.dumps(record(missing)))
        with pytest.raises(ValueError, match=message):
            Machine.from_record(path, 80 << 30)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a results.json with the facts suite"):
        Machine.from_record(path, 80 << 30)


# The plans this was made for, minutes of simulation.
@pytest.mark.slow
@pytest.mark.parametrize(
    "options, weights, optimizer",
    [
        ({"budget": "48GiB"}, "bf16", "adamw"),
        ({"budget": "24GiB", "weights": "nf4"}, "nf4", "adamw"),
        ({"budget": "141GiB", "train": "full", "height": 480, "width": 832}, "bf16", "adamw8bit"),
    ],
    ids=["48 GiB exact", "24 GiB NF4", "141 GiB, all parameters"],
)
def test_14b_fits(options, weights, optimizer):
    plan = planner.plan("wan2.1-t2v-14b", **options)
    print(plan)
    assert plan.feasible
    assert (plan.memory.weights, plan.memory.optimizer) == (weights, optimizer)
    assert plan.peak + plan.reserve <= plan.budget
    assert math.isfinite(plan.step_seconds)
