"""Tiny models of other transformer classes of diffusers, and one call of each.

:func:`build` returns the model, latents ``[1, C, F, H, W]``, timestep, conditions, and a function
``(model, x, timestep, conditions) -> velocity`` that makes the class's own call.
"""

import pytest
import torch

SIZE = (2, 4, 4)
# The smallest configuration with two heads of 32 channels; every class takes these names.
WIDTH = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}

CONFIGS = {
    "CogVideoXTransformer3DModel": WIDTH
    | {
        "text_embed_dim": 20,
        "time_embed_dim": 16,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 5,
        "max_text_seq_length": 6,
        "in_channels": 4,
        "out_channels": 4,
    },
    "MochiTransformer3DModel": WIDTH
    | {"pooled_projection_dim": 24, "text_embed_dim": 24, "time_embed_dim": 16, "in_channels": 4},
}
CHANNELS = {"Mochi": 4, "CogVideoX": 4}


def _conditions(name, randn):
    text = {"encoder_hidden_states": randn(1, 6, 24 if name == "Mochi" else 20)}
    mask = {"encoder_attention_mask": torch.ones(1, 6)}
    return text | (mask if name == "Mochi" else {})


def _cogvideox(model, x, timestep, conditions):
    latents, text = x.transpose(1, 2), conditions["encoder_hidden_states"]
    return model(latents, text, timestep.long(), return_dict=False)[0].transpose(1, 2)


def _mochi(model, x, timestep, conditions):
    # Mochi counts time from noise to data, and predicts the velocity with the other sign.
    return -model(x, timestep=1000 - timestep, **conditions, return_dict=False)[0]


_CALLS = {
    "CogVideoX": _cogvideox,
    "Mochi": _mochi,
}


def build(class_name, seed=0, **overrides):
    """Return ``(model, x, timestep, conditions, call)`` of a class with perturbed parameters."""
    kind = getattr(pytest.importorskip("diffusers"), class_name, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {class_name}")
    torch.manual_seed(seed)
    model = kind(**CONFIGS[class_name] | overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Some classes start with zero gates, so that blocks would have no effect.
            scale = 0.2 if parameter.ndim == 1 else 0.05
            parameter.add_(scale * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(seed + 1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    name = class_name.partition("Transformer")[0]
    x = randn(1, CHANNELS[name], *SIZE)
    return model, x, torch.tensor([600.0]), _conditions(name, randn), _CALLS[name]
