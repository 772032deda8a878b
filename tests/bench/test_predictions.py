"""Predictions from machine code: parsing, the path of a warp, the replay, and the baseline."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import aot
import predict
import pytest
import suites
from attention_speed import LoopCost
from bench_runs import ROOT, make_context
from machine_code import chips, cuda, flow, grids, replay, sass
from machine_code import predict as one
from sass_listing import listing
from suites import machine_code

LOAD = "LDG.E.128 R8, desc[UR4][R2.64] | write=0"
STORE = "STG.E.128 desc[UR4][R4.64], R8 | wait=0b1 read=1"
ADVANCE = ("IADD3 R2, R2, 0x10, RZ | wait=0b10", "IADD3 R4, R4, 0x10, RZ")


def loop(*body):
    """Return the lines of a kernel whose loop, at 0x20, runs ``body``."""
    end = 16 * (len(body) + 4)
    start = ("LDC.64 R2, c[0x0][0x210]", "LDC.64 R4, c[0x0][0x218]")
    return [*start, *body, "@P0 BRA 0x20", "EXIT", f"BRA {end:#x}"]


COPY_LOOP = loop(LOAD, STORE, *ADVANCE)
POINTERS = {0x210: "x_ptr", 0x218: "y_ptr"}


def copy_loop(lines=COPY_LOOP):
    code = sass.parse(listing(*lines))
    flow.name_tensors(code, POINTERS, lambda i: "DRAM")
    return code


# Parsing.


def test_instructions_and_control_bits():
    text = listing(
        "@!P1 LDG.E.U16 R8, desc[UR4][R2.64] | stall=3 write=2 read=5 wait=0b101", "EXIT"
    )
    load, leave = sass.parse(text)
    assert (load.at, load.predicate, load.op, load.width) == (0, "@!P1", "LDG", 2)
    assert (load.stall, load.write_bar, load.read_bar, load.wait) == (3, 2, 5, 0b101)
    assert (leave.at, leave.op, leave.write_bar) == (16, "EXIT", 7)


def test_widths():
    names = {"LDG.E.128": 16, "STG.E.64": 8, "LDG.E": 4, "LDG.E.U8": 1, "STG.E.ENL2.256": 32}
    for name, width in names.items():
        assert sass.Instruction(0, "", name, "").width == width


def test_one_function_of_several():
    text = listing("NOP", "EXIT", entry="first") + "\n" + listing("EXIT", entry="second")
    assert [i.op for i in sass.parse(text, "second")] == ["EXIT"]
    assert len(sass.parse(text)) == 3


def test_a_failing_tool_says_why(tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho no such cubin >&2\nexit 1\n")
    tool.chmod(0o755)
    with pytest.raises(RuntimeError, match="no such cubin"):
        sass.disassemble(tmp_path / "x.cubin", str(tool))


# The path of a warp.


def test_loops_and_dominators():
    graph = sass.Graph(copy_loop())
    assert [list(block) for block in graph.blocks] == [[0, 1], [2, 3, 4, 5, 6], [7], [8]]
    assert graph.loops() == [sass.Loop(1, 1, frozenset({1}))]  # not the jump to itself at the end
    assert graph.dominators[2] == {0, 1, 2}


def test_tensors_behind_accesses():
    accesses = {i.op: i.tensor for i in copy_loop() if i.op in flow.GLOBAL}
    assert accesses == {"LDG": "x_ptr", "STG": "y_ptr"}


def test_a_loaded_value_carries_no_parameter():
    lines = (COPY_LOOP[0], COPY_LOOP[2], "LDG.E R10, desc[UR4][R8.64]", "EXIT")
    assert [i.tensor for i in copy_loop(lines) if i.op == "LDG"] == ["x_ptr", ""]


def test_a_path_repeats_its_loop():
    path = flow.trace(copy_loop(), [5])
    assert [(len(piece), times) for piece, times in path.pieces] == [(2, 1), (0, 1), (5, 5), (1, 1)]
    assert path.length == 28 and [i.op for i in path.loop] == [
        "LDG",
        "STG",
        "IADD3",
        "IADD3",
        "BRA",
    ]
    assert flow.moved_bytes(path.loop) == 32


def test_parts_of_a_loop_that_some_trips_skip_run_once():
    skipped = ("@P1 BRA 0x60", "LDG.E R20, desc[UR4][R2.64]")
    path = flow.trace(copy_loop(loop(LOAD, STORE, *skipped, *ADVANCE)), [7])
    assert path.conditional == 1
    assert [times for piece, times in path.pieces if len(piece) == 1] == [1, 1]  # and EXIT


def test_every_trip_runs_the_conditional_parts_of_a_cuda_kernel():
    skipped = ("@P1 BRA 0x70", "LDG.E R20, desc[UR4][R2.64]", "IADD3 R20, R20, R20, RZ")
    path = flow.trace(copy_loop(loop(LOAD, STORE, *skipped, *ADVANCE)), [7], every=True)
    assert [i.op for i in path.loop].count("LDG") == 2 and path.conditional == 0


def test_lanes_that_agree_do_not_diverge():
    """The code of lanes that differ lies behind the kernel and jumps back into the loop."""
    code = copy_loop((*loop(LOAD, "BRA.DIV UR4, 0xa0", STORE, *ADVANCE)[:-1], "NOP", "BRA 0x40"))
    assert [i.name for i in flow.trace(code, [5]).loop] == [
        "LDG.E.128", "BRA.DIV", "STG.E.128", "IADD3", "IADD3", "BRA",
    ]  # fmt: skip


def test_without_trips_everything_runs_once():
    path = flow.trace(copy_loop(), [])
    assert path.loop and all(times == 1 for _, times in path.pieces)


# The replay.


def run(lines=COPY_LOOP, trips=64, warps=4, resident=8, blocks=8, latency=800, bandwidth=16.0):
    path = flow.trace(copy_loop(lines), [trips])
    return replay.replay(path, warps, resident, blocks, latency, bandwidth, 1.0)


def test_bytes_in_flight_bound_the_share():
    """One load of 512 bytes a warp under way: Little's law gives the rate."""
    few = run(warps=1, resident=1, blocks=1)
    # A load and a store of 512 bytes for each round trip of about 800 clocks, at 16 bytes a clock.
    assert few.share == pytest.approx(1024 / 800 / 16, rel=0.1)
    assert few.peak_bytes == 512
    many = run(warps=8, resident=8, blocks=8)
    assert many.share > 0.85 and many.peak_bytes == 64 * 512


