"""Tiny diffusers models of other families than Wan, and their inputs."""

import contextlib
import copy

import pytest
import torch
from wan import float_means_double

from prfl_fast.models.registry import find_adapter

_JOINT = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "mlp_ratio": 2.0,
    "rope_axes_dim": (4, 8, 12),
    "num_refiner_layers": 1,
    "text_embed_dim": 20,
}
HUNYUAN = {
    **_JOINT, "num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": 12,
}  # fmt: skip
_LTX2 = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
    "cross_attention_dim": 32, "audio_in_channels": 6, "audio_out_channels": 6,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 20,
}  # fmt: skip
# What LTX-2.3 has more than LTX-2.
LTX23 = {
    "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True,
    "audio_cross_attn_mod": True, "perturbed_attn": True, "use_prompt_embeddings": False,
}  # fmt: skip
# Name of a case → class, configuration, channels of the latents.
CASES = {
    "hunyuan": ("HunyuanVideoTransformer3DModel", HUNYUAN, 16),
    "hunyuan-replace": (
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN, "image_condition_type": "token_replace", "guidance_embeds": False},
        16,
    ),
    "hunyuan15": (
        "HunyuanVideo15Transformer3DModel",
        {**_JOINT, "num_layers": 2, "text_embed_2_dim": 12, "image_embed_dim": 16},
        32,
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2,
            "attention_head_dim": 16, "cross_attention_dim": 32, "num_layers": 3,
            "caption_channels": 20,
        },
        8,
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "in_channels": 4,
            "pooled_projection_dim": 20, "text_embed_dim": 24, "time_embed_dim": 16,
        },
        4,
    ),
    # The weights that were released have split rotary tables.
    "ltx2": ("LTX2VideoTransformer3DModel", {**_LTX2, "rope_type": "split"}, 8),
}  # fmt: skip
# Changes of a case for which its heads may have 32 columns.
WIDE = {case: {"rope_axes_dim": (8, 12, 12)} for case in CASES if case.startswith("hunyuan")}
WIDE |= {"ltx": {"cross_attention_dim": 64}, "mochi": {}}
WIDE["ltx2"] = {
    "cross_attention_dim": 64, "audio_attention_head_dim": 32, "audio_cross_attention_dim": 64,
}  # fmt: skip
# Perturbation by number of dimensions; three has the table of Mochi's frequencies, zeros at first.
_NOISE = {1: 0.2, 3: 0.02}


def tiny(case, *, seed=0, **overrides):
    """Build a random model whose perturbed norms and biases make every gradient count."""
    diffusers = pytest.importorskip("diffusers")
    name, config, _ = CASES[case]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**{**config, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in _NOISE:
                parameter.add_(_NOISE[parameter.ndim] * torch.randn_like(parameter))
    return model.train()


def inputs(case, *, batch=2, size=(3, 4, 6), text=7, seed=1):
    """Return latents ``[B, C, F, H, W]``, timesteps and conditions; texts of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def mask(tokens):
        return (torch.arange(tokens) < tokens - 2 * torch.arange(batch)[:, None]).long()

    conditions = {
        "encoder_hidden_states": randn(batch, text, 24 if case == "mochi" else 20),
        "encoder_attention_mask": mask(text),
    }
    if case.startswith("hunyuan15"):
        conditions |= {
            "encoder_hidden_states_2": randn(batch, 5, 12),
            "encoder_attention_mask_2": mask(5),
            "image_embeds": randn(batch, 3, 16),
            "latent_condition": randn(batch, 33, *size),
        }
    elif case == "ltx2":
        conditions |= {
            "audio_hidden_states": randn(batch, 5, 6),
            "audio_encoder_hidden_states": randn(batch, text, 20),
            "audio_encoder_attention_mask": mask(text),
            "audio_timestep": torch.full((batch,), 3),
        }
    elif case.startswith("hunyuan"):
        conditions["pooled_projections"] = randn(batch, 12)
        if case == "hunyuan":
            conditions["guidance"] = 6 * torch.ones(batch)
    x = randn(batch, CASES[case][2], *size)
    # Small timesteps, because the error of their float32 sines would hide the blocks'.
    timestep = 4 * torch.rand(batch, generator=generator)
    return x, 1000 - timestep if case == "mochi" else timestep, conditions


def run(model, x, timestep, conditions, *, double=False, autocast=False):
    """Return velocity and every gradient (inputs, parameters) of one forward and backward."""
    model = copy.deepcopy(model).double() if double else model
    dtype = torch.float64 if double else next(model.parameters()).dtype
    timestep = timestep.to(dtype)  # as the oracle gets it
    timestep = timestep.double() if double else timestep
    leaves = {"x": x, **{k: v for k, v in conditions.items() if v.is_floating_point()}}
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in leaves.items()}
    given = {**conditions, **{k: v for k, v in leaves.items() if k != "x"}}
    context = float_means_double() if double else contextlib.nullcontext()
    with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast and not double):
        out = find_adapter(model).velocity(model, leaves["x"], timestep, given)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    with float_means_double() if double else contextlib.nullcontext():
        out.backward(cotangent)
    gradients = {name: value.grad for name, value in leaves.items()}
    gradients |= {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return out.detach(), gradients


def cogvideox(seed, batch, layout):
    """Return a tiny CogVideoX and its arguments, rotary tables included."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=20, num_layers=2, sample_width=6, sample_height=4,
        sample_frames=9, use_rotary_positional_embeddings=True, max_text_seq_length=5,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 1 else 0.0) * torch.randn_like(parameter))
    dtype = torch.bfloat16 if layout == "bf16" else torch.float32
    phi = (6 * torch.rand(3 * 2 * 3, 8)).repeat_interleave(2, dim=1)
    x, text = torch.randn(batch, 3, 4, 4, 6).to(dtype), torch.randn(batch, 5, 20).to(dtype)
    return model.to(dtype).train(), (x, text, torch.full((batch,), 3.0), (phi.cos(), phi.sin()))


def run_cogvideox(model, arguments, double=False):
    """Return output and gradients by name of one forward and backward of CogVideoX."""
    model = copy.deepcopy(model).double() if double else model
    x, text, timestep, rope = arguments
    leaves = [t.detach().to(next(model.parameters()).dtype).requires_grad_() for t in (x, text)]
    with float_means_double() if double else contextlib.nullcontext():
        (out,) = model(*leaves, timestep, image_rotary_emb=rope, return_dict=False)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        out.backward(cotangent)
    found = {"output": out.detach(), "x": leaves[0].grad, "text": leaves[1].grad}
    found |= {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def single(case):
    """Return True for a model with single-stream blocks."""
    return "num_single_layers" in CASES[case][1]
