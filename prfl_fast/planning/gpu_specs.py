"""Rates and memory of GPUs, for the planner's time estimate.

The presets serve to rank policies; no record under bench/results confirms them.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prfl_fast.utils.checks import check, check_choice, check_positive

# The H200 preset has the rates that this project's targets assume: 790 of the data sheet's 989
# TFLOP/s (dense, fp32 accumulation) in matrix products, 620 in attention, 4.3 of 4.8 TB/s in
# copies. The other presets are data-sheet figures times these fractions. Pinned copies are assumed
# to reach 0.8 of a PCIe x16 link's raw rate per direction.
_MATMUL, _ATTENTION, _COPY, _LINK = 790 / 989, 620 / 989, 4.3 / 4.8, 0.8
_GEN4, _GEN5 = 32e9, 64e9
# NVLink per direction: half of the data sheets' 600, 900 and 1800 GB/s. Collectives are assumed to
# reach 0.8 of it, as those of NCCL do for large messages.
_NVLINK3, _NVLINK4, _NVLINK5 = 0.8 * 300e9, 0.8 * 450e9, 0.8 * 900e9
# The backward of attention recomputes the scores and writes three gradients: published kernels for
# heads of 128 reach about 0.8 of the forward's rate. An eager operation takes about 10 µs of host
# time, Python and dispatcher included. Both are assumptions until a GPU has run the facts suite.
BACKWARD, LAUNCH = 0.8, 10e-6


@dataclass(frozen=True)
class GpuSpecs:
    """Rates and memory of one GPU and of its link to the host.

    Attributes:
        name: shown in reports.
        matmul, attention: rate of bf16 matrix products and of bf16 attention, FLOP/s.
        copy: device bytes read plus bytes written, per second.
        to_device, to_host: rates of pinned copies, bytes/s.
        memory: bytes that ``torch.cuda.get_device_properties`` reports.
        attention_backward: rate of the backward of attention, FLOP/s; 0 stands for ``BACKWARD``
            times the forward's rate.
        launch: seconds of host time per operation, a lower bound that matters for small models.
        peer: bytes/s that a GPU receives from the others of its machine in a collective; 0 stands
            for ``to_device``, as over PCIe.

    Raises:
        ValueError: if a rate or ``memory`` is not a positive number.
    """

    name: str
    matmul: float
    attention: float
    copy: float
    to_device: float
    to_host: float
    memory: int
    attention_backward: float = 0.0
    launch: float = LAUNCH
    peer: float = 0.0

    def __post_init__(self) -> None:
        if not self.peer:
            object.__setattr__(self, "peer", self.to_device)
        if not self.attention_backward:
            object.__setattr__(self, "attention_backward", BACKWARD * self.attention)
        for field in dataclasses.fields(self)[1:]:
            check_positive(f"{self.name}: {field.name}", getattr(self, field.name))

    @classmethod
    def from_record(cls, path: str | os.PathLike[str], memory: int) -> "GpuSpecs":
        """Read the rates from a ``results.json`` of ``bench/run.py --suite facts``.

        The record does not hold ``memory`` (bytes). The attention rates are those of the fastest
        backend at the largest size. Raise ``ValueError`` if the file lacks a rate.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            name, cases = record["run"]["device"]["name"], record["suites"]["facts"]["cases"]
            facts = {case["fact"]: case for case in cases}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a results.json of the facts suite. Run "
                "python bench/run.py --suite facts on the GPU"
            ) from error
        return cls(
            name,
            matmul=_rate(path, facts, "matmul bf16", "flops_per_s"),
            attention=_attention_rate(path, facts.values(), "forward"),
            attention_backward=_attention_rate(path, facts.values(), "backward"),
            copy=_rate(path, facts, "device copy", "bytes_per_s"),
            to_device=_rate(path, facts, "host to device", "bytes_per_s"),
            to_host=_rate(path, facts, "device to host", "bytes_per_s"),
            memory=memory,
        )


def _rate(path: Any, facts: Mapping[str, Any], start: str, key: str) -> float:
    for name, case in facts.items():
        if name.startswith(start) and key in case:
            return float(case[key])
    raise ValueError(f"{path}: the facts suite has no {key} of {start!r}. Run it on a GPU")


def _attention_rate(path: Any, cases: Iterable[Mapping[str, Any]], part: str) -> float:
    rates = [
        (case["tokens"] * case["heads"], case["flops_per_s"][part])
        for case in cases
        if case["fact"].startswith("attention") and part in case.get("flops_per_s", {})
    ]
    if not rates:
        raise ValueError(f"{path}: no attention backend ran in the facts suite. Run it on a GPU")
    return float(max(rates)[1])


