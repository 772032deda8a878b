"""Read clips and images, and write videos and contact sheets, by PyAV and pillow."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import interpolate, pad

from prfl_fast.utils.checks import check, check_count, check_positive, reason_of
from prfl_fast.utils.io import write_atomic
from prfl_fast.utils.optional import need

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".gif")
# A frame starts this share of an output frame early or late without being another one: time bases
# round to milliseconds in webm.
_SLACK = 0.02


class VideoFileError(ValueError):
    """Error for a file that is no readable video or image; its message begins with the path."""


class ClipInfo(NamedTuple):
    """Describe a clip as it is shown: size in pixels after rotation, frames, length in seconds."""

    width: int
    height: int
    frames: int
    seconds: float

    def frames_at(self, fps: float) -> int:
        """Return the number of frames at another rate; a single frame counts once."""
        return 1 if self.frames == 1 else max(1, math.ceil(self.seconds * fps - _SLACK))


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """Open a file and yield its container and video stream; errors of PyAV name the file."""
    av = need("av", "video")
    path = Path(path)
    if not path.is_file():
        raise VideoFileError(f"{path}: no such file")
    if not path.stat().st_size:
        raise VideoFileError(f"{path}: has 0 bytes, expected a video or an image")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoFileError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            # Callers read clips in parallel. One run with FFmpeg's own threads never ended.
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.error.FFmpegError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise VideoFileError(f"{path}: cannot be read as video ({reason})") from error


def _open_image(path: Path) -> Any:
    """Return an image upright, as RGB."""
    pillow, transposed = need("PIL.Image", "video"), need("PIL.ImageOps", "video").exif_transpose
    try:
        with pillow.open(path) as image:
            upright = transposed(image)
            if upright.mode.startswith("I"):  # 16 bits, which convert() would clip to 8
                numpy = need("numpy", "video")
                upright = pillow.fromarray((numpy.array(upright) >> 8).astype(numpy.uint8))
            return upright.convert("RGB")
    except Exception as error:  # decoders of pillow raise errors of many types
        reason = reason_of(error)
        raise VideoFileError(f"{path}: cannot be read as an image ({reason})") from error


def clip_info(path: str | os.PathLike[str]) -> ClipInfo:
    """Return size, frames and length of a clip or image from its packets, not from its header.

    One frame is decoded. An image has one frame of one second.

    Raises:
        VideoFileError: if the file is missing, empty, damaged or has no frames.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGES:
        width, height = _open_image(path).size
        return ClipInfo(width, height, 1, 1.0)
    with _open(path) as (container, stream):
        first = next(iter(container.decode(stream)), None)
        if first is None:
            raise VideoFileError(f"{path}: has no frames")
        width, height = _shown_width(first, stream), first.height
        if first.rotation % 180:
            width, height = height, width
        container.seek(0)
        # A trimmed file keeps packets before its first frame, which are not shown.
        times = sorted(
            (packet.pts, packet.duration or 0)
            for packet in container.demux(stream)
            if packet.size and packet.pts is not None and not packet.is_discard
        )
        if not times:
            raise VideoFileError(f"{path}: its frames have no times")
        (first_tick, _), (last_tick, length) = times[0], times[-1]
        ticks = last_tick - first_tick
        # Without a duration, the last frame lasts as long as the others do on average.
        length = length or (ticks / (len(times) - 1) if len(times) > 1 else 0)
        seconds = float((ticks + length) * stream.time_base) or 1.0
        return ClipInfo(width, height, len(times), seconds)


