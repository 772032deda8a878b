"""LTX-2 of diffusers: both streams patched against unpatched, variants, audio as condition."""

import contextlib
import copy
import re

import pytest
import tiny_families as families
import torch
from wan import float_means_double

import prfl_fast
from prfl_fast.models.registry import find_adapter

SPLIT = {"rope_type": "split"}
VARIANTS = {
    "interleaved": {"rope_type": "interleaved"},
    "split": SPLIT,
    "2.3": SPLIT | families.LTX23,
    # LTX-2.5: keys of the text do not depend on the time, no bias in the feed-forward.
    "2.5": SPLIT | families.LTX23 | {"use_prompt_adaln_single": False, "ff_bias": False},
}
LAYOUTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


def inputs(config, batch, seed=1):
    """Return arguments of the class's forward; masked text tokens are anywhere in the text."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def mask():
        return (
            (torch.rand(batch, 7, generator=generator) < 0.7)
            .long()
            .index_fill_(1, torch.tensor(3), 1)
        )

    widths = (20, 20) if config.use_prompt_embeddings else (32, 16)
    times = 3 * torch.rand(2, batch, generator=generator)
    return {
        "hidden_states": randn(batch, 24, 8),
        "audio_hidden_states": randn(batch, 5, 6),
        "encoder_hidden_states": randn(batch, 7, widths[0]),
        "audio_encoder_hidden_states": randn(batch, 7, widths[1]),
        "encoder_attention_mask": mask(),
        "audio_encoder_attention_mask": mask(),
        # Small timesteps, because the error of their float32 sines would hide the blocks'.
        **{
            "timestep": times[0],
            "sigma": times[0],
            "audio_timestep": times[1],
            "audio_sigma": times[1],
        },
        **{"num_frames": 2, "height": 3, "width": 4, "audio_num_frames": 5},
    }


def run(model, given, *, double=False, autocast=False):
    """Return both outputs and every gradient by name of one call of the class."""
    model = copy.deepcopy(model).double() if double else model
    dtype = next(model.parameters()).dtype
    leaves = {k: v.to(dtype).requires_grad_() for k, v in given.items() if "hidden_states" in k}
    times = {
        k: v.double() for k, v in given.items() if double and k.endswith(("timestep", "sigma"))
    }
    context = float_means_double() if double else contextlib.nullcontext()
    generator = torch.Generator().manual_seed(2)
    with context:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs = model(**{**given, **times, **leaves}, return_dict=False)
        cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]
        torch.autograd.backward(outs, cotangents)
    found = {"video": outs[0].detach(), "audio": outs[1].detach()}
    found |= {name: leaf.grad for name, leaf in leaves.items()}
    found |= {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_streams_within_twice(variant, layout, batch):
    """Sum squares of errors over seeds and blocks, because those of single gradients scatter."""
    squares = {}
    for seed in range(5):
        model = families.tiny("ltx2", seed=seed, **VARIANTS[variant])
        model, given = model.to(LAYOUTS[layout]), inputs(model.config, batch, seed + 10)
        if layout == "bf16":
            given |= {k: v.bfloat16() for k, v in given.items() if "hidden_states" in k}
        exact = run(model, given, double=True)
        autocast = layout == "autocast"
        theirs = run(model, given, autocast=autocast)
        ours = run(prfl_fast.patch(model), given, autocast=autocast)
        for name, value in exact.items():
            assert (ours[name] is None) == (theirs[name] is None) == (value is None), name
            if value is None or not value.any():
                continue
            assert torch.isfinite(ours[name]).all() and ours[name].dtype == theirs[name].dtype
            kind = re.sub(r"blocks\.\d+", "blocks", name)
            sums = squares.setdefault(kind, [0.0, 0.0])
            for i, found in enumerate((ours[name], theirs[name])):
                sums[i] += (found - value).square().sum().item()
    ratios = {name: (ours / theirs) ** 0.5 for name, (ours, theirs) in squares.items()}
    # A gate's bias has two values, whose errors scatter: the geometric mean of 24 seeds is 0.9 to
    # 1.15.
    biases = [name for name in ratios if name.endswith("to_gate_logits.bias")]
    assert all(ratios.pop(name) <= 4 for name in biases)
    worst = max(ratios, key=ratios.__getitem__)
    assert ratios[worst] <= 2, f"{worst}: {ratios[worst]:.2f} times the unpatched model's error"


def close(ours, theirs):
    """Assert that two results of :func:`run` differ by rounding."""
    for name, value in theirs.items():
        if value is not None:
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=name)


OPTIONS = {
    ("interleaved", "isolated"): {"isolate_modalities": True},
    ("2.3", "time by token"): {
        "timestep": 3 * torch.rand(2, 24, generator=torch.Generator().manual_seed(5)),
        "audio_timestep": 3 * torch.rand(2, 5, generator=torch.Generator().manual_seed(6)),
        "use_cross_timestep": True,
    },
    ("2.5", "coordinates by sample"): {"video_coords": torch.arange(288.0).view(2, 3, 24, 2) / 20},
}


@pytest.mark.parametrize("variant, option", OPTIONS)
def test_options_of_the_forward(variant, option):
    model = families.tiny("ltx2", **VARIANTS[variant])
    given = inputs(model.config, 2) | OPTIONS[variant, option]
    theirs = run(model, given)
    close(run(prfl_fast.patch(model), given), theirs)
    plain = run(model, inputs(model.config, 2))
    assert not torch.allclose(plain["video"], theirs["video"], rtol=1e-3)


@pytest.mark.parametrize("variant", ["interleaved", "split"])
def test_what_the_kernels_do_not_know_runs_as_before(variant):
    model = families.tiny("ltx2", **VARIANTS[variant], perturbed_attn=True)
    given = inputs(model.config, 2)
    for option in (
        {"spatio_temporal_guidance_blocks": [0, 1]},
        {"video_self_attention_mask": torch.ones(2, 24, 24).tril()},
    ):
        theirs = run(model, given | option)
        with pytest.warns(UserWarning, match="runs its own forward.*mask"):
            ours = run(prfl_fast.patch(model), given | option)
        assert all(v is None or torch.equal(ours[k], v) for k, v in theirs.items())
        prfl_fast.unpatch(model)


def test_audio_is_a_condition():
    """Compare the adapter's velocity with the class's own call, with and without audio."""
    model = families.tiny("ltx2")
    x, timestep, conditions = families.inputs("ltx2")
    audio = {k: v for k, v in conditions.items() if k.startswith("audio")}
    text = {k: v for k, v in conditions.items() if k not in audio}
    adapter = find_adapter(model)
    own = {"hidden_states": x.flatten(2).transpose(1, 2), "timestep": timestep, "sigma": timestep}
    own |= {"num_frames": 3, "height": 4, "width": 6, "audio_num_frames": 5, "return_dict": False}

    def video(**given):
        return model(**own, **given)[0].transpose(1, 2).unflatten(2, x.shape[2:])

    def velocity(given):
        adapter.check_latents(model, x, given)
        return adapter.velocity(model, x, timestep, given)

    with torch.no_grad():
        given = conditions | {"audio_sigma": conditions["audio_timestep"]}
        assert torch.equal(velocity(conditions), video(**given))
        expected = video(**given, fps=12.0)
        assert torch.equal(velocity(conditions | {"fps": torch.full((2,), 12.0)}), expected)
        assert not torch.equal(expected, video(**given))
        clean = {k: v for k, v in conditions.items() if k != "audio_timestep"}
        zero = {"audio_timestep": torch.zeros(2), "audio_sigma": torch.zeros(2)}
        assert torch.equal(velocity(clean), video(**clean, **zero))
        alone = velocity(text)
        assert torch.equal(alone, video(**conditions, isolate_modalities=True))
        per_sample = {"fps": torch.tensor([24.0, 12.0])}
        mixed = velocity(conditions | per_sample)
        prfl_fast.patch(model)
        for out, again in ((alone, velocity(text)), (mixed, velocity(conditions | per_sample))):
            torch.testing.assert_close(out, again, rtol=1e-4, atol=1e-5)
    del conditions["audio_encoder_hidden_states"]
    with pytest.raises(ValueError, match="audio_encoder_hidden_states.* is None, expected given"):
        adapter.check_latents(model, x, conditions)
    del model.prompt_modulation
    with pytest.raises(ValueError, match="expected the class of diffusers 0.38 or later"):
        prfl_fast.patch(model)
