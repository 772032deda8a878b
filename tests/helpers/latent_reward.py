"""Tiny latent reward models, and the reference's reward model written out."""

import pytest
import torch
from torch import nn
from wan import tiny_wan

from prfl_fast.rewards.latent import LatentRewardModel

safetensors = pytest.importorskip("safetensors.torch")

HEADS = 4


def build(case="t2v", *, num_blocks=2, layers=3, num_queries=1, seed=0):
    """Return a tiny reward model with biases large enough to matter, and its generator."""
    transformer = tiny_wan(case, layers=layers, seed=seed)
    reward = LatentRewardModel.from_backbone(transformer, num_blocks, HEADS, num_queries)
    with torch.no_grad():
        for parameter in [*reward.pool.parameters(), *reward.head.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return reward, transformer


def textbook(transformer, pool, head, x, timestep, conditions, num_blocks):
    """Score one sample as the reference: diffusers' blocks, then ``nn.MultiheadAttention``."""
    assert x.shape[0] == 1
    if "latent_condition" in conditions:
        x = torch.cat([x, conditions["latent_condition"]], dim=1)
    _, time, text, image = transformer.condition_embedder(
        timestep, conditions["encoder_hidden_states"], conditions.get("encoder_hidden_states_image")
    )
    context = text if image is None else torch.cat([image, text], dim=1)
    rotary = transformer.rope(x)
    h = transformer.patch_embedding(x).flatten(2).transpose(1, 2)
    for block in transformer.blocks[:num_blocks]:
        h = block(h, context, time.unflatten(1, (6, -1)), rotary)
    attention = nn.MultiheadAttention(h.shape[-1], HEADS, batch_first=True).to(h.dtype)
    weights = {k.removeprefix("multihead_attn."): v for k, v in pool.items() if k != "queries"}
    attention.load_state_dict(weights)
    queries = pool["queries"].unsqueeze(0)
    pooled = (attention(queries, h, h, need_weights=False)[0] + queries).mean(1)
    for layer in ("fc1", "fc2"):
        pooled = torch.relu(pooled @ head[f"{layer}.weight"].T + head[f"{layer}.bias"])
    return torch.sigmoid(pooled @ head["fc3.weight"].T + head["fc3.bias"])[:, 0]


def textbook_batch(transformer, pool, head, x, timestep, conditions, num_blocks):
    def row(i, value):
        return value[i : i + 1]

    rows = [
        textbook(
            transformer, pool, head, row(i, x), row(i, timestep),
            {k: row(i, v) for k, v in conditions.items()}, num_blocks,
        )
        for i in range(x.shape[0])
    ]  # fmt: skip
    return torch.cat(rows)


def doubled(x, timestep, conditions):
    return x.double(), timestep.double(), {k: v.double() for k, v in conditions.items()}


def edit_tensors(file, change):
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)
