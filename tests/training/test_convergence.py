"""32 optimizer steps of a tiny Wan, patched against unpatched: losses and parameters."""

import pytest
import torch
import wan

import prfl_fast

pytest.importorskip("diffusers")
STEPS = 32


def train(model):
    """Return losses and parameters of each step of flow matching on four fixed latents."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    latents, _, conditions = wan.inputs(batch=4)
    losses, parameters = [], []
    for _ in range(STEPS):
        sigma = torch.rand(4, 1, 1, 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = (1 - sigma) * latents + sigma * noise
        text = conditions["encoder_hidden_states"]
        out = model(noisy, 1000 * sigma.flatten(), text, return_dict=False)[0]
        loss = (out - (noise - latents)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        parameters.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
    return losses, parameters


@pytest.mark.slow
def test_patched_training_follows_unpatched_training():
    # Adam divides by gradients that are rounding noise: parameters agree to 2 % of their change.
    plain_losses, plain = train(wan.tiny_wan())
    losses, patched = train(prfl_fast.patch(wan.tiny_wan()))
    assert plain_losses[-1] < 0.8 * plain_losses[0], "the training must do something"
    for step, (ours, theirs) in enumerate(zip(losses, plain_losses, strict=True)):
        assert abs(ours - theirs) <= 1e-5 * abs(theirs), f"loss at step {step}"
    for step, (ours, theirs) in enumerate(zip(patched, plain, strict=True)):
        for name, value in theirs.items():
            # Adam's first step moves every entry by the learning rate.
            moved = (value - plain[0][name]).abs().max() + 1e-3
            difference = (ours[name] - value).square().mean().sqrt()
            assert difference <= 0.02 * moved, f"{name} at step {step}: {difference:.2e}"
