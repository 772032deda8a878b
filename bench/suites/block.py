"""Measure one transformer block and one PRFL step: eager, torch.compile, prfl_fast."""

import copy
import time as clock
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import harness
import report
import torch
from harness import Context, Preset, SuiteResult, Table, UnavailableError

import prfl_fast
from prfl_fast import PRFL, FlowUniPC, LatentRewardModel
from suites import kept as kept_bytes
from suites import wan
from suites.kernels import TOLERANCE

LABELS = {name: name for name in ("eager", "reference", "prfl_fast")}
LABELS["compiled"] = "torch.compile"
LABELS["both"] = "prfl_fast, compiled"
STEP_LAYERS = 4
STEP_SOLVER_STEPS = 10
STEP_INDEX = 4
STEP_LATENT_ON_CPU = (5, 16, 16)
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def block_run(
    model: torch.nn.Module, preset: Preset, context: Context, compiled: bool = False
) -> Run:
    """Return the model's first block; attributes: ``parameters`` of the block, and ``model``."""
    block = torch.compile(model.blocks[0], dynamic=False) if compiled else model.blocks[0]
    # Once a forward for all blocks in the model, so outside of what is timed.
    rope = model.rope(torch.empty((1, 16, *preset.latent), device=context.device))

    def run(x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return block(x, text, time, rope)

    run.parameters, run.model = list(model.blocks[0].parameters()), model
    return run


def _variants(context: Context) -> tuple[dict[str, Run], dict[str, str]]:
    """Return name → block, and name → reason for those that cannot run."""
    preset = context.preset
    model = wan.build(preset, context, layers=1)
    patched = prfl_fast.patch(copy.deepcopy(model))
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    for name in context.baselines:
        if name == "reference":
            try:
                runs[name] = wan.reference_block(model, preset, context)
            except UnavailableError as error:
                missing[name] = str(error)
        elif name == "both":
            runs[name] = block_run(copy.deepcopy(patched), preset, context, compiled=True)
        else:
            runs[name] = block_run(model, preset, context, compiled=name == "compiled")
    runs["prfl_fast"] = block_run(patched, preset, context)
    return runs, missing


def block_inputs(context: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, text, time and the cotangent of the output."""
    preset, generator = context.preset, context.generator(7)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=context.device).to(context.dtype)

    x = randn(1, preset.tokens, preset.dim).requires_grad_()
    text, time = randn(1, preset.text_tokens, preset.dim), randn(1, 6, preset.dim)
    return x, text, time, randn(1, preset.tokens, preset.dim)


def _record(case: str, preset: Preset) -> dict[str, Any]:
    return {"case": case, "preset": preset.name, "tokens": preset.tokens, "dim": preset.dim}


def _error(results: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(harness.relative_error(a, b) for a, b in zip(results, expected, strict=True))


def block_case(
    context: Context, seconds: float = 0.5
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return record, notes and failed checks of the block; ``seconds`` for each measurement."""
    runs, missing = _variants(context)
    notes = [f"{LABELS[name]}: not measured, {reason}." for name, reason in missing.items()]
    problems: list[str] = []
    x, text, time, cotangent = block_inputs(context)

    def train(run: Run, *inputs: torch.Tensor) -> list[torch.Tensor]:
        inputs = inputs or (x, text, time)
        y = run(*inputs)
        leaves = [inputs[0], *run.parameters]
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.type_as(y))]

    def error_over_eager(results: list[torch.Tensor], eager: list[torch.Tensor]) -> float:
        """Return the largest error of the patched block over the unpatched one's, to float64."""
        wide = block_run(copy.deepcopy(runs["eager"].model).double(), context.preset, context)
        given = (t.detach().double() for t in (text, time))
        exact = train(wide, x.detach().double().requires_grad_(), *given)
        pairs = zip(results, eager, exact, strict=True)
        return max(_error([a], [c]) / max(_error([b], [c]), 1e-12) for a, b, c in pairs)

    def infer(run: Run) -> torch.Tensor:
        with torch.no_grad():
            return run(x, text, time)

    record = _record("block", context.preset) | {"kept_bytes": {}, "peak_bytes": {}}
    expected = None
    for name in context.each(runs, "block"):
        run = runs[name]
        start = clock.perf_counter()
        try:
            # The reference has its parameters in another order: output and input gradient compare.
            results = train(run)[: 2 if name == "reference" else None]
        except Exception as error:
            if name == "prfl_fast":
                raise
            notes.append(f"{LABELS[name]}: not measured, {harness.first_line(error)}.")
            del runs[name]
            continue
        if name == "compiled":
            record["compile_s"] = clock.perf_counter() - start
        if name == "eager":
            expected = results
        elif expected is not None:
            error = _error(results, expected[: len(results)])
            record.setdefault("difference", {})[name] = error
            # A gradient that is nearly zero, as of the bias of keys, is rounding alone.
            if name == "prfl_fast" and error > TOLERANCE[context.dtype]:
                ratio = error_over_eager(results, expected)
                record["error_over_eager"] = ratio
                if ratio > 2:
                    off = f"{error:.1e} off the unpatched one's, and {ratio:.1f} times as far"
                    problems.append(f"block: output or a gradient is {off} from float64")
        del results
        inputs = [x, *run.parameters]
        kept = harness.saved_bytes(partial(run, x, text, time), exclude=inputs)
        record["kept_bytes"][name] = kept
        # What compiled code allocates on a CPU does not pass through PyTorch's dispatcher.
        if context.device.type == "cuda" or name not in ("compiled", "both"):
            record["peak_bytes"][name] = harness.peak_bytes(partial(train, run), context.device)
    record["times"] = {}
    for part, function in (("forward, no gradient", infer), ("forward + backward", train)):
        thunks = {n: partial(function, run) for n, run in runs.items()}
        if function is infer and context.device.type == "cpu":
            # A second compilation, for inference, is not worth its time on a CPU.
            thunks = {n: t for n, t in thunks.items() if n not in ("compiled", "both")}
        times = harness.time_side_by_side(thunks, context.device, seconds=seconds)
        record["times"][part] = {n: t.record() for n, t in times.items()}
    return record, notes, problems


