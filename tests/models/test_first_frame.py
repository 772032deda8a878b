"""A given first frame: what the model is called with, and tensors that a patched one avoids."""

import copy
import functools

import numerics
import pytest
import torch
import wan
from official_wan import tiny_official
from other_models import HandMade, hand_made_inputs, hand_made_velocity
from rollouts import lay_out
from torch.utils._python_dispatch import TorchDispatchMode

import prfl_fast
from prfl_fast.models import VelocityModel
from prfl_fast.models.registry import find_adapter
from prfl_fast.models.velocity import bind_velocity
from prfl_fast.rewards import LatentRewardModel
from prfl_fast.training import sft_loss

X, TIMESTEP, CONDITIONS = wan.inputs("first-frame")
TEXT, FIRST = CONDITIONS["encoder_hidden_states"], CONDITIONS["first_frame"]
TOKENS = 2 * 3  # of a frame


def per_token(timestep):
    """Return timesteps as diffusers' pipeline makes them: ``mask[:, ::2, ::2] · t``, flattened."""
    mask = torch.ones(X.shape[2:])
    mask[0] = 0
    return torch.stack([(mask[:, ::2, ::2] * t).flatten() for t in timestep])


def by_hand(model):
    x = X.clone()
    x[:, :, 0] = FIRST[:, :, 0]
    v = model(x, per_token(TIMESTEP), TEXT, return_dict=False)[0]
    v[:, :, 0] = 0
    return v


@pytest.mark.parametrize("timestep", [TIMESTEP, torch.tensor(321.0)])
def test_the_model_sees_the_first_frame_at_time_zero(timestep):
    model = wan.tiny_wan()
    adapter = find_adapter(model)
    v = adapter.velocity(model, X, timestep, CONDITIONS)
    if timestep.ndim:
        assert torch.equal(v, by_hand(model))
    patched = adapter.velocity(prfl_fast.patch(copy.deepcopy(model)), X, timestep, CONDITIONS)
    torch.testing.assert_close(patched, v, rtol=1e-4, atol=1e-4)
    assert not patched[:, :, 0].any()
    moved = X.clone()
    moved[:, :, 0] += 1  # whatever the latents hold there
    assert torch.equal(adapter.velocity(model, moved, timestep, CONDITIONS), v)


def test_a_function_gets_the_first_frame_and_the_others_time():
    def function(x, timestep, conditions):
        assert torch.equal(x[:, :, :1], FIRST) and timestep is TIMESTEP
        return x + 1

    v = bind_velocity(function, X, CONDITIONS, "x")(X, TIMESTEP, CONDITIONS)
    assert not v[:, :, 0].any() and torch.equal(v[:, :, 1:], X[:, :, 1:] + 1)


def test_a_paired_model_gets_what_a_function_gets():
    x, timestep, conditions = hand_made_inputs()
    conditions["first_frame"] = torch.randn(2, 4, 1, 3, 2)
    model, losses = HandMade(), []
    paired = VelocityModel(model, hand_made_velocity, hidden_size=16)
    for transformer in (paired, functools.partial(hand_made_velocity, model)):
        generator = torch.Generator().manual_seed(0)
        losses.append(sft_loss(transformer, x, conditions, generator=generator))
    assert losses[0].equal(losses[1])
    reward = LatentRewardModel.from_backbone(paired, 1, 2)
    moved = torch.cat([x[:, :, :1] + 1, x[:, :, 1:]], dim=2)
    assert torch.equal(*(reward(each, timestep, conditions) for each in (x, moved)))


def test_features_are_those_of_the_same_call():
    model, seen = wan.tiny_wan(), []
    model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out))
    by_hand(model)
    assert torch.equal(find_adapter(model).features(model, X, TIMESTEP, CONDITIONS, 2), seen[0])


