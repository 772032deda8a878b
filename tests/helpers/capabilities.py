"""Run what docs/models.md says about model classes, and write its table.

``python tests/helpers/capabilities.py`` runs every check on every row and rewrites the table. To
add a model, add its row to ``ROWS``: a function that returns a :class:`Case`.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_families
import torch
import wan
from official_wan import CLASSES, official_inputs, tiny_official
from other_models import HandMade, hand_made_inputs, hand_made_velocity
from torch import nn
from wan_relatives import relative_inputs, tiny_relative

import prfl_fast
from prfl_fast.memory import activation_checkpointing, quantize
from prfl_fast.models import VelocityModel, find_adapter
from prfl_fast.models.inference import UnsupportedError
from prfl_fast.models.registry import find_blocks
from prfl_fast.planning import Workload
from prfl_fast.planning.simulation import simulate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
MARKS = ("<!-- models -->\n", "<!-- end of models -->")
REFUSALS = (TypeError, ValueError, UnsupportedError)


@dataclass
class Case:
    """A tiny model and one call of it.

    ``velocity`` is the class's own call, through which a class without adapter gets PRFL; ``flow``
    is False if it returns no flow velocity. ``tolerance`` is that of relative L2 distances.
    """

    model: nn.Module
    x: torch.Tensor
    timestep: torch.Tensor
    conditions: dict[str, torch.Tensor]
    velocity: Callable[..., torch.Tensor] | None = None
    flow: bool = True
    tolerance: float = 1e-5

    def call(self):
        """Return the velocity, through the adapter if the model has one."""
        if self.velocity is not None:
            return self.velocity(self.x, self.timestep, self.conditions)
        adapter = find_adapter(self.model)
        return adapter.velocity(self.model, self.x, self.timestep, self.conditions)

    def gradients(self):
        """Return the output and the parameters' gradients of its mean square."""
        self.model.zero_grad()
        out = self.call()
        out.square().mean().backward()
        grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        return out.detach(), torch.cat(grads)


def close(ours, theirs, tolerance):
    """Assert that relative L2 distances of two lists of tensors are small."""
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance


def check_patch(case):
    plain = case.gradients()
    keys = list(case.model.state_dict())
    prfl_fast.patch(case.model)
    assert prfl_fast.is_patched(case.model) and list(case.model.state_dict()) == keys
    close(case.gradients(), plain, case.tolerance)
    prfl_fast.unpatch(case.model)
    assert not prfl_fast.is_patched(case.model)
    close(case.gradients(), plain, 1e-12)


def check_policies(case):
    plain = case.gradients()
    for mode in ("full", "attention"):
        for offload in (None, "cpu"):
            activation_checkpointing(case.model, mode, offload)
            close(case.gradients(), plain, case.tolerance)


def block_bytes(model):
    """Return the bytes of the parameters of the blocks."""
    blocks = find_blocks(model).blocks(model)
    return sum(parameter.nbytes for parameter in blocks.parameters())


def check_quantize(case):
    plain = case.call().detach()
    before = block_bytes(case.model)
    quantize(case.model, "fp8")
    assert block_bytes(case.model) < 0.6 * before
    close([case.call().detach()], [plain], 0.1)


def check_rollout(case):
    prfl_fast.patch(case.model)
    adapter, times = find_adapter(case.model), [case.timestep, case.timestep * 0.5]
    opened = adapter.open_rollout(case.model, case.x, times, case.conditions)
    with torch.no_grad():
        close([opened.velocity(case.x, 0)], [case.call()], 1e-6)


def latent_reward(case):
    return prfl_fast.LatentRewardModel.from_backbone(case.model, 1, num_heads=2).freeze()


def check_reward(case):
    reward, x = latent_reward(case), case.x.clone().requires_grad_()
    score = reward(x, case.timestep, case.conditions)
    score.sum().backward()
    assert score.shape == (len(x),) and float(x.grad.norm()) > 0


