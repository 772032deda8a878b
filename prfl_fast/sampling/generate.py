"""Sample videos into files: noise of a seed → latents → video files and a contact sheet.

Each step reads the files of the one before, so a killed run continues, and generator and
autoencoder need not be in memory together.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate, pad

from prfl_fast.data.codec import ImageEncoder
from prfl_fast.data.codec_base import Codec
from prfl_fast.data.prompts import Prompt
from prfl_fast.data.video import (
    contact_sheet,
    from_uint8,
    read_clip,
    read_frames,
    write_image,
    write_video,
)
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.conditions import IMAGE, stack_conditions
from prfl_fast.rewards.functions import Reward
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.sampling.methods import Method
from prfl_fast.utils.checks import check, torch_seed
from prfl_fast.utils.io import open_tensors, save_tensors
from prfl_fast.utils.optional import need
from prfl_fast.utils.progress import on_terminal

LATENTS = "latents"  # folder of latents, and the name of the tensor in its files
SHEET = "sheet.png"
_METADATA = "sample"
_STRIP_HEIGHT, _CAPTION_HEIGHT = 120, 16  # pixels


class Video(NamedTuple):
    """Name a video to sample: ``name`` of its files, number of its prompt, seed of its noise."""

    name: str
    prompt: int
    seed: int


def list_videos(prompts: int, per_prompt: int = 1, seed: int = 0) -> list[Video]:
    """Return the videos of all prompts; the seeds count up from ``seed``, so that none repeats."""
    count = range(prompts * per_prompt)
    return [
        Video(f"{i // per_prompt:04d}-{i % per_prompt}", i // per_prompt, seed + i) for i in count
    ]


def noise_of(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """Return the noise of a seed, float32 of ``shape`` on the CPU: the same on every device."""
    generator = torch.Generator().manual_seed(torch_seed(seed))
    return torch.randn(tuple(shape), generator=generator, device="cpu")


def batches_of(
    videos: Sequence[Video], shape: Callable[[int], Sequence[int]], batch_size: int
) -> list[list[Video]]:
    """Return batches of videos whose latents have one shape; ``shape`` is that of a prompt."""
    groups: dict[tuple[int, ...], list[Video]] = {}
    for video in videos:
        groups.setdefault(tuple(shape(video.prompt)), []).append(video)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def batch_conditions(
    samples: Sequence[Conditions], device: torch.device | str = "cpu"
) -> Conditions:
    """Stack conditions without batch dimension on a device; see :func:`stack_conditions`."""
    return {name: t.to(device) for name, t in stack_conditions(samples).items()}


def image_conditions(
    prompt: Prompt,
    frames: int,
    size: tuple[int, int],
    codec: Codec,
    encoder: ImageEncoder | None,
) -> Conditions:
    """Return the conditions of a prompt's images, without batch dimension, on the CPU.

    Args:
        prompt: with an image, or the first and the last.
        frames: of the video.
        size: height and width of the video, to which images are scaled and cropped.
        codec: encodes them as :meth:`Codec.image_condition`.
        encoder: CLIP, for models that take its states; None for others.

    Raises:
        ValueError: if an image cannot be read.
    """
    paths = [path for path in (prompt.image, prompt.last_image) if path is not None]
    images = [read_clip(path, 1, size)[:, 0] for path in paths]  # [3, H, W] each
    found = codec.image_condition(images[0], frames, *images[1:])
    if encoder is not None:
        found[IMAGE] = encoder(images)
    return {name: tensor.cpu() for name, tensor in found.items()}


def latents_file(folder: Path, video: Video) -> Path:
    """Return the file of a video's latents in the folder of a run."""
    return folder / LATENTS / f"{video.name}.safetensors"


def read_latents(folder: Path, video: Video) -> tuple[torch.Tensor, float | None]:
    """Read the latents ``[C, F, H, W]`` of a video, and its reward if a method computed it."""
    with open_tensors(latents_file(folder, video)) as file:
        return file.get_tensor(LATENTS), json.loads(file.metadata()[_METADATA])["score"]


def write_latents(
    folder: Path, video: Video, latents: torch.Tensor, score: float | None = None
) -> None:
    """Write the latents ``[C, F, H, W]`` of a video, and its reward.

    Raise ``ValueError`` if they are not finite.
    """
    ok, hint = bool(latents.isfinite().all()), "Try another precision or dtype of the weights"
    check(ok, f"latents of {video.name}", latents, "finite values", hint=hint)
    # One key, because safetensors writes several in random order.
    metadata = {_METADATA: json.dumps({"seed": video.seed, "score": score})}
    save_tensors({LATENTS: latents}, latents_file(folder, video), metadata)


