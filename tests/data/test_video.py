"""Clips and images in, videos and sheets out."""

import os
from fractions import Fraction

import pytest
import torch
from clips import atom, claim_hours, hide_start, rotate

from prfl_fast.data import video
from prfl_fast.data.video import VideoFileError, clip_info, read_clip, read_frames, write_video

av = pytest.importorskip("av")


def ramp(frames, size=(32, 48)):
    """Return a clip whose brightness is its frame's number over ``frames``; its left is dark."""
    clip = torch.linspace(-0.5, 1, frames)[None, :, None, None].repeat(3, 1, *size)
    clip[..., : size[1] // 4] = -1
    return clip


def levels(frames):
    """Return the brightness of the right part of frames."""
    return [round(frame[:, -8:].float().mean().item()) for frame in frames]


def encoded(path, frames, fps=16):
    write_video(path, ramp(frames), fps)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm", ".mkv"])
def test_a_clip_keeps_its_frames(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    original = ramp(9)
    write_video(path, original, 24)
    info = clip_info(path)
    assert info[:3] == (48, 32, 9) and abs(info.frames / info.seconds - 24) < 0.5
    read = read_clip(path, 9, (32, 48), fps=24)
    assert (read - original).abs().mean() < 0.05
    assert torch.equal(read, read_clip(path, 9, (32, 48)))  # at its own rate each frame once
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.cases(2)
@pytest.mark.parametrize("fps", [8, 12, 16, 32])
def test_frames_are_those_shown_at_each_time(tmp_path, fps):
    found = levels(read_frames(encoded(tmp_path / "clip.mp4", 16), fps=fps))
    expected = levels(read_frames(tmp_path / "clip.mp4"))
    assert len(found) == fps
    assert found == [expected[int(i * 16 / fps + 1e-6)] for i in range(fps)]


def test_a_start_skips_by_time(tmp_path):
    path = encoded(tmp_path / "clip.mp4", 16)
    whole = list(read_frames(path, fps=16))
    part = list(read_frames(path, fps=16, start=0.5))
    assert torch.equal(torch.stack(part), torch.stack(whole[8:]))
    assert list(read_frames(path, fps=16, start=5.0)) == []


def variable(path, times):
    """Write a clip whose frame i is shown from ``times[i]`` milliseconds on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for time, frame in zip(times, video.to_uint8(ramp(len(times))), strict=True):
            image = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
            image.pts, image.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def test_variable_rates_are_resampled_by_time(tmp_path):
    path = tmp_path / "clip.mkv"
    variable(path, [0, 100, 500, 600])  # the second frame is shown for 400 ms
    shown = levels(read_frames(path))
    assert len(shown) == 4 and clip_info(path).frames == 4
    at_ten = levels(read_frames(path, fps=10))
    assert at_ten[:7] == [shown[i] for i in (0, 1, 1, 1, 1, 2, 3)]


@pytest.mark.cases(2)
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(tmp_path, degrees):
    path = encoded(tmp_path / "clip.mp4", 2)
    plain = next(iter(read_frames(path)))
    rotate(path, degrees)
    turned = next(iter(read_frames(path)))
    assert torch.equal(turned, torch.rot90(plain, degrees // 90, (0, 1)))
    height, width = turned.shape[:2]
    assert clip_info(path)[:2] == (width, height)


def written(path, **options):
    """Write a frame of orange by codec options of its stream, which say how it is shown."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv444p"
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        stream.options = {"crf": "4"}
        color = torch.tensor([200, 60, 30], dtype=torch.uint8).expand(32, 48, 3).numpy()
        frame = av.VideoFrame.from_ndarray(color, format="rgb24")
        space = {"dst_colorspace": options.get("colorspace", 5), "src_colorspace": 0}
        ranges = {"dst_color_range": options.get("color_range", 1), "src_color_range": 2}
        container.mux(stream.encode(frame.reformat(format="yuv444p", **space, **ranges)))
        container.mux(stream.encode())
    return next(iter(read_frames(path)))


@pytest.mark.parametrize("space", [1, 5, 9])  # BT.709, BT.601, BT.2020
@pytest.mark.parametrize("full", [1, 2])
def test_colors_are_read_by_the_matrix_and_range_of_the_file(tmp_path, space, full):
    frame = written(tmp_path / "clip.mp4", colorspace=space, color_range=full)
    wanted = torch.tensor([200.0, 60.0, 30.0])
    assert (frame.float().mean((0, 1)) - wanted).abs().max() < 3


def test_pixels_are_square_and_images_of_16_bits_keep_their_levels(tmp_path):
    frame = written(tmp_path / "clip.mp4", sample_aspect_ratio=Fraction(4, 3))
    assert frame.shape == (32, 64, 3) and clip_info(tmp_path / "clip.mp4")[:2] == (64, 32)
    from PIL import Image

    levels = torch.arange(0, 65536, 256, dtype=torch.int32).view(16, 16).numpy().astype("uint16")
    Image.fromarray(levels).save(tmp_path / "a.png")
    shown = next(iter(read_frames(tmp_path / "a.png")))[..., 0]
    assert torch.equal(shown.flatten(), torch.arange(256, dtype=torch.uint8))


def test_images_are_clips_of_one_frame(tmp_path):
    frame = (torch.rand(20, 30, 3) * 255).to(torch.uint8)
    video.write_image(tmp_path / "a.png", frame)
    assert clip_info(tmp_path / "a.png") == (30, 20, 1, 1.0)
    assert torch.equal(next(iter(read_frames(tmp_path / "a.png", fps=16))), frame)
    assert read_clip(tmp_path / "a.png", 1, (16, 16)).shape == (3, 1, 16, 16)
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to show
    Image.fromarray(frame.numpy()).save(tmp_path / "b.jpg", exif=exif)
    assert clip_info(tmp_path / "b.jpg")[:2] == (20, 30)


def test_a_clip_of_one_frame(tmp_path):
    path = encoded(tmp_path / "clip.mp4", 1)
    assert clip_info(path).frames == 1
    assert len(list(read_frames(path, fps=16))) == 1
    with pytest.raises(VideoFileError, match=r"clip.mp4: has 1 frames at 16 .* expected 5"):
        read_clip(path, 5, (16, 16), fps=16)


def damaged(path):
    # The boxes stay whole; the coded frames are noise.
    encoded(path, 12)
    data = bytearray(path.read_bytes())
    start = atom(data, "mdat")
    end = len(data)
    data[start + 40 : end] = os.urandom(end - start - 40)
    path.write_bytes(data)


def truncated(path):
    encoded(path, 12)
    path.write_bytes(path.read_bytes()[:300])


def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), "fltp", "mono")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "text": (lambda path: path.write_text("no video\n" * 50), "cannot be read as video"),
    "truncated": (truncated, "cannot be read as video|has no video stream"),
    "damaged": (damaged, "damaged|cannot be read as video|has no frames|expected 9"),
    "sound": (sound_only, "has no video stream"),
    "missing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    make, reason = BAD[name]
    path = tmp_path / "bad.mp4"
    make(path)
    with pytest.raises(VideoFileError, match=rf"^{path}: .*({reason})"):
        read_clip(path, 9, (16, 16), fps=16)
    if name != "damaged":  # its packets can be counted
        with pytest.raises(VideoFileError, match=f"^{path}: "):
            clip_info(path)


