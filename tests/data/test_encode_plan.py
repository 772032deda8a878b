"""Sizes, lengths and crops of the samples of clips."""

import json
from pathlib import Path

import pytest

from prfl_fast.data.clip_lists import Clip
from prfl_fast.data.encode_plan import (
    EncodeSettings,
    bucket_sizes,
    default_condition,
    nearest_size,
    ordered_map,
    plan_crops,
)
from prfl_fast.data.video import ClipInfo, VideoFileError

CLIP = Clip("a", Path("a.mp4"), "A disc")


def info(width=1920, height=1080, seconds=5.0, fps=24):
    return ClipInfo(width, height, round(seconds * fps), seconds)


def test_auto_buckets_have_the_area_and_the_steps():
    sizes = bucket_sizes(EncodeSettings(buckets="auto"), 16)
    assert sizes[:2] == [(480, 832), (832, 480)] and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % 16 == 0 == width % 16
        assert abs(height * width / (480 * 832) - 1) < 0.06
    assert bucket_sizes(EncodeSettings(), 16) == [(480, 832)]


@pytest.mark.parametrize(
    ("side", "expected"),
    [((1920, 1080), (480, 832)), ((1080, 1920), (832, 480)), ((1000, 1000), (640, 640))],
)
def test_a_clip_takes_the_nearest_aspect_ratio(side, expected):
    sizes = bucket_sizes(EncodeSettings(buckets="auto"), 16)
    found = nearest_size(info(*side), sizes)
    ratio = side[0] / side[1]
    best = min(abs(w / h - ratio) for h, w in sizes)
    assert abs(found[1] / found[0] - ratio) < max(best * 1.5, 0.06)
    assert found in sizes and (found[0] > found[1]) == (expected[0] > expected[1])


@pytest.mark.parametrize(
    ("seconds", "frames"), [(5.0, 65), (2.0, 17), (65 / 16, 65), (1.0, None), (17 / 16, 17)]
)
def test_a_clip_takes_the_largest_length_that_it_has(seconds, frames):
    settings = EncodeSettings(frames=(17, 65))
    if frames is None:
        with pytest.raises(VideoFileError, match="a.mp4: has 16 frames at 16 .* at least 17"):
            plan_crops(CLIP, info(seconds=seconds), settings, 16)
    else:
        (crop,) = plan_crops(CLIP, info(seconds=seconds), settings, 16)
        assert crop.frames == frames and crop.id == "a" and crop[4:6] == (0.0, (0.5, 0.5))


def test_random_crops_depend_on_seed_and_clip_only():
    settings = EncodeSettings(frames=(17,), crops=4)
    crops = plan_crops(CLIP, info(), settings, 16)
    assert crops == plan_crops(CLIP, info(), settings, 16)
    assert [crop.id for crop in crops] == ["a-0", "a-1", "a-2", "a-3"]
    assert len({crop.start for crop in crops}) > 1 and len({crop.at for crop in crops}) == 4
    for crop in crops:
        assert 0 <= crop.start <= (80 - 17) / 16 and crop.start * 16 == round(crop.start * 16)
        assert all(0 <= place <= 1 for place in crop.at)
    others = plan_crops(CLIP, info(), settings._replace(seed=1), 16)
    assert [crop.at for crop in others] != [crop.at for crop in crops]


def test_images_and_small_clips():
    image = ClipInfo(100, 50, 1, 1.0)
    (crop,) = plan_crops(CLIP, image, EncodeSettings(frames=(1, 5)), 16)
    assert crop.frames == 1 and crop.enlarged
    with pytest.raises(VideoFileError, match="has 1 frames"):
        plan_crops(CLIP, image, EncodeSettings(frames=(5,)), 16)
    assert not plan_crops(CLIP, info(seconds=6), EncodeSettings(), 16)[0].enlarged


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_errors_where_they_belong(workers):
    started = []

    def square(n):
        started.append(n)
        if n == 7:
            raise ValueError("seven")
        return n * n

    found = ordered_map(square, range(10), workers)
    assert [next(found) for _ in range(7)] == [(n, n * n) for n in range(7)]
    assert max(started) <= 7 + workers
    with pytest.raises(ValueError, match="seven"):
        next(found)


@pytest.mark.parametrize(
    ("folder", "config", "expected"),
    [
        ("transformer", {"in_channels": 16, "out_channels": 16}, "none"),
        ("transformer", {"in_channels": 36, "out_channels": 16}, "first"),
        ("transformer", {"in_channels": 36, "out_channels": 16, "pos_embed_seq_len": 514}, None),
        (".", {"model_type": "i2v", "in_dim": 36, "out_dim": 16}, "first"),
        (".", {"model_type": "flf2v", "in_dim": 36, "out_dim": 16}, None),
        (".", {"model_type": "ti2v", "in_dim": 48, "out_dim": 48}, "none"),
        ("high_noise_model", {"model_type": "i2v", "in_dim": 36, "out_dim": 16}, "first"),
    ],
)
def test_the_condition_is_the_transformers(tmp_path, folder, config, expected):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    assert default_condition(tmp_path) == (expected or "first-last")
