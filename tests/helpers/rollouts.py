"""Short rollouts of tiny patched models, shared by the tests of rollout blocks and layers."""

import contextlib
import copy
import functools

import pytest
import torch
import wan

import prfl_fast
from prfl_fast.models.inference import RolloutOptions
from prfl_fast.models.registry import find_adapter

SHARES = (1.0, 0.6, 0.05)  # timesteps of a rollout, of the first
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
FP8 = {"linears": "fp8", "attention": "fp8"}


def build(case="t2v", layout="fp32", **options):
    """Build a patched model in which every layer takes 8 bits."""
    options = {"head_dim": 32, **options}
    return prfl_fast.patch(lay_out(wan.tiny_wan(case, **options), layout))


def fused(model):
    """Fuse the projections of every attention."""
    for block in model.blocks:
        block.attn1.fuse_projections()
        block.attn2.fuse_projections()
    return model


def lay_out(model, layout):
    if layout == "mixed":
        return wan.mixed_layout(model)
    return model.to({"bf16": torch.bfloat16}.get(layout, torch.float32))


def autocast(layout):
    """Return the autocast that the layout runs under."""
    if layout == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def add_lora(model, name="default", *, rank=4, seed=3, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    options = {"target_modules": TARGETS, "init_lora_weights": False, **options}
    model.add_adapter(peft.LoraConfig(r=rank, **options), adapter_name=name)
    return model


def spied(monkeypatch, owner, *names):
    """Return the list of names to which every call of these functions of ``owner`` adds its own."""
    calls = []
    for name in names:
        original = getattr(owner, name)

        @functools.wraps(original)
        def spy(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    return calls


class Case:
    """Latents, timesteps and conditions of a short rollout of a model."""

    def __init__(self, model, case="t2v", **options):
        self.model, self.adapter = model, find_adapter(model)
        self.x, timestep, self.conditions = wan.inputs(case, **options)
        self.timesteps = [share * timestep for share in SHARES]

    def open(self, **options):
        return self.adapter.open_rollout(
            self.model, self.x, self.timesteps, self.conditions, RolloutOptions(**options)
        )

    @torch.no_grad()
    def plain(self, model=None, x=None):
        """Return the model's own velocity at every step."""
        x = self.x if x is None else x
        model = self.model if model is None else model
        return [self.adapter.velocity(model, x, t, self.conditions) for t in self.timesteps]

    def all(self, rollout, **how):
        return [rollout.velocity(self.x, i, **how) for i in range(len(SHARES))]

    def double(self):
        """Every step of a float64 copy of the model."""
        model = copy.deepcopy(self.model).double()
        wide = {name: value.double() for name, value in self.conditions.items()}
        with torch.no_grad(), wan.float_means_double():
            return [
                self.adapter.velocity(model, self.x.double(), t.double(), wide)
                for t in self.timesteps
            ]

    def state(self):
        """Return the attributes of every module and the bits of every tensor."""
        attributes = {
            name: {key: value for key, value in module.__dict__.items() if key[:2] != "__"}
            for name, module in self.model.named_modules()
        }
        return attributes, {k: v.clone() for k, v in self.model.state_dict().items()}

    def assert_as_before(self, state):
        attributes, tensors = self.state()
        for name, own in state[0].items():
            assert own.keys() == attributes[name].keys(), name
            assert all(own[key] is attributes[name][key] for key in own), name
        assert tensors.keys() == state[1].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, state[1][name]), name


def opened(model, case="t2v", **options):
    """Return the case of a model and its rollout."""
    work = Case(model, case)
    return work, work.open(**options)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) == len(SHARES)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def distance(ours, theirs):
    """Largest relative L2 distance over the steps."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))
