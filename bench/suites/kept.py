"""Count the bytes that one Wan block keeps for its backward at real sizes, on fake tensors.

Everything here raises ``UnavailableError`` if diffusers is not installed.
"""

from typing import Any

import report
import torch
from harness import PRESETS, Context, Preset, Table, saved_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

import prfl_fast
from prfl_fast.memory.checkpointing import MODES
from prfl_fast.memory.ledger import Ledger
from suites import wan

SIZES = ("wan1.3b-480p", "wan14b-480p", "wan14b-720p")
PARAMETERS = {"all parameters train": True, "frozen (LoRA's base, a reward model)": False}


def _block(
    preset: Preset, context: Context, *, patched: bool, train: bool
) -> tuple[Any, tuple[Any, ...]]:
    """Return a bfloat16 model of one block and its arguments, under a ``FakeTensorMode``."""
    # Fake CUDA tensors need a CUDA build; what is kept does not depend on the device.
    model = wan.build(preset, context, layers=1, dtype=torch.bfloat16, device="cpu")
    model.requires_grad_(train)
    if patched:
        prfl_fast.patch(model)
    x = torch.empty(1, preset.tokens, preset.dim, dtype=torch.bfloat16, requires_grad=True)
    text = torch.empty(1, preset.text_tokens, preset.dim, dtype=torch.bfloat16)
    rope: Any = model.rope(torch.empty(1, 16, *preset.latent))
    return model, (x, text, torch.empty(1, 6, preset.dim), rope)


def kept_bytes(preset: Preset, context: Context, *, patched: bool, train: bool) -> int:
    """Return the bytes autograd keeps for one bfloat16 block, without its input and parameters."""
    with FakeTensorMode():
        model, args = _block(preset, context, patched=patched, train=train)
        return saved_bytes(lambda: model.blocks[0](*args), exclude=[args[0], *model.parameters()])


def policy_bytes(preset: Preset, context: Context, policy: str, *, train: bool) -> int:
    """Return the bytes a patched block leaves on the device until its backward, with its input."""
    with FakeTensorMode():
        model, args = _block(preset, context, patched=True, train=train)
        prfl_fast.memory.activation_checkpointing(model, policy)
        run = model._gradient_checkpointing_func if policy != "none" else lambda f, *a: f(*a)
        with Ledger() as ledger:
            ledger.mark(args[0], "checkpoints")
            out = run(model.blocks[0], *args)
            return ledger.live - out.untyped_storage().nbytes()


def measure(context: Context) -> tuple[Table, list[dict[str, Any]]]:
    """Return the table ``kept`` and its records."""
    cases: list[dict[str, Any]] = []
    body = []
    for name in SIZES:
        for what, train in PARAMETERS.items():
            eager, ours = (
                kept_bytes(PRESETS[name], context, patched=patched, train=train)
                for patched in (False, True)
            )
            record = {"case": f"kept, {what}", "preset": name, "eager": eager, "prfl_fast": ours}
            cases.append(record)
            first = what == next(iter(PARAMETERS))
            line = [name if first else "", what, report.size(eager), report.size(ours)]
            body.append([*line, f"{ours / eager:.2f}"])
    columns = ["block", "parameters", "diffusers", "prfl_fast", "ratio"]
    notes = ["bfloat16, one sample, 512 text tokens; counted on shapes, without a GPU."]
    return Table("kept", "Kept for the backward of one block", columns, body, notes), cases


def policies(context: Context) -> tuple[Table, list[dict[str, Any]]]:
    """Return the table ``kept-policies`` and its records."""
    cases: list[dict[str, Any]] = []
    body = []
    for name in SIZES:
        for what, train in PARAMETERS.items():
            kept = {p: policy_bytes(PRESETS[name], context, p, train=train) for p in MODES}
            cases.append({"case": f"kept by policy, {what}", "preset": name, **kept})
            first = what == next(iter(PARAMETERS))
            share = f"1/{kept['none'] / kept['attention']:.1f}"
            line = [name if first else "", what, *map(report.size, kept.values()), share]
            body.append(line)
    columns = ["block", "parameters", *MODES, "attention of none"]
    notes = [
        "prfl_fast's block, bfloat16, one sample, 512 text tokens; the block's input counts. "
        "Counted on shapes, without a GPU."
    ]
    title = "Kept for the backward of one block, by checkpoint policy"
    return Table("kept-policies", title, columns, body, notes), cases