def step_case(context: Context, seconds: float = 1.0) -> tuple[dict[str, Any], list[str]]:
    """Measure one PRFL step of a model with few blocks; return its case and failed checks."""
    preset = replace(context.preset, layers=min(STEP_LAYERS, context.preset.layers))
    if context.device.type == "cpu" and preset.name == "tiny":
        preset = replace(preset, latent=STEP_LATENT_ON_CPU)
    model = wan.build(preset, context)
    noise, conditions = wan.latents(preset, context), wan.conditions(preset, context)
    if context.device.type == "cuda":
        model.enable_gradient_checkpointing()
    models = {"eager": model, "prfl_fast": prfl_fast.patch(copy.deepcopy(model))}
    pool = LatentRewardModel.from_backbone(model, num_blocks=1).freeze()
    thunks = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, transformer in models.items():
        reward = copy.deepcopy(pool)
        if name == "prfl_fast":
            prfl_fast.patch(reward.backbone)
        step = PRFL(transformer, reward, FlowUniPC(), num_inference_steps=STEP_SOLVER_STEPS)

        def thunk(step: PRFL = step, transformer: Any = transformer) -> None:
            transformer.zero_grad(set_to_none=True)
            step(noise, conditions, indices=(STEP_INDEX,))

        thunk()
        trained = [p.grad for p in transformer.parameters() if p.grad is not None]
        gradients[name] = [gradient.clone() for gradient in trained]
        thunks[name] = thunk
    difference = total_error(gradients["prfl_fast"], gradients["eager"])
    gradients.clear()
    record = _record("PRFL step", preset) | {"layers": preset.layers, "index": STEP_INDEX}
    record |= {"solver_steps": STEP_SOLVER_STEPS, "difference": {"prfl_fast": difference}}
    problems = []
    # Five steps of an untrained model amplify rounding; a wrong gradient is off by far more.
    if difference > 10 * TOLERANCE[context.dtype]:
        problems.append(f"PRFL step: the gradient is {difference:.1e} off the unpatched model's")
    record["peak_bytes"] = {n: harness.peak_bytes(t, context.device) for n, t in thunks.items()}
    timings = harness.time_side_by_side(thunks, context.device, seconds=seconds, at_least=3)
    record["times"] = {"step": {n: t.record() for n, t in timings.items()}}
    return record, problems


