"""Check and encode the inputs of ``prfl-fast sample`` and ``compare``: prompts, images, rewards."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prfl_fast.cli import loading
from prfl_fast.cli.inputs import fingerprint
from prfl_fast.cli.plan import note
from prfl_fast.cli.sections import HardwareSection
from prfl_fast.data.codec import (
    MAX_TOKENS,
    load_codec,
    load_image_encoder,
    load_prompt_encoder,
)
from prfl_fast.data.codec_base import Codec
from prfl_fast.data.codec_files import find_part, has_part
from prfl_fast.data.encode import DTYPES
from prfl_fast.data.encode_plan import default_condition
from prfl_fast.data.families import find_family
from prfl_fast.data.manifest import LatentDataset, Sample
from prfl_fast.data.prompts import Prompt, read_prompts
from prfl_fast.data.reference_lists import open_latents
from prfl_fast.data.video import clip_info
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.conditions import GUIDANCE, IMAGE, LATENT, TEXT, takes_guidance
from prfl_fast.models.registry import find_adapter, patch
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.sampling import generate
from prfl_fast.training.objectives import reward_call
from prfl_fast.utils.checks import check
from prfl_fast.utils.choices import Condition
from prfl_fast.utils.io import read_json
from prfl_fast.utils.modules import free_memory
from prfl_fast.utils.progress import step_progress


class Job:
    """Check and encode the inputs of sampling, which all generators share.

    Attributes:
        videos: those to sample, by prompt.
        prompts: texts and images; of a dataset the captions of its samples, or their ids.
        shapes: of latents and conditions by name, without batch dimension; of a dataset those of
            its largest samples.
        conditions: those of each prompt, after :meth:`encode`.
        guidance: with the negative conditions, after :meth:`encode`.

    Raises:
        ValueError: if an input is missing or does not fit the generator; nothing is written then.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.model = options, options.model
        check(self.model.exists(), "--model", str(self.model), "a folder that exists")
        self.family = find_family(self.model)
        self._set_defaults(options)
        self.device = loading.device_of(HardwareSection(device=options.device))
        cuda = self.device.type == "cuda"
        self.weight_dtype = options.weight_dtype or ("bf16" if cuda else "fp32")
        self.dtype = DTYPES["bf16" if cuda else "fp32"]  # of the encoders
        loading.check_writable(options.out, "OUT")
        self.conditions: Sequence[Conditions] = ()
        self.guidance: Guidance | None = None
        self.dataset: LatentDataset | None = None
        self.folders, boundary = loading.folders_of(str(self.model))
        scale = options.guidance_scale
        one = not isinstance(scale, tuple) or boundary is not None
        check(one, "--guidance-scale", scale, "one number for one transformer")
        # HunyuanVideo's scale is a condition, so there is no second branch.
        self.embedded = boundary is None and takes_guidance(loading.empty_model(self.folders[0]))
        self.guided = scale != 1 and not self.embedded
        ok = not self.embedded or options.negative is None
        check(ok, "--negative", options.negative, "no value for a model with embedded guidance")
        if options.data is not None:
            self._open_dataset(options)
        else:
            self._open_prompts(options)
        mixed = len({prompt.image is None for prompt in self.prompts}) > 1
        ok, expected = not mixed or options.batch_size == 1, "1 where some prompts have no image"
        check(ok, "--batch-size", options.batch_size, expected)
        self.videos = generate.list_videos(len(self.prompts), options.samples, options.seed)

    def _set_defaults(self, options: argparse.Namespace) -> None:
        """Fill in the options whose default depends on the family."""
        if options.fps is None:
            options.fps = 16.0 if self.family is None else float(self.family.fps)
        self.shift_given = options.shift is not None
        if options.shift is None:
            options.shift = 5.0
            scheduler = self.model / "scheduler" / "scheduler_config.json"
            if self.family is not None and scheduler.is_file():
                config = read_json(scheduler)
                # LTX chooses its shift by the size. Mochi's 1 belongs to other noise levels.
                if not config.get("use_dynamic_shifting") and config.get("shift", 1.0) > 1:
                    options.shift = float(config["shift"])

    def _open_dataset(self, options: argparse.Namespace) -> None:
        dataset = self.dataset = open_latents(options.data)
        check(not dataset.pairs, "--data", options.data, "single videos, not preference pairs")
        for name in ("size", "frames"):
            value, wanted = getattr(options, name), "no value with --data, whose latents have one"
            check(value is None, f"--{name}", value, wanted)
        check(not options.image, "--image", options.image, "none with --data")
        for folder in self.folders:
            loading.check_model(folder, dataset)
        named = zip(dataset.captions(), dataset.ids(), strict=True)
        self.prompts = [Prompt(caption or name) for caption, name in named]
        self.shapes = dict(dataset.shapes)
        if not options.latents_only:
            find_part(self.model, "vae")
        if self.guided and options.negative is None:
            self._negative_file()
        elif self.guided:
            find_part(self.model, "text_encoder")

    def _negative_file(self) -> Path:
        """Return the file of a dataset's negative prompt, or of its empty one."""
        assert self.dataset is not None
        paths = [self.dataset.negative_prompt_file(), self.dataset.empty_prompt_file()]
        found = [path for path in paths if path.is_file()]
        hint = "Or give --negative TEXT, or --guidance-scale 1"
        check(bool(found), "--data", str(self.options.data), f"one with {paths[0]}", hint=hint)
        return found[0]

    def _open_prompts(self, options: argparse.Namespace) -> None:
        self.prompts = read_prompts(options.prompts) if options.prompts else _given_prompts(options)
        self.size = options.size or (480, 832)
        self.frames = 81 if options.frames is None else options.frames
        condition = default_condition(self.model)
        self.takes_clip = condition != "none" and has_part(self.model, "image_encoder")
        find_part(self.model, "text_encoder")
        # The smallest part is read here, because it decides the shape of the latents.
        codec = load_codec(self.model)
        latents = codec.latent_shape(self.frames, *self.size)
        _check_images(self.prompts, condition, codec.is_ti2v, self.takes_clip, self.frames)
        self.shapes = {"latents": latents}
        if condition != "none":
            self.shapes[LATENT] = (codec.channels + 4, *latents[1:])
        for folder in self.folders:
            model: Any = loading.empty_model(folder)
            if self.family is not None:
                adapter: Any = find_adapter(model)
                self.shapes |= adapter.prompt_shapes(model)
                if self.family.is_flow:
                    loading.check_shapes(self.shapes, model, f"{folder}: does not fit the videos")
                continue
            self.shapes[TEXT] = (MAX_TOKENS, model.config.text_dim)
            if model.config.image_dim is not None:
                check(self.takes_clip, "--model", str(self.model), "a pipeline with image_encoder")
                rows = getattr(model.config, "pos_embed_seq_len", None) or 257
                self.shapes[IMAGE] = (rows, model.config.image_dim)
            loading.check_shapes(self.shapes, model, f"{folder}: does not fit the videos")

    def shape_of(self, prompt: int) -> tuple[int, ...]:
        """Return the shape ``(C, F, H, W)`` of a prompt's latents."""
        if self.dataset is None:
            return self.shapes["latents"]
        bucket = next(b for b in self.dataset.buckets if prompt in b.indices)
        return bucket.shapes["latents"]

    def encode(self) -> None:
        """Encode the prompts, then the images."""
        negative, texts = self.options.negative, []
        if self.dataset is None:
            texts = [prompt.text for prompt in self.prompts]
            negative = negative or ""
        wanted = [*texts, *([negative] if self.guided and negative is not None else [])]
        states = self._states(wanted) if wanted else {}
        if self.dataset is not None:
            self.conditions = _OfDataset(self.dataset)
        else:
            images = self._images()
            self.conditions = [
                {**states[text], **image} for text, image in zip(texts, images, strict=True)
            ]
        if self.embedded:
            self.conditions = _WithGuidance(self.conditions, self.options.guidance_scale)
        if self.guided:
            if negative is None:
                assert self.dataset is not None
                text = self.dataset.read_prompt(self._negative_file())
            else:
                text = states[negative]
            of_batch = generate.batch_conditions([text], self.device)
            # In turn, because prompts have other lengths than the negative one.
            self.guidance = Guidance(self.options.guidance_scale, of_batch, batched=False)

    def _states(self, texts: Sequence[str]) -> dict[str, Conditions]:
        """Return the conditions of each text, by the text, on the CPU."""
        unique = list(dict.fromkeys(texts))
        encoder = load_prompt_encoder(self.model, self.device, self.dtype, self.options.fps)
        states = {}
        with step_progress("prompts", 0, len(unique)) as bar:
            for text in unique:
                states[text] = encoder.conditions([text])[0]
                if encoder.is_cut(text):
                    note(f"cut at {MAX_TOKENS} tokens: {text[:60]!r}", self.options.command)
                bar.update()
        del encoder
        free_memory()
        return states

    def _images(self) -> list[Conditions]:
        """Return the conditions of the prompts' images."""
        found: list[Conditions] = [{} for _ in self.prompts]
        places = [i for i, prompt in enumerate(self.prompts) if prompt.image is not None]
        if not places:
            return found
        encoder = None
        if self.takes_clip:
            encoder = load_image_encoder(self.model, self.device, self.dtype)
        codec = self.open_codec()
        with step_progress("images", 0, len(places)) as bar:
            for i in places:
                prompt = self.prompts[i]
                found[i] = generate.image_conditions(prompt, self.frames, self.size, codec, encoder)
                bar.update()
        del codec, encoder
        free_memory()
        return found

    def open_codec(self) -> Codec:
        """Return the autoencoder; its memory with its weights fits ``--budget``, or free memory."""
        codec = load_codec(self.model, self.device)
        if self.options.budget is not None:
            codec.limit(self.options.budget)
        elif self.device.type == "cuda":
            codec.budget = torch.cuda.mem_get_info(self.device)[0]
        return codec

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the videos, without the weights and the method."""
        o = self.options
        names = ("size", "frames", "fps", "samples", "seed", "num_inference_steps", "shift")
        found = {name: getattr(o, name) for name in (*names, "guidance_scale", "negative")}
        found |= {"model": str(self.model), "data": o.data, "weight_dtype": self.weight_dtype}
        found["model: fingerprint"] = fingerprint(self.model.resolve())
        if self.dataset is not None:
            found["data: fingerprint"] = fingerprint(self.dataset.folder.resolve())
            found["data: manifest"] = self.dataset.digest()  # of a list: with the files' paths
        else:
            found |= {"size": self.size, "frames": self.frames}
            for key in ("text", "image", "last_image"):
                values = [getattr(prompt, key) for prompt in self.prompts]
                found[f"prompts: {key}"] = [
                    v if v is None or isinstance(v, str) else fingerprint(v) for v in values
                ]
        return found


class _OfDataset(Sequence[Conditions]):
    """Read the conditions of a dataset's samples."""

    def __init__(self, dataset: LatentDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return _sample(self._dataset, index).conditions


class _WithGuidance(Sequence[Conditions]):
    """Set the embedded guidance of conditions."""

    def __init__(self, conditions: Sequence[Conditions], scale: float) -> None:
        self._conditions, self._value = conditions, torch.tensor(1000.0 * scale)

    def __len__(self) -> int:
        return len(self._conditions)

    def __getitem__(self, index: Any) -> Any:
        return {**self._conditions[index], GUIDANCE: self._value}


def _sample(dataset: LatentDataset, index: int) -> Sample:
    sample = dataset[index]
    assert isinstance(sample, Sample)
    return sample


def _given_prompts(options: argparse.Namespace) -> list[Prompt]:
    images = [Path(image) for image in options.image]
    ok = not images or len(images) == len(options.prompt)
    check(ok, "--image", len(images), f"one for each of {len(options.prompt)} prompts")
    for image in images:
        check(image.is_file(), "--image", str(image), "a file that exists")
    return [Prompt(text, images[i] if images else None) for i, text in enumerate(options.prompt)]


def _check_images(
    prompts: Sequence[Prompt], condition: Condition, first_frame: bool, clip: bool, frames: int
) -> None:
    """Check that the generator takes the prompts' images, and that they can be read."""
    for prompt in prompts:
        name, given = f"image of {prompt.text[:40]!r}", prompt.image is not None
        if condition == "none":
            ok, expected = not given or (first_frame and frames > 1), "none: the model takes none"
        else:
            ok, expected = given, "a file: this is an image-to-video model"
            expected += ". Give --image FILE, or image in the file of --prompts"
        check(ok, name, prompt.image and str(prompt.image), expected)
        last, name = prompt.last_image, f"last_image of {prompt.text[:40]!r}"
        check(last is not None or condition != "first-last", name, None, "a file")
        takes = condition == "first-last" or (condition == "first" and not clip)
        check(last is None or takes, name, str(last), "none: the model takes a first frame")
        for path in (prompt.image, last):
            if path is not None:
                clip_info(path)


def check_reward(path: str, job: Job) -> None:
    """Check that a saved reward model can be read and takes the latents and conditions of a job."""
    ok = (Path(path) / "config.json").is_file()
    hint = "A run of train-reward has it in its folder reward"
    check(ok, "--reward", path, "the folder of a saved reward model", hint=hint)
    backbone = LatentRewardModel.load(path).backbone
    loading.check_shapes(job.shapes, backbone, f"--reward: {path} does not fit the videos")


def load_reward_call(path: str, device: torch.device) -> Any:
    """Return a saved reward model on the device, frozen and patched, in the form of a reward."""
    reward = LatentRewardModel.load(path).float().to(device).freeze()
    patch(reward.backbone)
    return reward_call(reward, "bf16" if device.type == "cuda" else "fp32")
