"""Tiny models of diffusers' classes with Wan's blocks, their inputs, and their gradients."""

import contextlib
import copy

import pytest
import torch
from wan import float_means_double

from prfl_fast.models import find_adapter

CASES = ("vace", "animate", "skyreels", "skyreels-forcing", "chronoedit", "chronoedit-2")

_DIM = 48
_IMAGE = {"image_dim": 20, "added_kv_proj_dim": None, "in_channels": 36}
_FACE = {"motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16}
_FACE |= {"motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16}
_FACE |= {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2}
_CLASSES = {
    "vace": ("WanVACETransformer3DModel", {"vace_layers": [0, 1], "vace_in_channels": 12}),
    "animate": (
        "WanAnimateTransformer3DModel",
        {**_IMAGE, "latent_channels": 16, "inject_face_latents_blocks": 2, **_FACE},
    ),
    "skyreels": ("SkyReelsV2Transformer3DModel", {}),
    "chronoedit": ("ChronoEditTransformer3DModel", _IMAGE),
}


def tiny_relative(case, *, seed=0, **changes):
    """Build a random model whose perturbed norms and biases make every gradient count."""
    diffusers = pytest.importorskip("diffusers")
    name, own = _CLASSES[case.split("-")[0]]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    if case.startswith("skyreels") and diffusers.__version__.startswith("0.35."):
        pytest.skip("attention of diffusers 0.35 is another class, which patch refuses by name")
    config = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2}
    config |= {"ffn_dim": 3 * _DIM, "text_dim": 20, "freq_dim": 32, "rope_max_seq_len": 64}
    config |= own | changes
    if "added_kv_proj_dim" in own:
        config["added_kv_proj_dim"] = 2 * config["attention_head_dim"]
    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**config)
    model.text_tokens = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def relative_inputs(case, *, batch=2, seed=1):
    """Return latents, timesteps and conditions of :func:`tiny_relative`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(batch, *shape, generator=generator)

    frames = 2 if case == "chronoedit-2" else 3
    size = (frames, 4, 6)
    image = case.split("-")[0] in ("animate", "chronoedit")
    conditions = {"encoder_hidden_states": randn(512 if image else 7, 20)}
    if image:
        conditions |= {"encoder_hidden_states_image": randn(5, 20)}
        conditions |= {"latent_condition": randn(20, *size)}
    if case == "vace":
        conditions["control_hidden_states"] = randn(12, *size)
    if case == "animate":
        conditions["pose_hidden_states"] = randn(16, frames - 1, *size[1:])
        conditions["face_pixel_values"] = randn(3, 4 * (frames - 1) - 3, 16, 16)
    forcing = case == "skyreels-forcing"
    timestep = torch.rand(batch, frames if forcing else 1, generator=generator) * 1000
    return randn(16, *size), timestep if forcing else timestep[:, 0], conditions


def run_relative(model, x, timestep, conditions, *, double=False):
    """Return output and every gradient (inputs, parameters) of one forward and backward."""
    model = copy.deepcopy(model).double() if double else model
    dtype = torch.float64 if double else model.patch_embedding.weight.dtype
    leaves = {"x": x, **conditions}
    leaves = {name: value.to(dtype).requires_grad_() for name, value in leaves.items()}
    given = {name: value for name, value in leaves.items() if name != "x"}
    with float_means_double() if double else contextlib.nullcontext():
        out = find_adapter(model).velocity(model, leaves["x"], timestep, given)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        out.backward(cotangent)
    gradients = {name: value.grad for name, value in leaves.items()}
    gradients |= {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return out.detach(), gradients
