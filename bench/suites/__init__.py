"""List the suites of ``bench/run.py``: modules with a function ``run(context) -> SuiteResult``."""

import importlib
from collections.abc import Callable

from harness import Context, SuiteResult

# Name → text of one line of --help. Suites without a star run by default.
DESCRIPTIONS = {
    "kernels": "fused operations against PyTorch: time, bandwidth, saved bytes",
    "block": "a transformer block and a PRFL step: eager, compiled, prfl_fast",
    "family": "* every way to train and to sample in the small world, at its cost",
    "memory": "peak and time of a PRFL step by memory policy; plans",
    "peers": "* memory methods of other libraries: bytes, copies, FLOPs, time",
    "alignment": "train a small generator and its reward model, compare methods",
    "methods": "* reward gradients by method: time, memory, FLOPs and variance",
    "rollout": "* a rollout by option: time, FLOPs, memory, drift; work by part",
    "calibrated-rollout": "* train in the small world, rollouts exact and calibrated",
    "plan": "* time of prfl-fast plan by workload and GPU, whole commands",
    "scale": "* a rank of 1 to 64 on fake tensors: bytes, communication, FLOPs",
    "host": "* host time and calls of operations and a tiny block, on one thread",
    "step": "* a PRFL step by part: the reference, eager, compiled, prfl_fast",
    "machine-code": "* predictions: share of the copy rate by kernel, without a GPU",
    "facts": "* rates of a GPU, for the planner: copies, products, attention",
}
EXPERIMENTS = ("alignment", "family", "calibrated-rollout")
DEFAULT = tuple(name for name, text in DESCRIPTIONS.items() if not text.startswith("*"))


def load(name: str) -> Callable[[Context], SuiteResult]:
    package = "experiments" if name in EXPERIMENTS else "suites"
    return importlib.import_module(f"{package}.{name.replace('-', '_')}").run
