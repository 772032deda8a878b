"""Read adapters for rollouts: LoRA files of Wan, also with differences of parameters."""

import re
from pathlib import Path

import torch

from prfl_fast.models.lora_files import lora_file, parse_lora, without_prefix
from prfl_fast.models.rollout_adapter import AdapterFile, Change
from prfl_fast.models.wan_weights import find_layer, rename
from prfl_fast.utils.shards import read_state

# Differences beside LoRA in lightx2v's files: of a weight, a bias, and the modulation of a block.
_DIFFERENCE = re.compile(r"(.+)\.(diff|diff_b|diff_m)")


def read_adapter(path: str, scale: float) -> AdapterFile:
    """Read an adapter of Wan: a file of :func:`read_lora`, also with differences of parameters.

    Differences are keys that end in ``.diff``, ``.diff_b`` or ``.diff_m``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as :func:`read_lora`.
    """
    file = lora_file(Path(path))
    if file is None:
        raise FileNotFoundError(f"rollout adapter {path}: no such file, or no LoRA in it")
    found: dict[str, dict[str, torch.Tensor]] = {}
    others = {}
    for key, tensor in read_state(file).items():
        match = _DIFFERENCE.fullmatch(key)
        if match is None:
            others[key] = tensor
            continue
        module, _, part = _parameter(without_prefix(match[1]), match[2]).rpartition(".")
        found.setdefault(module, {})[part] = tensor
    lora = parse_lora(others, file) if others else {}
    names = dict.fromkeys([*lora, *found])
    changes = {name: Change(lora.get(name), found.get(name, {})) for name in names}
    return AdapterFile(file, scale, changes)


def _parameter(name: str, kind: str) -> str:
    """Return diffusers' name of the parameter that a difference in a file is added to."""
    if kind == "diff_m" or name.endswith(".modulation"):
        return rename(f"{name.removesuffix('.modulation')}.modulation", to_reference=False)
    part = "bias" if kind == "diff_b" else "weight"
    layer = find_layer(name)
    return rename(f"{name}.{part}", to_reference=False) if layer is None else f"{layer}.{part}"
