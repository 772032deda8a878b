"""Score motion independently: read pixels only, follow the bodies, apply mechanics.

Nothing here is learned, and nothing here is differentiated or shown to training. The steps:

1. Foreground: distance of the gray value from the clip's median (the plain background), minus a
   soft threshold.
2. One or two bodies, from the spread of the foreground against that of one disc of the same area.
3. Tracks: centroids, refined by nearest-center assignment from the extrapolated positions.
4. Five marks in [0, 1] a clip, and their geometric mean as the score:
   smooth  accelerations equal gravity away from the walls, the floor and other bodies
   steady  no displacement exceeds what the room's mechanics allows
   alive   no frame repeats
   energy  kinetic plus potential energy does not grow
   shape   the area and the elongation of the bodies stay the same

The scales were set on clean and defective clips of the world after the codec, never on a
generator's samples.
"""

import dataclasses
import math

import torch
from torch import Tensor

GRAVITY = 4.0  # heights per clip duration squared: the law that the metric holds clips against
TOP_SPEED = 3.0  # heights per clip duration
THRESHOLD = 0.35  # of the clip's peak contrast
FAINT = 0.3  # peak contrasts below this (of a range of 2) count as an empty room
MARKS = ("smooth", "steady", "alive", "energy", "shape")


@dataclasses.dataclass(frozen=True)
class Track:
    """Hold the paths of bodies in N clips; K = 2, the second is NaN where only one was found.

    positions: [N, K, F, 2], (x, y) in pixels, y down. area: [N, K, F], pixels.
    spread: [N, K, F], second moment about the center over that of a disc of the same area.
    count: [N], 0 (empty room), 1 or 2.
    """

    positions: Tensor
    area: Tensor
    spread: Tensor
    count: Tensor


