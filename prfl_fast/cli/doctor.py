"""Report versions, devices and the backend of every operation: ``prfl-fast doctor``."""

import importlib.util
import json
import platform
from importlib import metadata
from typing import Any

import torch

from prfl_fast.cli.doctor_ranks import print_ranks, report_ranks
from prfl_fast.cli.tables import print_table
from prfl_fast.kernels.attn.backend_choice import get_attention_backend
from prfl_fast.kernels.attn.backend_choice import report as attention_report
from prfl_fast.kernels.attn.rollout_choice import report as rollout_report
from prfl_fast.kernels.runtime import registry
from prfl_fast.kernels.runtime.extension import extension_reason
from prfl_fast.parallel.launch import join_ranks
from prfl_fast.utils.allocator_settings import EXPANDABLE, expandable_segments
from prfl_fast.utils.version import __version__

RANKS_TIMEOUT = 120.0  # seconds that a rank waits for the others
_PACKAGES = (
    "triton diffusers peft safetensors tqdm pydantic rich yaml tensorboard bitsandbytes torchao"
).split()
_ATTENTION = "flash_attn flash_attn_interface xformers sageattention sageattn3 cudnn".split()
# Distributions whose names differ from those of their modules.
_DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "cudnn": "nvidia-cudnn-frontend",
}


def _version_of(module: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ValueError:  # an entry in sys.modules without a spec
        return None
    try:
        return metadata.version(_DISTRIBUTIONS.get(module, module))
    except metadata.PackageNotFoundError:
        return "unknown version"


def report() -> dict[str, Any]:
    """Return the report of ``prfl-fast doctor`` as plain values."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count() if kind == "cuda" else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    operations = registry.report(kind, torch.bfloat16)
    return {
        "prfl_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version_of(name) for name in _PACKAGES},
        "attention": {name: _version_of(name) for name in _ATTENTION},
        "devices": [
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory_bytes": gpu.total_memory,
            }
            for gpu in gpus
        ],
        "expandable_segments": expandable_segments(),
        "cpu_threads": torch.get_num_threads(),
        "backend": registry.get_backend(),
        "extension": extension_reason(),
        "operations": {name: choice._asdict() for name, choice in operations.items()},
        "attention_backend": get_attention_backend(),
        "attention_backends": _verdicts(attention_report(kind)),
        "rollout_attention_backends": _verdicts(rollout_report(kind)),
    }


def _verdicts(reasons: dict[str, str | None]) -> dict[str, dict[str, Any]]:
    return {n: {"usable": reason is None, "reason": reason} for n, reason in reasons.items()}


def run_doctor(as_json: bool) -> int:
    """Print the report as text and tables or as one JSON object; return the exit code.

    Under torchrun rank 0 prints it, with a check of all ranks; the code is 1 if a collective gives
    a wrong result.
    """
    found = report()
    with join_ranks("cuda" if found["devices"] else "cpu", RANKS_TIMEOUT) as device:
        if device is not None:
            found["ranks"] = report_ranks(device)
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            _print(found)
            if device is not None:
                print_ranks(found["ranks"])
    return int(device is not None and bool(found["ranks"]["wrong_results"]))


def _print(found: dict[str, Any]) -> None:
    versions = f"Python {found['python']}, torch {found['torch']}, {found['platform']}"
    print(f"prfl_fast {found['prfl_fast']}, {versions}")
    for group in ("packages", "attention"):
        listed = (f"{name} {version or 'not installed'}" for name, version in found[group].items())
        print(f"{group}: {', '.join(listed)}")
    for device in found["devices"]:
        gib = device["memory_bytes"] / 2**30
        print(f"device: {device['name']}, capability {device['capability']}, {gib:.1f} GiB")
    if not found["devices"]:
        print(f"device: no CUDA device; CPU with {found['cpu_threads']} threads")
    if found["devices"] and not found["expandable_segments"]:
        print(f"allocator: set {EXPANDABLE}, which loses less memory to fragmentation")
    print(f"CUDA C++ extension: {found['extension']}")
    print(f"backend: {found['backend']}; for bfloat16 tensors on the device above:")
    rows = [(name, c["backend"], c["reason"]) for name, c in found["operations"].items()]
    print_table(rows, ("operation", "backend", "reason"))
    heads = "for bfloat16 heads of 128 on the device above, best first:"
    print(f"attention backend: {found['attention_backend']}; {heads}")
    _print_verdicts(found["attention_backends"])
    print(f"rollout attention, {heads}")
    usable = "usable" if found["devices"] else "usable, emulated by PyTorch"
    _print_verdicts(found["rollout_attention_backends"], usable)


def _print_verdicts(backends: dict[str, dict[str, Any]], usable: str = "usable") -> None:
    verdicts = [
        (name, usable if backend["usable"] else f"refused: {backend['reason']}")
        for name, backend in backends.items()
    ]
    print_table(verdicts, ("backend", "verdict"))
