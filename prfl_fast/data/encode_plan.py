"""Choose size, length and crops of the samples that clips are encoded to."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prfl_fast.data.clip_lists import Clip
from prfl_fast.data.codec_base import Codec
from prfl_fast.data.codec_files import has_part
from prfl_fast.data.families import find_family
from prfl_fast.data.video import ClipInfo, VideoFileError, clip_info
from prfl_fast.utils.checks import check, check_choice, check_count, check_positive
from prfl_fast.utils.choices import CONDITIONS, Condition
from prfl_fast.utils.io import digest_of, read_json

# Width over height of the buckets that `auto` adds to the given size.
RATIOS = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9)


class EncodeSettings(NamedTuple):
    """Hold the settings that determine the tensors of a dataset.

    Attributes:
        size: height and width in pixels; with ``buckets="auto"`` its area is that of all buckets.
        frames: numbers of frames, each 4n + 1; a clip takes the largest that it has.
        fps: frames per second.
        buckets: sizes to choose from by a clip's aspect ratio, or ``"auto"``; empty: ``size`` only.
        crops: samples of each clip. The first frames of the center if it is 1 and ``random_crops``
            is False.
        random_crops: choose place and first frame of each crop at random.
        condition: frames that image-to-video models get.
        negative: negative prompt for guidance; None writes none.
        dtype: ``fp32`` or ``bf16``, of umT5, of CLIP and of the files; the autoencoder is fp32.
        seed: of random crops.
    """

    size: tuple[int, int] = (480, 832)
    frames: tuple[int, ...] = (81,)
    fps: float = 16.0
    buckets: tuple[tuple[int, int], ...] | Literal["auto"] = ()
    crops: int = 1
    random_crops: bool = False
    condition: Condition = "none"
    negative: str | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0


class Crop(NamedTuple):
    """Describe one sample: its clip, size, frames, first second and place of the crop."""

    id: str
    clip: Clip
    frames: int
    size: tuple[int, int]
    start: float = 0.0
    at: tuple[float, float] = (0.5, 0.5)
    enlarged: bool = False


class EncodePlan(NamedTuple):
    """Hold the samples to write, the SHA-256 digests of their clips, and the skipped clips."""

    crops: list[Crop]
    digests: dict[str, str]
    skipped: list[tuple[str, str]]


def check_settings(settings: EncodeSettings, codec: Codec) -> None:
    """Raise ``ValueError`` if a setting is out of range or does not fit the codec."""
    check_positive("fps", settings.fps)
    check_count("crops", settings.crops)
    check_choice("condition", settings.condition, CONDITIONS)
    check(bool(settings.frames), "frames", settings.frames, "at least one number")
    sizes = () if settings.buckets == "auto" else settings.buckets
    for frames in settings.frames:
        for height, width in (settings.size, *sizes):
            codec.latent_shape(frames, height, width)
            codec.set_encoder_tiles((1, 3, frames, height, width))
    expected = "more than 1 with a given last frame"
    ok = settings.condition != "first-last" or min(settings.frames) > 1
    check(ok, "frames", settings.frames, expected)


def bucket_sizes(settings: EncodeSettings, step: int) -> list[tuple[int, int]]:
    """Return the sizes that clips may take; those of ``auto`` are multiples of ``step``."""
    if settings.buckets != "auto":
        return list(settings.buckets) or [settings.size]
    height, width = settings.size
    area = height * width
    sizes = [settings.size, (width, height)]
    for ratio in RATIOS:
        h, w = math.sqrt(area / ratio), math.sqrt(area * ratio)
        sizes.append((max(step, round(h / step) * step), max(step, round(w / step) * step)))
    return list(dict.fromkeys(sizes))


def nearest_size(info: ClipInfo, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size whose aspect ratio is nearest to a clip's; the first of equal ones."""
    ratio = math.log(info.width / info.height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - ratio))


