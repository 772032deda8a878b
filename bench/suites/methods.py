"""Compare every gradient plan: time, memory, FLOPs and variance of a gradient point.

Time, peak memory and FLOPs per gradient point at this machine's size, the first four also with the
supervised step each point is paired with (the paper's Table 4, arXiv 2511.21541); all run on the
same patched generator. The variance of their gradients is measured in the small world.
"""

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import method_specs as plans
import report
import torch
from experiments import variance, world
from harness import Context, Preset, SuiteResult, Table, Timing, UnavailableError
from method_specs import METHODS, POINTS, SOLVER_STEPS, TINY, Method
from torch import nn

import prfl_fast
from prfl_fast import LatentRewardModel
from prfl_fast.training import add_lora, sft_loss
from suites import wan

# Parameters: a larger generator trains LoRA layers, as in bf16 its gradients alone are 28 GB.
LORA_ABOVE = 3e9
LORA_RANK = 16
TOO_LONG_TO_REPEAT = 5.0  # seconds of a call on a GPU
PAPER_FRACTION = 8 / 30  # blocks of the reward over blocks of the generator (Wan2.1 1.3B)
FLOPS_TARGET = 0.5
SINGLE, SFT = "PRFL, 1 point", "SFT"
# Names, between semicolons: which methods are measured, where all take longer than there is time.
CHOSEN = tuple(filter(None, os.environ.get("PRFL_FAST_BENCH_METHODS", "").split(";")))


class PixelClassifier(nn.Module):
    """Replace a frame-level reward: frozen random 3-D convolutions, mean, sigmoid."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        widths = [3, channels, 2 * channels, 4 * channels, 4 * channels]
        self.layers = nn.ModuleList(
            nn.Conv3d(a, b, 3, stride=(1, 2, 2), padding=1)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.head = nn.Linear(widths[-1], 1)
        self.requires_grad_(False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map ``[B, 3, F, H, W]`` to ``[B]`` in (0, 1)."""
        frames = frames.to(self.head.weight.dtype)
        for layer in self.layers:
            frames = torch.nn.functional.silu(layer(frames))
        return torch.sigmoid(self.head(frames.mean((2, 3, 4)))).squeeze(-1)


def chosen() -> tuple[Method, ...]:
    """Return the methods to measure, by ``PRFL_FAST_BENCH_METHODS``."""
    names = [method.name for method in METHODS]
    for name in CHOSEN:
        if name not in names:
            raise UnavailableError(
                f"PRFL_FAST_BENCH_METHODS: {name!r} is none of {'; '.join(names)}"
            )
    return tuple(method for method in METHODS if not CHOSEN or method.name in CHOSEN)


def _decoder(context: Context) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """Return the small world's codec, or on a GPU the Wan VAE, and its description."""
    if context.device.type == "cpu":
        what = "the linear codec of bench/experiments/world, which keeps nothing for its backward"

        def decode(latents: torch.Tensor) -> torch.Tensor:
            # The codec has more channels than Wan's latents; its last ones stay at their mean.
            missing = world.CHANNELS - latents.shape[1]
            return world.decode(nn.functional.pad(latents, (0, 0, 0, 0, 0, 0, 0, missing)))

        return decode, what
    from diffusers import AutoencoderKLWan

    with torch.device(context.device):
        vae = AutoencoderKLWan().to(context.dtype).requires_grad_(False).eval()

    def run(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(context.dtype), return_dict=False)[0]

    return run, "the Wan VAE's decoder with random weights"


def _generator(preset: Preset, context: Context) -> tuple[nn.Module, str]:
    """Return the patched generator in training mode and a description of what trains."""
    model = prfl_fast.patch(wan.build(preset, context))
    if context.device.type == "cuda":
        model.enable_gradient_checkpointing()
    if sum(p.numel() for p in model.parameters()) < LORA_ABOVE:
        return model, "all parameters train"
    add_lora(model, LORA_RANK)
    return model, f"LoRA of rank {LORA_RANK} on the attention projections trains"