class Sizes(TorchDispatchMode):
    """Record the largest number of elements of all tensors."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_a_patched_model_makes_one_row_of_modulation_per_frame():
    dim, size = 48, (3, 8, 12)
    x, timestep, conditions = wan.inputs("first-frame", size=size)
    dense = 2 * 3 * 4 * 6 * 6 * dim  # [B, L, 6, D]
    largest = []
    times = timestep[:, None].repeat(1, 3 * 4 * 6)
    times[:, : 4 * 6] = 0
    model = wan.tiny_wan(ffn_dim=dim)
    for each in (model, prfl_fast.patch(copy.deepcopy(model))):
        with Sizes() as sizes:
            find_adapter(each).velocity(each, x, timestep, conditions).sum().backward()
        largest.append(sizes.largest)
    with Sizes() as sizes, torch.no_grad():  # as diffusers' pipeline calls it, on the patched model
        each(x, times, conditions["encoder_hidden_states"])
    assert largest[0] >= dense and max(largest[1], sizes.largest) < dense / 2


@pytest.mark.parametrize("sizes", [(6, 12), (9, 9), (18,), (5, 13)])
def test_equal_timesteps_of_tokens_share_a_row(sizes):
    """Runs of any lengths give what diffusers gives, forward and backward."""
    parts = [
        torch.full((2, n), 100.0 * i) + torch.tensor([[1.0], [2]]) for i, n in enumerate(sizes)
    ]
    arguments = X, torch.cat(parts, 1), {"encoder_hidden_states": TEXT}
    model = wan.tiny_wan()
    (out, gradients), (theirs, expected) = (
        wan.run(m, *arguments) for m in (prfl_fast.patch(copy.deepcopy(model)), model)
    )
    torch.testing.assert_close(out, theirs, rtol=0, atol=1e-5)
    for name in ("x", "blocks.0.scale_shift_table", "condition_embedder.time_proj.weight"):
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["fp32", "bf16", "mixed"])
def test_features_within_twice(layout):
    model = lay_out(wan.tiny_wan(), layout)
    adapter = find_adapter(model)

    def features(model, double=False):
        kind = torch.float64 if double else torch.float32
        inputs = {key: value.to(kind) for key, value in CONDITIONS.items()}
        return adapter.features(model, X.to(kind), TIMESTEP, inputs, 2)

    with wan.float_means_double():
        oracle = features(copy.deepcopy(model).double(), True)
    plain = features(model)
    numerics.assert_within_twice(features(prfl_fast.patch(model)), plain, oracle)


@pytest.mark.filterwarnings("ignore:a patched block runs its own forward")
def test_a_block_with_a_hook_expands_the_rows():
    model = wan.tiny_wan()
    adapter = find_adapter(model)
    v = adapter.velocity(model, X, TIMESTEP, CONDITIONS)
    prfl_fast.patch(model).blocks[0].norm1.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(
        adapter.velocity(model, X, TIMESTEP, CONDITIONS), v, rtol=0, atol=1e-4
    )


BAD = {
    "no frame axis": FIRST[:, :, 0],
    "two frames": FIRST.repeat(1, 1, 2, 1, 1),
    "channels": FIRST[:, :4],
    "grid": FIRST[..., :2],
    "batch": FIRST[:1],
}


@pytest.mark.parametrize("name", BAD)
def test_other_shapes_are_refused(name):
    model, conditions = wan.tiny_wan(), {**CONDITIONS, "first_frame": BAD[name]}
    for transformer in (model, lambda x, t, c: x):
        with pytest.raises(ValueError, match=r"conditions\['first_frame'\] is .*, expected"):
            bind_velocity(transformer, X, conditions, "x")


def test_a_video_of_one_frame_has_nothing_to_generate():
    with pytest.raises(ValueError, match="two frames or more"):
        bind_velocity(wan.tiny_wan(), X[:, :, :1], CONDITIONS, "x")


def test_the_official_layout_takes_one_too():
    model = tiny_official("wan22")
    adapter = find_adapter(model)
    v = adapter.velocity(model, X, TIMESTEP, CONDITIONS)
    seen = torch.cat([FIRST, X[:, :, 1:]], dim=2)
    text = torch.nn.functional.pad(TEXT, (0, 0, 0, model.text_len - TEXT.shape[1]))
    theirs = torch.stack(model(list(seen), per_token(TIMESTEP), list(text), 3 * TOKENS))
    assert torch.equal(v[:, :, 1:], theirs[:, :, 1:]) and not v[:, :, 0].any()
    prfl_fast.patch(model)
    ours = adapter.velocity(model, X, TIMESTEP, CONDITIONS)
    torch.testing.assert_close(ours, v, rtol=0, atol=1e-4)
    with torch.no_grad():
        opened = adapter.open_rollout(model, X, [TIMESTEP], CONDITIONS)
        assert torch.equal(opened.velocity(X, 0), ours)
