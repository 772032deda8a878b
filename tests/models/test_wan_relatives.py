"""VACE, Animate, SkyReels-V2 and ChronoEdit: patched against unpatched, policies, rewards."""

import copy

import pytest
import torch
from numerics import PooledErrors
from rollouts import lay_out
from wan_relatives import CASES, relative_inputs, run_relative, tiny_relative

import prfl_fast
from prfl_fast.memory import activation_checkpointing, quantize
from prfl_fast.models import VelocityModel, find_adapter
from prfl_fast.models.inference import UnsupportedError
from prfl_fast.rewards import LatentRewardModel
from prfl_fast.training import sft_loss

pytest.importorskip("diffusers")


@pytest.mark.cases(3)
@pytest.mark.parametrize("layout", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_within_twice(case, layout):
    errors = PooledErrors()
    for seed, batch in ((0, 1), (1, 2), (2, 2), (3, 2), (4, 2), (5, 2)):
        model = lay_out(tiny_relative(case, seed=seed), layout)
        arguments = relative_inputs(case, batch=batch, seed=seed + 10)
        runs = [run_relative(model, *arguments, double=double) for double in (True, False)]
        runs.append(run_relative(prfl_fast.patch(model), *arguments))
        errors.add(*({"output": out} | gradients for out, gradients in runs))
    errors.assert_within_twice()


@pytest.mark.cases(2)
@pytest.mark.parametrize("case", ["vace", "animate", "skyreels-forcing", "chronoedit-2"])
def test_patch_is_reversible_and_policies_change_no_bit(case):
    model, arguments = tiny_relative(case), relative_inputs(case)
    plain, keys = run_relative(model, *arguments), list(model.state_dict())
    prfl_fast.patch(model)
    assert prfl_fast.is_patched(model) and list(model.state_dict()) == keys
    patched = run_relative(model, *arguments)
    for mode, offload in (("full", None), ("attention", "cpu")):
        activation_checkpointing(model, mode, offload)
        out, gradients = run_relative(model, *arguments)
        assert torch.equal(out, patched[0])
        for name, gradient in patched[1].items():
            assert gradient is None or torch.equal(gradients[name], gradient), name
    activation_checkpointing(model, "none")
    prfl_fast.unpatch(model)
    assert not prfl_fast.is_patched(model)
    assert torch.equal(run_relative(model, *arguments)[0], plain[0])
    quantize(prfl_fast.patch(model), "fp8")
    assert torch.isfinite(run_relative(model, *arguments)[0]).all()


@pytest.mark.cases(2)
@pytest.mark.parametrize("case", ["vace", "animate", "skyreels", "chronoedit-2"])
def test_latent_rewards_and_rollouts(case, tmp_path):
    model, (x, timestep, conditions) = prfl_fast.patch(tiny_relative(case)), relative_inputs(case)
    adapter = find_adapter(model)
    with pytest.raises(UnsupportedError, match="forward of its own between the blocks"):
        adapter.open_rollout(model, x, [timestep], conditions)
    generator = model
    if case in ("vace", "animate"):
        with pytest.raises(ValueError, match=r"Pass VelocityModel\(model, function\)"):
            LatentRewardModel.from_backbone(model, 1, num_heads=2)
        generator = VelocityModel(model, adapter.velocity)
    reward = LatentRewardModel.from_backbone(generator, 1, num_heads=2)
    seen = []
    hook = model.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        adapter.velocity(model, x, timestep, conditions)
    hook.remove()
    expected = torch.sigmoid(reward.head(reward.pool(seen[0].contiguous())))
    assert torch.allclose(reward(x, timestep, conditions), expected, rtol=1e-5)
    reward.save(tmp_path / "reward")
    with_model = generator if generator is not model else None
    loaded = LatentRewardModel.load(tmp_path / "reward", with_model)
    assert torch.allclose(loaded(x, timestep, conditions), expected, rtol=1e-4)
    step = prfl_fast.PRFL(model, reward.freeze(), prfl_fast.FlowUniPC(), num_inference_steps=3)
    assert step(x, conditions, generator=torch.Generator().manual_seed(0)).finite
    assert sft_loss(model, x, conditions, noise=torch.zeros_like(x), sigma=0.5).isfinite()


@pytest.mark.parametrize("mode", [("full", None), ("attention", "cpu")])
def test_checkpointed_rewards_have_the_same_gradients(mode):
    """The forward is stopped inside the call that diffusers checkpoints."""
    model = prfl_fast.patch(tiny_relative("skyreels"))
    x, timestep, conditions = relative_inputs("skyreels")
    torch.manual_seed(0)
    reward = LatentRewardModel.from_backbone(model, 2, num_heads=2)
    found = []
    for settings in (("none", None), mode):
        activation_checkpointing(reward.backbone, *settings)
        leaf = x.clone().requires_grad_()
        reward(leaf, timestep, conditions).sum().backward()
        found.append([leaf.grad, *(p.grad for p in reward.parameters() if p.requires_grad)])
        reward.zero_grad()
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))


def test_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="num_frame_per_block of SkyReelsV2.* is 2, expected 1"):
        prfl_fast.patch(tiny_relative("skyreels", num_frame_per_block=2))
    model = prfl_fast.patch(tiny_relative("skyreels"))
    model._set_ar_attention(3)
    x, timestep, conditions = relative_inputs("skyreels")
    with pytest.raises(ValueError, match="got a causal mask, expected none"):
        find_adapter(model).velocity(model, x, timestep, conditions)
    sampled = tiny_relative("skyreels", inject_sample_info=True)
    with pytest.raises(ValueError, match="inject_sample_info of SkyReelsV2.*VelocityModel"):
        sft_loss(sampled, x, conditions)
    x, _, conditions = relative_inputs("vace")
    vace = tiny_relative("vace")
    for wrong in ({}, {"control_hidden_states": x[:, :3]}):
        bad = {"encoder_hidden_states": conditions["encoder_hidden_states"], **wrong}
        with pytest.raises(ValueError, match=r"control_hidden_states.*\[2, 12, 3, 4, 6\]"):
            sft_loss(vace, x, bad)
    with pytest.raises(ValueError, match="no layout of HY-Video-PRFL"):
        find_adapter(vace).to_reference({})
    twin = copy.deepcopy(prfl_fast.patch(vace))
    assert twin.vace_blocks[0].forward.args[0] is twin.vace_blocks[0]


@pytest.mark.parametrize("case", ["vace", "animate", "skyreels-forcing", "chronoedit"])
def test_a_first_frame_is_refused(case):
    """These classes give no time to the tokens of one frame, or their velocity has that frame."""
    model, (x, _, conditions) = tiny_relative(case), relative_inputs(case)
    with pytest.raises(ValueError, match="conditions is .*expected no first_frame, as "):
        sft_loss(model, x, conditions | {"first_frame": x[:, :, :1]})
