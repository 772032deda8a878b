"""Count and time one training step under memory methods of other libraries and of prfl_fast.

All methods are applied to the same unpatched model of diffusers, so kernels make no difference.
"""

import contextlib
from dataclasses import replace
from typing import Any

import harness
import report
import torch
from harness import Context, SuiteResult, Table, UnavailableError
from torch.utils.checkpoint import set_checkpoint_early_stop

from prfl_fast import MemoryConfig, apply_memory
from prfl_fast.memory import quantize
from prfl_fast.memory.ledger import HOST
from prfl_fast.planning.costs import CostLedger
from prfl_fast.training import add_lora
from suites import peer_methods, wan
from suites.peer_methods import Running

SIZES: dict[str, Any] = {"latent": (5, 8, 16), "dim": 128, "heads": 2, "ffn_dim": 512, "layers": 6}
TEXT_TOKENS, RANK = 32, 4
BASE = "no method"
CASTING, FP8 = "diffusers: FP8 layerwise casting", "prfl_fast: FP8 weights"


def _ours(checkpointing: str, **rest: Any) -> Any:
    def apply(model: Any) -> Running:
        config: Any = {"activation_checkpointing": checkpointing, **rest}
        apply_memory(model, MemoryConfig(**config))
        return contextlib.nullcontext

    return apply


def _method(checkpointing: bool, method: Any = None, **options: Any) -> Any:
    """Return a function that applies a method, and diffusers' checkpointing if asked for."""

    def apply(model: Any) -> Running:
        if checkpointing:
            model.enable_gradient_checkpointing()
        return (method and method(model, **options)) or contextlib.nullcontext

    return apply


def _groups(checkpointing: bool, kind: str, prefetch: bool = False, stop: bool = False) -> Any:
    def apply(model: Any) -> Running:
        running = _method(checkpointing, peer_methods.offload_groups, kind=kind, prefetch=prefetch)
        within = running(model)

        @contextlib.contextmanager
        def run() -> Any:
            with set_checkpoint_early_stop(stop), within():
                yield

        return run

    return apply


def _swap(blocks: int) -> Any:
    def apply(model: Any) -> Running:
        peer_methods.BlockSwap(model, blocks)
        return peer_methods.quietly

    return apply


def _quantize(model: Any) -> None:
    quantize(model, "fp8")  # weight_dtype="fp8" would also make the other weights bfloat16


def _cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


_selective = peer_methods.checkpoint_selectively
_activations = peer_methods.OffloadedActivations
# Label → function that applies a method to a model and returns a context for its steps.
ROWS: dict[str, Any] = {
    BASE: _method(False),
    "diffusers: checkpointing": _method(True),
    "torch: selective checkpointing, attention": _method(
        False, _selective, every_second_product=False
    ),
    "prfl_fast: attention": _ours("attention"),
    "torch: selective checkpointing, every second product": _method(
        False, _selective, every_second_product=True
    ),
    "TRL: activations offloaded": _method(False, _activations),
    "prfl_fast: none, offloaded": _ours("none", offload="cpu"),
    "TRL: activations offloaded, checkpointing": _method(True, _activations),
    "prfl_fast: full, offloaded": _ours("full", offload="cpu"),
    "prfl_fast: attention, offloaded": _ours("attention", offload="cpu"),
    "diffusers: groups of a block, no checkpointing": _groups(False, "block_level"),
    "diffusers: groups of a block": _groups(True, "block_level", stop=True),
    "diffusers: groups of a block, whole recompute": _groups(True, "block_level"),
    "diffusers: groups of a block, prefetched, whole recompute": _groups(
        True, "block_level", prefetch=True
    ),
    "diffusers: groups of a layer, whole recompute": _groups(True, "leaf_level"),
    "musubi-tuner: 3 of 6 blocks swapped": _swap(3),
    "musubi-tuner: 4 of 6 blocks swapped": _swap(4),
    "prfl_fast: full, weights streamed": _ours("full", stream_weights=1),
    CASTING: _method(True, _cast),
    FP8: _method(True, _quantize),
}
# These replace the dtype of weights: they precede LoRA, and their gradients have other bits.
BEFORE_LORA = ROUNDED = (CASTING, FP8)


