"""Tiny diffusers Wan models, their inputs, and a float64 oracle."""

import contextlib
import copy

import pytest
import torch

from prfl_fast.models.registry import find_adapter

CASES = ("t2v", "i2v", "per-token")


def tiny_wan(case="t2v", *, layers=2, heads=2, head_dim=24, seed=0, text_tokens=None, **overrides):
    """Build a random ``WanTransformer3DModel`` whose perturbed norms and biases make every gradient
    count. Its adapter pads text to ``text_tokens`` rows; None takes it as it is, so that tests can
    call the model itself too.
    """
    diffusers = pytest.importorskip("diffusers")

    torch.manual_seed(seed)
    dim = heads * head_dim
    i2v = {"image_dim": 20, "added_kv_proj_dim": dim, "in_channels": 36}
    image = {"i2v": i2v, "flf": {**i2v, "pos_embed_seq_len": 10}}  # flf: first and last frame
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": layers,
        "ffn_dim": 3 * dim,
        "text_dim": 20,
        "freq_dim": 32,
        "rope_max_seq_len": 64,
        **image.get(case, {}),
        **overrides,
    }
    model = diffusers.WanTransformer3DModel(**config)
    model.text_tokens = text_tokens
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(case="t2v", *, batch=2, size=(3, 4, 6), text_tokens=7, seed=1):
    """Return latents ``[B, 16, F, H, W]``, timesteps and conditions for :func:`tiny_wan`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    frames, height, width = size
    image = {"i2v": 5, "flf": 10}.get(case)  # image tokens
    tokens = frames * (height // 2) * (width // 2)
    timestep = torch.rand(batch, tokens if case == "per-token" else 1, generator=generator) * 1000
    conditions = {"encoder_hidden_states": randn(batch, 512 if image else text_tokens, 20)}
    if image:
        conditions["encoder_hidden_states_image"] = randn(batch, image, 20)
        conditions["latent_condition"] = randn(batch, 20, *size)
    if case == "first-frame":
        conditions["first_frame"] = randn(batch, 16, 1, height, width)
    return randn(batch, 16, *size), timestep if case == "per-token" else timestep[:, 0], conditions


def mixed_layout(model):
    """Cast to diffusers' bf16 layout: norms, modulation tables and time embedder stay float32."""
    keep = model._keep_in_fp32_modules
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not any(part in keep for part in name.split(".")):
            tensor.data = tensor.data.to(torch.bfloat16)
    return model


@contextlib.contextmanager
def float_means_double():
    """Make casts to float32 return float64, so that diffusers' casts keep an oracle exact."""
    to_float, to = torch.Tensor.float, torch.Tensor.to

    def wide(tensor, *args, **kwargs):
        args = (torch.float64 if arg is torch.float32 else arg for arg in args)
        return to(tensor, *args, **kwargs)

    torch.Tensor.float, torch.Tensor.to = torch.Tensor.double, wide
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = to_float, to


def run(model, x, timestep, conditions, *, double: bool = False):
    """Return output and every gradient (inputs, parameters) of one forward and backward.

    With a first frame the adapter calls the model, else this function.
    """
    model = copy.deepcopy(model).double() if double else model
    dtype = torch.float64 if double else model.patch_embedding.weight.dtype
    leaves = {"x": x, **conditions}
    leaves = {name: value.to(dtype).requires_grad_() for name, value in leaves.items()}
    latents = leaves["x"]
    if "latent_condition" in leaves:
        latents = torch.cat([latents, leaves["latent_condition"]], dim=1)
    with float_means_double() if double else contextlib.nullcontext():
        if "first_frame" in leaves:
            conditions = {name: value for name, value in leaves.items() if name != "x"}
            out = find_adapter(model).velocity(model, latents, timestep, conditions)
        else:
            out = model(
                latents,
                timestep,
                leaves["encoder_hidden_states"],
                encoder_hidden_states_image=leaves.get("encoder_hidden_states_image"),
                return_dict=False,
            )[0]
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
        out.backward(cotangent)
    gradients = {name: value.grad for name, value in leaves.items()}
    gradients |= {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return out.detach(), gradients
