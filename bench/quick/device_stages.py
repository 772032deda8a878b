"""Run the stages of single operations: env, warm, smoke, timing, attention and cuda."""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Preset, UnavailableError, relative_error
from suites import facts
from suites.kernel_checks import Case

import prfl_fast
from prfl_fast import kernels
from prfl_fast.kernels.runtime.registry import report
from quick.measure import (
    REAL,
    TINY,
    inputs,
    operations,
    sizes,
    smoke_cases,
    time_operation,
    timed,
    verify,
)
from quick.model_stages import no_diffusers
from quick.supervisor import SCRIPT
from quick.worker import Worker

BACKENDS = ("flash_attn_3 cudnn flash flash_attn_4 flash_attn_2 xformers efficient plain").split()
QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu",
    "clocks_event_reasons.active",
)


def tool_path(name: str) -> str | None:
    """Return the path of a CUDA tool: on PATH, or in the usual folders."""
    places = [shutil.which(name)]
    for pattern in (f"cuda*/bin/{name}", f"cuda*/compute-sanitizer/{name}"):
        places += sorted(map(str, Path("/usr/local").glob(pattern)), reverse=True)
    places += sorted(map(str, Path("/opt/nvidia").glob(f"nsight-compute/*/{name}")), reverse=True)
    return next((p for p in places if p and os.access(p, os.X_OK)), None)


def versions(worker: Worker) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "prfl_fast": prfl_fast.__version__}
    found["revision"] = os.environ.get("GPU_QUICK_REV")
    try:
        kernels.set_backend("cuda")
        found["extension"] = "loaded"
    except ValueError as reason:
        found["extension"] = str(reason)
    kernels.set_backend("auto")
    names = ("triton", "diffusers", "peft", "transformers", "flash-attn", "xformers")
    found |= harness.package_versions(names)
    found |= {t: bool(tool_path(t)) for t in ("nvcc", "ncu", "compute-sanitizer")}
    if worker.cuda:
        p = torch.cuda.get_device_properties(worker.device)
        found |= {"gpu": p.name, "sms": p.multi_processor_count, "l2_mb": p.L2_cache_size >> 20}
        found |= {"gib": p.total_memory / 2**30, "cudnn": torch.backends.cudnn.version()}
    choices = report(worker.device, worker.dtype)
    found["operations"] = {name: list(choice) for name, choice in choices.items()}
    return found


def clocks(worker: Worker) -> dict[str, Any]:
    if not shutil.which("nvidia-smi"):
        raise UnavailableError("no nvidia-smi")
    text = ""
    for fields in QUERY:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=15)
        text += run.stdout + run.stderr
    return {"nvidia_smi": text.strip()[-800:]}


def doctor(worker: Worker) -> dict[str, Any]:
    """Store the output of ``prfl-fast doctor``."""
    command = [sys.executable, "-m", "prfl_fast.cli", "doctor"]
    limit = max(5.0, min(25.0, worker.left()))
    run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    (worker.out / "doctor.txt").write_text(run.stdout + run.stderr)
    return {"status": run.returncode, "text": run.stdout[-6000:]}


def copy(worker: Worker) -> dict[str, Any]:
    """Measure the rate of a large copy: the ceiling of operations bound by memory."""
    count = 1 << (31 if worker.cuda and not worker.dry else 20)
    source = torch.empty(count, dtype=torch.uint8, device=worker.device).random_()
    target = torch.empty_like(source)
    record = timed(worker, [lambda: target.copy_(source)])
    return {"gbs": 2 * count / record["ms"] / 1e6, "ms": record["ms"]}


def product(worker: Worker) -> dict[str, Any]:
    side = side_of(worker)
    record = timed(worker, [facts.matmul(worker.device, side)])
    return {"tflops": 2 * side**3 / record["ms"] / 1e9, "ms": record["ms"]}


def product_fp8(worker: Worker) -> dict[str, Any]:
    """Measure a row-wise scaled FP8 product, with and without fast accumulation."""
    side = side_of(worker)
    record: dict[str, Any] = {}
    for name, fast in (("tflops", False), ("fast_accum_tflops", True)):
        try:
            run = facts.matmul_fp8(worker.device, side, fast)
            record[name] = 2 * side**3 / timed(worker, [run])["ms"] / 1e9
        except RuntimeError as error:
            record[name] = str(error).splitlines()[0][:200]
    return record


