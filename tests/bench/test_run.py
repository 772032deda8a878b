"""The benchmark itself: ledger, FLOPs, timing, tables, records, arguments, README tables."""

import functools
import json
import shutil
import subprocess
from dataclasses import replace

import aot
import harness
import pytest
import report
import results_tables
import run as bench_run
import suites
import torch
from bench_runs import CPU, ROOT, make_context, run_suites
from harness import Preset, Table, UnavailableError
from suites import block, facts, resources
from suites import kernels as kernel_suite

from prfl_fast.kernels import attention, query_pool

KIB = 256  # float32 elements in a kibibyte
SMALL = Preset("small", 48, 2, 96, 1, (3, 4, 6), text_tokens=5, text_dim=16)


context = functools.partial(make_context, preset=SMALL)
# Memory.


def test_saved_bytes_counts_each_storage_once_and_not_the_excluded():
    x, w = torch.randn(KIB, requires_grad=True), torch.randn(KIB, requires_grad=True)
    assert harness.saved_bytes(lambda: x * w) == 2048
    assert harness.saved_bytes(lambda: x * w, exclude=[w]) == 1024
    half = slice(KIB // 2)
    assert harness.saved_bytes(lambda: (x[half] * w[half]).sum() + x.exp().sum()) == 2048 + 1024


# FLOPs.


def test_flops_of_our_attention_are_those_of_pytorch():
    q, k = torch.randn(2, 24, 32, requires_grad=True), torch.randn(2, 40, 32, requires_grad=True)

    def ours():
        attention(q, k, k, heads=4)[0].sum().backward()

    def plain():
        heads = [t.unflatten(2, (4, 8)).transpose(1, 2) for t in (q, k, k)]
        torch.nn.functional.scaled_dot_product_attention(*heads).sum().backward()

    forward = 4 * 2 * 24 * 40 * 32
    assert harness.count_flops(ours) == harness.count_flops(plain) == 3.5 * forward


def test_flops_of_the_query_pool():
    x, u = torch.randn(2, 40, 16, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    unit = 2 * 40 * 16 * 3
    assert harness.count_flops(lambda: query_pool(x, u)) == 4 * unit
    assert harness.count_flops(lambda: query_pool(x, u)[0].sum().backward()) == (4 + 10) * unit
    frozen = u.detach()
    assert harness.count_flops(lambda: query_pool(x, frozen)[0].sum().backward()) == (4 + 8) * unit


# Timing.


def test_timing_quantiles():
    timing = harness.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.runs) == (3.5, 2.0, 5.0, 6)


def test_side_by_side_takes_turns_and_rotates_inputs():
    calls = []
    sets = [lambda i=i: calls.append(("b", i)) for i in range(3)]
    works = {"a": lambda: calls.append(("a", 0)), "b": sets}
    times = harness.time_side_by_side(works, CPU, seconds=10.0, at_most=4)
    assert times["a"].runs == times["b"].runs == 4
    names = [name for name, _ in calls]
    assert names == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]  # warm-up, then four rounds
    assert [i for name, i in calls if name == "b"] == [0, 1, 2, 0, 1]


def test_input_sets_exceed_the_cache():
    assert harness.input_sets(1 << 40, CPU) == 1
    assert harness.input_sets(harness.CACHE_BYTES, CPU) == 2
    assert harness.input_sets(1, CPU, limit=7) == 7


# Tables and records.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report.seconds(1.234), "1.23 s"),
        (report.seconds(0.04567), "45.7 ms"),
        (report.seconds(7.891e-6), "7.89 µs"),
        (report.seconds(float("nan")), "–"),
        (report.size(1_234_567), "1.23 MB"),
        (report.size(12), "12 B"),
        (report.size(None), "–"),
        (report.flops(3.2e10), "32.0 GFLOP"),
        (report.ratio(12.34), "12.3×"),
        (report.ratio(0.5), "0.500×"),
        (report.number(0.25), "0.250"),
        (report.number(1e-7), "1.0e-07"),
    ],
)
def test_units(text, expected):
    assert text == expected


def table():
    return Table("t", "A title", ["what", "time"], [["long name", "1 s"], ["x", "12.5 s"]], ["n."])


