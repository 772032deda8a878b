"""Mochi's own parts; ``test_families.py`` runs what all families share."""

import pytest
import tiny_families as families
import torch

import prfl_fast
from prfl_fast.models.block_autograd import JointAttention
from prfl_fast.models.registry import find_adapter
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout import Sampler, rollout
from prfl_fast.rollout.schedulers import FlowEuler


def test_rollout_equals_the_loop_of_the_pipeline():
    """Mochi's scheduler runs from σ = 0 to 1 and adds the model's output."""
    diffusers = pytest.importorskip("diffusers")
    model = families.tiny("mochi").eval()
    x, _, conditions = families.inputs("mochi")
    ours = rollout(model, x, conditions, FlowEuler(shift=2.0), 4)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, invert_sigmas=True)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model(x, timestep=t.expand(len(x)), **conditions, return_dict=False)[0]
            x = scheduler.step(out, t, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="invert_sigmas is True, expected False"):
        Sampler(model, scheduler, 4)


@pytest.mark.parametrize(
    "mask", [[[1] * 7, [0] * 7], [[0, 1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]]
)
def test_text_masks_of_any_form(mask):
    """The streams of every block equal the class's, rows of masked text tokens too."""
    model = families.tiny("mochi")
    x, timestep, conditions = families.inputs("mochi")
    conditions["encoder_attention_mask"] = torch.tensor(mask)
    found = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, out: found.append(out))
    find_adapter(model).velocity(model, x, timestep, conditions)
    theirs, found = found, []
    prfl_fast.patch(model)
    find_adapter(model).velocity(model, x, timestep, conditions)
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [4, 8])
def test_gradient_of_rotary_angles(columns):
    """Tables shared by two heads of 8 columns, or of each head."""
    torch.manual_seed(0)
    video, text = torch.randn(3, 2, 5, 16).double(), torch.randn(3, 2, 3, 16).double()
    weights = list(torch.rand(4, 8).double())
    lengths = torch.tensor([8, 6], dtype=torch.int32)

    def attend(angle):
        tables = angle.cos(), angle.sin()
        return JointAttention.apply(*video, *text, *weights, *tables, lengths, 2, 1e-6)

    angle = torch.randn(5, columns).double().requires_grad_()
    assert torch.autograd.gradcheck(attend, angle, fast_mode=True)


def test_reward_of_all_blocks(tmp_path):
    """The last block has no text output; that of a shorter backbone has one."""
    model = prfl_fast.patch(families.tiny("mochi"))
    arguments = families.inputs("mochi")
    reward = LatentRewardModel.from_backbone(model, 3, num_heads=2).freeze()
    reward.save(tmp_path / "reward")
    again = LatentRewardModel.load(tmp_path / "reward")
    assert again.backbone.transformer_blocks[-1].context_pre_only
    prfl_fast.patch(again.backbone)
    assert torch.equal(again(*arguments), reward(*arguments))
    shorter = LatentRewardModel.from_backbone(again.backbone, 1, num_heads=2)
    assert not shorter.backbone.transformer_blocks[-1].context_pre_only
