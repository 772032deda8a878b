"""Measure time, memory and FLOPs, and record results: shared by all suites."""

import contextlib
import gc
import importlib.metadata
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prfl_fast import __version__, kernels
from prfl_fast.kernels.runtime.registry import get_backend
from prfl_fast.memory.ledger import Ledger, storage_of
from prfl_fast.utils.flops import flop_counter

ROOT = Path(__file__).resolve().parents[1]
FORMAT = "prfl_fast bench 1"

CACHE_BYTES = 64 << 20  # at least the last-level cache of common CPUs and of an H200 (60 MB)
# Seconds. GPU work below this is queued behind a pause, so that launches are not timed.
SHORT = 2e-3


class UnavailableError(RuntimeError):
    """Say that a measurement is impossible here; the message is the reason in one line."""


@dataclass(frozen=True)
class Preset:
    """Hold sizes of a Wan model. ``latent``: latent frames, height, width; patches are 1×2×2."""

    name: str
    dim: int
    heads: int
    ffn_dim: int
    layers: int
    latent: tuple[int, int, int]
    text_tokens: int = 512
    text_dim: int = 4096

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return frames, height and width in tokens."""
        frames, height, width = self.latent
        return frames, height // 2, width // 2

    @property
    def config(self) -> dict[str, int]:
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.dim // self.heads,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.layers,
            "text_dim": self.text_dim,
        }

    def with_grid(self, frames: int, height: int, width: int) -> "Preset":
        return replace(self, latent=(frames, 2 * height, 2 * width))

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width


PRESETS = {
    p.name: p
    for p in (
        Preset("tiny", 256, 4, 1024, 4, (5, 24, 40), text_tokens=128, text_dim=64),
        Preset("wan1.3b-480p", 1536, 12, 8960, 30, (21, 60, 104)),
        Preset("wan14b-480p", 5120, 40, 13824, 40, (21, 60, 104)),
        Preset("wan14b-720p", 5120, 40, 13824, 40, (21, 90, 160)),
    )
}


@dataclass
class Context:
    """Hold the settings of a run, passed to every suite.

    Attributes:
        device, preset, seed, seeds: as given on the command line, or their defaults.
        preset_given: True if the command line named the preset; no other is measured then.
        baselines: of ``eager``, ``compiled``, ``reference``.
        reference: the checkout of HY-Video-PRFL if ``reference`` is a baseline.
        compile_ops: also compile each naive operation of the kernels suite; seconds each on a CPU.
        out: folder of the results.
        bar: makes a progress bar, ``bar(total, description)``.
        set_dtype: dtype in place of the device's own; None keeps that.
    """

    device: torch.device
    preset: Preset
    seed: int = 0
    seeds: int = 1
    baselines: tuple[str, ...] = ("eager", "compiled")
    reference: Path | None = None
    compile_ops: bool = False
    out: Path = Path("bench-out")
    preset_given: bool = False
    bar: Callable[[int, str], Any] = lambda total, description: contextlib.nullcontext(NoBar())
    set_dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations and weights: bfloat16 on CUDA, float32 on the CPU."""
        if self.set_dtype is not None:
            return self.set_dtype
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def refuse_large(self, hours: str = "takes hours") -> None:
        """Raise ``UnavailableError`` on a CPU for a preset that it cannot run."""
        if self.device.type == "cpu" and self.preset.name != "tiny":
            name = self.preset.name
            raise UnavailableError(f"{name} on a CPU {hours}; use --preset tiny, or a GPU")

    def each(
        self, items: Iterable[Any], label: str, name: Callable[[Any], str] = str
    ) -> Iterator[Any]:
        """Yield items under a progress bar that shows the name of the current one."""
        items = list(items)
        with self.bar(len(items), label) as bar:
            for item in items:
                bar.set_postfix_str(name(item))
                yield item
                bar.update()

    def generator(self, offset: int = 0) -> torch.Generator:
        """Return a generator on the device, seeded by the run's seed."""
        return torch.Generator(self.device).manual_seed(self.seed + offset)


class NoBar:
    """Replace a progress bar and show nothing."""

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