def check_prfl(case):
    def reward(x, timestep, conditions):
        return torch.sigmoid(x.mean(dim=(1, 2, 3, 4)))

    found = "yes"
    try:
        step = prfl_fast.PRFL(case.model, reward, prfl_fast.FlowUniPC(), num_inference_steps=4)
    except TypeError:
        if case.velocity is None or not case.flow:
            raise
        step = prfl_fast.PRFL(case.velocity, reward, prfl_fast.FlowUniPC(), num_inference_steps=4)
        found = "function"
    assert step(case.x, case.conditions, indices=[1]).finite
    assert any(float(p.grad.norm()) > 0 for p in case.model.parameters() if p.grad is not None)
    return found


def check_plan(case):
    size = {"frames": 25, "height": 64, "width": 64, "reward_blocks": 1, "lora_rank": 2}
    memory = prfl_fast.MemoryConfig("bf16", "full"), prfl_fast.MemoryConfig("bf16", "full")
    run = simulate(Workload(case.model, **size), *memory)
    assert run.peak == sum(run.categories.values()) > 0


CHECKS = {
    "patch": check_patch,
    "policies": check_policies,
    "quantize": check_quantize,
    "rollout engine": check_rollout,
    "reward": check_reward,
    "PRFL": check_prfl,
    "plan": check_plan,
}


def diffusers_wan(kind="t2v", **options):
    """Return a row of diffusers' ``WanTransformer3DModel``."""

    def build():
        model = wan.tiny_wan(kind, head_dim=32, **options)
        x, _, conditions = wan.inputs(kind, batch=1, size=(2, 4, 4))
        return Case(model, x, torch.tensor([600.0]), conditions)

    return build


def official(variant, kind="t2v"):
    """Return a row of a stand-in of :mod:`official_wan`."""

    def build():
        model = tiny_official(variant, kind, head_dim=32)
        given = official_inputs(variant, kind, batch=1, size=(2, 4, 4))
        conditions = {"encoder_hidden_states": torch.stack(given["context"])}
        if kind != "t2v":
            conditions["latent_condition"] = given["y"]
        if "clip_fea" in given:
            conditions["encoder_hidden_states_image"] = given["clip_fea"]
        # musubi-tuner casts float32 to bfloat16 in attention.
        tolerance = 5e-3 if variant.startswith("musubi") else 1e-5
        return Case(model, given["x"], torch.tensor([600.0]), conditions, tolerance=tolerance)

    return build


def relative(kind):
    """Return a row of a class of :mod:`wan_relatives`."""

    def build():
        model = tiny_relative(kind, attention_head_dim=32, num_layers=6)
        x, timestep, conditions = relative_inputs(kind, batch=1)
        return Case(model, x, timestep, conditions)

    return build


def any_other():
    """Return a row of a model without an adapter, paired with its function."""
    torch.manual_seed(0)
    model = VelocityModel(HandMade(width=64), hand_made_velocity, hidden_size=64)
    x, timestep, conditions = hand_made_inputs(batch=1)
    return Case(model, x, timestep, conditions)


_LABELS = {
    "wan21": "Wan2.1 `WanModel`",
    "wan22": "Wan2.2 `WanModel`",
    "hyprfl": "HY-Video-PRFL `WanModel`",
    "videox": "VideoX-Fun `WanTransformer3DModel`",
    "videox22": "VideoX-Fun `Wan2_2Transformer3DModel`",
    "diffsynth": "DiffSynth-Studio `WanModel`",
    "musubi": "musubi-tuner `WanModel`, 2.1",
    "musubi22": "musubi-tuner `WanModel`, 2.2",
}


