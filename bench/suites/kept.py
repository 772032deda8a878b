"""Bytes that one Wan block keeps for its backward at real sizes, counted on fake tensors."""

from typing import Any

import report
import torch
from harness import PRESETS, Context, Preset, Table, saved_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

import prfl_fast
from suites import wan

SIZES = ("wan1.3b-480p", "wan14b-480p", "wan14b-720p")
PARAMETERS = {"all parameters train": True, "frozen (LoRA's base, a reward model)": False}


def kept_bytes(preset: Preset, context: Context, *, patched: bool, train: bool) -> int:
    """Bytes autograd keeps for one bfloat16 block; its input and parameters are not counted.

    Raises:
        Unavailable: diffusers is not installed.
    """
    # Fake CUDA tensors need a CUDA build; what is kept does not depend on the device.
    with FakeTensorMode():
        model = wan.build(preset, context, layers=1, dtype=torch.bfloat16, device="cpu")
        model.requires_grad_(train)
        if patched:
            prfl_fast.patch(model)
        x = torch.empty(1, preset.tokens, preset.dim, dtype=torch.bfloat16, requires_grad=True)
        text = torch.empty(1, preset.text_tokens, preset.dim, dtype=torch.bfloat16)
        rest = (text, torch.empty(1, 6, preset.dim), model.rope(torch.empty(1, 16, *preset.latent)))
        return saved_bytes(lambda: model.blocks[0](x, *rest), exclude=[x, *model.parameters()])


def measure(context: Context) -> tuple[Table, list[dict[str, Any]]]:
    """The table ``kept`` and its records.

    Raises:
        Unavailable: diffusers is not installed.
    """
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