def test_latency_costs_where_little_is_in_flight():
    near, far = (run(warps=1, latency=latency).share for latency in (400, 1600))
    assert near > 3 * far


def test_loads_issued_together_raise_the_share():
    more = (LOAD.replace("R8", "R12"), STORE.replace("R8", "R12"))
    together = loop(LOAD, more[0], STORE, more[1], *ADVANCE)
    alone = dict(warps=1, resident=1, blocks=1)
    assert run(together, **alone).share > 1.8 * run(**alone).share


def test_masked_lanes_move_no_bytes():
    path = flow.trace(copy_loop(), [8])
    full, half = (replay.replay(path, 1, 1, 1, 800, 16.0, useful) for useful in (1.0, 0.5))
    assert half.peak_bytes == full.peak_bytes / 2


def test_warps_wait_for_their_block_at_a_barrier():
    with_barrier = loop(LOAD, STORE, "BAR.SYNC.DEFER_BLOCKING 0x0 | wait=0b11", *ADVANCE)
    apart, together = run(resident=2, blocks=2), run(with_barrier, resident=2, blocks=2)
    assert together.share < apart.share


def test_a_counted_wait_lets_the_newest_loads_go_on():
    copy = ("LDGSTS.E.128 [R9], desc[UR4][R2.64]", "LDGDEPBAR | write=0")
    newest, every = (loop(*copy, f"DEPBAR.LE SB0, {keep:#x}", *ADVANCE) for keep in (3, 0))
    assert run(newest, warps=1).share > 2 * run(every, warps=1).share


def test_a_barrier_of_a_cluster_takes_longer_than_one_of_a_block():
    of_cluster, of_block = (
        run(loop(LOAD, STORE, f"{name} | wait=0b11", *ADVANCE), latency=400, warps=1)
        for name in ("UCGABAR_WAIT", "BAR.SYNC.DEFER_BLOCKING 0x0")
    )
    assert of_cluster.share < 0.7 * of_block.share