def total_error(values: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the relative error of all gradients taken as one vector."""
    pairs = zip(values, expected, strict=True)
    off = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    return (off / sum(b.double().square().sum().item() for b in expected)) ** 0.5


def _rows(record: dict[str, Any], names: list[str], failed: bool) -> list[list[str]]:
    lines = []
    for part, times in record["times"].items():
        ours = times["prfl_fast"]["median_s"]
        step = record["case"] == "PRFL step"
        line = [f"{record['case']}, {record['layers']} blocks" if step else f"block, {part}"]
        medians = [times[n]["median_s"] if n in times else None for n in names]
        line += [report.seconds(median) for median in medians]
        ratios = [report.ratio(median and median / ours) for median in medians[:-1]]
        line += ["check failed"] * len(ratios) if failed else ratios
        for kind in ("kept_bytes", "peak_bytes"):
            found = record.get(kind, {}) if part != "forward, no gradient" else {}
            line += [report.size(found.get(name)) for name in (names[0], "prfl_fast")]
        lines.append(line)
    return lines


def run(context: Context) -> SuiteResult:
    """Measure the block at the preset's size and one PRFL step of a model with few blocks."""
    context.refuse_large("takes minutes and tens of gigabytes")
    block, notes, problems = block_case(context)
    step, step_problems = step_case(context)
    names = [*context.baselines, "prfl_fast"]
    columns = ["work", *(LABELS[n] for n in names)]
    columns += [f"over {LABELS[n]}" for n in names[:-1]]
    first = LABELS[names[0]]
    columns += [f"kept, {first}", "kept, prfl_fast", f"peak, {first}", "peak, prfl_fast"]
    body = _rows(block, names, bool(problems)) + _rows(step, names, bool(step_problems))
    preset = context.preset
    notes = [
        f"Block: L = {preset.tokens}, D = {preset.dim}, {preset.text_tokens} text tokens; "
        f"step: L = {step['tokens']}, {step['solver_steps']} solver steps, gradient at step "
        f"{step['index']}; {str(context.dtype).removeprefix('torch.')}. Measured in turns in one "
        "run.",
        "kept: for the backward of one block, weights and input not counted; peak: most bytes "
        "alive of what the work allocates, gradients included.",
        *notes,
    ]
    if "compile_s" in block:
        notes.append(f"Compiling the block took {report.seconds(block['compile_s'])}, not counted.")
    table = Table("block", "Transformer block and PRFL step", columns, body, notes)
    kept, counted = kept_bytes.measure(context)
    drawn = figures(block, step, names, harness.device_name(context.device))
    return SuiteResult([table, kept], [block, step, *counted], drawn, problems + step_problems)


def _relative(parts: dict[str, dict[str, Any]], names: list[str], **text: Any) -> Any:
    """Draw part → name → (low, value, high) relative to the first name, its values = 1."""
    figure, axes = report.new_figure(8, 0.8 + 0.9 * len(parts))
    shown = [n for n in names if any(n in values for values in parts.values())]
    series: dict[str, list[float | None]] = {n: [] for n in shown}
    labels: dict[str, list[str]] = {n: [] for n in shown}
    errors: dict[str, list[tuple[float, float] | None]] = {n: [] for n in shown}
    write = text.pop("write")
    for values in parts.values():
        base = values[names[0]][1]
        for name in shown:
            low, value, high = values.get(name, (0, 0, 0))
            series[name].append(value / base if name in values else None)
            labels[name].append(write(value) if name in values else "")
            spread = ((value - low) / base, (high - value) / base)
            errors[name].append(spread if high > low else None)
    ours = [f"{v:.2f}" for v in sorted(v for v in series["prfl_fast"] if v is not None)]
    text["title"] = text["title"].format(" to ".join(dict.fromkeys((ours[0], ours[-1]))))
    report.grouped_bars(axes, list(parts), series, labels=labels, errors=errors, **text)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(1, 0))
    return figure


def figures(
    block: dict[str, Any], step: dict[str, Any], names: list[str], on: str
) -> dict[str, Any]:
    """Draw times and peaks of the block and the step relative to the unpatched model."""
    parts = {f"block, {part}": times for part, times in block["times"].items()}
    work = f"PRFL step, {step['layers']} blocks"
    parts[work] = step["times"]["step"]
    times = {
        part: {n: (t["p20_s"], t["median_s"], t["p80_s"]) for n, t in each.items()}
        for part, each in parts.items()
    }
    peaks = {
        part: {n: (b, b, b) for n, b in case["peak_bytes"].items()}
        for part, case in (("block, forward + backward", block), (work, step))
    }
    about = f"Wan block, L = {block['tokens']}, D = {block['dim']}, {on}"
    first = LABELS[names[0]]
    title = f"prfl_fast takes {{}} times as long as {first}\n{about}"
    unit = f"time, {first} = 1 (bars: 20 … 80 %)"
    drawn = {"block.png": _relative(times, names, write=report.seconds, title=title, unit=unit)}
    title = f"prfl_fast's peak is {{}} times that of {first}\n{about}"
    unit = f"peak of the bytes that training allocates, {first} = 1"
    memory = _relative(peaks, names, write=report.size, title=title, unit=unit)
    return drawn | {"block-memory.png": memory}
