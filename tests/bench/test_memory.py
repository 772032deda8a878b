"""The benchmark's suite on memory: predictions, small runs, tables, and what runs on a GPU with the
GPU's part replaced.
"""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import report
import run as bench_run
import torch
from bench_runs import assert_rectangular, make_context, run_suites
from harness import Preset, UnavailableError
from suites import kept, memory, memory_step
from suites.memory_step import Case, MeasuredStep, uniform

from prfl_fast.memory import activation_checkpointing
from prfl_fast.planning.gpu_specs import find_gpu
from prfl_fast.planning.simulation import simulate
from prfl_fast.utils.units import GIB

pytest.importorskip("diffusers")

# One block keeps more than the 64 KiB below which nothing is offloaded.
SMALL = Preset("small", 128, 2, 256, 6, (5, 16, 16), text_tokens=24, text_dim=32)
TINY = replace(SMALL, name="tiny", layers=2)


context = functools.partial(make_context, preset=TINY)


@pytest.mark.slow
@pytest.mark.parametrize("row", memory.rows())
def test_two_depths_predict_the_whole_model(row):
    case = Case(SMALL, *memory.rows()[row], train="full")
    case = replace(case, memory=replace(case.memory, feed_forward_chunk=None))
    predicted = memory_step.predict(case)
    whole = memory_step._record(simulate(case.workload(), *case.memories))
    assert predicted["host_bytes"] == whole["host_bytes"]
    assert (whole["host_bytes"] > 0) == ("offloaded" in row)
    assert predicted["flops"] == whole["flops"]
    assert predicted["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=1e-3)


def test_the_baseline_keeps_what_diffusers_own_checkpointing_keeps():
    case = Case(TINY, uniform("full", weights="fp32"), False, "full")
    own, ours = MeasuredStep(case, context()), MeasuredStep(case, context())
    activation_checkpointing(ours.generator, "full")
    assert own.generator._gradient_checkpointing_func.__module__.startswith("diffusers.")
    input_bytes = 4 * TINY.tokens * TINY.dim
    assert own.kept()[0] == ours.kept()[0] > TINY.layers * input_bytes


def test_every_row_and_size_is_in_the_table_and_on_the_curves():
    cases = memory.table_cases()
    every = {(size, row) for size in memory.SIZES for row in memory.rows()}
    chunked = {(size, memory.CHUNKED) for size in memory.SIZES if size != "wan14b-720p"}
    assert {(size, row) for size, row, _ in cases} == every - chunked
    exact, narrow = (cases["wan14b-720p", "full, offloaded", w] for w in ("bf16", "nf4"))
    assert narrow.memory == replace(exact.memory, weight_dtype="nf4")
    workload = memory.curve_cases()[memory.BASELINE, 121, "720p"].workload()
    assert (workload.frames, workload.height, workload.width) == (121, 720, 1280)
    assert exact.workload().tokens == 75600 and exact.workload().reward_blocks == 8
    baseline = cases["wan14b-720p", memory.BASELINE, "bf16"]
    assert memory.curve_cases()[memory.BASELINE, 81, "720p"] == baseline


@pytest.fixture
def quick(monkeypatch, one_round):
    """Shrink the suite to one tiny size and three rows, simulated in this process."""
    wanted = (memory.BASELINE, "none", "attention, offloaded")
    few = {name: row for name, row in memory.rows().items() if name in wanted}
    presets = {name: replace(TINY, name=name) for name in memory.SIZES} | {"tiny": TINY}
    monkeypatch.setattr(memory, "rows", lambda: few)
    monkeypatch.setattr(memory, "SIZES", memory.SIZES[:1])
    monkeypatch.setattr(memory, "PRESETS", presets)
    monkeypatch.setattr(memory, "CURVES", {memory.BASELINE: memory.CURVES[memory.BASELINE]})
    monkeypatch.setattr(memory, "FRAMES", (17, 81))
    monkeypatch.setattr(memory, "RESOLUTIONS", {"720p": memory.RESOLUTIONS["720p"]})
    monkeypatch.setattr(memory, "SMALL_LATENT", TINY.latent)

    def predictions(cases, context):
        found = {}
        for case in cases:
            wide = replace(case, train="full", memory=memory.narrowed(case.memory, "bf16"))
            if wide not in found:
                found[wide] = memory._predicted([wide])[0]
            found[case] = found[wide]
        return {case: found[case] for case in cases}

    monkeypatch.setattr(memory, "predictions", predictions)
    monkeypatch.setattr(bench_run, "PRESETS", presets)
    monkeypatch.setattr(kept, "PRESETS", presets)
    monkeypatch.setattr(kept, "SIZES", memory.SIZES)


@pytest.mark.slow
def test_a_run_writes_tables_records_and_the_curves(quick, tmp_path, capsys):
    status, record = run_suites(tmp_path, "memory")
    assert status == 0, capsys.readouterr().err
    suite = record["suites"]["memory"]
    tables = {table["name"]: table["rows"] for table in suite["tables"]}
    assert list(tables) == ["memory", "kept-policies", "memory-small"]
    assert [row[1] for row in tables["memory"]] == list(memory.rows())
    assert [row[0] for row in tables["memory-small"]] == list(memory.rows())
    assert suite["problems"] == [] and suite["figures"] == ["memory.png"]
    assert (tmp_path / "memory.png").stat().st_size > 1000
    ran = {c["row"]: c for c in suite["cases"] if c["case"] == "run"}
    assert ran["none"]["host_bytes"] == 0 < ran["attention, offloaded"]["host_bytes"]
    assert ran["attention, offloaded"]["kept_bytes"] < ran["none"]["kept_bytes"]
    assert ran[memory.BASELINE]["patched"] is False
    simulated = [c for c in suite["cases"] if c["case"] == "simulated"]
    assert all(sum(c["categories"].values()) == c["peak_bytes"] for c in simulated)


@pytest.mark.slow
def test_a_policy_with_another_gradient_is_a_problem(quick, monkeypatch):
    feedback = MeasuredStep.feedback

    def wrong(self, noise=None):
        feedback(self, noise)
        if self.generator.gradient_checkpointing:
            self.parameters[0].grad.mul_(1.001)

    monkeypatch.setattr(MeasuredStep, "feedback", wrong)
    _, problems = memory.run_small_on_cpu(context())
    assert problems == ["attention, offloaded: a gradient is not that of policy none, bit for bit"]


def test_kept_bytes_of_policies():
    def kept_by(policy, train):
        return kept.policy_bytes(SMALL, context(), policy, train=train)

    x = 2 * SMALL.tokens * SMALL.dim
    lse = 4 * SMALL.tokens * SMALL.heads
    for train in (True, False):
        assert kept_by("full", train) == x
        # The cross-attention to a few text tokens runs again.
        assert kept_by("attention", train) == 2 * x + lse
    assert kept_by("none", True) > kept_by("none", False) > kept_by("attention", False)


# On a GPU, its part replaced.


@pytest.fixture
def gpu(quick, monkeypatch):
    """Imitate a device of 80 GiB on the CPU; its allocator's peak is 10 GiB."""
    calls = []
    answers = {"empty_cache": None, "reset_peak_memory_stats": None, "memory_reserved": GIB}
    answers |= {"max_memory_allocated": 10 * GIB, "max_memory_reserved": 11 * GIB}
    answers |= {"mem_get_info": (78 * GIB, 80 * GIB)}
    answers |= {"get_device_properties": SimpleNamespace(total_memory=80 * GIB)}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, _: calls.append(f))
    monkeypatch.setattr(memory, "this_gpu", lambda device: find_gpu("h100"))
    return calls