def read_frames(
    path: str | os.PathLike[str], *, fps: float | None = None, start: float = 0.0
) -> Iterator[torch.Tensor]:
    """Yield the frames of a clip, upright, as uint8 ``[H, W, 3]``, one at a time.

    Args:
        path: video, or image of one frame.
        fps: frames per second of the output: frame i is the one that is shown ``start + i / fps``
            seconds after the first, by the times in the file. None yields each frame once.
        start: seconds to skip.

    Raises:
        VideoFileError: if the file cannot be read, also in mid-clip.
    """
    if fps is not None:
        check_positive("fps", fps)
    path = Path(path)
    if path.suffix.lower() in IMAGES:
        if start <= 0:
            yield _tensor(_open_image(path))
        return
    with _open(path) as (container, stream):
        begin: float | None = None
        count, shown = 0, start  # of the next output frame: index and time
        held, end = None, 0.0  # the last frame before that time, and when it ends
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise VideoFileError(f"{path}: a frame is damaged")
            now = 0.0 if frame.pts is None else float(frame.pts * frame.time_base)
            begin = now if begin is None else begin
            now -= begin
            if fps is None:
                if now >= start:
                    yield _upright(frame, stream)
                continue
            while held is not None and shown < now - _SLACK / fps:
                yield _upright(held, stream)
                count += 1
                shown = start + count / fps
            held = frame
            length = float((frame.duration or 0) * frame.time_base)
            # A frame is shown at its own time at least, however short a muxer says it is.
            end = now + max(length or 1 / fps, 2 * _SLACK / fps)
        while held is not None and fps is not None and shown < end - _SLACK / fps:
            yield _upright(held, stream)
            count += 1
            shown = start + count / fps


def _tensor(image: Any) -> torch.Tensor:
    numpy = need("numpy", "video")
    return torch.from_numpy(numpy.array(image, dtype=numpy.uint8))


def _shown_width(frame: Any, stream: Any) -> int:
    """Return the width of a frame in square pixels, before it is turned."""
    return max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))


def _upright(frame: Any, stream: Any) -> torch.Tensor:
    """Return a decoded frame in RGB and square pixels, turned as its display matrix says."""
    # Unless both color spaces are named, PyAV 15 takes the matrix of BT.601 for all files.
    colors = {"src_colorspace": int(frame.colorspace), "dst_colorspace": 0}
    colors |= {"src_color_range": int(frame.color_range), "dst_color_range": 2}  # full, of RGB
    width = _shown_width(frame, stream)
    image = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, **colors))
    return torch.rot90(image, round(frame.rotation / 90) % 4, (0, 1)).contiguous()


def fit_frame(
    frame: torch.Tensor, size: tuple[int, int], at: tuple[float, float] = (0.5, 0.5)
) -> torch.Tensor:
    """Resize a frame until it covers ``size``, and crop the rest.

    Args:
        frame: uint8 ``[H, W, 3]``.
        size: height and width of the result.
        at: place of the crop in the rest, from 0 (top, left) to 1 (bottom, right); default: center.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    height, width = size
    scale = max(height / frame.shape[0], width / frame.shape[1])
    # Rounding must not leave a side short.
    rows, columns = (
        max(wanted, round(side * scale)) for wanted, side in zip(size, frame.shape[:2], strict=True)
    )
    image = frame.permute(2, 0, 1)[None]
    if (rows, columns) != tuple(frame.shape[:2]):
        image = interpolate(image.float(), (rows, columns), mode="bicubic", antialias=True)
        image = image.round_().clamp_(0, 255).to(torch.uint8)
    top, left = round((rows - height) * at[0]), round((columns - width) * at[1])
    return image[0, :, top : top + height, left : left + width].permute(1, 2, 0).contiguous()


def read_clip(
    path: str | os.PathLike[str],
    frames: int,
    size: tuple[int, int],
    *,
    fps: float | None = None,
    start: float = 0.0,
    at: tuple[float, float] = (0.5, 0.5),
) -> torch.Tensor:
    """Read ``frames`` frames of a clip at one size, as float32 ``[3, F, H, W]`` in [-1, 1].

    Arguments are those of :func:`read_frames` and :func:`fit_frame`.

    Raises:
        VideoFileError: if the file cannot be read, or has fewer frames.
    """
    check_count("frames", frames)
    found: list[torch.Tensor] = []
    stream = read_frames(path, fps=fps, start=start)
    with contextlib.closing(stream):  # type: ignore[type-var]
        for frame in stream:
            found.append(fit_frame(frame, size, at))
            if len(found) == frames:
                break
    if len(found) < frames:
        rate = "" if fps is None else f" at {fps:g} frames per second"
        raise VideoFileError(f"{path}: has {len(found)} frames{rate}, expected {frames}")
    return from_uint8(torch.stack(found))


def from_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Return uint8 ``[F, H, W, 3]`` as float32 ``[3, F, H, W]`` in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Return ``[3, F, H, W]`` in [-1, 1] as uint8 ``[F, H, W, 3]`` on the CPU."""
    values = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return values.to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous()