class _Counter(CostLedger):
    """Count the copies between device and host of each phase, beside its costs."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[str, dict[str, list[int]]] = {}

    def on_operation(
        self, func: Any, args: Any, kwargs: Any, given: Any, fresh: Any, out: Any
    ) -> None:
        super().on_operation(func, args, kwargs, given, fresh, out)
        name = func._schema.name
        if name == "aten::copy_":
            target, source = given[:2]
        elif name == "aten::_to_copy" and kwargs.get("device") == peer_methods.COPYING:
            target, source = out, given[0]  # diffusers moves a group to the other side
            if self.category_of(source) != HOST:
                self.mark(out, HOST)
        else:
            return
        to_host, from_host = (self.category_of(t) == HOST for t in (target, source))
        if to_host != from_host:
            way = "to_host" if to_host else "to_device"
            ways = self.copies.setdefault(self.phase, {"to_device": [0, 0], "to_host": [0, 0]})
            ways[way][0] += 1
            ways[way][1] += source.nbytes


class Step:
    """Hold one model with a method applied, and run a training step of its adapters."""

    def __init__(self, name: str, context: Context) -> None:
        preset = replace(context.preset, **SIZES, text_tokens=TEXT_TOKENS)
        model: Any = wan.build(preset, context)
        self._model, self.ledger = model, _Counter()
        with self.ledger:
            for parameter in model.parameters():
                self.ledger.mark(parameter, "weights")
            if name in BEFORE_LORA:
                self._running: Running = ROWS[name](model)
            add_lora(model, RANK)
            self._draw_adapters(context)
            if name not in BEFORE_LORA:
                self._running = ROWS[name](model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._inputs = wan.latents(preset, context), torch.full((1,), 500.0)
        self._text = wan.conditions(preset, context)["encoder_hidden_states"]

    @torch.no_grad()
    def _draw_adapters(self, context: Context) -> None:
        generator = context.generator(3)
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self.ledger.mark(parameter, "weights")
                parameter.normal_(0, 0.02, generator=generator)

    def __call__(self, phase: str = "") -> int:
        """Run forward and backward; return the bytes on the device between them."""
        for parameter in self._parameters:
            parameter.grad = None
        with self._running():
            self.ledger.start_phase(phase)
            loss = self._model(*self._inputs, self._text, return_dict=False)[0].square().mean()
            live = self.ledger.live
            loss.backward()
        return live

    def gradients(self) -> torch.Tensor:
        """Return the gradients of the last step as one vector."""
        return torch.cat([p.grad.flatten() for p in self._parameters if p.grad is not None])

    def record(self) -> dict[str, Any]:
        """Return bytes, copies and FLOPs of a second step; the first fixes the prefetch order."""
        with self.ledger as ledger:
            self("first")
            for parameter in self._parameters:
                parameter.grad = None
            ledger.start_phase("")
            before = ledger.live
            between = self("second")
            ledger.start_phase("")
        cost, copies = ledger.costs()["second"], ledger.copies.get("second", {})
        return {
            "before_bytes": before,
            "between_bytes": between,
            "peak_bytes": max(sum(live.values()) for p, live in ledger.timeline if p == "second"),
            "host_bytes": ledger.host_peak,
            "copies": {way: tuple(total) for way, total in copies.items()},
            "flops": cost.flops,
        }


def measure(context: Context) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the record of each method, and failed checks."""
    records, problems = [], []
    steps = {name: Step(name, context) for name in ROWS}
    expected = torch.empty(0)
    for name in context.each(ROWS, "peers"):
        record = {"case": "peer", "row": name, **steps[name].record()}
        found = steps[name].gradients()
        if name == BASE:
            expected = found
        record["gradient_off"] = float((found - expected).norm() / expected.norm())
        if name not in ROUNDED and not torch.equal(found, expected):
            problems.append(f"{name}: a gradient differs from that of {BASE}")
        records.append(record)
    timings = harness.time_side_by_side(steps, context.device, seconds=0.5)
    for record in records:
        record["times"] = timings[record["row"]].record()
    return records, problems


def _table(records: list[dict[str, Any]], context: Context) -> Table:
    columns = ["method", "before a step", "before its backward", "peak", "in host memory"]
    columns += ["to the device", "to the host", "FLOPs", "time", "gradient off"]
    body = []
    for record in records:
        sizes = [record[f"{name}_bytes"] for name in ("before", "between", "peak", "host")]
        line = [record["row"], *(report.size(size or None) for size in sizes)]
        for way in ("to_device", "to_host"):
            count, size = record["copies"].get(way, (0, 0))
            line.append(f"{report.size(size)} in {count}" if count else report.BLANK)
        line.append(report.ratio(record["flops"] / records[0]["flops"]))
        line.append(report.ratio(record["times"]["median_s"] / records[0]["times"]["median_s"]))
        off = record["gradient_off"]
        body.append([*line, f"{off:.1e}" if off else "0"])
    preset = replace(context.preset, **SIZES)
    notes = [
        f"One forward and backward of diffusers' Wan, unpatched: {preset.layers} blocks, "
        f"D = {preset.dim}, L = {preset.tokens}, float32, LoRA of rank {RANK}. Rows of diffusers, "
        "musubi-tuner and FP8 recompute blocks in the backward unless they say no checkpointing.",
        "Bytes on the device, weights included: before a step, between forward and backward, at "
        "the peak. to the device, to the host: bytes and number of copies in a step. FLOPs, time: "
        "over those of the first row. On a CPU a copy stays in memory and nothing overlaps, and at "
        "this size Python takes most of the time. gradient off: relative L2 distance from the "
        "gradient of the first row; 0: no bit differs.",
        "diffusers runs its own code without streams; the algorithms of TRL and musubi-tuner are "
        "written anew without streams. Groups move trained adapters too. whole recompute: "
        "set_checkpoint_early_stop(False). Without it, a recompute ends before the hook that moves "
        "the block out. Prefetching keeps to the order of the forward: the recompute of a block "
        "brings in the block that comes after it in the forward.",
    ]
    return Table("peers", "Memory methods of other libraries", columns, body, notes)


def run(context: Context) -> SuiteResult:
    """Run the suite, on a CPU only."""
    if context.device.type != "cpu":
        raise UnavailableError("copies are counted within CPU memory; use --device cpu")
    context.refuse_large()
    records, problems = measure(context)
    return SuiteResult([_table(records, context)], records, {}, problems)
