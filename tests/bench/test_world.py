"""The small world: determinism, the codec's algebra, and the metric's sight of every defect."""

from functools import lru_cache

import pytest
import torch
from experiments import world
from experiments.world.captions import TEXT_DIM, TEXT_TOKENS
from experiments.world.codec import CHANNELS
from experiments.world.metric import MARKS, motion_score, track
from experiments.world.videos import GRAVITY
from offload_models import assert_same


@lru_cache
def clips(defect, bodies=(1, 1), num=64, seed=11):
    return world.generate(num, defect=defect, seed=seed, bodies=bodies)


def roc_auc(positive, negative):
    """Return the probability that a value of `positive` exceeds one of `negative`; ties: half."""
    order = positive[:, None] - negative[None]
    return ((order > 0).double() + 0.5 * (order == 0).double()).mean().item()


def through_codec(video):
    return world.decode(world.encode(video))


def test_same_seed_same_clips_and_other_seed_other_clips():
    a, b, c = (world.generate(6, seed=s) for s in (3, 3, 4))
    assert_same([a.frames, a.text], [b.frames, b.text])
    assert a.defects == b.defects
    assert not torch.equal(a.frames, c.frames)


@pytest.mark.parametrize(("frames", "height", "width"), [(9, 32, 32), (13, 48, 64), (17, 32, 48)])
def test_shapes_and_ranges(frames, height, width):
    v = world.generate(5, seed=0, frames=frames, height=height, width=width, bodies=(1, 2))
    assert v.frames.shape == (5, 3, frames, height, width) and v.frames.dtype == torch.float32
    assert v.frames.min() >= -1 and v.frames.max() <= 1
    assert v.text.shape == (5, TEXT_TOKENS, TEXT_DIM)
    assert v.labels["motion_quality"].shape == (5,) and len(v.defects) == len(v.captions) == 5
    assert v.positions.shape == v.radii.shape == (5, 2, frames, 2)


def test_labels_follow_the_defects_and_the_rate():
    v = world.generate(400, seed=5, frames=9)
    assert v.labels["motion_quality"].tolist() == [float(d == "none") for d in v.defects]
    assert set(v.defects) == {"none", *world.DEFECTS}
    assert 0.4 < v.labels["motion_quality"].mean() < 0.6
    rare = world.generate(400, seed=5, frames=9, defect_rate=0.1)
    assert 0.84 < rare.labels["motion_quality"].mean() < 0.96


def test_text_describes_the_scene_and_not_the_defect():
    good, bad = clips(None), clips("jitter")
    assert torch.equal(good.text, bad.text)
    rows = {c: good.text[i] for i, c in enumerate(good.captions)}
    assert len(rows) == len(torch.unique(good.text.flatten(1), dim=0)) > 10
    assert all(torch.equal(rows[c], good.text[i]) for i, c in enumerate(good.captions))


def test_good_clips_fall_under_gravity_bounce_and_lose_energy():
    v = clips(None)
    path = v.positions[:, 0].double() / 32
    rate = path.shape[1] - 1
    velocity = path.diff(dim=1) * rate
    accel = velocity.diff(dim=1) * rate
    assert abs(accel[..., 1].median().item() - GRAVITY) < 0.4
    height = 1 - 0.5 * (path[:, 1:, 1] + path[:, :-1, 1])
    energy = 0.5 * velocity.square().sum(-1) + GRAVITY * height
    assert (energy[:, -1] < energy[:, 0]).all()
    edge, y = v.radii[:, 0, :, 0], v.positions[:, 0, :, 1]
    assert (y >= edge - 1e-3).all() and (y <= 32 - edge + 1e-3).all()


def test_each_defect_changes_the_trajectory_as_described():
    good = clips(None)
    step = good.positions[:, 0].diff(dim=1).norm(dim=-1)
    assert torch.equal(clips("reverse").positions[:, 0], good.positions[:, 0].flip(1))
    jump = clips("teleport").positions[:, 0].diff(dim=1).norm(dim=-1)
    assert (jump.amax(1) > 8).float().mean() > 0.9 and step.max() < 7
    still = clips("freeze").positions[:, 0].diff(dim=1).norm(dim=-1) == 0
    assert (still.sum(1) == 6).all() and (step > 0).all()
    assert not torch.equal(clips("jitter").positions[:, 0], good.positions[:, 0])
    area = clips("deform").radii[:, 0].prod(-1).log().std(1)
    assert (area > 0.1).all() and (good.radii[:, 0].prod(-1).log().std(1) < 1e-5).all()


WRONG = {"num_videos": 0, "defect": "melting", "seed": -1, "frames": 16, "height": 40, "width": 0}
WRONG |= {"bodies": (2, 1), "defect_rate": 1.5}