@pytest.mark.slow
def test_policies_on_a_gpu(gpu):
    records, problems = memory.run_small_on_gpu(context())
    assert problems == [] and all(r["peak_bytes"] == 10 * GIB for r in records)
    told = context(device=torch.device("cuda"))
    table = memory._small_table(records, told)
    assert len(table.rows) == len(memory.rows())
    assert_rectangular(table)
    records[1] = {k: v for k, v in records[1].items() if k != "times"} | {"skipped": "no luck"}
    table = memory._small_table(records, told)
    assert table.rows[1][1] == "no luck"
    assert report.to_text(table)


def found_plan(policy, peak_gib, *, feasible=True, missing=0):
    plan = SimpleNamespace(memory=policy, reward_memory=policy, peak=peak_gib * GIB, host=0)
    plan.feasible, plan.missing = feasible, missing
    return plan


@pytest.mark.slow
def test_plans_run_in_a_capped_process(gpu, monkeypatch):
    asked = {}

    def plan(workload, **options):
        asked.update(options, workload=workload)
        chosen = uniform("full", weights="fp32")
        return found_plan(chosen, 12)

    monkeypatch.setattr(memory, "plan_memory", plan)
    rows = (("all of it", "full", "bf16", 24), ("too large", "full", "bf16", 100))
    monkeypatch.setattr(memory, "PLANS", {"tiny": rows})
    tables, records, problems = memory.run_plans(context())
    assert gpu[0] == pytest.approx((24 - 1) / 80) and gpu[-1] == 1.0
    assert asked["workload"].config["num_layers"] == TINY.layers and not asked["workload"].sft
    assert records[0]["peak_bytes"] == 10 * GIB and records[0]["outside_bytes"] == GIB
    assert tables[0].rows[0][3:6] == ["12.0 GiB", "10.0 GiB", "+20.0%"]
    assert records[1]["budget_bytes"] == 80 * GIB and problems == []


def test_a_plan_that_does_not_fit_is_a_problem(gpu, monkeypatch):
    found = found_plan(uniform("full"), 30, feasible=False, missing=6 * GIB)
    monkeypatch.setattr(memory, "plan_memory", lambda *a, **k: found)
    monkeypatch.setattr(memory, "PLANS", {"tiny": (("it", "full", "bf16", 24),)})
    _, _, problems = memory.run_plans(context())
    assert problems == ["it in 24 GiB: no policy fits, 6.0 GiB are missing"]

    def full(case, context, budget):
        raise UnavailableError("out of memory")

    found.feasible = True
    monkeypatch.setattr(memory, "run_capped", full)
    tables, _, problems = memory.run_plans(context())
    assert problems == ["it in 24 GiB: out of memory"]
    assert len(tables[0].rows[0]) == len(tables[0].columns)
