"""Measure host time of operations and blocks, and blocks by width and dtype, on one CPU thread.

Each one and the PyTorch calls that it replaces run in turns. Host time is measured at sizes with
little arithmetic.
"""

import copy
import cProfile
import pstats
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import harness
import report
import torch
from harness import Context, Preset, SuiteResult, Table

import prfl_fast
from prfl_fast.rollout import FlowEuler, FlowUniPC, Sampler, Trajectory
from prfl_fast.training.lora import add_lora
from suites import block, wan
from suites.floors import FLOORS
from suites.kernel_cases import CASES
from suites.kernel_checks import Case, as_tuple, cotangents, draw_inputs

TINY = Preset("host", 64, 2, 128, 1, (2, 4, 8), text_tokens=8, text_dim=16)
CPU = torch.device("cpu")
STEPS = (40, 1000)
SECONDS, ROUNDS = 0.4, 2000
SECONDS_BY_WIDTH = 5.0  # a step takes a second at D = 512
WIDTHS, DTYPES = (64, 256, 512), (torch.float32, torch.bfloat16)
# Compiling a block is slow, so each dtype is compiled at one width.
COMPILED = ((64, torch.float32), (256, torch.bfloat16))
# A CPU without bfloat16 units is slow at D = 512: fewer tokens, and no step of four blocks.
BFLOAT16_LATENT, BFLOAT16_STEPS = (2, 16, 16), 64


def count_calls(thunk: Callable[[], object]) -> int:
    """Return the number of calls of Python functions, and of C functions by them, in a run."""
    thunk()
    counts = []
    for _ in range(2):  # one of two steps may be the first of a new trajectory
        profile = cProfile.Profile()
        profile.runcall(thunk)
        counts.append(int(pstats.Stats(profile).total_calls))
    return min(counts)


def compare(thunks: dict[str, Callable[[], object]], case: str) -> dict[str, Any]:
    """Return the record of versions of one piece of work: times and calls by name."""
    timing = {"seconds": SECONDS, "at_most": ROUNDS}
    times = harness.time_side_by_side(thunks, CPU, **timing)
    record: dict[str, Any] = {"case": case, "times": {n: t.record() for n, t in times.items()}}
    return record | {"calls": {n: count_calls(thunk) for n, thunk in thunks.items()}}


def operation(case: Case) -> list[dict[str, Any]]:
    """Return the records of an operation's forward, and forward and backward."""
    tensors = draw_inputs(case, TINY, CPU, torch.float32)
    leaves = [tensors[name] for name in case.leaves]
    works = {"eager": lambda: case.naive(tensors, torch.float32)}
    works["prfl_fast"] = lambda: case.ours(tensors)
    if case.name in FLOORS:
        works["floor"] = partial(FLOORS[case.name], tensors)
    given = {n: cotangents(as_tuple(work()), 1) for n, work in works.items()}

    def infer(work: Callable[[], Any]) -> None:
        with torch.no_grad():
            work()

    def train(name: str, work: Callable[[], Any]) -> None:
        torch.autograd.grad(as_tuple(work()), leaves, given[name])

    forward = {n: partial(infer, work) for n, work in works.items()}
    both = {n: partial(train, n, work) for n, work in works.items()}
    records = [compare(forward, f"{case.name}, forward")]
    return [*records, compare(both, f"{case.name}, forward + backward")]


def _block(context: Context, setting: str) -> dict[str, Callable[[bool], None]]:
    """Return functions that run an unpatched and a patched block, with gradient or without."""
    model = wan.build(TINY, context, layers=1, device="cpu", dtype=torch.float32)
    if setting == "LoRA":
        add_lora(model, 4)
    models = {"eager": model, "prfl_fast": prfl_fast.patch(copy.deepcopy(model))}
    generator = torch.Generator().manual_seed(context.seed)
    x, text = (torch.randn(1, n, TINY.dim, generator=generator) for n in (TINY.tokens, 8))
    time, x = torch.randn(1, 6, TINY.dim, generator=generator), x.requires_grad_()
    works = {}
    for name, model in models.items():
        if setting == "checkpointing":
            prfl_fast.memory.activation_checkpointing(model, "full")
        rope = model.rope(torch.empty(1, 16, *TINY.latent))
        trained = [p for p in model.blocks.parameters() if p.requires_grad]
        block = model.blocks[0]
        if setting == "checkpointing":
            block = partial(model._gradient_checkpointing_func, block)

        def run(gradient: bool, block: Any = block, rope: Any = rope, to: Any = trained) -> None:
            with torch.set_grad_enabled(gradient):
                y = block(x, text, time, rope)
            if gradient:
                torch.autograd.grad(y, [x, *to], y.detach())

        works[name] = run
    return works


