"""Compiled blocks: the choice by measured times, its reasons, and gradients of compiled blocks."""

import logging
from types import SimpleNamespace

import pytest
import torch
import wan
from engine_world import make_wan, wan_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

from prfl_fast.memory import activation_checkpointing, quantize
from prfl_fast.memory.stream import stream_weights
from prfl_fast.models import Experts, compile_blocks, compiled_blocks
from prfl_fast.models.block_timer import BlockTimer, TimedCall
from prfl_fast.models.compiled_blocks import are_compiled
from prfl_fast.models.registry import patch
from prfl_fast.rollout import FlowEuler, RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.trajectory import rollout


def said(caplog):
    """Return the messages of prfl_fast; torch logs its traces."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("prfl_fast")]


class Times:
    """Clock and events of a machine whose host takes 1 s a pass and whose GPU ``device`` s."""

    def __init__(self, device):
        self.device, self.now, self.marks = device, 0.0, 0

    def clock(self):
        self.now += 1.0
        return self.now

    def event(self, device):
        self.marks += 1
        number = self.marks

        def elapsed_time(end):
            assert number == end.number - 1
            return 1e3 * self.device

        return SimpleNamespace(number=number, elapsed_time=elapsed_time, synchronize=lambda: None)

    def timer(self):
        return BlockTimer(self.event, self.clock)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    torch._dynamo.reset()
    where = SimpleNamespace(type="cuda")
    monkeypatch.setattr(compiled_blocks, "device_of", lambda model: where)
    yield where
    torch._dynamo.reset()


def build(layers=2):
    return patch(wan.tiny_wan(layers=layers))


def run(model):
    x, timestep, conditions = wan.inputs()
    text = conditions["encoder_hidden_states"]
    model.zero_grad()
    out = model(x, timestep, text, return_dict=False)[0]
    out.square().sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device, compiled", [(1.1, True), (3.0, False), (1.0, True)])
@pytest.mark.cases(1)
def test_blocks_are_compiled_if_the_device_waits(device, compiled, caplog):
    caplog.set_level(logging.INFO, "prfl_fast")
    model, times, graphs = build(layers=1), Times(device), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compile_blocks(model, backend=backend, timer=times.timer())
    plain = run(model)
    run(model)
    assert not graphs and times.marks == 2, "the choice is made after the second call"
    ours = run(model)
    assert bool(graphs) == compiled == are_compiled(model)
    (line,) = said(caplog)
    assert line.startswith("blocks are compiled" if compiled else "blocks are not compiled")
    assert f"{100 / device:.0f} % of the GPU's time" in line
    torch.testing.assert_close(ours, plain)
    assert ours[1].keys() == plain[1].keys()
    if not compiled:
        assert all(block._compiled_call_impl is None for block in model.blocks)


def test_timing_changes_no_bit():
    plain, model = run(build()), build()
    compile_blocks(model, timer=Times(1.0).timer())
    timed = run(model)
    assert torch.equal(plain[0], timed[0])
    assert all(torch.equal(g, timed[1][n]) for n, g in plain[1].items())


def checkpointed(model):
    """Let each call of the model be recomputed as a whole, of which its blocks know nothing."""
    forward = model.forward
    model.forward = lambda *args, **options: checkpoint(
        forward, *args, use_reentrant=False, **options
    )


CHANGES = {
    "by diffusers": lambda model: model.enable_gradient_checkpointing(),
    "by us": activation_checkpointing,
    "by the user": checkpointed,
}


@pytest.mark.parametrize("which", CHANGES)
def test_checkpointing_that_begins_while_blocks_are_timed(which, caplog):
    """A block that ran eagerly is not recomputed compiled."""
    caplog.set_level(logging.INFO, "prfl_fast")
    plain, model = run(build()), build()
    compile_blocks(model, backend="eager", timer=Times(1.0).timer())
    run(model)
    CHANGES[which](model)
    found = run(model)
    assert torch.equal(found[0], plain[0])
    assert all(torch.equal(g, found[1][n]) for n, g in plain[1].items())
    if which != "by the user":
        run(model)
        (line,) = said(caplog)
        assert line.startswith("blocks are not compiled: activation checkpointing")


def test_events_are_recorded_on_the_device_of_the_blocks(monkeypatch):
    streams = []
    event = SimpleNamespace(record=streams.append)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    timer, x = BlockTimer(), torch.empty(0, device="meta")
    for _ in range(2):
        timer(0, 1, lambda **inputs: None, hidden_states=x)
    assert streams == [x.device] * 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
def test_gradients_of_compiled_blocks(mode):
    plain, model = run(build()), build()
    activation_checkpointing(model, mode)
    compile_blocks(model, "on", backend="aot_eager")
    torch.testing.assert_close(run(model), plain, rtol=1e-4, atol=1e-4)
    compile_blocks(model, "off")
    assert not are_compiled(model) and torch.equal(run(model)[0], plain[0])


def test_rollouts_of_a_model_with_compiled_blocks():
    """Caches stay in use while blocks are timed."""
    x, conditions = wan_inputs()
    model = make_wan()
    plain = rollout(model, x, conditions, FlowEuler(), 3)
    compile_blocks(model, timer=Times(1.0).timer())
    engine = RolloutEngine(model, RolloutConfig())
    out = rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
    assert torch.equal(out, plain) and not any("as it is" in note for note in engine.notes)
    assert all(isinstance(block._compiled_call_impl, TimedCall) for block in model.blocks)


def test_rollouts_of_two_experts():
    x, conditions = wan_inputs()
    model = Experts(make_wan(), make_wan(), 0.5)
    plain = rollout(model, x, conditions, FlowEuler(), 3)
    out = rollout(model, x, conditions, FlowEuler(), 3, rollout_config=RolloutConfig())
    assert torch.equal(out, plain) and not are_compiled(model)
    compile_blocks(model.low, "on", backend="eager")
    assert are_compiled(model)


REASONS = {
    "on cpu": (lambda model: None, "the model is on cpu"),
    "compiled": (lambda model: model.blocks[0].compile(backend="eager"), "compiled already"),
    "hook": (
        lambda model: model.blocks[1].attn1.to_q.register_forward_hook(lambda *_: None),
        "attn1.to_q has hooks",
    ),
    "streamed": (lambda model: stream_weights(model, 1, torch.device("cpu")), "streamed"),
    "checkpointing": (activation_checkpointing, "activation checkpointing"),
    "quantized": (lambda model: quantize(model, "fp8"), "quantized"),
    "sharded": (
        lambda model: setattr(
            model.blocks[0].norm2, "weight", type("DTensor", (nn.Parameter,), {})(torch.ones(1))
        ),
        "sharded",
    ),
}


@pytest.mark.parametrize("which", REASONS)
def test_reasons_against(which, caplog, on_a_gpu):
    caplog.set_level(logging.DEBUG, "prfl_fast")
    change, words = REASONS[which]
    model = build()
    change(model)
    on_a_gpu.type = "cpu" if which == "on cpu" else "cuda"
    before = [block._compiled_call_impl for block in model.blocks]
    compile_blocks(model)
    assert words in said(caplog)[-1] or which == "on cpu"
    assert said(caplog)[-1].startswith("blocks are not compiled: ")
    assert [block._compiled_call_impl for block in model.blocks] == before


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_failing_compiler_is_given_up_unless_asked_for(mode, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    model, times = build(), Times(1.0)
    plain = run(model)
    compile_blocks(model, mode, backend=broken, timer=times.timer())
    if mode == "on":
        with pytest.raises(RuntimeError, match="no compiler here"):
            run(model)
        return
    for _ in range(3):
        out = run(model)
    assert torch.equal(out[0], plain[0]) and not are_compiled(model)
    assert "BackendCompilerFailed" in said(caplog)[-1]


def test_only_whole_passes_are_timed():
    """Recomputed blocks come in reverse order; a call may also stop after some blocks."""
    timer = Times(2.0).timer()
    for index in (2, 1, 0, 0, 1, 0, 1, 2, 2, 1, 0):
        assert timer(index, 3, lambda x: x, index) == index and timer.ratio() is None
    for index in (0, 1, 2):
        timer(index, 3, lambda: None)
    assert timer.ratio() == 0.5


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="mode is 'yes'"):
        compile_blocks(build(), "yes")


@pytest.mark.parametrize("backend", ["inductr", 3])
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_unknown_backends_are_refused_before_a_block_changes(mode, backend):
    model = compile_blocks(build(), "on", backend="eager")
    before = [block._compiled_call_impl for block in model.blocks]
    with pytest.raises(ValueError, match=f"backend is {backend!r}, expected .*inductor"):
        compile_blocks(model, mode, backend=backend)
    assert [block._compiled_call_impl for block in model.blocks] == before
