"""Count the work and traffic of a rollout at Wan's sizes, by option, on fake tensors."""

from dataclasses import dataclass
from typing import Any

import report
import torch
from harness import Preset, Table
from method_specs import SOLVER_STEPS

from prfl_fast.models import find_adapter
from prfl_fast.models.inference import RolloutOptions
from prfl_fast.planning.built_models import fake_models
from prfl_fast.planning.costs import Cost, CostLedger
from suites.memory_step import DEPTHS, Case, uniform
from suites.split import line, total

EIGHT_BITS = ("prfl_fast::fp8_linear", "prfl_fast::rollout_attention", "aten::_scaled_mm")
SPARSE = "prfl_fast::sparse_attention"


@dataclass(frozen=True)
class Counted:
    """Describe a way to run the rollout.

    Attributes:
        patched: on prfl_fast's kernels. cache: in the engine. lora: with adapters, merge: merged.
        linears, attention: in FP8.
    """

    patched: bool = True
    cache: bool = True
    lora: bool = False
    merge: bool = False
    linears: bool = False
    attention: bool = False


OPTIONS = {
    "unpatched": Counted(patched=False, cache=False),
    "patched": Counted(cache=False),
    "caches": Counted(),
    "LoRA, unpatched": Counted(patched=False, cache=False, lora=True),
    "LoRA, caches": Counted(lora=True),
    "LoRA merged": Counted(lora=True, merge=True),
    "FP8 linears": Counted(linears=True),
    "FP8 both": Counted(linears=True, attention=True),
}


class EightBits(CostLedger):
    """Add up the FLOPs of 8-bit products and attention by phase, too.

    Block-sparse attention on fake tensors has the FLOPs of a dense one, as their lists of blocks
    have no values; here it has the share ``density`` of them.
    """

    def __init__(self, density: float = 1.0) -> None:
        super().__init__()
        self.eight_bits: dict[str, Cost] = {}
        self._density = density

    def on_operation(self, func, args, kwargs, given, fresh, out):
        name = func._schema.name
        before = self.costs().get(self.phase, Cost()).flops
        super().on_operation(func, args, kwargs, given, fresh, out)
        sparse = name == SPARSE
        if not sparse and name not in EIGHT_BITS:
            return
        added = self.costs()[self.phase].flops - before
        if sparse:
            left_out = round((1 - self._density) * added)
            self.count(attention_flops=-left_out)
            added -= left_out
        if not sparse or "exact" not in [a for a in args if isinstance(a, str)]:  # its variant
            kind = "attention_flops" if "attention" in name else "matmul_flops"
            known = self.eight_bits.get(self.phase, Cost())
            self.eight_bits[self.phase] = total(known, Cost(**{kind: added}))


Tally = dict[str, Cost]


def _tally(preset: Preset, option: Counted, depth: int, num_inference_steps: int) -> Tally:
    """Return costs of opening a rollout and of a forward, the caches, a forward's 8-bit FLOPs."""
    train = "lora" if option.lora else "full"
    memory = uniform("none")
    workload = Case(preset, memory, option.patched, train).workload()
    models = fake_models(workload, memory, memory, layers=depth, reward_layers=1)
    with models as (generator, _), torch.no_grad():
        adapter = find_adapter(generator)
        x = torch.zeros(workload.latent_shape)
        text = torch.zeros(1, workload.text_tokens, preset.text_dim)
        conditions = {"encoder_hidden_states": text}
        times = [torch.full((1,), 1000.0 - i) for i in range(num_inference_steps)]
        ledger = EightBits()
        with ledger:
            ledger.start_phase("opening")
            run, held = None, ledger.live
            if option.cache:
                options = RolloutOptions(merge_lora=option.merge)
                run = adapter.open_rollout(generator, x, times, conditions, options)
                held = ledger.live - held
            ledger.start_phase("forward")
            if run is None:
                adapter.velocity(generator, x, times[0], conditions)
            else:
                linears, attention = (
                    "fp8" if eight else "exact" for eight in (option.linears, option.attention)
                )
                run.velocity(x, 0, linears=linears, attention=attention)
            costs = {"opening": Cost()} | ledger.costs()
            costs["caches"] = Cost(moved_bytes=held if run is not None else 0)
            costs["8 bits"] = ledger.eight_bits.get("forward", Cost())
            return costs


def tally(preset: Preset, option: Counted, num_inference_steps: int = SOLVER_STEPS) -> Tally:
    """Return costs at the preset's depth, by the line through two small depths."""
    few, more = (_tally(preset, option, depth, num_inference_steps) for depth in DEPTHS[False])
    return {name: line(few[name], more[name], DEPTHS[False], preset.layers) for name in few}


def count(preset: Preset, num_inference_steps: int = SOLVER_STEPS) -> list[dict[str, Any]]:
    """Return records of a whole rollout: FLOPs, those in 8 bits, bytes moved and cached."""
    records = []
    for name, option in OPTIONS.items():
        found = tally(preset, option, num_inference_steps)
        whole = total(found["opening"], *[found["forward"]] * num_inference_steps)
        record = {"case": "rollout counted", "preset": preset.name, "option": name}
        record |= {"num_inference_steps": num_inference_steps, "flops": whole.flops}
        record["eight_bit_flops"] = num_inference_steps * found["8 bits"].flops
        record["moved_bytes"] = whole.moved_bytes
        record["cache_bytes"] = found["caches"].moved_bytes
        records.append(record)
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """Return the table by size and option, beside the rollout of the unpatched model."""
    body = []
    for size in dict.fromkeys(r["preset"] for r in records):
        rows = {r["option"]: r for r in records if r["preset"] == size}
        for i, (name, r) in enumerate(rows.items()):
            base = rows["LoRA, unpatched" if OPTIONS[name].lora else "unpatched"]
            less = r["flops"] / base["flops"] - 1
            share = r["eight_bit_flops"] / r["flops"]
            moved = f"{r['moved_bytes'] / base['moved_bytes']:.3f}"
            line = ["" if i else size, name, report.flops(r["flops"])]
            line.append(report.BLANK if r is base else f"{less:+.3%}")
            line.append(f"{share:.0%}" if share else report.BLANK)
            line += [report.size(r["moved_bytes"]), report.BLANK if r is base else moved]
            body.append([*line, report.size(r["cache_bytes"] or None)])
    columns = ["size", "rollout", "FLOPs", "over unpatched", "in 8 bits", "moved", "of unpatched"]
    steps = records[0]["num_inference_steps"]
    notes = [
        f"A whole rollout of {steps} steps, bf16 weights, one sample, 512 text tokens; LoRA of "
        "rank 16. Counted on fake tensors; no time was measured.",
        "moved: what everything but products and attention reads and writes, fused operations "
        "once; caches: bytes held from the rollout's first step to its last.",
    ]
    title = "A rollout at Wan's sizes, counted"
    return Table("rollout-wan", title, [*columns, "caches"], body, notes)