def tiny_family(case, channels=None):
    """Return a row of a class of :mod:`tiny_families`, with latents of that many channels."""

    def build():
        own = {} if channels is None else {"in_channels": channels, "out_channels": channels}
        wide = {"attention_head_dim": 32, **tiny_families.WIDE[case]}
        x, timestep, conditions = tiny_families.inputs(case, batch=1, size=(2, 4, 4))
        x = x if channels is None else x.repeat(1, channels // x.shape[1], 1, 1, 1)
        return Case(tiny_families.tiny(case, **wide, **own), x, timestep, conditions)

    return build


def cogvideox():
    """Return a row of ``CogVideoXTransformer3DModel``, which has no velocity."""
    model, (x, text, timestep, rope) = tiny_families.cogvideox(0, 1, "fp32")

    def call(x, timestep, conditions):
        given = {"timestep": timestep.long(), "image_rotary_emb": rope, "return_dict": False}
        return model(x.transpose(1, 2), **conditions, **given)[0].transpose(1, 2)

    conditions = {"encoder_hidden_states": text}
    return Case(model, x.transpose(1, 2), timestep, conditions, call, flow=False)


ROWS: dict[str, Callable[[], Case]] = {
    "diffusers `WanTransformer3DModel`, T2V": diffusers_wan(),
    "diffusers `WanTransformer3DModel`, I2V": diffusers_wan("i2v"),
    "diffusers `WanTransformer3DModel`, first and last frame": diffusers_wan("flf"),
    "diffusers `WanTransformer3DModel`, given first frame (Wan2.2 TI2V)": diffusers_wan(
        "first-frame"
    ),
    **{_LABELS[variant]: official(variant) for variant in CLASSES},
    "Wan2.1 `WanModel`, I2V": official("wan21", "i2v"),
    "Wan2.2 `WanModel`, I2V": official("wan22", "i2v"),
    "diffusers `WanVACETransformer3DModel`": relative("vace"),
    "diffusers `WanAnimateTransformer3DModel`": relative("animate"),
    "diffusers `SkyReelsV2Transformer3DModel`": relative("skyreels"),
    "diffusers `ChronoEditTransformer3DModel`": relative("chronoedit"),
    "diffusers `HunyuanVideoTransformer3DModel`": tiny_family("hunyuan"),
    "diffusers `HunyuanVideo15Transformer3DModel`": tiny_family("hunyuan15"),
    "diffusers `LTXVideoTransformer3DModel`": tiny_family("ltx", channels=128),
    "diffusers `LTX2VideoTransformer3DModel`": tiny_family("ltx2", channels=128),
    "diffusers `CogVideoXTransformer3DModel`": cogvideox,
    "diffusers `MochiTransformer3DModel`": tiny_family("mochi", channels=12),
    "any other model as `VelocityModel`": any_other,
}


def cells(name):
    """Run every check on a row; return ``yes``, ``function`` (no adapter) or ``refused`` each."""
    found = {}
    for column, check in CHECKS.items():
        try:
            found[column] = check(ROWS[name]()) or "yes"
        except REFUSALS as error:
            print(f"{name}, {column}: {type(error).__name__}: {str(error)[:200]}")
            found[column] = "refused"
    return found


def row(name, found):
    return f"| {name} | {' | '.join(found.values())} |"


def rows():
    """Return the rows of docs/models.md by the name of their model."""
    lines = PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0].splitlines()[2:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def write(only):
    """Run the checks of some rows, all by default, and write the table."""
    # A row whose patched blocks fall back to their own forward must not say yes.
    warnings.filterwarnings("error", "a patched block runs its own forward")
    known = rows()
    for name in ROWS:
        if not only or any(word in name for word in only):
            try:
                known[name] = row(name, cells(name))
            except pytest.skip.Exception as missing:
                print(f"{name}: kept, {missing}")
    lines = [f"| model | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    lines += [known[name] for name in ROWS if name in known]
    before, rest = PAGE.read_text().split(MARKS[0])
    table = "\n".join(lines) + "\n"
    PAGE.write_text(before + MARKS[0] + table + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    write(sys.argv[1:])