def test_a_long_loop_is_judged_by_the_pace_of_its_later_trips():
    """A cut to fewer trips leaves the share: start and end of a block are not repeated."""
    path = flow.trace(copy_loop(), [1000])
    long, longer = (
        replay.replay(flow.WarpPath([(p, n * k) for p, n in path.pieces], path.loop, 0), 8, 4, 4,
                      800, 16.0, 1.0).share
        for k in (1, 4)
    )  # fmt: skip
    assert long == pytest.approx(longer, rel=0.02)


def test_a_slow_pipe_bounds_the_issue():
    slow = loop(LOAD, STORE, *["MUFU.EX2 R20, R20"] * 64, *ADVANCE)
    assert run(slow, warps=8, trips=8).share < 0.5 * run(warps=8, trips=16).share


def test_long_grids_are_cut_to_whole_waves():
    path = flow.trace(copy_loop(), [100])
    short, long = (replay.replay(path, 8, 4, blocks, 800, 16.0, 1.0) for blocks in (400, 40000))
    assert short == long


# Occupancy and pipes.


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (90, 128, 0, 4, 4),  # 16 warps of 128 registers fill the register file
        (90, 32, 0, 1, 32),
        (90, 40, 100 * 1024, 4, 2),
        (120, 32, 0, 8, 6),  # 48 warps
        (80, 168, 0, 4, 3),
    ],
)
def test_resident_blocks(arch, registers, shared, warps, blocks):
    assert chips.resident_blocks(arch, registers, shared, warps) == blocks


def test_pipes():
    expected = {
        "FFMA.FTZ": ("fma", 1), "IMAD.MOV.U32": ("fma", 1), "IMAD.WIDE.U32": ("fma", 2),
        "MUFU.RCP": ("mufu", 8), "LOP3.LUT": ("alu", 2), "LDG.E": ("", 0), "UIADD3": ("", 0),
    }  # fmt: skip
    assert {name: chips.pipe_of(name) for name in expected} == expected


# Cases of the operations.


def test_offsets_of_parameters():
    kernel = SimpleNamespace(arg_names=["x_ptr", "n", "absent_ptr", "y_ptr", "D"])
    case = SimpleNamespace(kernel=kernel, types={"x_ptr": "*bf16:16", "n": "i32", "y_ptr": "*fp32"})
    assert one.parameter_offsets(case, 90) == {0x210: "x_ptr", 0x220: "y_ptr"}


@pytest.mark.parametrize("op", grids.GRIDS)
def test_every_grid_covers_all_tokens(op):
    for case in aot.OPERATIONS[op]((9, 0), False):
        grid = grids.GRIDS[op](case, (9, 0))
        if grid is None:
            assert case.label.startswith("merge")
            continue
        assert grid.blocks > 0 and grid.elements and grid.elements.keys() <= case.types.keys()
        written = [name for name in grid.elements if name.startswith(("y", "out", "h_", "d", "q_"))]
        assert written or grid.extra or op in ("flow_loss", "query_pool"), case.label


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile csrc/")
def test_cuda_kernels_read_each_token_once():
    for found in cuda.predict_query_pool(90, "D=1536"):
        assert not found.spilled_bytes and found.resident_blocks == 2
        loads = [line for line in found.listing if "LDGSTS" in line or "LDG." in line]
        assert loads and all(line.endswith("DRAM") for line in loads)
        assert found.share > 70


def test_limits_in_words():
    def limits(shares=(95, 93, 91), pressure=20, waves=8.0, balance=1.0, extra=0.0):
        grid = grids.Grid(1, [4], {})
        return one._limits(shares, {"issue": pressure, "lsu": 0}, waves, balance, extra, grid)

    assert limits() == "bandwidth"
    assert limits(pressure=97) == "issue-bound"
    assert limits((60, 45, 38)) == "latency: too few bytes in flight"
    assert limits(waves=3.1) == "tail: 3.10 waves"
    assert limits(extra=0.2) == "partial sums or a second pass: +20 % bytes"
    assert limits((80, 78, 76)) == "serial reductions and ramp"


def prediction(arch, share=91, op="rms_norm"):
    return one.Prediction(
        op, "forward", arch, (95, share, 80), 64, 0, 8, 32, 20.5, 4.0, {"issue": 50}, 2, 80.0,
        "bandwidth", ("a line",),
    )  # fmt: skip


