"""The suites on methods and steps: plans, tables, and each suite end to end at a minimal size."""

import re
from dataclasses import replace

import harness
import method_specs as plans
import pytest
import report
import torch
from bench_runs import ROOT, assert_rectangular, make_context, run_suites
from experiments import small_world, variance
from harness import UnavailableError
from suites import block, memory, methods, rollout, split, step

from prfl_fast.feedback.points import Point

pytest.importorskip("diffusers")

WORLD = small_world.Settings(clips=64, held_out=4, prompts=2)


def test_every_method_has_a_draw_of_its_plan():
    for method in plans.METHODS:
        drawn = method.plan.draw(method.num_inference_steps, torch.Generator().manual_seed(0))
        points = 1 if method.plan.to == "latent" else len(drawn) + method.plan.renoised
        assert points == method.points, method.name
        if method.typical is None:
            continue
        outcomes = method.plan.outcomes(method.num_inference_steps)
        typical = [Point(p, 1, 0.0) if isinstance(p, int) else p for p in method.typical]
        assert len(typical) == len(drawn), method.name
        for i, point in enumerate(typical):
            for value in ("step", "depth"):
                expected = sum(p * getattr(points[i], value) for p, points in outcomes)
                assert abs(getattr(point, value) - expected) <= 1, (method.name, value)


def test_methods_by_name(monkeypatch):
    monkeypatch.setattr(methods, "CHOSEN", ("DRaFT-1", "PRFL, 5 points"))
    assert [m.name for m in methods.chosen()] == ["PRFL, 5 points", "DRaFT-1"]
    monkeypatch.setattr(methods, "CHOSEN", ("DRaFT",))
    with pytest.raises(UnavailableError, match="'DRaFT' is none of RGB ReFL, all frames"):
        methods.chosen()


def test_methods_of_the_gpu_script_exist():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    found = re.findall(r'(?:names|late|long)="(.+)"', script)
    names = ";".join(found).split(";")
    assert len(names) == 14 and set(names) <= {m.name for m in plans.METHODS}


def test_methods_table_is_per_point_and_relative_to_one():
    def case(name, points, seconds, flops, peak):
        sizes = {"points": points, "flops": flops, "peak_bytes": peak}
        return {"method": name, **sizes, "times": {"median_s": seconds}}

    cases = [
        case("PRFL, 1 point", 1, 2.0, 4e9, 1e6),
        case("PRFL, 5 points", 5, 5.0, 8e9, 2e6),
        {"method": "DRaFT-1", "points": 1, "skipped": "out of memory"},
        case("SFT", 1, 1.0, 1e9, 3e6),
    ]
    spread = {"PRFL, 1 point": variance.Estimate(2.5, 0.25)}
    table, problems = methods._table(cases, "Sizes.", spread)
    rows = {row[0]: row[1:] for row in table.rows}
    assert problems == []
    cells = "2.00 s,1.00 MB,4.00 GFLOP,1.00×,1.00×,2.5 ± 0.2"
    assert rows["PRFL, 1 point"] == cells.split(",")
    assert rows["PRFL, 5 points"][2:5] == ["1.60 GFLOP", "0.500×", "0.400×"]
    # One supervised step a point: (1 + 1) / (2 + 1) seconds, (1.6 + 1) / (4 + 1) GFLOP.
    assert rows["PRFL, 5 points + SFT"][1:5] == ["3.00 MB", "2.60 GFLOP", "0.667×", "0.520×"]
    assert rows["DRaFT-1"][0] == "out of memory" and "DRaFT-1 + SFT" not in rows
    assert_rectangular(table)
    drawn = next(note for note in table.notes if "Steps with gradient" in note)
    assert "PRFL, 5 points 3, 11, 19, 27, 35." in drawn and "RGB ReFL" not in drawn
    cases[1]["flops"] = 16e9
    table, problems = methods._table(cases, "", {})
    assert "variance" not in table.columns
    assert_rectangular(table)
    assert problems == ["5 points cost 0.800 of one point's FLOPs each, target 0.5"]


