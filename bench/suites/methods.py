"""Reward feedback learning four ways: RGB ReFL on all frames or the first, PRFL with 1 or 5
gradient points.

The comparison of the paper's Table 4 (arXiv 2511.21541) at this machine's size: time, peak memory
and FLOPs per gradient point, with and without the supervised step each point is paired with. All
methods run on the same patched generator.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import report
import torch
from harness import Context, Preset, SuiteResult, Table, Timing, Unavailable
from torch import nn

import prfl_fast
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.losses import sft_loss
from prfl_fast.reward import LatentRewardModel
from prfl_fast.rgb_refl import RGBReFL
from prfl_fast.schedulers import FlowUniPC
from prfl_fast.step import PRFL
from suites import wan

SOLVER_STEPS = 40
POINTS = 5
# The middle of each method's draw. RGB ReFL draws from the last ten steps, 34.5 on average: the
# earlier, cheaper one.
RGB_INDEX = (34,)
PRFL_INDEX = (19,)
PRFL_INDICES = (3, 11, 19, 27, 35)
TINY = Preset("tiny", 128, 4, 512, 4, (5, 8, 16), text_tokens=32, text_dim=64)
# parameters; a generator larger than this trains LoRA layers, as in bf16 its gradients alone are 28
# GB
LORA_ABOVE = 3e9
LORA_RANK = 16
TOO_LONG_TO_REPEAT = 5.0  # seconds of a call on a GPU
PAPER_FRACTION = 8 / 30  # blocks of the reward over blocks of the generator (Wan2.1 1.3B)
FLOPS_TARGET = 0.5


class PixelReward(nn.Module):
    """Stand-in for a frame-level reward: four strided 3-D convolutions, mean, sigmoid; random
    weights, frozen.
    """

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
        """``[B, 3, F, H, W]`` → ``[B]`` in (0, 1)."""
        for layer in self.layers:
            frames = torch.nn.functional.silu(layer(frames))
        return torch.sigmoid(self.head(frames.mean((2, 3, 4)))).squeeze(-1)


@dataclass(frozen=True)
class Method:
    """One way to get reward gradients; ``points`` gradient points a call."""

    name: str
    points: int
    call: Callable[[], object]


def _decoder(
    preset: Preset, context: Context
) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """Latents → frames, and what it is: the small world's linear codec, or the Wan VAE with random
    weights.
    """
    if context.device.type == "cpu":
        from world import decode

        return decode, "the linear codec of bench/world, which keeps nothing for its backward"
    from diffusers import AutoencoderKLWan

    with torch.device(context.device):
        vae = AutoencoderKLWan().to(context.dtype).requires_grad_(False).eval()

    def run(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(context.dtype), return_dict=False)[0]

    return run, "the Wan VAE's decoder with random weights"


def _generator(preset: Preset, context: Context) -> tuple[nn.Module, str]:
    """The patched generator in training mode and a description of what trains."""
    model = prfl_fast.patch(wan.build(preset, context))
    if context.device.type == "cuda":
        model.enable_gradient_checkpointing()
    if sum(p.numel() for p in model.parameters()) < LORA_ABOVE:
        return model, "all parameters train"
    from peft import LoraConfig

    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
    return model, f"LoRA of rank {LORA_RANK} on the attention projections trains"


def _methods(preset: Preset, context: Context) -> tuple[list[Method], Callable[[], None], str]:
    """The four methods, one supervised step, and notes."""
    model, trains = _generator(preset, context)
    blocks = max(1, round(PAPER_FRACTION * preset.layers)) if preset.layers < 30 else 8
    reward = LatentRewardModel.from_backbone(model, num_blocks=blocks).freeze()
    decode, decoder = _decoder(preset, context)
    pixel = PixelReward().to(context.device, context.dtype)
    noise, clean = wan.latents(preset, context), wan.latents(preset, context, 3)
    conditions = wan.conditions(preset, context)
    scheduler = FlowUniPC()

    def fresh(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            model.zero_grad(set_to_none=True)
            return call()

        return run

    def pixels(frames: torch.Tensor) -> torch.Tensor:
        return pixel(frames.to(context.dtype))

    methods = []
    for frames in ("all", "first"):
        step = RGBReFL(model, decode, pixels, scheduler, num_steps=SOLVER_STEPS, frames=frames)
        label = "RGB ReFL, all frames" if frames == "all" else "RGB ReFL, first frame"
        methods.append(
            Method(label, 1, fresh(lambda step=step: step(noise, conditions, indices=RGB_INDEX)))
        )
    for points, indices in ((1, PRFL_INDEX), (POINTS, PRFL_INDICES)):
        prfl = PRFL(model, reward, scheduler, GradientPlan.prfl(points), num_steps=SOLVER_STEPS)
        label = f"PRFL, {points} point{'s' if points > 1 else ''}"
        call = fresh(lambda prfl=prfl, indices=indices: prfl(noise, conditions, indices=indices))
        methods.append(Method(label, points, call))

    def supervised() -> None:
        loss = sft_loss(model, clean, conditions, generator=context.generator(4))
        loss.backward()

    notes = (
        f"{preset.layers} blocks, D = {preset.dim}, L = {preset.tokens}, reward of {blocks} block"
        f"{'s' if blocks > 1 else ''}; {trains}; {SOLVER_STEPS} solver steps. "
        f"Pixels come from {decoder}."
    )
    return methods, fresh(supervised), notes


def _measure(method: Method, device: torch.device) -> dict[str, Any]:
    """FLOPs, then peak bytes, of one call each; on CUDA also the seconds of the second call.

    Two calls, because PyTorch's FLOP counter keeps tensors alive a little longer than the call
    alone does: half as much again at the peak of RGB ReFL. The CPU's ledger slows a call down, so
        its seconds mean nothing.
    """
    record: dict[str, Any] = {"method": method.name, "points": method.points}
    try:
        record["flops"] = harness.count_flops(method.call)
        start = time.perf_counter()
        record["peak_bytes"] = harness.peak_bytes(method.call, device)
        if device.type == "cuda":
            record["first_s"] = time.perf_counter() - start
    except (Unavailable, torch.OutOfMemoryError) as error:
        record.pop("flops", None)
        record["skipped"] = str(error) if isinstance(error, Unavailable) else "out of memory"
    return record


def run(context: Context) -> SuiteResult:
    """Measure every method; per gradient point, with and without SFT."""
    preset = TINY if context.preset.name == "tiny" else context.preset
    if context.device.type == "cpu" and preset is not TINY:
        raise Unavailable(f"{preset.name} on a CPU takes hours; use --preset tiny, or a GPU")
    methods, supervised, notes = _methods(preset, context)
    methods.append(Method("SFT", 1, supervised))
    cases = []
    with context.bar(len(methods) + 1, "methods") as bar:
        for method in methods:
            bar.set_postfix_str(method.name)
            cases.append(_measure(method, context.device))
            gc.collect()
            bar.update()
        short = {
            m.name: m.call
            for m, c in zip(methods, cases, strict=True)
            if "flops" in c and c.get("first_s", 0.0) < TOO_LONG_TO_REPEAT
        }
        timings = harness.time_side_by_side(short, context.device, seconds=1.5, at_least=3)
        bar.update()
    for case in cases:
        if case["method"] in timings:
            case["times"] = timings[case["method"]].record()
        elif "first_s" in case:
            case["times"] = Timing.of([case["first_s"]]).record()
    table, problems = _table(cases, notes)
    figures = {"methods.png": _figure(cases, preset, context)}
    return SuiteResult([table], cases, figures, problems)


def _per_point(case: dict[str, Any], sft: dict[str, Any] | None) -> tuple[float, float, float]:
    """Seconds, peak bytes and FLOPs per gradient point; with SFT, one supervised step a point."""
    seconds, work = case["times"]["median_s"] / case["points"], case["flops"] / case["points"]
    if sft is None:
        return seconds, case["peak_bytes"], work
    return (
        seconds + sft["times"]["median_s"],
        max(case["peak_bytes"], sft["peak_bytes"]),
        work + sft["flops"],
    )


def _table(cases: list[dict[str, Any]], notes: str) -> tuple[Table, list[str]]:
    *methods, sft = cases
    body, problems = [], []
    base = next((c for c in methods if c["method"] == "PRFL, 1 point" and "flops" in c), None)
    for with_sft in (False, True):
        for case in methods:
            label = [case["method"] + (" + SFT" if with_sft else "")]
            if "skipped" in case:
                body.append([*label, case["skipped"], *[report.BLANK] * 4])
                continue
            extra = sft if with_sft else None
            seconds, peak, work = _per_point(case, extra)
            relative: list[str] = [report.BLANK] * 2
            if base is not None:
                one = _per_point(base, extra)
                relative = [report.ratio(seconds / one[0]), report.ratio(work / one[2])]
            body.append(
                [*label, report.seconds(seconds), report.size(peak), report.flops(work), *relative]
            )
    columns = ["method", "time", "peak", "FLOPs", "time, PRFL 1 = 1", "FLOPs, PRFL 1 = 1"]
    many = next((c for c in methods if c["points"] == POINTS and "flops" in c), None)
    lines = [
        notes,
        "Per gradient point. Gradient at the middle of each method's draw: step "
        f"{RGB_INDEX[0]} for RGB ReFL (the last ten), {PRFL_INDEX[0]} and "
        f"{', '.join(map(str, PRFL_INDICES))} for PRFL. peak: most bytes alive of what one call "
        "allocates, gradients included, weights not.",
        "+ SFT: one supervised step a point; its peak is that of the larger of the two steps.",
    ]
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
    return Table("methods", "Cost of a gradient point", columns, body, lines), problems


def _figure(cases: list[dict[str, Any]], preset: Preset, context: Context) -> Any:
    *methods, sft = cases
    shown = [c for c in methods if "flops" in c]
    figure, panels = report.new_figure(11, 3.6, ncols=3, sharey=True)
    names = [c["method"].replace(", ", ",\n") for c in shown]
    plain, paired = ([_per_point(c, extra) for c in shown] for extra in (None, sft))
    sizes = (
        (0, "Time per gradient point", "seconds", 1.0, report.seconds),
        (1, "Peak memory of a step", "megabytes", 1e6, report.size),
        (2, "FLOPs per gradient point", "GFLOP", 1e9, report.flops),
    )
    for axes, (i, title, unit, scale, text) in zip(panels, sizes, strict=True):
        series = {
            "without SFT": [p[i] / scale for p in plain],
            "with SFT": [p[i] / scale for p in paired],
        }
        labels = {
            "without SFT": [text(p[i]) for p in plain],
            "with SFT": [text(p[i]) for p in paired],
        }
        report.grouped_bars(axes, names, series, title=title, unit=unit, labels=labels)
        axes.margins(x=0.3)
    panels[0].legend(fontsize=8, loc="lower right")
    missing = [f"{c['method']}: {c['skipped']}" for c in methods if "skipped" in c]
    on = harness.device_name(context.device)
    about = f"{preset.layers} blocks, L = {preset.tokens}, D = {preset.dim}, on {on}"
    figure.suptitle("; ".join([about, *missing]), fontsize=11)
    return figure