def test_the_suite_makes_a_table(monkeypatch):
    def find(arch, record):
        return [prediction(arch, 80 + arch // 10)]

    monkeypatch.setattr(predict, "find", find)
    monkeypatch.setattr(predict, "find_attention", list)
    assert suites.load("machine-code") is machine_code.run
    result = machine_code.run(make_context())
    table, attention = result.tables
    assert not attention.rows and table.rows == [
        ["rms_norm", "forward", "95 / 89 / 80", "32 / 20.5", "88", "90", "92", "bandwidth"]
    ]
    assert any("not measurements" in note for note in table.notes)
    assert len(result.cases) == 4 and not result.problems
    assert "rms_norm forward: 64 registers" in predict.describe(prediction(90))


def test_unknown_operations_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        predict.main(["no_such_op"])
    assert "no grids of no_such_op" in capsys.readouterr().err


# The baseline: the newest record with predictions.


def assert_no_drop(arch, ops=()):
    record = predict.newest_record(ROOT / "bench" / "results")
    before = {p.name: p.share for p in predict.read_record(record) if p.arch == arch}
    if shutil.which("nvcc") is None:
        before = {name: share for name, share in before.items() if "CUDA" not in name}
    before = {name: share for name, share in before.items() if not ops or name.split()[0] in ops}
    found = {p.name: p for p in predict.find(arch, ops, record=record)}
    assert before and before.keys() <= found.keys(), "record --suite machine-code again"
    drops = {n: (s, found[n].share) for n, s in before.items() if found[n].share < s - 5}
    assert not drops, f"predicted percent of the copy rate, before and now: {drops}"
    assert not [p.name for p in found.values() if p.spilled_bytes]


def write_record(path, predictions, date="2026-01-01"):
    cases = [{"case": p.name, **dataclasses.asdict(p), "listing": None} for p in predictions]
    record = {"run": {"date": date}, "suites": {"machine-code": {"cases": cases}}}
    path.write_text(json.dumps(record))


def test_the_newest_record_is_read(tmp_path):
    assert predict.newest_record(tmp_path) is None
    (tmp_path / "other.json").write_text(json.dumps({"run": {"date": "2027"}, "suites": {}}))
    write_record(tmp_path / "b.json", [prediction(80)], "2026-01-02")
    write_record(tmp_path / "c.json", [])
    assert predict.newest_record(tmp_path) == tmp_path / "b.json"
    (read,) = predict.read_record(tmp_path / "b.json")
    assert read == dataclasses.replace(prediction(80), listing=())


@pytest.mark.aot
@pytest.mark.slow
def test_known_machine_code_is_not_replayed(tmp_path):
    """Change the shares of a record: they come back for the same code, and only for it."""
    first, second = predict.find(90, ["flow_loss"], "backward")
    changed = dataclasses.replace(first, shares=(3, 2, 1), listing=())
    other = dataclasses.replace(second, shares=(3, 2, 1), code="0" * 16)
    write_record(tmp_path / "known.json", [changed, other])
    assert predict.find(90, ["flow_loss"], "backward", tmp_path / "known.json") == [changed, second]


@pytest.mark.aot
def test_no_prediction_drops():
    """Compile the kernels of rms_norm and norm_modulate; the slow tier has all operations."""
    assert_no_drop(90, ["rms_norm"])


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.CAPABILITIES)
def test_no_prediction_drops_on_any_architecture(arch):
    assert_no_drop(arch)


# Attention.


def test_speeds_of_sparse_attention_are_over_dense_ones_of_the_same_precision():
    names = ("a 16-bit backend", "rollout_attention x", "sparse_attention exact bf16",
             "sparse_attention int8_fp8 bf16")  # fmt: skip
    costs = [LoopCost(name, 100.0 * i, 1000.0 * 2**i) for i, name in enumerate(names)]
    table = machine_code.attention_table(costs)
    assert [row[3:] for row in table.rows] == [
        ["–"] * 3,
        ["–"] * 3,
        ["0.25", "0.50", "1.00"],
        ["0.25", "0.50", "1.00"],
    ]


@pytest.mark.slow  # compiles three kernels
def test_loops_of_attention():
    costs = {cost.label.split()[0]: cost for cost in predict.find_attention()}
    assert set(costs) == {"a", "rollout_attention", "sparse_attention"}
    assert all(100 < c.instructions < 1000 for c in costs.values() if c.instructions)
    assert 512 < costs["rollout_attention"].clocks < costs["sparse_attention"].clocks < 4000