def blocks(context: Context) -> list[dict[str, Any]]:
    """Return the records of a block: alone, with activation checkpointing, with LoRA."""
    records = []
    for setting in ("alone", "checkpointing", "LoRA"):
        works = _block(context, setting)
        label = "block" if setting == "alone" else f"block, {setting}"
        passes = {"forward + backward": True}
        if setting != "checkpointing":  # which applies with gradients only
            passes = {"forward": False} | passes
        for what, gradient in passes.items():
            thunks = {n: partial(work, gradient) for n, work in works.items()}
            records.append(compare(thunks, f"{label}, {what}"))
    return records


def _stepper(kind: Any, steps: int) -> Callable[[], object]:
    """Return a function that takes the next step of a trajectory, over and over."""
    sampler = Sampler(lambda x, *_: x, kind(), steps)
    noise = torch.ones(1, 1, 1, 2, 2)
    trajectory = Trajectory(sampler, noise, {})

    def step() -> None:
        nonlocal trajectory
        if trajectory.index == steps:
            trajectory = Trajectory(sampler, noise, {})
        trajectory.run(trajectory.index + 1)

    return step


def solver() -> list[dict[str, Any]]:
    """Return the records of a step without model in schedules of 40 and of 1000 steps."""
    return [
        compare({str(n): _stepper(kind, n) for n in STEPS}, f"step of {kind.__name__}")
        for kind in (FlowEuler, FlowUniPC)
    ]


def by_width(context: Context) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the records of a block and of a PRFL step by D and dtype, and failed checks."""
    records, problems = [], []
    for dim in WIDTHS:
        for dtype in DTYPES:
            narrow = dtype == torch.bfloat16
            preset = replace(
                context.preset, name=f"D {dim}", dim=dim, heads=max(2, dim // 64), ffn_dim=4 * dim,
                latent=BFLOAT16_LATENT if narrow else block.STEP_LATENT_ON_CPU,
            )  # fmt: skip
            step = not narrow or dim <= BFLOAT16_STEPS
            compiled = "compiled" in context.baselines and (dim, dtype) in COMPILED
            baselines = ("eager", "compiled", "both") if compiled else ("eager",)
            sized = replace(context, preset=preset, baselines=baselines, set_dtype=dtype)
            for make in (block.block_case, block.step_case)[: 1 + step]:
                torch._dynamo.reset()  # else the ninth variant of a function would run eager
                record, *_, found = make(sized, SECONDS_BY_WIDTH)
                records.append(record | {"dtype": str(dtype).removeprefix("torch.")})
                problems += [f"D {dim}, {dtype}: {problem}" for problem in found]
    return records, problems


def _width_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for record in records:
        for part, times in record["times"].items():
            work = part if part == "step" else f"block, {part}"
            row = [f"D = {record['dim']}, {record['dtype']}, {work}"]
            for names in (("eager", "prfl_fast"), ("compiled", "both")):
                pair = [times[name]["median_s"] if name in times else None for name in names]
                ratio = pair[0] / pair[1] if pair[0] and pair[1] else None
                row += [*map(report.seconds, pair), report.ratio(ratio)]
            rows.append(row)
    return rows


def run(context: Context) -> SuiteResult:
    """Measure operations, blocks and solver steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        differentiable = [case for case in CASES if case.leaves]
        named = context.each(differentiable, "host", lambda case: case.name)
        cases = [record for case in named for record in operation(case)]
        cases += blocks(context) + solver()
        sized, problems = by_width(context)
    finally:
        torch.set_num_threads(threads)
    rows = []
    for record in cases:
        first, *others = record["times"]
        times = [record["times"][name]["median_s"] for name in (first, *others)]
        calls = [str(record["calls"][name]) for name in (first, others[0])]
        ratios = [f"{time / times[0]:.2f}" for time in times[1:]] + ["–"]
        rows.append([record["case"], *map(report.seconds, times[:2]), *ratios[:2], *calls])
    columns = ["work", "eager", "prfl_fast", "ratio", "floor", "calls", "calls, ours"]
    notes = [f"D = {TINY.dim}, {TINY.tokens} tokens, float32, one thread, medians, in turns."]
    notes += ["floor: ratio of an autograd function in Python with bare calls of ATen, no checks."]
    notes += ["calls: of Python and C functions in one run, by cProfile."]
    few, many = STEPS
    notes += [
        f"Last two rows: ours in a schedule of {few} steps (eager) and of {many} (prfl_fast)."
    ]
    table = Table("host", "Host time", columns, rows, notes)
    columns = ["work", "eager", "prfl_fast", "over eager"]
    columns += ["torch.compile", "prfl_fast, compiled", "over torch.compile"]
    tokens = " and ".join(str(n) for n in dict.fromkeys(r["tokens"] for r in sized))
    notes = [f"L = {tokens} (float32, bfloat16), one thread, medians, in turns."]
    widths = Table("widths", "Blocks on a CPU", columns, _width_rows(sized), notes)
    return SuiteResult([table, widths], cases + sized, problems=problems)