@torch.no_grad()
def sample_latents(
    sampler: Sampler,
    batches: Sequence[Sequence[Video]],
    conditions: Callable[[int], Conditions],
    shape: Callable[[int], Sequence[int]],
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    method: tuple[Method, Reward] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Sample videos and write their latents, those of a batch together.

    A video's noise depends on its seed only, and its other random numbers on its seed and those of
    the batch.

    Args:
        sampler: the generator, its schedule, guidance and rollout configuration.
        batches: the videos to sample, see :func:`batches_of`.
        conditions: returns the conditions of a prompt's number, without batch dimension.
        shape: returns that of a prompt's latents, ``(C, F, H, W)``.
        folder: of the run; files are ``latents/<name>.safetensors``.
        device: of the noise, the conditions and the model.
        method: a use of a reward, and the reward.
        tick: called ``num_inference_steps`` times for each batch, as it is sampled.

    Raises:
        TypeError, ValueError: as :func:`prfl_fast.rollout.rollout` and the method's function.
    """
    engine = None
    if sampler.rollout is not None:
        engine = RolloutEngine(sampler.transformer, sampler.rollout)
    for batch in batches:
        noise = torch.stack([noise_of(v.seed, shape(v.prompt)) for v in batch]).to(device)
        given = batch_conditions([conditions(video.prompt) for video in batch], device)
        scores = None
        if method is None:
            trajectory = Trajectory(sampler, noise, given, engine=engine)
            trajectory.run(sampler.num_inference_steps, tick)
            latents = trajectory.x
        else:
            # Not the seed itself, whose numbers are the noise of the first candidate.
            generator = torch.Generator().manual_seed(torch_seed(batch[0].seed) ^ 1 << 62)
            with torch.enable_grad():
                use, reward = method
                latents, scores, _ = use.run(
                    sampler, reward, noise, given, generator, progress=on_terminal()
                )
            for _ in range(sampler.num_inference_steps):
                tick()
        for i, video in enumerate(batch):
            score = None if scores is None else float(scores[i])
            write_latents(folder, video, latents[i], score)


def decode(
    codec: Codec,
    videos: Sequence[Video],
    folder: Path,
    fps: float,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Write ``<name>.mp4`` of the latents of videos; each part is written when it is decoded.

    ``tick`` is called once for each video. Errors are those of :meth:`Codec.decode` and
    :func:`prfl_fast.data.video.write_video`.
    """
    for video in videos:
        latents, _ = read_latents(folder, video)
        parts = (part[0] for part in codec.decode_parts(latents[None]))
        write_video(folder / f"{video.name}.mp4", parts, fps)
        tick()


def write_sheet(videos: Sequence[Video], prompts: Sequence[str], folder: Path) -> None:
    """Write ``sheet.png``: eight frames of each video in a row under its name, seed and prompt.

    Frames are at most 120 pixels high. Letters that Pillow's own font lacks leave a prompt out.
    """
    rows = []
    for video in videos:
        row = frame_strip(folder / f"{video.name}.mp4")
        prompt = prompts[video.prompt]
        text = f"{video.name}, seed {video.seed}: {prompt if prompt.isascii() else ''}"
        rows.append(torch.cat([_caption(text, row.shape[1]), row]))
    width = max(row.shape[1] for row in rows)
    sheet = torch.cat([pad(row, (0, 0, 0, width - row.shape[1]), value=255) for row in rows])
    write_image(folder / SHEET, sheet)


def _caption(text: str, width: int) -> torch.Tensor:
    """Return a line of text, dark on white, as uint8 ``[16, width, 3]``; the rest is cut."""
    image = need("PIL.Image", "video").new("RGB", (width, _CAPTION_HEIGHT), "white")
    need("PIL.ImageDraw", "video").Draw(image).text((1, 2), " ".join(text.split()), fill="black")
    return torch.from_numpy(need("numpy", "video").array(image))


def frame_strip(path: Path) -> torch.Tensor:
    """Return evenly spaced frames of a video file as an image, uint8 ``[height, width, 3]``."""
    frames = []
    for frame in read_frames(path):
        scale = min(1.0, _STRIP_HEIGHT / frame.shape[0])
        size = [max(2, round(n * scale)) for n in frame.shape[:2]]
        small = interpolate(frame.permute(2, 0, 1)[None].float(), size, mode="area")[0]
        frames.append(small.round().to(torch.uint8).permute(1, 2, 0))
    return contact_sheet([from_uint8(torch.stack(frames))])
