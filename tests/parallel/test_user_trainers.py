"""The loops of docs/multi-gpu.md on two ranks: their weights are those of one process."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sharded_world import all_full
from wan import float_means_double, tiny_wan

from prfl_fast import PRFL, FlowUniPC, LatentRewardModel, is_patched, patch
from prfl_fast.memory import make_optimizer

pytest.importorskip("diffusers")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "multi-gpu.md"
STEPS, UPDATES = 4, 2


def snippet(heading):
    section = PAGE.read_text().partition(f"\n## {heading}")[2].partition("\n## ")[0]
    (body,) = re.findall(r"^```python\n(.*?)^```$", section, re.S | re.M)
    return compile(body, str(PAGE), "exec")


def models():
    transformer = tiny_wan(layers=2, text_dim=12, ffn_dim=64).double()
    reward = LatentRewardModel.from_backbone(transformer, 1, num_heads=2).double().freeze()
    given = {"transformer": transformer, "reward": reward, "steps": STEPS}
    return {**given, "device_type": "cpu"}


def batches(samples):
    """Return the batches of the updates, with these of two samples."""
    draw = torch.Generator().manual_seed(4)
    found = []
    for _ in range(UPDATES):
        noise = torch.randn(2, 16, 2, 4, 4, generator=draw, dtype=torch.float64)
        text = torch.randn(2, 3, 12, generator=draw, dtype=torch.float64)
        found.append((noise[samples], {"encoder_hidden_states": text[samples]}))
    return {"batches": found, "points": torch.Generator().manual_seed(5)}


def weights(transformer):
    named = {name.removeprefix("module."): p for name, p in transformer.named_parameters()}
    return {name: tensor.numpy() for name, tensor in all_full(named).items()}


def run(heading, samples, **names):
    given = {**models(), **batches(samples), **names}
    with float_means_double():
        exec(snippet(heading), given)
    assert is_patched(given["transformer"])
    return weights(given["transformer"]), type(given["transformer"]).__name__


@pytest.fixture(scope="module")
def expected():
    """Return the weights after the updates of one process on both samples."""
    given = {**models(), **batches(slice(None))}
    patch(given["transformer"])
    patch(given["reward"].backbone)
    step = PRFL(given["transformer"], given["reward"], FlowUniPC(), num_inference_steps=STEPS)
    optimizer = make_optimizer("adamw", given["transformer"].parameters(), learning_rate=1e-3)
    with float_means_double():
        for noise, conditions in given["batches"]:
            step(noise, conditions, generator=given["points"])
            optimizer.step()
            optimizer.zero_grad()
    return weights(given["transformer"])


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    start = weights(models()["transformer"])
    assert max(abs(expected[n] - start[n]).max() for n in start) > 1e-3  # it trained
    errors = {name: abs(found[name] - value).max() for name, value in expected.items()}
    assert max(errors.values()) <= 1e-10, max(errors.items(), key=lambda item: item[1])


def test_a_loop_as_in_torchtitan_equals_one_process(expected):
    for found, kind in run_ranks(2, run, "Your own training loop", slice(None)):
        assert kind == "FSDPWanTransformer3DModel"
        assert_equal(found, expected)


def test_a_loop_with_accelerate_equals_one_process(expected, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29551")  # not used: the ranks have their process group

    class Accelerator(accelerate.Accelerator):
        """Take FSDP2 on the CPU, as accelerate itself does on GPUs only."""

        def __init__(self, fsdp_plugin):
            super().__init__(cpu=True, fsdp_plugin=fsdp_plugin)
            self.state.distributed_type = accelerate.DistributedType.FSDP
            self.state.fsdp_plugin = fsdp_plugin

    monkeypatch.setattr(accelerate, "Accelerator", Accelerator)

    def on_rank():
        return run("accelerate", slice(dist.get_rank(), dist.get_rank() + 1))

    for found, kind in run_ranks(2, on_rank):
        assert kind == "FSDPWanTransformer3DModel"
        assert_equal(found, expected)