@pytest.mark.slow
def test_methods_run_end_to_end(inline, tiny, monkeypatch, tmp_path):
    few = variance.Settings(groups=3, trajectories=1, calls=2, points=(1, 5), batches=(1,))
    monkeypatch.setattr(variance, "SETTINGS", replace(few, num_inference_steps=11))
    monkeypatch.setattr(variance, "WORLD", WORLD)
    short = [replace(m, num_inference_steps=7) for m in plans.METHODS if m.name.startswith("PRFL")]
    known = [replace(short[0], typical=(3,)), replace(short[1], typical=(0, 1, 2, 3, 4))]
    known += [m for m in plans.METHODS if m.name.startswith(("ControlNet++", "ReNO"))]
    for module in (methods, plans):
        monkeypatch.setattr(module, "METHODS", tuple(known))
    status, record = run_suites(tmp_path, "methods")
    suite = record["suites"]["methods"]
    assert "error" not in suite, suite.get("traceback")
    # Of 7 steps 5 are no bargain.
    assert status == bool(suite["problems"])
    assert any("of one point's FLOPs each" in problem for problem in suite["problems"])
    costs, by_points = suite["tables"]
    assert costs["name"] == "methods" and by_points["name"] == "variance"
    names = ["PRFL, 1 point", "PRFL, 5 points", "ControlNet++", "ReNO, one-step generator"]
    paired = [f"{name} + SFT" for name in names[:2]]
    assert [row[0] for row in costs["rows"]] == names + paired
    assert costs["rows"][3][-1] == "–"  # no gradient of the parameters
    assert suite["figures"] == ["methods.png", "variance.png"]


@pytest.mark.slow
def test_a_step_is_split_into_its_parts(tiny):
    found = step.run(make_context(baselines=("eager", "compiled")))
    table, records = found.tables[0], found.cases
    assert [r["way"] for r in records] == ["eager", "prfl_fast, 1 point", "prfl_fast, 5 points"]
    for record in records:
        seconds = record["seconds_per_point"]
        assert set(seconds) == set(split.PARTS) and min(seconds.values()) > 0
        assert record["peak_bytes"] > 0
    assert list(found.figures) == ["step.png"]
    eager, one = records[:2]
    both = [sum(r["seconds_per_point"].values()) for r in (eager, one)]
    assert table.rows[1][-2] == report.ratio(both[0] / both[1])
    assert_rectangular(table)
    assert found.problems == [] and [r["reward_off"] < 1e-6 for r in records] == [True] * 3
    assert [r.get("latents_off", -1) < 1e-4 for r in records] == [True] * 3
    assert 0 < one["latents_off"] and "latents_off" not in records[2]
    assert set(records[2]["rewards"]) == {str(index) for index in plans.MANY}


def test_steps_without_compiled_models():
    names = [way.name for way in step.ways(make_context(baselines=("eager",), compile_ops=True))]
    assert names == ["eager", "prfl_fast, 1 point", "prfl_fast, 5 points"]
    assert [way.name for way in step.ways(make_context(baselines=("eager",)))] == names
    assert [way.name for way in step.ways(make_context(baselines=("eager", "compiled")))] == names


def test_a_way_with_another_reward_is_a_problem():
    names = ["eager", "prfl_fast, 1 point", "prfl_fast, 5 points, FP8 rollout"]
    values = [0.5, 0.51, 0.6]
    records = [{"way": n, "rewards": {"19": v}} for n, v in zip(names, values, strict=True)]

    def add_latents(value):
        for record, latents in zip(records, (torch.ones(4), torch.full((4,), value)), strict=False):
            record["latents"] = latents

    add_latents(1.01)
    records.append({"way": "reference", "skipped": "no flash_attn"})
    on_cuda = make_context(device=torch.device("cuda"), baselines=("eager", "reference"))
    assert step.compare_rewards(records, on_cuda) == []
    add_latents(1.03)
    records[1]["rewards"]["19"] = 0.53
    assert step.compare_rewards(records, on_cuda) == [
        "prfl_fast, 1 point: the reward after step 19 is 3.0e-02 off eager's, expected at most "
        "2e-02",
        "prfl_fast, 1 point: the latents after step 19 are 3.0e-02 off eager's, expected at most "
        "2e-02",
    ]
    assert all("latents" not in record for record in records)
    assert records[2]["reward_off"] == pytest.approx(0.1) and "reward_off" not in records[3]
    add_latents(1.0)
    records[1]["rewards"]["19"] = float("nan")
    assert len(step.compare_rewards(records, on_cuda)) == 1


def test_sizes_that_take_a_cpu_hours_are_refused():
    for suite in (block, memory, rollout, methods, step):
        with pytest.raises(UnavailableError, match="use --preset tiny"):
            suite.run(make_context(preset=harness.PRESETS["wan14b-720p"]))
