"""Rates of GPUs: presets, the device of this machine, and bench records."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from prfl_fast.planning.gpu_specs import GPUS, GpuSpecs, find_gpu, this_gpu


def test_the_device_at_hand(monkeypatch):
    found = {"name": "NVIDIA H100 80GB HBM3", "total_memory": 5}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**found))
    here = this_gpu("cuda")
    assert here == dataclasses.replace(GPUS["h100"], name=found["name"], memory=5)
    names = {"NVIDIA L40S": "l40s", "NVIDIA L4": "l4", "NVIDIA H200": "h200", "NVIDIA H20": "h20"}
    names |= {"NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA RTX A6000": "a6000"}
    names |= {"NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100-SXM4-80GB": "a100"}
    for found["name"], key in names.items():
        here = this_gpu("cuda")
        assert (here.matmul, here.copy) == (GPUS[key].matmul, GPUS[key].copy)
    for found["name"] in ("NVIDIA T4", "NVIDIA L40"):
        assert this_gpu("cuda").name == f"{found['name']} (at an A100's rates)"
        assert this_gpu("cuda").matmul == GPUS["a100"].matmul


def test_presets():
    h200 = find_gpu("h200")
    assert (h200.matmul, h200.attention, h200.copy) == (790e12, 620e12, 4.3e12)
    for name, preset in GPUS.items():
        assert preset.name == name and find_gpu(preset) is preset
        assert preset.attention < preset.matmul
    with pytest.raises(ValueError, match="expected a CUDA device"):
        this_gpu("cpu")
    with pytest.raises(ValueError, match="copy is 0"):
        GpuSpecs("m", 1, 1, 0, 1, 1, 1)


def record(*without):
    cases = [
        {"fact": "device copy, read + write", "bytes_per_s": 4e12},
        {"fact": "matmul bf16, 8192³", "flops_per_s": 7e14},
        {"fact": "host to device, pinned", "bytes_per_s": 5e10},
        {"fact": "device to host, pinned", "bytes_per_s": 4e10},
    ]
    for name, tokens, rate in (
        ("flash", 75600, 5e14),
        ("cuDNN", 75600, 6e14),
        ("flash", 32760, 9e14),
    ):
        rates = {"forward": rate, "backward": rate / 2}
        case = {"fact": f"attention {name}, x", "tokens": tokens, "heads": 40, "flops_per_s": rates}
        cases.append(case)
    cases.append({"fact": "attention efficient, x", "tokens": 75600, "heads": 40, "skipped": "no"})
    kept = [case for case in cases if not case["fact"].startswith(without)] if without else cases
    return {"run": {"device": {"name": "Some GPU"}}, "suites": {"facts": {"cases": kept}}}


def test_gpu_from_a_bench_record(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record()))
    found = GpuSpecs.from_record(path, 80 << 30)
    assert found == GpuSpecs("Some GPU", 7e14, 6e14, 4e12, 5e10, 4e10, 80 << 30, 3e14)
    for missing, message in (("matmul", "no flops_per_s of 'matmul bf16'"), ("attention", "ran")):
        path.write_text(json.dumps(record(missing)))
        with pytest.raises(ValueError, match=message):
            GpuSpecs.from_record(path, 80 << 30)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a results.json of the facts suite"):
        GpuSpecs.from_record(path, 80 << 30)