def test_tables_as_text_and_markdown():
    text = "A title|what         time|---------  ------|long name     1 s|x          12.5 s|  n."
    assert report.to_text(table()).splitlines() == text.split("|")
    rows = "| what | time |\n| :-- | --: |\n| long name | 1 s |\n| x | 12.5 s |"
    assert report.to_markdown(table()) == f"**A title**\n\n{rows}\n\nn."


def test_json_is_strict_and_replaced_only_when_whole(tmp_path):
    path = tmp_path / "results.json"
    report.write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "c": "µ"})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5], "c": "µ"}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        report.write_json(path, {"bad": object()})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_figures_are_written_without_a_display(tmp_path):
    figure, axes = report.new_figure(3, 2)
    report.grouped_bars(axes, ["a", "b"], {"eager": [1, None], "x": [2, 3]}, title="t", unit="s")
    report.save_figure(tmp_path / "f.png", figure)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


# Whole runs.


@pytest.fixture
def quick(monkeypatch, one_round):
    """Shrink the kernels suite to a handful of tokens, with two operations."""
    presets = {**harness.PRESETS, "tiny": replace(SMALL, name="tiny")}
    monkeypatch.setattr(bench_run, "PRESETS", presets)
    few = [c for c in kernel_suite.CASES if c.op in ("norm_modulate", "query_pool")]
    monkeypatch.setattr(kernel_suite, "CASES", tuple(few))
    monkeypatch.setattr(resources, "CASES", tuple(few))
    monkeypatch.setattr(kernel_suite, "PRESETS", {"wan1.3b-480p": replace(SMALL, name="large")})
    monkeypatch.setattr(harness, "CACHE_BYTES", 1)
    monkeypatch.setattr(harness, "copy_ceiling", lambda device: 1e10)
    used = [aot.Resources("op", "forward", c, 4, 40 + c, 0, 2048) for c in aot.CAPABILITIES]
    monkeypatch.setattr(aot, "measure", lambda ops, only: [u for u in used if u.capability in only])