def plan_crops(clip: Clip, info: ClipInfo, settings: EncodeSettings, step: int) -> list[Crop]:
    """Return the samples of a clip; they depend on the arguments only.

    Raises:
        VideoFileError: if the clip is too short.
    """
    size = nearest_size(info, bucket_sizes(settings, step))
    available = info.frames_at(settings.fps)
    fitting = [n for n in settings.frames if n <= available]
    if not fitting:
        least = min(settings.frames)
        raise VideoFileError(
            f"{clip.path}: has {available} frames at {settings.fps:g} frames per second, "
            f"expected at least {least}"
        )
    frames = max(fitting)
    enlarged = size[0] > info.height or size[1] > info.width
    if settings.crops == 1 and not settings.random_crops:
        return [Crop(clip.id, clip, frames, size, enlarged=enlarged)]
    crops = []
    for k in range(settings.crops):
        draw = random.Random(f"crop {settings.seed} {clip.id} {k}")
        start = draw.randint(0, available - frames) / settings.fps
        at = (draw.random(), draw.random())
        crops.append(Crop(f"{clip.id}-{k}", clip, frames, size, start, at, enlarged))
    return crops


def make_plan(
    clips: Iterable[Clip],
    settings: EncodeSettings,
    step: int,
    *,
    workers: int = 1,
    show: Callable[[str], object] = lambda text: None,
) -> EncodePlan:
    """Read all clips' packets and choose their samples; unreadable and short clips are skipped.

    Args:
        step: multiple of the sides of ``auto`` buckets, in pixels.
        workers: threads that read.
        show: is called with the path of each clip.
    """
    crops: list[Crop] = []
    digests: dict[str, str] = {}
    skipped: list[tuple[str, str]] = []

    def scan(clip: Clip) -> tuple[list[Crop], str] | VideoFileError:
        assert clip.path is not None
        try:
            found = plan_crops(clip, clip_info(clip.path), settings, step)
            return found, digest_of(clip.path)
        except VideoFileError as error:
            return error

    for clip, found in ordered_map(scan, clips, workers):
        show(str(clip.path))
        if isinstance(found, VideoFileError):
            skipped.append((clip.id, str(found)))
            continue
        crops += found[0]
        digests[clip.id] = found[1]
    return EncodePlan(crops, digests, skipped)


def plan_prompts(clips: Sequence[Clip], settings: EncodeSettings) -> EncodePlan:
    """Return the plan of prompts without clips: each has the size and the most frames."""
    crops = [Crop(clip.id, clip, max(settings.frames), settings.size) for clip in clips]
    return EncodePlan(crops, dict.fromkeys((clip.id for clip in clips), ""), [])


def ordered_map(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int
) -> Iterable[tuple[Any, Any]]:
    """Yield ``(item, function(item))`` in order; ``workers`` threads compute ahead of the caller.

    At most ``workers + 1`` results wait.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[tuple[Any, Any]] = []
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > workers:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def latent_tokens(frames: int, size: tuple[int, int], codec: Codec) -> int:
    """Return the tokens of the transformer for a sample."""
    _, f, h, w = codec.latent_shape(frames, *size)
    patch = codec.patch
    return (f // patch[0]) * (h // patch[1]) * (w // patch[2])


def read_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; raise ``ValueError`` with its path if it has none."""
    try:
        return dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a JSON object ({error})") from error


def transformer_config(model: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a pipeline's transformer; empty if there is none."""
    # Those of diffusers, of official Wan2.1 and of official Wan2.2 with two experts.
    for folder in ("transformer", ".", "high_noise_model"):
        if (model / folder / "config.json").is_file():
            return read_object(model / folder / "config.json")
    return {}


def default_condition(model: Path) -> Condition:
    """Return the condition that a pipeline's transformer takes; ``none`` for other families."""
    if find_family(model) is not None:
        return "none"
    config = transformer_config(model)
    kind = str(config.get("model_type", ""))
    if kind.startswith("flf") or config.get("pos_embed_seq_len"):
        return "first-last"
    given = (config.get("in_channels") or 0) - (config.get("out_channels") or math.inf)
    return "first" if kind == "i2v" or given > 4 else "none"


def needs_images(model: Path, condition: Condition) -> bool:
    """Return True if a dataset has CLIP states: a frame is given, and the model takes them."""
    takes = has_part(model, "image_encoder") or bool(transformer_config(model).get("image_dim"))
    return condition != "none" and takes