def side_of(worker: Worker) -> int:
    return facts.MATMUL if worker.cuda and not worker.dry else 128


def pinned(worker: Worker) -> dict[str, Any]:
    """Measure copies between pinned host memory and the device."""
    if not worker.cuda:
        raise UnavailableError("needs CUDA")
    count = 1 << (20 if worker.dry else 29)
    copies = facts.host_copies(worker.device, count).values()
    up, down = (count / timed(worker, [run], 0.2, 5)["ms"] / 1e6 for run in copies)
    return {"to_device_gbs": up, "to_host_gbs": down}


def stage_env(worker: Worker) -> None:
    """Record the machine, and the ceilings that later stages compare with."""
    cases = {"versions": versions, "copy": copy, "matmul bf16": product, "matmul fp8": product_fp8}
    for name, run in (cases | {"clocks": clocks, "pinned": pinned, "doctor": doctor}).items():
        worker.case(name, partial(run, worker))


def compile_all(worker: Worker) -> dict[str, Any]:
    """Compile the kernels of the smoke test into Triton's cache, on all cores at once."""
    count = max(1, min(8, (os.cpu_count() or 2) // 2))
    dry = ["--dry"] * worker.dry
    command = [sys.executable, SCRIPT, "--device", worker.device.type, *dry, "--probe"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([*command, f"warm:{i}:{count}"], **quiet) for i in range(count)]
    if "step" in worker.ends:  # the planner takes the CPU some seconds and writes its own line
        plan = ["--device", "cpu", "--out", str(worker.out), *dry, "--probe", "plan:"]
        subprocess.Popen([sys.executable, SCRIPT, *plan])
    why = no_diffusers()  # imports diffusers, which takes seconds, while the others compile
    status: list[Any] = []
    for process in started:
        try:
            status.append(process.wait(max(0.1, worker.left() - 1)))
        except subprocess.TimeoutExpired:
            process.kill()
            status.append("stopped")
    return {"processes": count, "status": status, "no_diffusers": why or None}


def stage_warm(worker: Worker) -> None:
    """Compile kernels ahead of the stages that measure."""
    if not worker.cuda:
        raise UnavailableError("a CPU compiles no kernels")
    worker.case("compile", partial(compile_all, worker), need=8)


def stage_smoke(worker: Worker) -> None:
    ops = operations()
    for label, op, preset, dtype in smoke_cases(worker.dry):
        worker.case(label, partial(verify, worker, ops[op], preset, dtype))


def against_eager(worker: Worker, case: Case, preset: Preset, part: str) -> dict[str, Any]:
    """Time an operation and its plain formula, and compare their outputs at the real size."""
    record = time_operation(worker, case, preset, part)

    def naive(tensors: dict[str, Any]) -> Any:
        return case.naive(tensors, torch.float32)

    try:
        record["eager_ms"] = time_operation(worker, case, preset, part, naive, 0.1)["ms"]
        if part == "forward" and case.tolerance is None and worker.left() > 1:
            tensors = inputs(worker, case, preset, worker.dtype)
            with torch.no_grad():
                ours, plain = case.decode(case.ours(tensors)), case.decode(naive(tensors))
            first = [o[0] if isinstance(o, tuple) else o for o in (ours, plain)]
            record["off_eager"] = relative_error(*first)
    except Exception as error:  # the operation's own time must not be lost with it
        record["eager_error"] = str(error)[:200]
    return record


def stage_timing(worker: Worker) -> None:
    """Time each operation but attention at real sizes."""
    for preset in sizes(worker):
        for name, case in operations().items():
            if "attention" in name:
                continue
            for part in ("forward", "backward")[: 2 if case.leaves else 1]:
                run = partial(against_eager, worker, case, preset, part)
                worker.case(f"{name} {part}, {preset.name}", run)


def attend(tensors: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.attention(*(tensors[n] for n in "qkv"), heads=int(tensors["heads"]))


def agreement(worker: Worker, name: str) -> dict[str, Any]:
    """Compare a backend's output, log-sum-exp and gradients with float64."""
    preset = TINY if worker.dry else REAL[1].with_grid(4, 16, 18)
    tensors = inputs(worker, operations()["attention"], preset, worker.dtype)

    def run(given: dict[str, Any]) -> list[torch.Tensor]:
        out, lse = attend(given)
        leaves = [given[n] for n in "qkv"]
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(1) / out.shape[1])
        return [out.detach(), lse.detach(), *gradients]

    try:
        kernels.set_attention_backend(name)
        ours = run(tensors)
    except ValueError as reason:
        raise UnavailableError(str(reason)) from reason
    wide = {n: t.detach().double().requires_grad_() for n, t in tensors.items() if n in "qkv"}
    kernels.set_backend("reference")  # until the case ends
    kernels.set_attention_backend("plain")
    exact, plain = run(wide | {"heads": tensors["heads"]}), run(tensors)
    errors = [relative_error(a, e) for a, e in zip(ours, exact, strict=True)]
    base = [relative_error(a, e) for a, e in zip(plain, exact, strict=True)]
    found = {"error": errors[0], "lse_error": errors[1], "gradient_error": max(errors[2:])}
    return found | {"plain": base}


def attention_speed(worker: Worker, name: str, preset: Preset) -> dict[str, Any]:
    kernels.set_attention_backend(name)
    case = operations()["attention"]
    forward = time_operation(worker, case, preset, "forward", seconds=0.5)
    backward = time_operation(worker, case, preset, "backward", seconds=0.8)
    return forward | {"backward_ms": backward["ms"], "backward_tflops": backward["tflops"]}


def rollout_speed(worker: Worker, preset: Preset) -> dict[str, Any]:
    """Time the 8-bit attention, and measure its error on even and on uneven channels."""
    case = operations()["rollout_attention"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tensors = inputs(worker, case, preset, torch.bfloat16)
        scale = torch.linspace(0.2, 3, preset.dim, device=worker.device).bfloat16()
        uneven = tensors | {n: tensors[n] * scale for n in "qk"}
        errors = [relative_error(case.ours(t), attend(t)[0]) for t in (tensors, uneven)]
        record = time_operation(worker, case, preset, "forward", seconds=0.5)
    messages = [str(w.message)[:160] for w in said]
    return record | {"error": errors[0], "error_uneven_channels": errors[1], "warned": messages}


def stage_attention(worker: Worker) -> None:
    """Check and time every attention backend, and the 8-bit one."""
    usable = [n for n in BACKENDS if worker.case(f"{n}: agreement", partial(agreement, worker, n))]
    real = ((1536, 480), (5120, 480), (1536, 720), (5120, 720))
    for dim, lines in ((64, 480),) if worker.dry else real:
        heads = 2 if worker.dry else dim // 128
        preset = TINY if worker.dry else REAL[2 if lines == 720 else 0]
        preset = replace(preset, dim=dim, heads=heads, ffn_dim=1)
        preset = replace(preset, name=f"{heads} heads, L {preset.tokens}")
        run = partial(rollout_speed, worker, preset)
        worker.case(f"rollout_attention, {preset.name}", run, need=3)
        for name in usable:
            slow = name == "plain" or (name in ("efficient", "xformers") and lines == 720)
            if worker.dry or not slow:
                speed = partial(attention_speed, worker, name, preset)
                worker.case(f"{name}, {preset.name}", speed, need=4 if lines == 480 else 8)


def triton_and_cuda(worker: Worker, case: Case, preset: Preset, part: str) -> dict[str, Any]:
    """Time both implementations of an operation and check the CUDA one."""
    record: dict[str, Any] = {}
    for name in ("triton", "cuda"):
        kernels.set_backend(name)
        t = time_operation(worker, case, preset, part)
        record |= {f"{name}_ms": t["ms"], f"{name}_percent": t.get("percent")}
    checked = verify(worker, case, preset.with_grid(3, 7, 59), torch.bfloat16)
    return record | {n: checked[n] for n in ("ok", "worst", "same_bits")}


def stage_cuda(worker: Worker) -> None:
    """Compare the CUDA C++ kernels with Triton's."""
    if not worker.cuda:
        raise UnavailableError("needs CUDA")
    with harness.backend("cuda"):  # or the stage is skipped
        pass
    for preset in sizes(worker)[:2]:
        for part in ("forward", "backward"):
            run = partial(triton_and_cuda, worker, operations()["query_pool"], preset, part)
            worker.case(f"query_pool {part}, {preset.name}", run)