def _from_data_sheet(
    name: str, teraflops: float, terabytes: float, link: float, gib: float, peer: float = 0.0
) -> GpuSpecs:
    return GpuSpecs(
        name,
        matmul=_MATMUL * teraflops * 1e12,
        attention=_ATTENTION * teraflops * 1e12,
        copy=_COPY * terabytes * 1e12,
        to_device=_LINK * link,
        to_host=_LINK * link,
        memory=int(gib * 2**30),
        peer=peer,
    )


# Memory is the total that PyTorch reports, which is less than the nominal size. The figures of the
# A100 40 GB, B200, H20, L4, RTX 3090 and A6000 are estimates that no card has confirmed.
GPUS = {
    # The targets' rates of copies, matrix products on random data and attention; a Gen5 x16 link.
    "h200": GpuSpecs(
        "h200",
        790e12,
        620e12,
        4.3e12,
        _LINK * _GEN5,
        _LINK * _GEN5,
        int(139.8 * 2**30),
        peer=_NVLINK4,
    ),
    # NVIDIA H100 data sheet, SXM: 989 TFLOP/s, 3.35 TB/s, Gen5.
    "h100": _from_data_sheet("h100", 989, 3.35, _GEN5, 79.1, _NVLINK4),
    # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOP/s, 2.039 TB/s, Gen4.
    "a100": _from_data_sheet("a100", 312, 2.039, _GEN4, 79.1, _NVLINK3),
    "a100-40gb": _from_data_sheet("a100-40gb", 312, 1.555, _GEN4, 39.4, _NVLINK3),
    # NVIDIA B200, DGX data sheet per GPU: 2250 TFLOP/s, 8 TB/s, Gen5.
    "b200": _from_data_sheet("b200", 2250, 8.0, _GEN5, 178.3, _NVLINK5),
    # NVIDIA H20: 148 TFLOP/s, 4.0 TB/s, Gen5.
    "h20": _from_data_sheet("h20", 148, 4.0, _GEN5, 95.0, _NVLINK4),
    # NVIDIA L40S data sheet: 362 TFLOP/s, 0.864 TB/s, Gen4.
    "l40s": _from_data_sheet("l40s", 362, 0.864, _GEN4, 44.4),
    # NVIDIA L4 data sheet: 121 TFLOP/s, 0.300 TB/s, Gen4.
    "l4": _from_data_sheet("l4", 121, 0.3, _GEN4, 22.0),
    # NVIDIA GA102 architecture paper: 71 TFLOP/s, 0.936 TB/s; RTX A6000: 154.8, 0.768; Gen4.
    "rtx3090": _from_data_sheet("rtx3090", 71, 0.936, _GEN4, 23.6),
    "a6000": _from_data_sheet("a6000", 154.8, 0.768, _GEN4, 47.4),
    # NVIDIA Ada GPU architecture paper: 165.2 TFLOP/s, 1.008 TB/s, Gen4.
    "rtx4090": _from_data_sheet("rtx4090", 165.2, 1.008, _GEN4, 23.5),
    # NVIDIA RTX Blackwell GPU architecture paper: 209.5 TFLOP/s, 1.792 TB/s, Gen5.
    "rtx5090": _from_data_sheet("rtx5090", 209.5, 1.792, _GEN5, 31.3),
}


def find_gpu(name: str | GpuSpecs) -> GpuSpecs:
    """Return the preset called ``name``; a :class:`GpuSpecs` is returned unchanged.

    Raise ``ValueError`` for a name that is not in ``GPUS``.
    """
    if isinstance(name, GpuSpecs):
        return name
    check_choice("gpu", name, GPUS)
    return GPUS[name]


def this_gpu(device: torch.device | str = "cuda") -> GpuSpecs:
    """Return the preset of a CUDA device, with the memory that the device reports.

    A device without a preset gets the A100's rates, and a name that says so. Raise ``ValueError``
    for a device that is not CUDA's.
    """
    device = torch.device(device)
    check(device.type == "cuda", "device", device, "a CUDA device; name a preset instead")
    properties = torch.cuda.get_device_properties(device)
    words = {*re.findall(r"[a-z0-9]+", properties.name.lower())}
    words |= {f"rtx{word}" for word in words}  # "RTX 4090"
    # The longest name first, because all words of "a100" are in "a100-40gb".
    keys = sorted(GPUS, key=len, reverse=True)
    preset = next((GPUS[key] for key in keys if {*key.split("-")} <= words), None)
    return dataclasses.replace(
        preset or GPUS["a100"],
        name=properties.name if preset else f"{properties.name} (at an A100's rates)",
        memory=properties.total_memory,
    )