def write_video(
    path: str | os.PathLike[str], video: torch.Tensor | Iterable[torch.Tensor], fps: float = 16
) -> None:
    """Write a video file atomically: H.264, or MPEG-4 if PyAV has no H.264 encoder.

    Args:
        path: file to write; its suffix chooses the container (``.mp4``, ``.mov``, ``.webm``: VP9).
        video: ``[3, F, H, W]`` in [-1, 1], or an iterable of such parts, which are written one
            after the other. Height and width are even.
        fps: frames per second.

    Raises:
        ValueError: if a part has another shape, or there is none.
        OSError: if the file cannot be written.
    """
    av, path = need("av", "video"), Path(path)
    check_positive("fps", fps)
    parts = iter([video] if isinstance(video, torch.Tensor) else video)
    first = next(parts, None)
    shape = None if first is None else tuple(first.shape)
    ok = shape is not None and len(shape) == 4 and shape[0] == 3 and not (shape[2] | shape[3]) % 2
    check(ok, "video", first, "[3, F, H, W] with even height and width")
    assert first is not None and shape is not None
    with write_atomic(path) as temporary:
        options = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov", ".m4v") else {}
        try:
            with av.open(str(temporary), "w", options=options) as container:
                stream = container.add_stream(
                    _encoder(path.suffix), rate=Fraction(fps).limit_denominator(1001)
                )
                stream.height, stream.width, stream.pix_fmt = *shape[2:], "yuv420p"
                # The bytes of a file do not depend on the number of cores.
                stream.codec_context.thread_count = 1
                if stream.name == "libx264":
                    stream.options = {"crf": "18"}
                else:
                    stream.bit_rate = max(200_000, math.prod(shape[2:]) * round(fps) // 4)
                for part in chain([first], parts):
                    check(part.shape[2:] == shape[2:], "a part of video", part, f"{list(shape)}")
                    for frame in to_uint8(part):
                        image = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
                        container.mux(stream.encode(image))
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def _encoder(suffix: str) -> str:
    av = need("av", "video")
    for name in ("libvpx-vp9",) if suffix == ".webm" else ("libx264", "libopenh264"):
        with contextlib.suppress(ValueError, av.error.FFmpegError):
            return av.codec.Codec(name, "w").name
    return "mpeg4"


def write_image(path: str | os.PathLike[str], image: torch.Tensor) -> None:
    """Write uint8 ``[H, W, 3]`` as an image file, atomically; the suffix chooses the format."""
    with write_atomic(path) as temporary:
        need("PIL.Image", "video").fromarray(image.numpy()).save(temporary)


def contact_sheet(videos: Sequence[torch.Tensor], columns: int = 8, gap: int = 4) -> torch.Tensor:
    """Arrange evenly spaced frames of videos in a sheet: one row per video.

    Args:
        videos: each ``[3, F, H, W]`` in [-1, 1]; sizes and lengths may differ.
        columns: frames per video; the first and the last are among them.
        gap: white pixels between frames.

    Returns:
        uint8 ``[height, width, 3]``, for :func:`write_image`.
    """
    check(bool(videos), "videos", videos, "at least one")
    check_count("columns", columns)
    rows = []
    for video in videos:
        count = min(columns, video.shape[1])
        chosen = torch.linspace(0, video.shape[1] - 1, count, device="cpu").round().long().tolist()
        frames = to_uint8(video[:, chosen])
        rows.append(torch.cat([pad(f, (0, 0, 0, gap, 0, gap), value=255) for f in frames], 1))
    width = max(row.shape[1] for row in rows)
    return torch.cat([pad(r, (0, 0, 0, width - r.shape[1]), value=255) for r in rows])