def motion_score(
    video: Tensor, *, details: bool = False
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Return the plausibility of the motion in each clip, [N] in [0, 1].

    video: [N, 3, F, H, W] in about [-1, 1], F >= 9. details: also return each mark of MARKS, [N]
    each. Raise ``ValueError`` for other shapes.
    """
    found = track(video)
    frames, height, width = video.shape[2:]
    box = torch.tensor([width / height, 1.0])
    path = found.positions.double() / height  # box units
    radius = (found.area / math.pi).sqrt().median(-1, keepdim=True).values  # [N, K, 1]
    radius = radius.double() / height
    rate = frames - 1

    velocity = path.diff(dim=2) * rate  # [N, K, F-1, 2]
    accel = velocity.diff(dim=2) * rate  # [N, K, F-2, 2], at frames 1 .. F-2
    excess = accel - torch.tensor([0.0, GRAVITY])
    excess = _forgive_contacts(excess, path, velocity, radius, box.double())
    # Heights: how far the middle frame is off the ballistic path, doubled.
    error = excess.norm(dim=-1) / rate**2
    step = path.diff(dim=2).norm(dim=-1)

    fall = GRAVITY * (1 - 0.5 * (path[:, :, 1:, 1] + path[:, :, :-1, 1]))
    energy = 0.5 * velocity.square().sum(-1).clamp(max=TOP_SPEED**2) + fall
    third = max(2, frames // 3)
    gain = energy[..., -third:].median(-1).values - energy[..., :third].median(-1).values
    log_area, log_spread = (t.clamp(min=1e-3).log() for t in (found.area, found.spread))
    still = torch.where(step.isnan(), step, (step < 0.25 / rate).double()).mean(-1)
    marks = {
        "smooth": _falloff(error.clamp(max=0.2).mean(-1), 0.02, 0.03),
        "steady": _falloff(step.amax(-1), 1.1 * TOP_SPEED / rate, 0.1),
        "alive": _falloff(still, 0.1, 0.15),
        "energy": _falloff(gain, 0.0, 0.8),
        "shape": _falloff(log_area.std(-1) + 0.5 * log_spread.std(-1), 0.15, 0.2),
    }
    marks = {name: value.nanmean(1).nan_to_num(0.0).float() for name, value in marks.items()}
    score = torch.stack([marks[name] for name in MARKS]).clamp(min=1e-6).log().mean(0).exp()
    score = torch.where(found.count > 0, score, torch.zeros_like(score))
    return (score, marks) if details else score


def _falloff(value: Tensor, tolerance: float, scale: float) -> Tensor:
    """Return 1 up to the tolerance, then a decaying exponential; NaN stays NaN."""
    return torch.exp(-(value - tolerance).clamp(min=0) / scale)


def _forgive_contacts(
    excess: Tensor, path: Tensor, velocity: Tensor, radius: Tensor, box: Tensor
) -> Tensor:
    """Drop the part of an acceleration that a wall, the floor or the other body can have caused.

    A contact with a wall is possible where the body, moving on for one frame from either side,
    would reach it; it can only push away from the wall.
    """
    rate = path.shape[2] - 1
    speed = torch.maximum(velocity[:, :, :-1].abs(), velocity[:, :, 1:].abs())
    reach = speed.clamp(max=TOP_SPEED) / rate + 0.03
    center, radius = path[:, :, 1:-1], radius[..., None]
    near_low = center - radius < reach
    near_high = box - radius - center < reach
    excess = torch.where(near_low & (excess > 0), 0.0, excess)
    excess = torch.where(near_high & (excess < 0), 0.0, excess)
    # NaN with one body: never a contact.
    gap = (center[:, 0] - center[:, 1]).norm(dim=-1, keepdim=True)
    touch = gap < radius.sum(1) + reach.amax(1).amax(-1, keepdim=True)
    return torch.where(touch[:, None], 0.0, excess)


def track(video: Tensor) -> Track:
    """Follow up to two bodies through the clips [N, 3, F, H, W].

    Raise ``ValueError`` for other shapes.
    """
    shaped = video.dim() == 5 and video.shape[1] == 3 and video.shape[2] >= 9
    if not shaped or not video.is_floating_point():
        raise ValueError(
            f"video is {tuple(video.shape)} {video.dtype}; "
            "expected floating point [N, 3, F >= 9, H, W]"
        )
    weight, found = _foreground(video.detach().float().cpu())
    height, width = weight.shape[2:]
    grid = torch.stack(
        torch.meshgrid(torch.arange(width) + 0.5, torch.arange(height) + 0.5, indexing="xy"), -1
    )

    one, area, spread = _moments(weight[:, None], grid)
    two = (spread[:, 0].median(-1).values > 1.7) & found  # two discs side by side: at least about 2
    positions = torch.full((*one.shape[:1], 2, *one.shape[2:]), math.nan)
    areas, spreads = positions[..., 0].clone(), positions[..., 0].clone()
    positions[:, :1], areas[:, :1], spreads[:, :1] = one, area, spread
    if two.any():
        shares = _split(weight[two], grid)
        positions[two], areas[two], spreads[two] = _moments(shares, grid)
    return Track(positions, areas, spreads, found.long() + two.long())


def _foreground(video: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights [N, F, H, W], about 1 inside a body, and True for clips with a body."""
    gray = video.mean(1)
    background = gray.flatten(1).median(1).values
    contrast = (gray - background.view(-1, 1, 1, 1)).abs()
    peak = contrast.flatten(2).amax(2).median(1).values.view(-1, 1, 1, 1)
    weight = ((contrast / peak.clamp(min=1e-6) - THRESHOLD) / (1 - 2 * THRESHOLD)).clamp(0, 1)
    return weight, peak.flatten() > FAINT


def _moments(weight: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return center [N, K, F, 2], area and spread [N, K, F] of the weights [N, K, F, H, W].

    A frame without foreground repeats the last center.
    """
    area = weight.flatten(3).sum(-1)
    safe = area.clamp(min=1e-3)
    center = torch.einsum("nkfhw,hwd->nkfd", weight, grid) / safe[..., None]
    square = torch.einsum("nkfhw,hwd->nkfd", weight, grid.square()) / safe[..., None]
    second = square - center.square()
    for frame in range(1, center.shape[2]):
        lost = area[:, :, frame] < 1
        center[:, :, frame][lost] = center[:, :, frame - 1][lost]
    return center, area, second.sum(-1).clamp(min=0) / (safe / (2 * math.pi))


def _split(weight: Tensor, grid: Tensor) -> Tensor:
    """Divide the foreground [M, F, H, W] between two bodies, [M, 2, F, H, W], frame by frame."""
    flat, points = weight.flatten(2), grid.flatten(0, 1)
    mean = (flat[:, 0] @ points) / flat[:, 0].sum(1, keepdim=True).clamp(min=1e-3)
    far = _farthest(flat[:, 0], points, mean)
    previous = centers = torch.stack([far, _farthest(flat[:, 0], points, far)], 1)  # [M, 2, 2]
    shares = []
    for frame in range(flat.shape[1]):
        guess = 2 * centers - previous
        previous = centers
        centers = guess
        for _ in range(3):
            middle, axis = centers.mean(1), centers[:, 1] - centers[:, 0]
            second = (axis @ points.T > (axis * middle).sum(1, keepdim=True)).float()  # [M, HW]
            mine = torch.stack([1 - second, second], 1) * flat[:, None, frame]
            area = mine.sum(-1, keepdim=True)
            centers = torch.where(area > 1, (mine @ points) / area.clamp(min=1e-3), previous)
        shares.append(mine)
    return torch.stack(shares, 2).unflatten(3, weight.shape[2:])


def _farthest(flat: Tensor, points: Tensor, origin: Tensor) -> Tensor:
    """Return the foreground pixel [M, 2] farthest from each origin [M, 2]."""
    distance = (points[None] - origin[:, None]).norm(dim=-1) * (flat > 0.5)
    return points[distance.argmax(1)]
