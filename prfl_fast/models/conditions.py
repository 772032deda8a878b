"""Name the conditions of all families, give their ranks, and stack them to batches."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import pad

from prfl_fast.models.adapter import FIRST_FRAME, Conditions
from prfl_fast.utils.modules import unwrap

TEXT = "encoder_hidden_states"
IMAGE, LATENT = "encoder_hidden_states_image", "latent_condition"
GUIDANCE = "guidance"  # embedded guidance, 1000 · scale
# From text states to the mask of their tokens.
MASKS = {
    TEXT: "encoder_attention_mask",
    "encoder_hidden_states_2": "encoder_attention_mask_2",
    "audio_encoder_hidden_states": "audio_encoder_attention_mask",
}
# Conditions whose first dimension counts the tokens of a text.
TEXTS = frozenset((*MASKS, *MASKS.values()))
# Conditions that a prompt determines.
OF_PROMPT = TEXTS | {"pooled_projections"}
# Number of dimensions of each condition of one sample.
RANKS = {
    TEXT: 2,
    "encoder_attention_mask": 1,
    "encoder_hidden_states_2": 2,
    "encoder_attention_mask_2": 1,
    "pooled_projections": 1,
    GUIDANCE: 0,
    IMAGE: 2,
    "image_embeds": 2,
    LATENT: 4,
    FIRST_FRAME: 4,
    "rope_interpolation_scale": 1,
    "timestep_r": 0,
    "fps": 0,
    "audio_hidden_states": 2,
    "audio_encoder_hidden_states": 2,
    "audio_encoder_attention_mask": 1,
    "audio_timestep": 0,
    "control_hidden_states": 4,
    "pose_hidden_states": 4,
    "face_pixel_values": 4,
}


def stack_conditions(
    samples: Sequence[Conditions], rows: Mapping[str, int] | None = None
) -> Conditions:
    """Stack conditions without batch dimension to float32 ones ``[B, ...]``.

    Shorter texts and masks get zeros up to the longest of the batch, or up to the number in
    ``rows``, as models pad them.
    """

    def stacked(name: str) -> torch.Tensor:
        tensors = [sample[name].float() for sample in samples]  # files may be bfloat16
        if name in TEXTS:
            most = max((rows or {}).get(name, 0), *map(len, tensors))
            tensors = [pad(t, (0, 0) * (t.ndim - 1) + (0, most - len(t))) for t in tensors]
        return torch.stack(tensors)

    return {name: stacked(name) for name in samples[0]}


def trim_texts(conditions: Conditions) -> Conditions:
    """Return the conditions of one sample without the masked tokens at the end of its texts.

    A text without a valid token keeps one token, and so do image states of zeros (no image).
    """
    found = dict(conditions)
    for text, mask in MASKS.items():
        if mask in found:
            valid = found[mask].nonzero()
            count = int(valid.max()) + 1 if len(valid) else 1
            found |= {name: found[name][:count] for name in (text, mask)}
    image = found.get("image_embeds")
    if image is not None and not image.any():
        found["image_embeds"] = image[:1]
    return found


def takes_guidance(model: nn.Module) -> bool:
    """Return True for a model with embedded guidance, whose scale is a condition."""
    return bool(getattr(unwrap(model), "config", {}).get("guidance_embeds", False))
