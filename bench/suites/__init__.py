"""List the suites of ``bench/run.py``: modules with a function ``run(context) -> SuiteResult``."""

import importlib
from collections.abc import Callable

from harness import Context, SuiteResult

# Name → one line for --help. Those without a star run by default.
DESCRIPTIONS = {
    "kernels": "fused operations against plain PyTorch: time, bandwidth, bytes kept for backward",
    "block": "one transformer block and one PRFL step: unpatched, compiled, prfl_fast",
    "family": "* the small world again: every training method and every way to sample, at its cost",
    "memory": "peak and time of a PRFL step by checkpoint policy, offload and weights; plans",
    "peers": "* memory methods of other libraries on one model: bytes, copies, FLOPs, time",
    "alignment": "train a small generator and its reward model, compare methods over training",
    "methods": "* reward gradients by method: time, memory, FLOPs and variance",
    "rollout": "* a rollout by option: time, FLOPs, memory, drift; work by part and by point",
    "calibrated-rollout": "* train in the small world with exact and with calibrated rollouts",
    "plan": "* time of prfl-fast plan by workload and GPU, whole commands; needs no GPU",
    "scale": "* a rank of 1 to 64 GPUs on fake tensors: bytes, communication, FLOPs",
    "host": "* host time and calls of operations and of a block at tiny sizes, on one CPU thread",
    "step": "* a PRFL step by part, in seconds: the reference, eager, compiled, prfl_fast",
    "machine-code": "* predictions: share of the copy rate by kernel, replayed without a GPU",
    "facts": "* rates of a GPU, for the planner: copies, products, attention backends, host copies",
}
EXPERIMENTS = ("alignment", "family", "calibrated-rollout")
DEFAULT = tuple(name for name, text in DESCRIPTIONS.items() if not text.startswith("*"))


def load(name: str) -> Callable[[Context], SuiteResult]:
    package = "experiments" if name in EXPERIMENTS else "suites"
    return importlib.import_module(f"{package}.{name.replace('-', '_')}").run
