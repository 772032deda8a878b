"""Compare generators on the same prompts and noise: ``prfl-fast compare``."""

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from prfl_fast.cli.page import PAGE, write_page
from prfl_fast.cli.sample import Arm, check_flow
from prfl_fast.cli.sample_inputs import Job, check_reward, load_reward_call
from prfl_fast.cli.tables import print_table
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.sampling import generate
from prfl_fast.sampling.compare import (
    compare_scores,
    record_velocities,
    rewards_by_timestep,
    velocity_drift,
)
from prfl_fast.sampling.generate import Video
from prfl_fast.training.noising import evaluation_sigma, model_timestep
from prfl_fast.utils.checks import check
from prfl_fast.utils.folder_lock import hold_folder
from prfl_fast.utils.io import write_json
from prfl_fast.utils.modules import free_memory
from prfl_fast.utils.optional import need
from prfl_fast.utils.progress import step_progress
from prfl_fast.utils.units import short_number

BASE, FIGURES, DRIFT = "base", "comparison.json", "drift"
DRIFT_VIDEOS = 4  # a file of drift has 16 latents, 134 MB of 81 frames at 480x832


def run_compare(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    need("matplotlib.figure", "video")
    out = options.out
    paths = _named("a generator", options.arms, BASE)
    rewards = _named("--reward", options.reward)
    job = Job(options)
    check_flow(job)
    for path in rewards.values():
        check_reward(path, job)
    arms = {BASE: Arm(job, out / BASE, None)}
    arms |= {name: Arm(job, out / name, path) for name, path in paths.items()}
    print(f"{arms[BASE].cost()}, for each of {len(arms)} generators")
    with hold_folder(out):
        for arm in arms.values():
            arm.open()
        job.encode()
        drift = _sample(job, arms)
        for arm in arms.values():
            arm.decode()
        scores = {name: _scores(name, path, job, arms) for name, path in rewards.items()}
        found = compare_scores(scores, drift)
        found |= {"arms": {name: arm.weights for name, arm in arms.items()}}
        found |= {"timesteps": list(options.timesteps), "settings": arms[BASE].settings()}
        found["scores"] = scores
        write_json(out / FIGURES, found)
        write_page(out, found, job.videos, [prompt.text for prompt in job.prompts])
    print_figures(found)
    print(f"page: {out / PAGE}")
    return 0


def _named(what: str, given: Sequence[str], *taken: str) -> dict[str, str]:
    """Return paths by name: the one before ``=``, or that of the folder."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            place = Path(text)
            path, name = text, place.parent.name if place.name == "final" else place.stem
        hint = f"Write NAME={path}"
        plain = bool(name) and not set(name) & set("/\\\0") and name not in (".", "..")
        fresh = plain and name not in found and name not in (*taken, DRIFT, FIGURES, PAGE)
        check(fresh, f"name of {what}", name, "another one than the others'", hint=hint)
        found[name] = path
    return found


def _sample(job: Job, arms: dict[str, Arm]) -> dict[str, list[dict[int, float]]]:
    """Sample the videos of all arms; return the drift of each from the base by video."""
    folder = arms[BASE].out / DRIFT
    folder.mkdir(exist_ok=True)
    videos = {video.prompt: video for video in reversed(job.videos)}  # the first of each prompt
    measured = [videos[prompt] for prompt in sorted(videos)][:DRIFT_VIDEOS]
    drift: dict[str, list[dict[int, float]]] = {}

    def measure(name: str, sampler: Sampler) -> None:
        with step_progress(f"velocities of {name}", 0, len(measured)) as bar:
            for video in measured:
                file = folder / f"{video.name}.safetensors"
                conditions = _conditions(job, video)
                if name != BASE:
                    found = velocity_drift(sampler, conditions, file)
                    drift.setdefault(name, []).append(found)
                elif not file.is_file():
                    noise = generate.noise_of(video.seed, job.shape_of(video.prompt))
                    record_velocities(sampler, noise[None].to(job.device), conditions, file)
                bar.update()

    for name, arm in arms.items():  # the base comes first
        arm.sample(partial(measure, name))
    return drift


def _conditions(job: Job, video: Video) -> Any:
    return generate.batch_conditions([job.conditions[video.prompt]], job.device)


def _scores(name: str, path: str, job: Job, arms: dict[str, Arm]) -> dict[str, list[list[float]]]:
    """Return the scores of a reward: by arm, of each video at each timestep."""
    reward = load_reward_call(path, job.device)
    levels = []
    for t in job.options.timesteps:
        sigma = evaluation_sigma(t, job.options.shift, True)
        levels.append((sigma, float(model_timestep(torch.tensor(sigma, device="cpu"), True))))
    found: dict[str, list[list[float]]] = {}
    with step_progress(f"scores of {name}", 0, len(arms) * len(job.videos)) as bar:
        for arm_name, arm in arms.items():
            found[arm_name] = []
            for video in job.videos:
                x = generate.read_latents(arm.out, video)[0][None].to(job.device)
                # Other noise than that of the sampler, which the latents still resemble.
                noise = generate.noise_of(~video.seed, x.shape).to(job.device)
                conditions = _conditions(job, video)
                scores = rewards_by_timestep(reward, x, conditions, noise, levels)
                what = f"score of {name} for {arm_name}/{video.name}"
                check(all(map(math.isfinite, scores)), what, scores, "finite numbers")
                found[arm_name].append(scores)
                bar.update()
    del reward
    free_memory()
    return found


def print_figures(found: Mapping[str, Any]) -> None:
    """Print mean rewards, drift and win rates as tables."""
    rows = []
    for arm in found["arms"]:
        means = (mean(by_arm[arm]["mean"]) for by_arm in found["rewards"].values())
        drift = found["drift"].get(arm)
        drifted = "" if drift is None else short_number(mean(drift.values()))
        rows.append((arm, *(f"{value:.4f}" for value in means), drifted))
    columns: tuple[str, ...] = ("generator", *found["rewards"], "drift from base")
    print_table(rows, columns, numbers=columns[1:])
    wins = [
        (
            *(win["reward"], win["arm"], win["against"], f"{win['rate']:.2f}"),
            *(f"{win['low']:.2f} to {win['high']:.2f}", f"{win['wins']}", f"{win['losses']}"),
        )
        for win in found["wins"]
    ]
    columns = ("reward", "generator", "against", "win rate", "95 % interval", "wins", "losses")
    if wins:
        print_table(wins, columns, numbers=columns[3:])
