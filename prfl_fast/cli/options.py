"""Add the options of encode, evaluate, sample and compare to their parsers, without torch."""

import argparse
from pathlib import Path
from typing import Any

from prfl_fast.cli.arguments import (
    count,
    finite,
    memory_size,
    positive,
    timesteps,
    video_size,
    whole_numbers,
)
from prfl_fast.utils.choices import CONDITIONS, EVALUATION_TIMESTEPS, METHODS

_WEIGHT_DTYPES = ("fp32", "bf16", "fp8", "nf4")


def add_encode(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prfl-fast encode``."""
    text = "folder of clips with captions in NAME.txt; .csv, .json, .jsonl; or prompts, .txt"
    parser.add_argument("clips", metavar="CLIPS", type=Path, help=text)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the dataset")
    text = "folder of a pipeline of diffusers or official Wan"
    parser.add_argument("--model", type=Path, required=True, help=text)
    text = "height x width in pixels (default: 480x832)"
    parser.add_argument("--size", type=video_size, default=(480, 832), help=text)
    text = "frames, 4n + 1 for Wan; of several, a clip takes the most that it has (default: 81)"
    parser.add_argument("--frames", type=whole_numbers, default=(81,), metavar="N,...", help=text)
    text = "frames per second (default: 16, for other families than Wan their own)"
    parser.add_argument("--fps", type=positive, help=text)
    text = "sizes to choose from by a clip's aspect ratio: auto (the area of --size), or a list"
    parser.add_argument("--buckets", type=_buckets, default=(), metavar="auto|HxW,...", help=text)
    text = "samples of each clip at random places (default: one at the center)"
    parser.add_argument("--crops", type=count, default=1, help=text)
    text = "place of the crop and first frame (default: center and first frame for one crop)"
    parser.add_argument("--crop", choices=["center", "random"], help=text)
    text = "given frames of image-to-video models (default: those of the pipeline's transformer)"
    parser.add_argument("--condition", choices=CONDITIONS, help=text)
    parser.add_argument("--negative", help="negative prompt for guidance: negative.safetensors")
    text = "dtype of the text encoders, CLIP and the files (default: bf16 on a GPU)"
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help=text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    text = "device memory for the autoencoder with its weights, such as 20GiB; larger frames are "
    text += "cut into tiles"
    parser.add_argument("--budget", type=memory_size, metavar="SIZE", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of random crops (default: 0)")
    parser.add_argument("--workers", type=count, default=2, help="threads that read clips")
    text = "write decoded frames of three samples to OUT/preview"
    parser.add_argument("--preview", action="store_true", help=text)
    text = "print how many samples, tokens and bytes, write nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)


def _buckets(text: str) -> Any:
    return "auto" if text == "auto" else tuple(video_size(word) for word in text.split(","))


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prfl-fast evaluate``."""
    text = "folder of a saved reward model; convert reads the files of HY-Video-PRFL"
    parser.add_argument("reward", metavar="REWARD", help=text)
    text = "dataset of labeled videos, or of preference pairs"
    parser.add_argument("data", metavar="DATA", help=text)
    text = "new folder for metrics.json, metrics.csv and plots (default: print the table only)"
    parser.add_argument("--out", metavar="FOLDER", help=text)
    text = "label of single videos (default: motion_quality)"
    parser.add_argument("--label", default="motion_quality", metavar="NAME", help=text)
    text = "label of videos without one (default: refuse them)"
    parser.add_argument("--missing-label", type=int, choices=(0, 1), help=text)
    times = EVALUATION_TIMESTEPS
    text = f"timesteps in 0 to 1000 (default: {','.join(map(str, times))})"
    parser.add_argument("--timesteps", type=timesteps, default=times, metavar="T,...", help=text)
    text = "timestep shift of the noise schedule the reward was trained on (default: 5)"
    parser.add_argument("--shift", type=positive, default=5.0, help=text)
    text = "evaluate at T / 1000 itself, for rewards trained with integer_timesteps: false"
    parser.add_argument("--float-timesteps", action="store_true", help=text)
    text = "videos or pairs in a forward pass (default: 1)"
    parser.add_argument("--batch-size", type=count, default=1, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    text = "auto, cpu, cuda or cuda:<number> (default: auto)"
    parser.add_argument("--device", default="auto", help=text)
    text = "bf16 computes under autocast (default: fp32)"
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help=text)
    text = "let a manifest name files outside its folder"
    parser.add_argument("--allow-outside", action="store_true", help=text)


def add_sample(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prfl-fast sample``."""
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the videos")
    text = "generator: run of prfl-fast train, its final, an adapter of any trainer, or a "
    text += "transformer (default: that of --model)"
    parser.add_argument("--weights", metavar="PATH", help=text)
    _add_sampling(parser)
    text = "sample by the pipeline of diffusers, with its own forward, in place of the rollout "
    text += "engine: for Wan the same videos up to rounding"
    parser.add_argument("--pipeline", action="store_true", help=text)
    group = parser.add_argument_group("use of a reward")
    text = "best-of: N noises; prune: drop the worst early; beam: beam search; reno: optimize the "
    text += "noise; guide: add the reward's gradient to the velocity"
    group.add_argument("--method", choices=METHODS, help=text)
    text = "option of the method, such as candidates=8; docs/sampling.md lists them"
    group.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=text)
    group.add_argument("--reward", metavar="PATH", help="folder of a saved reward model")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``prfl-fast sample`` and ``prfl-fast compare`` share."""
    text = "folder of a pipeline of diffusers or official Wan"
    parser.add_argument("--model", type=Path, required=True, help=text)
    group = parser.add_argument_group("prompts, of one kind")
    one_of = group.add_mutually_exclusive_group(required=True)
    text = ".txt with a prompt a line, or .csv or .jsonl with prompt, image and last_image"
    one_of.add_argument("--prompts", metavar="FILE", help=text)
    text = "a prompt; may be repeated"
    one_of.add_argument("--prompt", metavar="TEXT", action="append", default=[], help=text)
    text = "first frame of the prompt at the same place"
    group.add_argument("--image", metavar="FILE", action="append", default=[], help=text)
    text = "dataset, or list of HY-Video-PRFL, whose conditions and sizes are sampled"
    one_of.add_argument("--data", metavar="FOLDER", help=text)
    group = parser.add_argument_group("videos")
    text = "height x width in pixels (default: 480x832)"
    group.add_argument("--size", type=video_size, metavar="HxW", help=text)
    group.add_argument("--frames", type=count, help="4n + 1 for Wan (default: 81)")
    text = "frames per second (default: 16, for other families than Wan their own)"
    group.add_argument("--fps", type=positive, help=text)
    group.add_argument("--samples", type=count, default=1, help="videos of a prompt (default: 1)")
    text = "seed of the first video; the others count up (default: 0)"
    group.add_argument("--seed", type=int, default=0, help=text)
    text = "write latents and no videos"
    group.add_argument("--latents-only", action="store_true", help=text)
    group = parser.add_argument_group("sampler")
    text = "solver steps (default: 40)"
    group.add_argument("--num-inference-steps", metavar="N", type=count, default=40, help=text)
    text = "timestep shift of the noise schedule (default: 5, or the pipeline's fixed one)"
    group.add_argument("--shift", type=positive, help=text)
    text = "1 is off; of two experts also HIGH,LOW; embedded in HunyuanVideo (default: 5)"
    group.add_argument("--guidance-scale", metavar="S", type=_scale, default=5.0, help=text)
    text = "negative prompt (default: that of --data, or the empty prompt)"
    group.add_argument("--negative", metavar="TEXT", help=text)
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    text = "dtype of the generator's weights (default: bf16 on a GPU, else fp32)"
    group.add_argument("--weight-dtype", choices=_WEIGHT_DTYPES, help=text)
    text = "videos in a forward pass (default: 1)"
    group.add_argument("--batch-size", type=count, default=1, help=text)
    text = "device memory for the autoencoder with its weights, such as 20GiB (default: all that "
    text += "is free); larger frames are cut into tiles"
    group.add_argument("--budget", type=memory_size, metavar="SIZE", help=text)


def _scale(text: str) -> float | tuple[float, ...]:
    numbers = tuple(map(finite, text.split(",")))
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number or HIGH,LOW")
    return numbers[0] if len(numbers) == 1 else numbers


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prfl-fast compare``."""
    text = "generator beside that of --model: run of prfl-fast train, its final, an adapter or a "
    text += "transformer; NAME= chooses its name"
    parser.add_argument("arms", metavar="[NAME=]PATH", nargs="+", help=text)
    text = "folder of the videos, figures and page"
    parser.add_argument("--out", type=Path, required=True, help=text)
    _add_sampling(parser)
    group = parser.add_argument_group("rewards")
    text = "folder of a saved reward model; may be repeated"
    group.add_argument("--reward", metavar="[NAME=]PATH", action="append", default=[], help=text)
    text = "timesteps of the scores (default: " + ",".join(map(str, EVALUATION_TIMESTEPS)) + ")"
    group.add_argument(
        "--timesteps", type=timesteps, metavar="T,...", default=EVALUATION_TIMESTEPS, help=text
    )