def _calls(preset: Preset, context: Context) -> tuple[dict[str, Callable[[], object]], str]:
    """Return one call of every method and one supervised step, and notes."""
    methods = chosen()
    model, trains = _generator(preset, context)
    blocks = max(1, round(PAPER_FRACTION * preset.layers)) if preset.layers < 30 else 8
    reward = LatentRewardModel.from_backbone(model, num_blocks=blocks).freeze()
    decode, decoder = _decoder(context)
    pixel = PixelClassifier().to(context.device, context.dtype)
    noise, clean = wan.latents(preset, context), wan.latents(preset, context, 3)
    conditions = wan.conditions(preset, context)
    rewards = plans.rewards(reward, decode, pixel)

    # Nothing is left to be freed in the next call: its gradients are part of its peak.
    def fresh(call: Callable[..., object], *arguments: Any) -> None:
        try:
            call(*arguments)
        finally:
            model.zero_grad(set_to_none=True)

    calls: dict[str, Callable[[], object]] = {}
    for method in methods:
        call = plans.call_of(method, model, rewards, latents=clean, generator=context.generator(5))
        calls[method.name] = partial(fresh, call, noise, conditions)

    def supervised() -> None:
        loss = sft_loss(model, clean, conditions, generator=context.generator(4))
        loss.backward()

    calls[SFT] = partial(fresh, supervised)
    notes = (
        f"{preset.layers} blocks, D = {preset.dim}, L = {preset.tokens}, reward of {blocks} block"
        f"{'s' if blocks > 1 else ''}; {trains}; {SOLVER_STEPS} solver steps. RGB ReFL is rewarded "
        f"by pixels, which come from {decoder}; all others by the latent reward."
    )
    return calls, notes