def test_a_run_writes_records_report_and_plots(quick, tmp_path, capsys):
    status, record = run_suites(tmp_path / "out", "kernels")
    assert status == 0
    run = record["run"]
    assert run["format"] == harness.FORMAT
    assert run["git"]["sha"] and set(run["git"]) == {"sha", "dirty"}
    assert {"python", "torch", "prfl_fast"} <= set(run["versions"])
    assert run["command"].startswith("python bench/run.py") and "--out" not in run["command"]
    assert run["date"].endswith("+00:00") and run["seed"] == 0 and run["preset"] == "tiny"
    assert run["device"]["slug"].startswith("cpu-") and run["device"]["name"]
    suite = record["suites"]["kernels"]
    assert suite["problems"] == [] and suite["wall_s"] > 0
    case = suite["cases"][0]
    assert case["case"] == "norm_modulate" and set(case["times"]) == {"forward", "backward", "both"}
    assert set(case["times"]["both"]) == {"naive", "prfl_fast reference"}
    assert set(case["times"]["both"]["naive"]) == {"median_s", "p20_s", "p80_s", "runs"}
    elements = SMALL.tokens * SMALL.dim
    assert case["bytes"]["forward"] == 2 * 4 * elements  # x in, y out
    assert case["kept_bytes"]["prfl_fast reference"] < case["kept_bytes"]["naive"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| norm_modulate | forward |" in text and "![kernels](kernels.png)" in text
    for name in ("kernels.png", "kernels-kept.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    (table,) = [t for t in suite["tables"] if t["name"] == "resources"]
    cells = [f"{40 + c} / 0 / 2.0" for c in resources.CAPABILITIES]
    assert table["rows"] == [["op", "1", *cells]]
    assert "Operations against plain PyTorch" in capsys.readouterr().out


def test_no_speed_up_for_a_wrong_operation(quick, monkeypatch, tmp_path, capsys):
    right = kernel_suite.CASES[0]
    wrong = replace(right, ours=lambda t: right.ours(t) * 1.001)
    monkeypatch.setattr(kernel_suite, "CASES", (wrong,))
    assert run_suites(tmp_path, "kernels")[0] == 1
    captured = capsys.readouterr()
    (row,) = [line for line in captured.out.splitlines() if "check failed" in line]
    assert row.split() == ["norm_modulate", "check", "failed"]
    assert "norm_modulate: output 0: error 1.0e-03" in captured.err


def test_a_suite_that_fails_is_recorded_and_the_next_one_runs(quick, monkeypatch, tmp_path, capsys):
    def load(name):
        def broken(context):
            raise RuntimeError("no luck")

        return broken if name == "block" else kernel_suite.run

    monkeypatch.setattr(suites, "load", load)
    status, record = run_suites(tmp_path, "block", "kernels")
    assert status == 1
    assert record["suites"]["block"]["error"] == "RuntimeError: no luck"
    assert record["suites"]["kernels"]["tables"]
    assert "block: did not finish: RuntimeError: no luck" in capsys.readouterr().err


@pytest.mark.parametrize("case", kernel_suite.CASES, ids=lambda case: case.name)
def test_every_operation_passes_its_check(case):
    assert kernel_suite.verify(case, context()) < (case.tolerance or 1e-5)


@pytest.mark.parametrize("case", kernel_suite.CASES, ids=lambda case: case.name)
def test_bytes_follow_from_shapes(case):
    """The count of the ahead-of-time report is that of a measured case."""
    moved = resources.moved_bytes(case, SMALL, torch.float32)
    tensors = kernel_suite.make_tensors(case, SMALL, context())
    outputs = case.ours(tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    read = sum(tensors[name].nbytes for name in case.reads)
    assert moved["forward"] == read + sum(o.nbytes for o in outputs)
    assert ("backward" in moved) == bool(case.leaves)


def test_a_gpu_measures_every_wan_size_unless_one_is_named():
    cuda = replace(context(), device=torch.device("cuda"))
    assert [p.name for p in kernel_suite._presets(cuda)] == list(resources.SIZES)
    assert kernel_suite._presets(replace(cuda, preset_given=True)) == (SMALL,)
    assert kernel_suite._presets(context()) == (SMALL,)


def test_block_and_step_agree_with_the_unpatched_model(one_round):
    pytest.importorskip("diffusers")
    eager = context(baselines=("eager",))
    case, _, problems = block.block_case(eager)
    assert problems == [] and case["difference"]["prfl_fast"] < 1e-5
    assert case["peak_bytes"]["prfl_fast"] < case["peak_bytes"]["eager"]


def test_what_a_cpu_cannot_do_is_said_in_words():
    with pytest.raises(UnavailableError, match="measures a GPU"):
        facts.run(context())
    attention_case = next(c for c in kernel_suite.CASES if c.op == "attention")
    large = harness.PRESETS["wan14b-720p"]
    with pytest.raises(UnavailableError, match="minutes on a CPU|are free"):
        kernel_suite.measure(attention_case, large, replace(context(), preset=large), 1e10)


# Arguments.

BAD_ARGUMENTS = [
    (["--suite", "speed"], "invalid choice: 'speed'"),
    (["--suite"], "expected at least one argument"),
    (["--preset", "wan7b"], "invalid choice: 'wan7b'"),
    (["--baseline", "eager,fast"], "'fast' is none of eager, compiled, reference:PATH"),
    (["--baseline", "compiled:x"], "'compiled:x' is none of"),
    (["--baseline", "reference:/nowhere"], "/nowhere is not a checkout of HY-Video-PRFL"),
    (["--baseline", "reference"], "(no path) is not a checkout"),
    (["--seed", "-1"], "--seed is -1, expected a non-negative integer"),
    (["--seed", "one"], "invalid int value: 'one'"),
    (["--device", "tpu"], "invalid choice: 'tpu'"),
    (["--out", __file__], "is a file, expected a folder"),
    (["--fast"], "unrecognized arguments: --fast"),
]
if not torch.cuda.is_available():
    BAD_ARGUMENTS += [
        (["--device", "cuda"], "PyTorch sees no CUDA device"),
        (["--suite", "facts"], "it measures a GPU"),
    ]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=lambda a: " ".join(a)[:30])
def test_bad_arguments_give_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_run.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("bench/run.py: error: ") and message in error
    assert error.count("\n") == 1


def test_the_help_has_a_line_for_each_suite_with_its_newest_time(tmp_path, capsys):
    for name, day, command, walls in (
        ("b", 2, "run.py --seeds 5", {"alignment": 300.4, "block": 16.7}),
        ("a", 3, "run.py", {"block": 89.6, "step": 89.4}),
        ("c", 1, "run.py", {"block": 3.0}),
    ):
        record = {"suites": {suite: {"wall_s": wall} for suite, wall in walls.items()}}
        record["run"] = {"date": f"2026-11-0{day}", "command": command}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    lines = {line.split()[0]: line.split() for line in bench_run._suite_lines(tmp_path)}
    assert tuple(lines) == tuple(suites.DESCRIPTIONS)
    assert lines["alignment"][1:3] == ["5", "min"] and lines["alignment"][-2:] == ["(5", "seeds)"]
    assert lines["block"][1:3] == ["90", "s"] and "seeds)" not in lines["block"]
    assert lines["step"][1:3] == ["89", "s"] and lines["facts"][1] == "–"
    with pytest.raises(SystemExit):
        bench_run.parse(["--help"])
    told = capsys.readouterr().out.splitlines()
    shown = [line for line in told for name in lines if line.startswith(f"  {name} ")]
    assert len(shown) == len(lines) and max(map(len, shown)) <= 100


def test_defaults():
    told, names = bench_run.parse(["--device", "cpu"])
    assert names == ("kernels", "block", "memory", "alignment")
    assert told.preset.name == "tiny" and told.baselines == ("eager", "compiled")
    assert not told.compile_ops
    told, _ = bench_run.parse(["--device", "cpu", "--baseline", "compiled"])
    assert told.baselines == ("eager", "compiled") and told.compile_ops


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_gpu_script_refuses_unknown_stages(tmp_path):
    script = ROOT / "bench" / "gpu.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0

    def refused(words, **options):
        run = subprocess.run(["bash", script, *words], capture_output=True, text=True, **options)
        assert run.returncode == 2
        return run.stderr

    assert "expected quick, test, racecheck" in refused(["everything"])
    assert "not a folder" in refused(["test", "/nowhere"])
    # Relative to where it is called, not to the repository.
    found = refused(["test", "bench"], cwd=tmp_path)
    assert f"'{tmp_path}/bench'" in found


# README tables.


@pytest.fixture
def project(tmp_path):
    """Write a results page with one marked table and a folder with two records of it."""
    run = harness.run_record(context(), ["bench/run.py"])
    (tmp_path / "results" / "box").mkdir(parents=True)
    for name, date, value in (("old", "2026-01-01", "2 s"), ("new", "2026-02-01", "1 s")):
        fresh = Table("speed", "Speed", ["what", "time"], [["it", value]])
        suite = {"tables": [vars(fresh)], "cases": []}
        record = {"run": {**run, "date": date}, "suites": {"s": suite, "broken": {"error": "no"}}}
        (tmp_path / "results" / "box" / f"{name}.json").write_text(json.dumps(record))
    marked = "# A\n\n<!-- bench:box/speed -->\nstale\n<!-- /bench -->\nend\n"
    (tmp_path / "RESULTS.md").write_text(marked)
    return tmp_path


def tables(project, *flags):
    return results_tables.main(
        [*flags, "--file", str(project / "RESULTS.md"), "--results", str(project / "results")]
    )


def test_drift_of_results_is_seen_and_mended_from_the_newest_record(project, capsys):
    results = project / "RESULTS.md"
    before = results.read_text()
    assert tables(project, "--check") == 1
    assert "tables differ from the records" in capsys.readouterr().err
    assert results.read_text() == before
    assert tables(project) == 0
    text = results.read_text()
    assert "| it | 1 s |" in text and "2026-02-01" in text
    assert text.endswith("<!-- /bench -->\nend\n")
    assert tables(project, "--check") == 0
    results.write_text(text.replace("| it | 1 s |", "| it | 0.5 s |"))
    assert tables(project, "--check") == 1


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("<!-- bench:box/size -->\n<!-- /bench -->", "no record under"),
        ("<!-- bench:box/speed -->\nno end", "lacks its <!-- /bench -->"),
        ("<!-- bench:speed -->\n<!-- /bench -->", "malformed"),
    ],
)
def test_result_markers_without_a_record_or_an_end(project, capsys, marker, message):
    (project / "RESULTS.md").write_text(f"{marker}\n")
    assert tables(project, "--check") == 1
    assert message in capsys.readouterr().err


def test_a_record_that_is_none_is_named(project, capsys):
    (project / "results" / "box" / "zero.json").write_text("{")
    assert tables(project, "--check") == 1
    assert "zero.json: not a record of bench/run.py" in capsys.readouterr().err