@dataclass
class Table:
    """Hold rows of formatted cells; markers in RESULTS.md refer to ``name``."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass
class SuiteResult:
    """Hold the results of a suite.

    Attributes:
        tables: for the terminal, report.md and RESULTS.md.
        cases: every measurement as plain JSON values (seconds, bytes, FLOPs; no units hidden in
            strings).
        figures: file name (without folder) → matplotlib figure, see :func:`report.new_figure`.
        problems: checks that failed, one line each; the run ends with exit status 1 if there are
            any.
    """

    tables: list[Table]
    cases: list[dict[str, Any]]
    figures: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """Hold the median, 20th and 80th percentile of seconds over ``runs`` runs."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        ordered = sorted(seconds)
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
        return cls(statistics.median(ordered), low, high, len(ordered))

    def record(self) -> dict[str, float | int]:
        return {"median_s": self.median, "p20_s": self.p20, "p80_s": self.p80, "runs": self.runs}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Thunk = Callable[[], object]


def time_side_by_side(
    candidates: Mapping[str, Sequence[Thunk] | Thunk],
    device: torch.device,
    *,
    seconds: float = 0.3,
    at_least: int = 5,
    at_most: int = 200,
) -> dict[str, Timing]:
    """Time versions of the same work in turns, so that drift of the machine affects all alike.

    Args:
        candidates: name → a function, or several that do the same work on different inputs and are
            taken in turn, so that no run finds its inputs in a cache.
        seconds: time given to each candidate, warm-up not counted.
        at_least, at_most: rounds. One that takes longer than ``seconds`` in its first, untimed run
            gets two rounds, and a single one if it takes over five times as long; then that first
            run counts too.

    Returns:
        Timings by name. On CUDA the device's own events are read, and work below 2 ms is queued
        behind a short pause first, so that gaps between launches are not counted.
    """
    lists = {name: [c] if callable(c) else list(c) for name, c in candidates.items()}
    clock = _cuda_clock if device.type == "cuda" else _host_clock
    samples: dict[str, list[float]] = {name: [] for name in lists}
    first = {name: clock(thunks[0], device, 0.0) for name, thunks in lists.items()}
    rounds = dict.fromkeys(lists, at_most)
    for name, duration in first.items():
        if duration > 5 * seconds and duration > 2:
            samples[name], rounds[name] = [duration], 1
        elif duration > seconds:
            rounds[name] = 2
    spent = dict.fromkeys(lists, 0.0)
    for i in range(at_most):
        due = (n for n in lists if i < rounds[n])
        active = [n for n in due if spent[n] < seconds or i < min(at_least, rounds[n])]
        if not active:
            break
        for name in active if i % 2 == 0 else reversed(active):
            thunks = lists[name]
            duration = clock(thunks[(i + 1) % len(thunks)], device, first[name])
            samples[name].append(duration)
            spent[name] += duration
            first[name] = min(first[name], duration)
    return {name: Timing.of(values) for name, values in samples.items()}


def _host_clock(thunk: Thunk, device: torch.device, expected: float) -> float:
    start = time.perf_counter()
    result = thunk()
    duration = time.perf_counter() - start
    del result
    return duration


