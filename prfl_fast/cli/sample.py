"""Sample videos of prompts: ``prfl-fast sample``."""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prfl_fast.cli.generators import check_weights, load_sampler_model, weights_path
from prfl_fast.cli.inputs import fingerprint
from prfl_fast.cli.sample_inputs import Job, check_reward, load_reward_call
from prfl_fast.rewards.functions import Reward
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.sampling import generate
from prfl_fast.sampling.generate import Video
from prfl_fast.sampling.methods import METHODS, Method, make_method
from prfl_fast.sampling.pipeline import FamilyPipelineSampler, WanPipelineSampler
from prfl_fast.utils.checks import check
from prfl_fast.utils.folder_lock import hold_folder
from prfl_fast.utils.io import clean_temporaries, read_json, write_json
from prfl_fast.utils.modules import free_memory
from prfl_fast.utils.progress import step_progress
from prfl_fast.utils.units import plural
from prfl_fast.utils.version import __version__

RECORD = "samples.json"
# Paths may differ, because the fingerprints of their files are settings too.
_PLACES = ("model", "weights", "data")


def run_sample(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    method = _method(options)
    job = Job(options)
    if method is not None:
        check_reward(options.reward, job)
    if options.pipeline:
        _check_pipeline(options, job)
    else:
        check_flow(job)
    arm = Arm(job, options.out, options.weights, method, options.reward)
    print(arm.cost())
    with hold_folder(options.out):
        arm.open()
        if options.pipeline:
            arm.sample_by_pipeline()
        else:
            if arm.missing():
                job.encode()
            arm.sample()
        arm.decode()
    print(f"{plural(len(job.videos), 'video')}: {options.out}")
    if not options.latents_only:
        print(f"contact sheet: {options.out / generate.SHEET}")
    return 0


def _check_pipeline(options: argparse.Namespace, job: Job) -> None:
    """Check the inputs that a pipeline takes."""
    index = options.model / "model_index.json"
    check(index.is_file(), "--model", str(options.model), f"a folder with {index.name}")
    for name in ("method", "data"):
        value = getattr(options, name)
        check(value is None, f"--{name}", value, "no value with --pipeline")
    check(options.batch_size == 1, "--batch-size", options.batch_size, "1 with --pipeline")
    images = sum(prompt.image is not None for prompt in job.prompts)
    ok = job.family is None or not job.shift_given
    check(ok, "--shift", options.shift, "no value with --pipeline, which has its own scheduler")
    all_or_none = images in (0, len(job.prompts))
    check(all_or_none, "--image", images, "one for each prompt or none with --pipeline")


def check_flow(job: Job) -> None:
    """Raise ``ValueError`` for a family that only its own pipeline can sample, as CogVideoX."""
    if job.family is not None and not job.family.is_flow:
        raise ValueError(
            f"--model: {job.family.name} predicts no velocity of a flow, expected one that does. "
            "Use prfl-fast sample --pipeline, without --method"
        )


def _method(options: argparse.Namespace) -> Method | None:
    given = {}
    for pair in options.set:
        name, equals, value = pair.partition("=")
        check(bool(equals), "--set", pair, "KEY=VALUE")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    if options.method is None:
        ok = not given and options.reward is None
        check(ok, "--method", None, f"one of {', '.join(METHODS)} beside --reward or --set")
        return None
    check(options.reward is not None, "--reward", None, f"a reward model for {options.method}")
    return make_method(options.method, given, options.num_inference_steps)


class Arm:
    """Sample the videos of a job by one generator into a folder."""

    def __init__(
        self,
        job: Job,
        out: Path,
        weights: str | None,
        method: Method | None = None,
        reward: str | None = None,
    ) -> None:
        self.job, self.out, self.weights = job, out, weights
        self.method, self.reward = method, reward
        if weights is not None:
            flow = job.family is None or job.family.is_flow
            check_weights(weights, job.folders, job.shapes if flow else {})

    def cost(self) -> str:
        """Return a line with the forwards and backwards of the videos."""
        job, steps = self.job, self.job.options.num_inference_steps
        branches, count = 2 if job.guided else 1, plural(len(job.videos), "video")
        plain = steps * branches
        if self.method is None:
            return f"cost: {count} of {plural(plain, 'forward')} of the generator"
        each = self.method.cost(steps, branches)
        values = ", ".join(f"{k} {v}" for k, v in self.method.options.items() if v != {})
        backwards = each.generator_backward + each.reward_backward
        text = (
            f"{plural(each.generator, 'forward')} of the generator and {each.reward} of the reward"
        )
        if backwards:
            text += f", {each.generator_backward} and {each.reward_backward} backwards"
        # A backward through frozen weights costs about one forward.
        times = (each.generator + each.generator_backward) / plain
        return (
            f"cost: {self.method.name} ({values}) takes {text} for each of {count}, "
            f"{times:.1f} times the generator's work without a method"
        )

    def missing(self) -> list[Video]:
        """Return the videos without latents."""
        return [v for v in self.job.videos if not generate.latents_file(self.out, v).is_file()]

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the videos."""
        found = {**self.job.settings(), "weights": self.weights, "method": None}
        found["pipeline"] = getattr(self.job.options, "pipeline", False)
        if self.weights is not None:
            found["weights: fingerprint"] = fingerprint(weights_path(self.weights).resolve())
        if self.method is not None:
            assert self.reward is not None
            found["method"] = [self.method.name, dict(self.method.options)]
            found["reward: fingerprint"] = fingerprint(Path(self.reward).resolve())
            found["batch_size"] = self.job.options.batch_size  # its random numbers are shared
        return json.loads(json.dumps(found))

    def open(self) -> None:
        """Begin or continue in the folder; write the record.

        Raises:
            ValueError: if the folder has samples of other settings.
        """
        path, wanted = self.out / RECORD, self.settings()
        if path.is_file():
            before = read_json(path).get("settings", {})
            hint = "Choose a new folder, or sample as it was begun"
            for key in sorted((before.keys() | wanted.keys()) - set(_PLACES)):
                was, now = before.get(key), wanted.get(key)
                shown = f"{str(now)[:100]} of this call"  # prompts may fill pages
                check(was == now, f"{path}: {key}", str(was)[:100], shown, hint=hint)
        for folder in (self.out, self.out / generate.LATENTS):
            folder.mkdir(parents=True, exist_ok=True)
            clean_temporaries(folder)
        self._write_record(wanted)

    def _write_record(self, settings: Mapping[str, Any]) -> None:
        videos = []
        for video in self.job.videos:
            prompt, score = self.job.prompts[video.prompt], None
            if self.method is not None and generate.latents_file(self.out, video).is_file():
                score = generate.read_latents(self.out, video)[1]
            values = {"file": f"{video.name}.mp4", "prompt": prompt.text, "seed": video.seed}
            if self.job.dataset is not None:
                values["id"] = self.job.dataset.ids()[video.prompt]
            if prompt.image is not None:
                values["image"] = str(prompt.image)
            videos.append(values if score is None else {**values, "reward": score})
        content = {"prfl_fast": __version__, "settings": settings, "videos": videos}
        write_json(self.out / RECORD, content)

    def sampler(self) -> Sampler:
        """Return the sampler of the generator, which is loaded to the device."""
        job, o = self.job, self.job.options
        model = load_sampler_model(str(job.model), self.weights, job.weight_dtype, job.device)
        # Only Wan's transformers are called at timesteps that are rounded down.
        scheduler = FlowUniPC(o.shift, integer_timesteps=job.family is None)
        return Sampler(model, scheduler, o.num_inference_steps, job.guidance, RolloutConfig())

    def sample(self, then: Callable[[Sampler], None] | None = None) -> None:
        """Write the latents that are missing, then call a function with the loaded sampler."""
        todo, job = self.missing(), self.job
        if not todo and then is None:
            return
        sampler = self.sampler()
        method = None
        if self.method is not None:
            assert self.reward is not None
            method = (self.method, load_reward_call(self.reward, job.device))
        if todo:
            self._sample(sampler, set(todo), method)
        if then is not None:
            then(sampler)
        del sampler, method
        free_memory()
        if self.method is not None:
            self._write_record(self.settings())

    def _sample(
        self, sampler: Sampler, todo: set[Video], method: tuple[Method, Reward] | None
    ) -> None:
        job = self.job
        # Those of an uninterrupted run, because rounding and a method's random numbers depend on
        # the whole batch.
        batches = generate.batches_of(job.videos, job.shape_of, job.options.batch_size)
        batches = [batch for batch in batches if todo.intersection(batch)]
        steps = len(batches) * sampler.num_inference_steps
        with step_progress(f"sample {self.out.name}", 0, steps) as bar:
            generate.sample_latents(
                sampler,
                batches,
                lambda prompt: job.conditions[prompt],
                job.shape_of,
                self.out,
                device=job.device,
                method=method,
                tick=bar.update,
            )

    def sample_by_pipeline(self) -> None:
        """Write the latents that are missing by the pipeline of diffusers, one video at a time."""
        todo, job, o = self.missing(), self.job, self.job.options
        if not todo:
            return
        model = load_sampler_model(
            str(job.model), self.weights, job.weight_dtype, job.device, patched=False
        )
        pipeline: WanPipelineSampler | FamilyPipelineSampler
        parts: dict[str, Any] = {"device": job.device, "dtype": job.dtype}
        if job.family is None:
            images = job.prompts[0].image is not None
            pipeline = WanPipelineSampler(job.model, model, o.shift, images=images, **parts)
        else:
            pipeline = FamilyPipelineSampler(job.model, model, job.family, o.fps, **parts)
        with step_progress(f"sample {self.out.name}", 0, len(todo) * o.num_inference_steps) as bar:
            for video in todo:
                latents = pipeline(
                    job.prompts[video.prompt],
                    o.negative or "",
                    generate.noise_of(video.seed, job.shape_of(video.prompt))[None].to(job.device),
                    job.frames,
                    job.size,
                    o.num_inference_steps,
                    o.guidance_scale,
                    bar.update,
                )
                generate.write_latents(self.out, video, latents[0])
        del model, pipeline
        free_memory()

    def decode(self) -> None:
        """Write the videos that are missing and the contact sheet."""
        job = self.job
        todo = [v for v in job.videos if not (self.out / f"{v.name}.mp4").is_file()]
        if job.options.latents_only:
            return
        if todo:
            codec = job.open_codec()
            with step_progress(f"decode {self.out.name}", 0, len(todo)) as bar:
                generate.decode(codec, todo, self.out, job.options.fps, bar.update)
            del codec
            free_memory()
        if todo or not (self.out / generate.SHEET).is_file():
            generate.write_sheet(job.videos, [p.text for p in job.prompts], self.out)
