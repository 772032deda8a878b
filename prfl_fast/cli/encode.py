"""Encode clips and captions to a dataset: ``prfl-fast encode``."""

import argparse
import math
from collections import Counter

from prfl_fast.cli.loading import check_writable, device_of
from prfl_fast.cli.plan import note
from prfl_fast.cli.sections import HardwareSection
from prfl_fast.data.clip_lists import read_clips
from prfl_fast.data.codec import MAX_TOKENS, load_codec
from prfl_fast.data.codec_base import Codec
from prfl_fast.data.codec_files import check_parts
from prfl_fast.data.encode import PREVIEW, Encoding, encode_dataset
from prfl_fast.data.encode_plan import (
    EncodePlan,
    EncodeSettings,
    check_settings,
    default_condition,
    latent_tokens,
    make_plan,
    needs_images,
    plan_prompts,
)
from prfl_fast.data.families import find_family
from prfl_fast.utils.checks import check
from prfl_fast.utils.folder_lock import hold_folder
from prfl_fast.utils.optional import need
from prfl_fast.utils.progress import count_progress
from prfl_fast.utils.units import plural


def run_encode(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    check(options.model.exists(), "--model", str(options.model), "a folder that exists")
    check_writable(options.out, "OUT")
    ok = options.clips.resolve() not in (options.out.resolve(), *options.out.resolve().parents)
    check(ok, "OUT", str(options.out), f"a folder outside of the clips in {options.clips}")
    device = device_of(HardwareSection(device=options.device))
    clips = read_clips(options.clips)
    prompts = clips[0].path is None
    family = find_family(options.model)
    condition = options.condition or default_condition(options.model)
    ok, expected = family is None or condition == "none", "none for other families than Wan"
    check(ok, "--condition", condition, expected)
    fps = options.fps
    if fps is None:
        fps = 16.0 if family is None else float(family.fps)
    if prompts:
        hint = "A list of prompts has no frames"
        check(condition == "none", "--condition", condition, "none for prompts alone", hint=hint)
        for name, wanted in (("crops", 1), ("buckets", ()), ("preview", False)):
            value = getattr(options, name)
            check(value == wanted, f"--{name}", value, "none for prompts alone", hint=hint)
    settings = EncodeSettings(
        size=options.size,
        frames=options.frames,
        fps=fps,
        buckets=options.buckets,
        crops=options.crops,
        random_crops=options.crop == "random" or (options.crops > 1 and options.crop is None),
        condition=condition,
        negative=options.negative,
        dtype=options.dtype or ("bf16" if device.type == "cuda" else "fp32"),
        seed=options.seed,
    )
    ok = options.crops == 1 or options.crop != "center"
    check(ok, "--crops", options.crops, "1 with --crop center: the others would be equal")
    need("transformers", "video")
    codec = load_codec(options.model)
    if options.budget is not None:
        codec.limit(options.budget)
    check_settings(settings, codec)
    ok = condition != "first-last" or not codec.is_ti2v
    check(ok, "--condition", condition, "first or none for Wan2.2 TI2V")
    check_parts(options.model, needs_images(options.model, condition))
    step = codec.strides[1] * codec.patch[1]
    if prompts:
        plan = plan_prompts(clips, settings)
    else:
        with count_progress("read", "clips", len(clips)) as show:
            plan = make_plan(clips, settings, step, workers=options.workers, show=show)
    if options.dry_run:
        return _print_plan(plan, settings, codec)
    check(bool(plan.crops), "clips that can be used", 0, f"at least one: {_first(plan)}")
    budget = codec.budget
    del codec
    with hold_folder(options.out):
        encoding = Encoding(
            plan,
            settings,
            options.model,
            options.out,
            device=device,
            workers=options.workers,
            budget=budget,
        )
        samples = encode_dataset(encoding, options.preview)
    _print_skipped(encoding.skipped)
    if encoding.cut:
        cut = "text is" if len(encoding.cut) == 1 else "texts are"
        text = f"{len(encoding.cut)} {cut} cut at {MAX_TOKENS} tokens, such as"
        note(f"{text} {encoding.cut[0][:60]!r}", "encode")
    skipped = plural(len(encoding.skipped), "clip")
    print(f"dataset: {options.out}, {plural(samples, 'sample')}, {skipped} skipped")
    if options.preview:
        print(f"preview: {options.out / PREVIEW}")
    return 0


def _first(plan: EncodePlan) -> str:
    return plan.skipped[0][1] if plan.skipped else "there are none"


def _print_skipped(skipped: dict[str, str]) -> None:
    for reason in skipped.values():
        note(f"skipped {reason}", "encode")


def _print_plan(plan: EncodePlan, settings: EncodeSettings, codec: Codec) -> int:
    """Print samples, tokens and bytes by size and length."""
    counts = Counter((crop.size, crop.frames) for crop in plan.crops)
    element = 2 if settings.dtype == "bf16" else 4
    total = 0
    for (size, frames), count in sorted(counts.items()):
        channels, *grid = codec.latent_shape(frames, *size)
        if plan.crops[0].clip.path is not None:
            given = settings.condition != "none" and not codec.is_ti2v  # latent_condition
            held = channels + (channels + 4 if given else 0)
            total += count * held * math.prod(grid) * element
        print(
            f"{size[0]}x{size[1]}, {plural(frames, 'frame')}: {plural(count, 'sample')}, "
            f"{plural(latent_tokens(frames, size, codec), 'token')} each"
        )
    enlarged = sum(crop.enlarged for crop in plan.crops)
    if enlarged:
        print(f"{plural(enlarged, 'sample')} of clips smaller than their size, which are enlarged")
    _print_skipped(dict(plan.skipped))
    print(
        f"{plural(len(plan.crops), 'sample')} of {plural(len(plan.digests), 'clip')}, "
        f"{len(plan.skipped)} skipped, "
        f"{total / 2**30:.3g} GiB of latents in {settings.dtype}"
    )
    return 0
