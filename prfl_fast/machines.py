"""What a GPU does per second, for the planner's time estimate: presets, a bench record, or the
device at hand.

Presets rank policies; no record under bench/results stands behind them. The H200's are the rates
this project's targets are set with. The others are data-sheet figures (dense, fp32 accumulation)
times the fractions these are of its own data sheet: 790 of 989 TFLOP/s in matrix products, 620 of
989 in attention, 4.3 of 4.8 TB/s in copies. Of a PCIe link's raw rate per direction (Gen5: 64 GB/s,
Gen4: 32 GB/s) pinned copies are taken to reach 0.8; the rest is headers and flow control.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_MATMUL, _ATTENTION, _COPY, _LINK = 790 / 989, 620 / 989, 4.3 / 4.8, 0.8
_GEN4, _GEN5 = 32e9, 64e9


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU with its host.

    Attributes:
        matmul: bf16 matrix products, FLOP/s.
        attention: bf16 attention, FLOP/s.
        copy: bytes read plus bytes written per second on the device.
        to_device, to_host: bytes per second of pinned copies.
        memory: bytes that ``torch.cuda.get_device_properties`` reports.

    Raises:
        ValueError: a rate or the memory is not positive.
    """

    name: str
    matmul: float
    attention: float
    copy: float
    to_device: float
    to_host: float
    memory: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"machine {self.name}: {field.name} is {value!r}, expected > 0")

    @classmethod
    def from_record(cls, path: str | os.PathLike[str], memory: int) -> "Machine":
        """The rates in a ``results.json`` of ``bench/run.py --suite facts``.

        Of the attention backends at the largest size the fastest forward counts.

        Args:
            memory: the GPU's memory in bytes, which the record does not hold.

        Raises:
            ValueError: the file is no such record, or a rate is missing from it.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            name, cases = record["run"]["device"]["name"], record["suites"]["facts"]["cases"]
            facts = {case["fact"]: case for case in cases}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a results.json with the facts suite; run "
                "python bench/run.py --suite facts on the machine"
            ) from error
        return cls(
            name,
            matmul=_rate(path, facts, "matmul bf16", "flops_per_s"),
            attention=_attention_rate(path, facts.values()),
            copy=_rate(path, facts, "device copy", "bytes_per_s"),
            to_device=_rate(path, facts, "host to device", "bytes_per_s"),
            to_host=_rate(path, facts, "device to host", "bytes_per_s"),
            memory=memory,
        )


def _rate(path: Any, facts: Mapping[str, Any], start: str, key: str) -> float:
    for name, case in facts.items():
        if name.startswith(start) and key in case:
            return float(case[key])
    raise ValueError(f"{path}: the facts suite has no {key} of {start!r}")


def _attention_rate(path: Any, cases: Iterable[Mapping[str, Any]]) -> float:
    rates = [
        (case["tokens"] * case["heads"], case["flops_per_s"]["forward"])
        for case in cases
        if case["fact"].startswith("attention") and "flops_per_s" in case
    ]
    if not rates:
        raise ValueError(f"{path}: no attention backend ran in the facts suite")
    return float(max(rates)[1])


def _from_data_sheet(
    name: str, teraflops: float, terabytes: float, link: float, gib: float
) -> Machine:
    return Machine(
        name,
        matmul=_MATMUL * teraflops * 1e12,
        attention=_ATTENTION * teraflops * 1e12,
        copy=_COPY * terabytes * 1e12,
        to_device=_LINK * link,
        to_host=_LINK * link,
        memory=int(gib * 2**30),
    )


# Memory is what the driver leaves of the nominal 141, 80, 48, 24 and 32 GB.
MACHINES = {
    # The targets' copy, matrix product on random data and attention. Link: data sheet, Gen5 x16.
    "h200": Machine(
        "h200", 790e12, 620e12, 4.3e12, _LINK * _GEN5, _LINK * _GEN5, int(139.8 * 2**30)
    ),
    # NVIDIA H100 data sheet, SXM: 989 TFLOP/s, 3.35 TB/s, Gen5.
    "h100": _from_data_sheet("h100", 989, 3.35, _GEN5, 79.1),
    # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOP/s, 2.039 TB/s, Gen4.
    "a100": _from_data_sheet("a100", 312, 2.039, _GEN4, 79.1),
    # NVIDIA L40S data sheet: 362 TFLOP/s, 0.864 TB/s, Gen4.
    "l40s": _from_data_sheet("l40s", 362, 0.864, _GEN4, 44.4),
    # NVIDIA Ada GPU architecture paper: 165.2 TFLOP/s, 1.008 TB/s, Gen4.
    "rtx4090": _from_data_sheet("rtx4090", 165.2, 1.008, _GEN4, 23.5),
    # NVIDIA RTX Blackwell GPU architecture paper: 209.5 TFLOP/s, 1.792 TB/s, Gen5.
    "rtx5090": _from_data_sheet("rtx5090", 209.5, 1.792, _GEN5, 31.3),
}


def machine(name: "str | Machine") -> Machine:
    """A preset by name; a :class:`Machine` is returned as it is.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(name, Machine):
        return name
    if name not in MACHINES:
        raise ValueError(f"machine is {name!r}, expected one of {', '.join(MACHINES)} or a Machine")
    return MACHINES[name]


def this_machine(device: torch.device | str = "cuda") -> Machine:
    """The preset whose name is in the CUDA device's, with the memory the device reports.

    A device without a preset gets the A100's rates, and its name says so: they rank the candidates.

    Raises:
        ValueError: not a CUDA device.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device is {device}, expected a CUDA device; name a machine instead")
    properties = torch.cuda.get_device_properties(device)
    spelled = properties.name.lower().replace(" ", "")
    known = next((m for name, m in MACHINES.items() if name in spelled), None)
    name = properties.name if known else f"{properties.name} (at an A100's rates)"
    rates = known or MACHINES["a100"]
    return dataclasses.replace(rates, name=name, memory=properties.total_memory)