def test_bad_images_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(VideoFileError, match="a.png: cannot be read as an image"):
        clip_info(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_header_of_four_hours_is_not_believed(tmp_path, suffix):
    path = encoded(tmp_path / f"clip{suffix}", 12)
    claim_hours(path, 4)
    if suffix == ".webm":  # FFmpeg itself does not believe that of an mp4
        with av.open(str(path)) as container:
            assert container.duration == 4 * 3600 * 10**6
    info = clip_info(path)
    assert info.frames == 12 and abs(info.seconds - 0.75) < 0.07
    assert len(list(read_frames(path, fps=16))) == 12


def test_frames_before_a_trimmed_start_are_not_counted(tmp_path):
    path = encoded(tmp_path / "clip.mp4", 12)
    last = levels(read_frames(path))[4:]
    hide_start(path, 4)
    assert levels(read_frames(path)) == last
    assert clip_info(path).frames == 8 and abs(clip_info(path).seconds - 0.5) < 1e-3


def test_crops_cover_the_size(tmp_path):
    frame = torch.zeros(40, 60, 3, dtype=torch.uint8)
    frame[:, 30:] = 200
    assert video.fit_frame(frame, (40, 60)) is not frame
    assert torch.equal(video.fit_frame(frame, (40, 60)), frame)
    for at, mean in (((0.5, 0.0), 50), ((0.5, 0.5), 100), ((0.5, 1.0), 150)):
        part = video.fit_frame(frame, (40, 40), at)
        assert part.shape == (40, 40, 3) and abs(part.float().mean() - mean) < 1
    # Rounding leaves no side short.
    assert video.fit_frame(frame[:, :59], (16, 32)).shape == (16, 32, 3)
    assert video.fit_frame(frame[:39], (32, 16)).shape == (32, 16, 3)


def test_parts_are_written_as_one_clip(tmp_path):
    clip = ramp(9)
    write_video(tmp_path / "a.mp4", clip, 16)
    write_video(tmp_path / "b.mp4", iter(clip.split([1, 4, 4], 1)), 16)
    whole, parts = (read_clip(tmp_path / name, 9, (32, 48), fps=16) for name in ("a.mp4", "b.mp4"))
    # x264 writes a few other bytes in one of a thousand runs.
    torch.testing.assert_close(parts, whole, atol=0.05, rtol=0)
    bad = {"odd": clip[..., :-1], "four channels": clip[:1].repeat(4, 1, 1, 1), "none": []}
    for shape in bad.values():
        with pytest.raises(ValueError, match="even height and width"):
            write_video(tmp_path / "c.mp4", shape, 16)
    with pytest.raises(ValueError, match="a part of video"):
        write_video(tmp_path / "c.mp4", iter([clip, clip[..., :16]]), 16)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_sheet_has_a_row_per_video(tmp_path):
    clips = [ramp(9), ramp(3, (16, 16))]
    sheet = video.contact_sheet(clips, columns=4, gap=2)
    assert sheet.shape == ((32 + 2) + (16 + 2), 4 * (48 + 2), 3) and sheet.dtype == torch.uint8
    first, last = video.to_uint8(clips[0])[[0, -1]]
    assert torch.equal(sheet[:32, :48], first) and torch.equal(sheet[:32, 150:198], last)
    assert (sheet[34:, 3 * 18 :] == 255).all()
    video.write_image(tmp_path / "sheet.png", sheet)
    assert torch.equal(next(iter(read_frames(tmp_path / "sheet.png"))), sheet)
