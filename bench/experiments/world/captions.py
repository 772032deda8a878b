"""Describe a scene in sentences, and as the vectors that replace a text encoder.

Only the intended scene is described; a defect in how the clip plays it out is never mentioned.
"""

import torch
from torch import Tensor

MAX_BODIES = 2

PALETTE = {  # name -> RGB in [-1, 1]; all much brighter than the background
    "white": (1.0, 1.0, 1.0),
    "yellow": (1.0, 0.9, 0.0),
    "cyan": (0.0, 0.9, 1.0),
    "pink": (1.0, 0.3, 0.8),
    "green": (0.3, 1.0, 0.3),
    "orange": (1.0, 0.5, 0.1),
}

VOCABULARY = {
    "size": ("small", "middle-sized", "large"),
    "color": tuple(PALETTE),
    "place": ("upper left", "top", "upper right", "left", "middle", "right"),
    "motion": tuple(
        f"{pace} to the {side}" for side in ("left", "right") for pace in ("slowly", "fast")
    ),
}
TEXT_TOKENS = 1 + len(VOCABULARY) * MAX_BODIES
TEXT_DIM = 32


def words(
    color: Tensor, size: Tensor, start: Tensor, velocity: Tensor, aspect: float
) -> dict[str, Tensor]:
    """Return the attributes of each body as indices [N, B] into the lists of VOCABULARY."""
    column = (3 * start[..., 0] / aspect).long().clamp(0, 2)
    row = (start[..., 1] > 0.45).long()
    fast = (velocity[..., 0].abs() > 0.8 * aspect).long()
    return {
        "size": size,
        "color": color,
        "place": 3 * row + column,
        "motion": 2 * (velocity[..., 0] > 0).long() + fast,
    }


def text(count: Tensor, said: dict[str, Tensor], present: Tensor) -> Tensor:
    """Return [N, TEXT_TOKENS, TEXT_DIM]: a count token, four tokens per body, padding."""
    total = 1 + MAX_BODIES + sum(len(names) for names in VOCABULARY.values())
    table = torch.randn(total, TEXT_DIM, generator=torch.Generator().manual_seed(20251))
    columns, offset = [], 1 + MAX_BODIES
    for name, names in VOCABULARY.items():
        columns.append(offset + said[name])
        offset += len(names)
    ids = torch.where(present[..., None], torch.stack(columns, -1), 0)  # word 0 is padding
    return table[torch.cat([count[:, None], ids.flatten(1)], 1)]


def captions(count: Tensor, said: dict[str, Tensor]) -> list[str]:
    def body(i: int, k: int) -> str:
        size, color, place, motion = (names[said[name][i, k]] for name, names in VOCABULARY.items())
        return f"a {size} {color} ball thrown from the {place}, moving {motion}"

    return [" and ".join(body(i, k) for k in range(n)) for i, n in enumerate(count.tolist())]
