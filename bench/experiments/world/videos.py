"""Generate short videos of bouncing bodies, with labeled motion defects.

Physics, in box units (length 1 = frame height, time 1 = whole clip): constant gravity, weak linear
drag, inelastic bounces off the floor, the walls, the ceiling and other bodies. Every body of a good
clip bounces off the floor, so the clip loses energy visibly, and played backwards it gains energy.
The units scale with the frame size and the number of frames: a clip always tells a story of the
same length.

Defects act on the trajectory or on the shape, never on the pixels:

======== ========================================================================================
teleport one body jumps sideways, once, by a quarter to two fifths of the width, and moves on
jitter   every body gets an independent offset in each frame (white noise)
reverse  the clip is played backwards, so that bounces gain energy
freeze   two fifths of the clip repeat one frame, then motion jumps to where it would have been
deform   every body swells, shrinks and stretches periodically
======== ========================================================================================
"""

import dataclasses
import math

import torch
from torch import Tensor

from .captions import MAX_BODIES, PALETTE, captions, text, words

DEFECTS = ("teleport", "jitter", "reverse", "freeze", "deform")

GRAVITY = 4.0  # heights per clip duration squared
DRAG = 0.15  # 1 / clip duration
FLOOR_RESTITUTION = 0.65
SIDE_RESTITUTION = 0.85  # walls, ceiling and pairs of bodies
SUBSTEPS = 6  # integration steps per frame

SIZES = (0.17, 0.2, 0.23)  # body radius / frame height


@dataclasses.dataclass(frozen=True)
class Videos:
    """Hold a batch of N clips.

    frames: float32 [N, 3, F, H, W] in [-1, 1].
    text: float32 [N, TEXT_TOKENS, TEXT_DIM], the intended scene (count, and for each body its
        size, color, starting place and direction), whatever defect the clip got; the stand-in for
        the text encoder's states.
    labels: {"motion_quality": float32 [N]}, 1 for a plausible clip and 0 for a defective one.
    defects: N names out of DEFECTS, or "none".
    positions: float32 [N, MAX_BODIES, F, 2], (x, y) of the centers in pixels, y down; NaN where
        there is no such body.
    radii: float32 [N, MAX_BODIES, F, 2], horizontal and vertical semi-axes in pixels; likewise.
    captions: N sentences with the same content as `text`.
    """

    frames: Tensor
    text: Tensor
    labels: dict[str, Tensor]
    defects: list[str]
    positions: Tensor
    radii: Tensor
    captions: list[str]


def generate(
    num_videos: int,
    *,
    defect: str | None = "random",
    seed: int = 0,
    frames: int = 17,
    height: int = 32,
    width: int = 32,
    bodies: tuple[int, int] = (1, 1),
    defect_rate: float = 0.5,
) -> Videos:
    """Draw `num_videos` clips; the same arguments always give the same clips.

    defect: None for plausible clips, a name out of DEFECTS for that defect in every clip, or
        "random": each clip is defective with probability `defect_rate`, its defect drawn uniformly.
    frames: 4k + 1, at least 9. height, width: pixels, multiples of 16.
    bodies: smallest and largest number of bodies, within 1..MAX_BODIES.
    Raise ``ValueError`` for any argument outside these ranges.
    """
    _check(num_videos, defect, seed, frames, height, width, bodies, defect_rate)
    gen = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=gen)

    n, b, aspect = num_videos, MAX_BODIES, width / height
    count = torch.randint(bodies[0], bodies[1] + 1, (n,), generator=gen)
    color = torch.randint(len(PALETTE), (n, b), generator=gen)
    size = torch.randint(len(SIZES), (n, b), generator=gen)
    tone = uniform(n, low=-0.95, high=-0.75)
    present = torch.arange(b) < count[:, None]  # [N, MAX_BODIES]

    names = _draw_defects(n, defect, defect_rate, gen)
    flag = {name: torch.tensor([d == name for d in names]) for name in DEFECTS}

    radius = torch.tensor(SIZES)[size] * uniform(n, b, low=0.95, high=1.05)
    start, velocity = _start(radius, count, aspect, uniform)
    said = words(color, size, start, velocity, aspect)
    jump_frame = torch.randint(math.ceil(0.3 * frames), int(0.75 * frames), (n,), generator=gen)
    jump_frame = torch.where(flag["teleport"], jump_frame, -1)
    # [N, B, F, 2]
    positions = _simulate(start, velocity, radius, present, jump_frame, frames, aspect)
    radii = radius[:, :, None, None].expand(n, b, frames, 2)
    positions, radii = _play(positions, radii, flag, gen)
    edge = radii.clamp(max=0.3)
    positions = positions.clamp(edge, torch.tensor([aspect, 1.0]) - edge)

    rgb = torch.tensor(list(PALETTE.values()))[color]  # [N, B, 3]
    pixels = _render(positions * height, radii * height, present, rgb, tone, height, width)
    hidden = ~present[:, :, None, None]
    return Videos(
        frames=pixels,
        text=text(count, said, present),
        labels={"motion_quality": torch.tensor([float(d == "none") for d in names])},
        defects=names,
        positions=(positions * height).masked_fill(hidden, math.nan),
        radii=(radii * height).masked_fill(hidden, math.nan),
        captions=captions(count, said),
    )