def _measure(name: str, call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Measure FLOPs and then peak bytes, in one call each.

    Two calls, because PyTorch's FLOP counter keeps tensors alive a little longer than the call
    alone does: half as much again at the peak of RGB ReFL. On CUDA the second is
    also timed, as it runs in memory that the first has cached; the CPU's ledger slows a call down.
    """

    def timed() -> None:
        harness.synchronize(device)
        start = time.perf_counter()
        call()
        harness.synchronize(device)
        record["first_s"] = time.perf_counter() - start

    points = next((m.points for m in METHODS if m.name == name), 1)
    record: dict[str, Any] = {"method": name, "points": points}
    with harness.recorded_skip(record):
        record["flops"] = harness.count_flops(call)
        run = timed if device.type == "cuda" else call
        record["peak_bytes"] = harness.peak_bytes(run, device, empty_cache=False)
    if "skipped" in record:
        record.pop("flops", None)
    return record


def costs(preset: Preset, context: Context) -> tuple[list[dict[str, Any]], str]:
    """Return records of every method and of a supervised step, the last, and notes."""
    calls, notes = _calls(preset, context)
    cases = []
    for name in context.each(calls, "methods"):
        cases.append(_measure(name, calls[name], context.device))
        gc.collect()
    short = {
        c["method"]: calls[c["method"]]
        for c in cases
        if "skipped" not in c and c.get("first_s", 0.0) < TOO_LONG_TO_REPEAT
    }
    timings = harness.time_side_by_side(short, context.device, seconds=0.3, at_least=2)
    for case in cases:
        if case["method"] in timings:
            case["times"] = timings[case["method"]].record()
        elif "first_s" in case:
            case["times"] = Timing.of([case["first_s"]]).record()
    return cases, notes


def run(context: Context) -> SuiteResult:
    """Measure every method, per gradient point; then the variance of gradients."""
    preset = TINY if context.preset.name == "tiny" else context.preset
    context.refuse_large()
    with plans.one_thread(context.device):
        cases, notes = costs(preset, context)
    found, spread = SuiteResult([], []), {}
    if context.device.type == "cpu":  # the same on every machine
        trained = [method.name for method in chosen() if method.trains]
        found, spread = variance.study(context, trained)
    table, problems = _table(cases, notes, spread)
    found.figures["methods.png"] = _figure(cases, preset, context)
    tables, records = [table, *found.tables], [*cases, *found.cases]
    return SuiteResult(tables, records, found.figures, problems + found.problems)


def _per_point(case: dict[str, Any], sft: dict[str, Any] | None) -> tuple[float, float, float]:
    """Return seconds, peak bytes and FLOPs per gradient point, plus one supervised step."""
    seconds, work = case["times"]["median_s"] / case["points"], case["flops"] / case["points"]
    peak = case["peak_bytes"]
    if sft is None:
        return seconds, peak, work
    seconds, work = seconds + sft["times"]["median_s"], work + sft["flops"]
    return seconds, max(peak, sft["peak_bytes"]), work


def _paired(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {m.name for m in METHODS if m.paired}
    return [case for case in cases if case["method"] in names]


def _table(
    cases: list[dict[str, Any]], notes: str, spread: dict[str, variance.Estimate | None]
) -> tuple[Table, list[str]]:
    *methods, sft = cases
    body, problems = [], []
    base = next((c for c in methods if c["method"] == SINGLE and "flops" in c), None)
    for with_sft, rows in ((False, methods), (True, _paired(methods))):
        for case in rows:
            label = [case["method"] + (" + SFT" if with_sft else "")]
            if "skipped" in case or (with_sft and "skipped" in sft):
                reason = case.get("skipped") or sft["skipped"]
                body.append([*label, reason, *[report.BLANK] * (5 if spread else 4)])
                continue
            extra = sft if with_sft else None
            seconds, peak, work = _per_point(case, extra)
            relative: list[str] = [report.BLANK] * 2
            if base is not None:
                one = _per_point(base, extra)
                relative = [report.ratio(seconds / one[0]), report.ratio(work / one[2])]
            line = [report.seconds(seconds), report.size(peak), report.flops(work), *relative]
            if spread:
                value = None if with_sft else spread.get(case["method"])
                line.append(report.BLANK if value is None else str(value))
            body.append([*label, *line])
    columns = ["method", "time", "peak", "FLOPs", "time, PRFL 1 = 1", "FLOPs, PRFL 1 = 1"]
    columns += ["variance"] if spread else []
    several = (c for c in methods if c["method"].startswith("PRFL") and c["method"] != SINGLE)
    many = next((c for c in several if "flops" in c), None)
    names = {case["method"] for case in methods}
    drawn = "; ".join(f"{m.name} {_steps(m)}" for m in METHODS if m.typical and m.name in names)
    lines = [
        notes,
        "Per gradient point, where a call has several. "
        + (f"Steps with gradient, in the middle of a method's draw: {drawn}. " if drawn else "")
        + "peak: most bytes alive of what one call allocates, gradients "
        "included, weights not.",
        "+ SFT: one supervised step a point; its peak is that of the larger of the two steps. "
        "RG-LCD is without its distillation loss.",
    ]
    if spread:
        lines.append(
            "variance: E‖ĝ - g‖² / ‖g‖² of one call's gradient over noises, prompts and draws, "
            f"from {variance.SETTINGS.calls} calls in the small world, PRFL's from the table "
            "below; ± one standard error, by leaving out a call (PRFL: "
            f"{variance.SETTINGS.trajectories} trajectories) at a time; of so few it is rough "
            f"itself. Methods differ in what g is. {report.BLANK}: the gradient does not go to the "
            "parameters, or its mean is lost in the noise."
        )
    if base is not None and many is not None:
        saved = _per_point(many, None)[2] / _per_point(base, None)[2]
        lines.append(
            f"FLOPs per gradient point, {POINTS} points over 1: {saved:.3f} "
            f"(target ≤ {FLOPS_TARGET})."
        )
        if saved > FLOPS_TARGET:
            problems.append(
                f"{POINTS} points cost {saved:.3f} of one point's FLOPs each, target {FLOPS_TARGET}"
            )
    title = "Cost of a gradient point"
    return Table("methods", title, columns, body, lines), problems


def _steps(method: Method) -> str:
    shown = []
    for point in method.typical or ():
        first, last = (point, point) if isinstance(point, int) else (point.first, point.step)
        shown.append(str(first) if first == last else f"{first} … {last}")
    return ", ".join(shown)


def _figure(cases: list[dict[str, Any]], preset: Preset, context: Context) -> Any:
    *methods, sft = cases
    shown = [c for c in methods if "flops" in c]
    paired = [c for c in _paired(shown) if "flops" in sft]
    figure, panels = report.new_figure(11, 1.4 + 0.34 * len(shown), ncols=3, sharey=True)
    names = [c["method"] for c in shown]
    plain = [_per_point(c, None) for c in shown]
    both = [_per_point(c, sft) if c in paired else None for c in shown]
    sizes = (
        (0, "Time per gradient point", "seconds", 1.0, report.seconds),
        (1, "Peak memory of a call", "megabytes", 1e6, report.size),
        (2, "FLOPs per gradient point", "GFLOP", 1e9, report.flops),
    )
    for axes, (i, title, unit, scale, text) in zip(panels, sizes, strict=True):
        sides = {"without SFT": plain, "with SFT": both}
        series = {n: [p[i] / scale if p else None for p in side] for n, side in sides.items()}
        labels = {n: [text(p[i]) if p else "" for p in side] for n, side in sides.items()}
        report.grouped_bars(axes, names, series, title=title, unit=unit, labels=labels)
        axes.margins(x=0.3)
    panels[0].legend(fontsize=8, loc="lower right")
    finding = ""
    seconds = {c["method"]: p[0] for c, p in zip(shown, plain, strict=True)}
    many = f"PRFL, {POINTS} points"
    if {SINGLE, many} <= set(seconds):
        saved = seconds[SINGLE] / seconds[many]
        finding = f"{POINTS} gradient points on one trajectory: {saved:.1f}× less time each\n"
    missing = [f"{c['method']}: {c['skipped']}" for c in methods if "skipped" in c]
    on = harness.device_name(context.device)
    about = f"{preset.layers} blocks, L = {preset.tokens}, D = {preset.dim}, on {on}"
    figure.suptitle(finding + "; ".join([about, *missing]), fontsize=11)
    return figure