def _cuda_clock(thunk: Thunk, device: torch.device, expected: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if expected < SHORT:
        # Clock cycles, about 1 ms: the host queues everything meanwhile.
        torch.cuda._sleep(2_000_000)
    start.record()
    result = thunk()
    end.record()
    torch.cuda.synchronize(device)
    del result
    return start.elapsed_time(end) / 1e3


def input_sets(nbytes: int, device: torch.device, limit: int = 24) -> int:
    """Return how many sets of ``nbytes`` of inputs must take turns to be read from memory."""
    cache = CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(limit, -(-2 * cache // max(1, nbytes))))


def copy_ceiling(device: torch.device) -> float:
    """Return bytes per second, read plus written, of a copy far larger than the caches."""
    count = (1 << 31) if device.type == "cuda" else (1 << 27)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = time_side_by_side({"copy": lambda: target.copy_(source)}, device, seconds=0.2)["copy"]
    return 2 * count / timing.median


def saved_bytes(forward: Thunk, exclude: Iterable[torch.Tensor] = ()) -> int:
    """Return bytes that autograd saves in ``forward()``, each storage once, without ``exclude``."""
    skip = {t.untyped_storage()._cdata for t in exclude}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_of(tensor)
        if storage is not None and storage._cdata not in skip:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def peak_bytes(thunk: Thunk, device: torch.device, *, empty_cache: bool = True) -> int:
    """Return the peak of the bytes that ``thunk()`` allocates.

    CUDA's allocator counts them on a GPU, the ledger on a CPU. If memory runs out on a GPU, raise
    ``UnavailableError``. Pass ``empty_cache=False`` if ``thunk`` is timed: CUDA's cached memory is
    not freed before it, so that it needs none from the driver.
    """
    gc.collect()
    if device.type != "cuda":
        with Ledger(open_operations=True) as ledger:
            thunk()
        return ledger.peak
    if empty_cache:
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        thunk()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise UnavailableError("out of memory") from error
    return torch.cuda.max_memory_allocated(device) - before


def count_flops(thunk: Thunk) -> int:
    """Return FLOPs of the matrix products, convolutions and attention in ``thunk()``."""
    with flop_counter() as counter:
        thunk()
    return counter.get_total_flops()


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖out - expected‖ / ‖expected‖; infinity if a value is not finite."""
    wide = torch.float64 if out.numel() <= 1 << 26 else torch.float32
    out, expected = out.detach().to(wide), expected.detach().to(wide)
    norm = expected.norm().item()
    error = (out - expected).norm().item()
    if norm == 0:
        return error
    return error / norm if error == error else float("inf")


@contextlib.contextmanager
def recorded_skip(record: dict[str, Any]) -> Iterator[None]:
    """Store why a measurement is impossible here, or ran out of memory, under ``skipped``."""
    try:
        yield
    except torch.OutOfMemoryError:
        record["skipped"] = "out of memory"
    except UnavailableError as error:
        record["skipped"] = str(error)


def first_line(error: BaseException) -> str:
    """Return kind and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run with another kernel backend; raise ``UnavailableError`` if it is not installed."""
    before = get_backend()
    try:
        kernels.set_backend(name)
    except ValueError as error:
        raise UnavailableError(str(error)) from error
    try:
        yield
    finally:
        kernels.set_backend(before)


def device_name(device: torch.device) -> str:
    """Return the processor's name as its vendor writes it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_slug(device: torch.device) -> str:
    """Return the folder under ``bench/results``: ``cpu-2core``, ``h200``."""
    if device.type == "cpu":
        return f"cpu-{len(os.sched_getaffinity(0))}core"
    words = device_name(device).lower().replace("nvidia", "").replace("geforce", "").split()
    return "-".join(words)


def git_state() -> dict[str, Any]:
    """Return the commit and if tracked files differ; outside a checkout the package's version."""

    def git(*words: str) -> str | None:
        with contextlib.suppress(OSError):
            run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
            if run.returncode == 0:
                return run.stdout.strip()
        return None

    sha = git("rev-parse", "HEAD")
    if sha is None:
        return {"sha": __version__.partition("+g")[2] or __version__, "dirty": None}
    return {"sha": sha, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def run_record(context: Context, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the data that repeats a run: commit, versions, command, date, device, seed.

    The command is without ``--out``, a folder of one machine that decides no number.
    """
    argv = [*(sys.argv if argv is None else argv)]
    if "--out" in argv:
        place = argv.index("--out")
        del argv[place : place + 2]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["prfl_fast"] = __version__
    versions |= package_versions(("triton", "diffusers", "peft", "numpy", "flash-attn"))
    if context.device.type == "cuda":
        versions["cuda"] = torch.version.cuda
    return {
        "format": FORMAT,
        "git": git_state(),
        "versions": dict(sorted(versions.items())),
        "command": shlex.join(["python", *argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "device": {
            "type": context.device.type,
            "name": device_name(context.device),
            "slug": device_slug(context.device),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
        },
        "seed": context.seed,
        "preset": context.preset.name,
        "dtype": str(context.dtype).removeprefix("torch."),
    }