def _play(
    path: Tensor, radii: Tensor, flag: dict[str, Tensor], gen: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Freeze, reverse, shake and deform the paths and radii [N, B, F, 2] of these clips."""
    n, _, frames, _ = path.shape
    length = max(2, round(0.4 * frames))
    first = torch.randint(2, frames - length, (n, 1), generator=gen)
    time = torch.arange(frames).expand(n, frames)
    frozen = flag["freeze"][:, None] & (time > first) & (time < first + length)
    time = torch.where(frozen, first, time)
    time = torch.where(flag["reverse"][:, None], frames - 1 - time, time)
    path = path.gather(2, time[:, None, :, None].expand_as(path))
    shake = 0.07 * torch.randn(path.shape, generator=gen)
    path = torch.where(flag["jitter"][:, None, None, None], path + shake, path)
    wobbling = radii * _wobble(n, frames, gen)
    return path, torch.where(flag["deform"][:, None, None, None], wobbling, radii)


def _draw_defects(n: int, defect: str | None, rate: float, gen: torch.Generator) -> list[str]:
    bad = torch.rand(n, generator=gen) < rate
    kind = torch.randint(len(DEFECTS), (n,), generator=gen)
    if defect != "random":
        return [defect or "none"] * n
    return [DEFECTS[k] if b else "none" for k, b in zip(kind.tolist(), bad.tolist(), strict=True)]


def _start(radius: Tensor, count: Tensor, aspect: float, uniform) -> tuple[Tensor, Tensor]:
    """Draw starting centers and velocities [N, B, 2]; the first floor contact is at 0.3 .. 0.55."""
    n, b = radius.shape
    room = 1 - 2 * radius
    drop = room * uniform(n, b, low=0.5, high=0.85)
    contact = uniform(n, b, low=0.3, high=0.55)
    y = 1 - radius - drop
    vy = drop / contact - 0.5 * GRAVITY * contact
    # Two bodies start in different halves so that they never overlap at frame 0.
    two = (count == 2)[:, None]
    apart = (torch.arange(b) + uniform(n, b, low=0.1, high=0.9)) / b
    share = torch.where(two, apart, uniform(n, b))
    x = radius + (aspect - 2 * radius) * share
    speed = aspect * uniform(n, b, low=0.5, high=1.1)
    vx = torch.where(uniform(n, b) < 0.5, -speed, speed)
    return torch.stack([x, y], -1), torch.stack([vx, vy], -1)


def _simulate(
    start: Tensor,
    velocity: Tensor,
    radius: Tensor,
    present: Tensor,
    jump_frame: Tensor,
    frames: int,
    aspect: float,
) -> Tensor:
    """Return centers [N, B, F, 2] in box units; body 0 jumps at `jump_frame` [N] (-1: never)."""
    pos, vel = start.clone(), velocity.clone()
    step = 1 / ((frames - 1) * SUBSTEPS)
    low = radius[..., None].expand_as(pos)
    high = torch.tensor([aspect, 1.0]) - low
    pull = torch.tensor([0.0, GRAVITY])
    bounce_high = torch.tensor([SIDE_RESTITUTION, FLOOR_RESTITUTION])
    path = [pos]
    for frame in range(1, frames):
        for _ in range(SUBSTEPS):
            accel = pull - DRAG * vel
            pos = pos + step * vel + 0.5 * step**2 * accel
            vel = vel + step * accel
            under, over = pos < low, pos > high
            pos = torch.where(under, 2 * low - pos, torch.where(over, 2 * high - pos, pos))
            fallen = torch.where(over, -bounce_high * vel.abs(), vel)
            vel = torch.where(under, SIDE_RESTITUTION * vel.abs(), fallen)
            vel = _collide(pos, vel, radius, present)
        x, shift = pos[:, 0, 0], 0.42 * aspect
        # Towards the farther wall: at least a quarter of the width, whatever the radius.
        right, left = (x + shift).clamp(max=high[:, 0, 0]), (x - shift).clamp(min=low[:, 0, 0])
        moved = torch.where(x < 0.5 * aspect, right, left)
        now = jump_frame == frame
        pos = pos.clone()
        pos[:, 0, 0] = torch.where(now, moved, x)
        path.append(pos)
    return torch.stack(path, 2)


def _collide(pos: Tensor, vel: Tensor, radius: Tensor, present: Tensor) -> Tensor:
    """Return velocities [N, 2, 2] after the impulse between two touching bodies (mass ~ area)."""
    gap = pos[:, 1] - pos[:, 0]
    distance = gap.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    normal = gap / distance
    closing = ((vel[:, 1] - vel[:, 0]) * normal).sum(-1, keepdim=True)
    touch = (distance < radius.sum(1, keepdim=True)) & (closing < 0) & present.all(1, keepdim=True)
    mass = radius.square()
    push = torch.where(touch, (1 + SIDE_RESTITUTION) * closing, 0.0)
    impulse = push * normal / mass.sum(1, keepdim=True)
    return vel + torch.stack([mass[:, 1:] * impulse, -mass[:, :1] * impulse], 1)


def _wobble(n: int, frames: int, gen: torch.Generator) -> Tensor:
    """Return factors [N, 1, F, 2] on the semi-axes, which oscillate about twice a clip."""
    phase = 2 * math.pi * torch.rand(n, 2, 1, generator=gen)
    rate = 1.5 + torch.rand(n, 2, 1, generator=gen)
    wave = torch.sin(2 * math.pi * rate * torch.linspace(0, 1, frames) + phase)  # [N, 2, F]
    swell, stretch = 0.3 * wave[:, 0], 0.3 * wave[:, 1]
    return torch.stack([swell + stretch, swell - stretch], -1).exp()[:, None]


def _render(
    positions: Tensor,
    radii: Tensor,
    present: Tensor,
    rgb: Tensor,
    tone: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Draw ellipses with a one-pixel soft edge over a plain background, [N, 3, F, H, W]."""
    n, b, frames, _ = positions.shape
    image = tone.view(n, 1, 1, 1, 1).expand(n, 3, frames, height, width)
    xs = (torch.arange(width) + 0.5).view(1, 1, 1, width)
    ys = (torch.arange(height) + 0.5).view(1, 1, height, 1)
    for k in range(b):
        if not present[:, k].any():
            continue
        center, axes = positions[:, k, :, :, None, None], radii[:, k, :, :, None, None]
        across = (xs - center[:, :, 0]) / axes[:, :, 0]
        down = (ys - center[:, :, 1]) / axes[:, :, 1]
        # Pixels to the edge, [N, F, H, W].
        inside = (1 - (across.square() + down.square()).sqrt()) * axes.amin(2)
        cover = (inside + 0.5).clamp(0, 1) * present[:, k].view(n, 1, 1, 1)
        image = image + cover[:, None] * (rgb[:, k].view(n, 3, 1, 1, 1) - image)
    return image.contiguous()


def _check(num_videos, defect, seed, frames, height, width, bodies, defect_rate) -> None:
    def integer(value, least: int, modulus: int = 1, rest: int = 0) -> bool:
        return isinstance(value, int) and value >= least and value % modulus == rest

    names = (None, "random", *DEFECTS)
    pixels = "a positive multiple of 16 (pixels)"
    pair = len(bodies) == 2 and 1 <= bodies[0] <= bodies[1] <= MAX_BODIES
    for name, value, ok, expected in (
        ("num_videos", num_videos, integer(num_videos, 1), "an integer of at least 1"),
        ("defect", defect, defect in names, f"None, 'random' or one of {', '.join(DEFECTS)}"),
        ("seed", seed, integer(seed, 0), "a non-negative integer"),
        ("frames", frames, integer(frames, 9, 4, 1), "4k + 1 with k >= 2, for example 17"),
        ("height", height, integer(height, 16, 16), pixels),
        ("width", width, integer(width, 16, 16), pixels),
        ("bodies", bodies, pair, f"(smallest, largest) within 1..{MAX_BODIES}"),
        ("defect_rate", defect_rate, 0 <= defect_rate <= 1, "a probability within 0..1"),
    ):
        if not ok:
            raise ValueError(f"{name} is {value!r}; expected {expected}")