@pytest.mark.parametrize("name", WRONG)
def test_generate_names_the_wrong_argument(name):
    with pytest.raises(ValueError, match=f"{name} is .*expected"):
        world.generate(**{"num_videos": 1, name: WRONG[name]})


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (5, 16, 48), (17, 32, 32)])
def test_encode_inverts_decode(frames, height, width):
    z = torch.randn(2, CHANNELS, 1 + frames // 4, height // 16, width // 16, dtype=torch.float64)
    video = world.decode(z)
    assert video.shape == (2, 3, frames, height, width)
    torch.testing.assert_close(world.encode(video), z, rtol=0, atol=1e-10)


def test_decode_of_encode_is_the_orthogonal_projection():
    x = torch.randn(2, 3, 9, 32, 32, dtype=torch.float64)
    y = torch.randn_like(x)
    px, py = through_codec(x), through_codec(y)
    torch.testing.assert_close(through_codec(px), px, rtol=0, atol=1e-10)
    # The latents' means lie in the retained subspace, so the map is linear: every residual is
    # orthogonal to every projection.
    assert abs(((x - px) * py).sum().item()) < 1e-8


def test_latents_are_about_standardised_and_bodies_survive():
    x = world.generate(512, seed=2).frames
    z = world.encode(x)
    for part in (z[:, :, :1], z[:, :, 1:]):
        channels = part.transpose(0, 1).flatten(1)
        assert channels.mean(1).abs().max() < 0.1
        assert (channels.std(1) > 0.85).all() and (channels.std(1) < 1.15).all()
    assert (through_codec(x) - x).square().mean() < 0.25 * x.var()


def test_codec_is_differentiable():
    x = torch.randn(1, 3, 5, 16, 16, dtype=torch.float64, requires_grad=True)
    z = torch.randn(1, CHANNELS, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    for function, value in ((world.encode, x), (world.decode, z)):
        assert torch.autograd.gradcheck(function, (value,), fast_mode=True)


REFUSED = [
    (world.encode, (1, 3, 4, 32, 32)),
    (world.encode, (1, 3, 5, 24, 32)),
    (world.encode, (3, 5, 32, 32)),
    (lambda x: world.encode(x.int()), (1, 3, 5, 16, 16)),
    (world.decode, (1, 16, 2, 4, 4)),
    (world.decode, (CHANNELS, 2, 4, 4)),
    (world.decode, (1, CHANNELS, 0, 4, 4)),
    (motion_score, (1, 3, 5, 32, 32)),
]


@pytest.mark.parametrize(("function", "shape"), REFUSED)
def test_other_shapes_are_refused(function, shape):
    with pytest.raises(ValueError, match="expected"):
        function(torch.zeros(shape))


def test_tracker_finds_the_centers_through_the_codec():
    v = clips(None)
    found = track(through_codec(v.frames))
    assert (found.count == 1).float().mean() > 0.98
    error = (found.positions[:, 0] - v.positions[:, 0]).norm(dim=-1)
    assert error.mean() < 0.5  # pixels
    pair = track(through_codec(clips(None, (2, 2)).frames))
    assert (pair.count == 2).float().mean() > 0.9


# Two bodies that touch or pass each other are harder to follow.
@pytest.mark.cases(1)
@pytest.mark.parametrize(("bodies", "overall"), [((1, 1), 0.97), ((1, 2), 0.9)])
def test_score_separates_good_clips_from_every_defect(bodies, overall):
    good = motion_score(through_codec(clips(None, bodies).frames))
    assert good.min() >= 0 and good.max() <= 1 and good.mean() > 0.9
    aucs = {}
    for defect in world.DEFECTS:
        # Another seed: the comparison must not be between two versions of one scene.
        bad = motion_score(through_codec(clips(defect, bodies, seed=12).frames))
        aucs[defect] = roc_auc(good, bad)
    assert min(aucs.values()) > 0.85, aucs
    assert sum(aucs.values()) / len(aucs) > overall, aucs


@pytest.mark.parametrize(
    ("defect", "mark"),
    [
        ("teleport", "steady"),
        ("jitter", "smooth"),
        ("reverse", "energy"),
        ("freeze", "alive"),
        ("deform", "shape"),
    ],
)
def test_each_defect_lowers_its_own_mark(defect, mark):
    _, good = motion_score(through_codec(clips(None).frames), details=True)
    _, bad = motion_score(through_codec(clips(defect).frames), details=True)
    assert set(good) == set(MARKS)
    assert bad[mark].mean() < 0.65 < 0.85 < good[mark].mean()


def test_empty_rooms_and_noise_score_low():
    assert motion_score(torch.full((2, 3, 9, 32, 32), -0.8)).max() == 0
    noise = torch.randn(32, CHANNELS, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    assert motion_score(world.decode(noise)).mean() < 0.4
    still = clips(None).frames[:, :, :1].expand(-1, -1, 17, -1, -1)
    assert motion_score(still).mean() < 0.6
