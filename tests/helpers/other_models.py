"""Tiny models without an adapter: classes of diffusers, and one made by hand."""

import pytest
import torch
from torch import nn


class Block(nn.Module):
    """Return (video, text), as joint blocks do; take keyword arguments only."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down, self.to_q = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, *, scale, stream, text):
        stream = stream + self.down(torch.tanh(self.up(self.norm(stream)))) * scale
        text = text + self.to_q(stream).mean(1, keepdim=True)
        return stream + text.mean(1, keepdim=True), text


class HandMade(nn.Module):
    """A flow transformer over the pixels of a latent, without ``config``."""

    def __init__(self, width=16, layers=3, channels=4):
        super().__init__()
        self.embed, self.head = nn.Linear(channels, width), nn.Linear(width, channels)
        self.text = nn.Linear(6, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, sigma, text):
        stream, text = self.embed(x.flatten(2).transpose(1, 2)), self.text(text)
        for layer in self.layers:
            stream, text = layer(scale=1 + sigma.view(-1, 1, 1), stream=stream, text=text)
        return (self.head(stream) + self.bias).transpose(1, 2).unflatten(2, x.shape[2:])


def hand_made_velocity(model, x, timestep, conditions):
    """Call :class:`HandMade` as a velocity function."""
    return model(x, timestep / 1000, conditions["text"])


def hand_made_inputs(batch=2, seed=1):
    """Return latents ``[B, 4, 2, 3, 2]``, timesteps and conditions of :class:`HandMade`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 2, 3, 2, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    return x, timestep, {"text": torch.randn(batch, 5, 6, generator=generator)}


def _hunyuan():
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2}
    config |= {"attention_head_dim": 12, "num_layers": 2, "num_single_layers": 1}
    config |= {"num_refiner_layers": 1, "text_embed_dim": 8, "pooled_projection_dim": 6}
    config |= {"rope_axes_dim": (4, 4, 4), "guidance_embeds": False}
    given = {"hidden_states": (2, 4, 1, 4, 4), "encoder_hidden_states": (2, 5, 8)}
    given |= {"pooled_projections": (2, 6)}
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return "HunyuanVideoTransformer3DModel", config, given, {"encoder_attention_mask": mask}


def _ltx():
    config = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "num_layers": 2}
    config |= {"attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 8}
    given = {"hidden_states": (2, 8, 8), "encoder_hidden_states": (2, 5, 8)}
    size = {"num_frames": 2, "height": 2, "width": 2}
    return "LTXVideoTransformer3DModel", config, given, size | {"encoder_attention_mask": None}


def _cogvideox():
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "num_layers": 3}
    config |= {"attention_head_dim": 16, "time_embed_dim": 8, "text_embed_dim": 8}
    config |= {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 5}
    given = {"hidden_states": (2, 2, 4, 4, 4), "encoder_hidden_states": (2, 5, 8)}
    return "CogVideoXTransformer3DModel", config, given, {}


def _mochi():
    config = {"in_channels": 4, "num_attention_heads": 2, "num_layers": 2, "text_embed_dim": 8}
    config |= {"attention_head_dim": 8, "pooled_projection_dim": 8, "time_embed_dim": 8}
    given = {"hidden_states": (2, 4, 2, 4, 4), "encoder_hidden_states": (2, 5, 8)}
    mask = torch.ones(2, 5, dtype=torch.bool)
    return "MochiTransformer3DModel", config, given, {"encoder_attention_mask": mask}


def _cosmos():
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "num_layers": 2}
    config |= {"attention_head_dim": 16, "text_embed_dim": 8, "adaln_lora_dim": 4}
    config |= {"max_size": (4, 8, 8), "extra_pos_embed_type": None, "mlp_ratio": 2}
    config |= {"concat_padding_mask": False}
    given = {"hidden_states": (2, 4, 2, 4, 4), "encoder_hidden_states": (2, 5, 8)}
    return "CosmosTransformer3DModel", config, given, {}


def _allegro():
    config = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "num_layers": 2}
    config |= {"attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 8}
    config |= {"sample_width": 4, "sample_height": 4, "sample_frames": 2}
    given = {"hidden_states": (2, 4, 2, 4, 4), "encoder_hidden_states": (2, 5, 8)}
    return "AllegroTransformer3DModel", config, given, {}


FAMILIES = {
    "hunyuan": _hunyuan,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
    "mochi": _mochi,
    "cosmos": _cosmos,
    "allegro": _allegro,
}


def tiny(family):
    """Return a tiny model of a class of diffusers, and the tensors and options of its forward."""
    diffusers = pytest.importorskip("diffusers")
    name, config, shapes, options = FAMILIES[family]()
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config)
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    return model, tensors, options | {"timestep": torch.tensor([300, 700])}
