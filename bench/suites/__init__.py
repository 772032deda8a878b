"""The suites of ``bench/run.py``. Each is a module with ``run(context) -> SuiteResult``, imported
when asked for.
"""

import importlib
from collections.abc import Callable

from harness import Context, SuiteResult

# Name → one line for --help. Those without a star run by default.
DESCRIPTIONS = {
    "kernels": "fused operations against plain PyTorch: time, bandwidth, bytes kept for backward",
    "block": "one transformer block and one PRFL step: unpatched, compiled, prfl_fast",
    "alignment": "train a small generator and its reward model, compare methods over training",
    "family": "* the small world again: every training method and every way to sample, at its cost",
    "memory": "* peak and time of a PRFL step by checkpoint policy, offload and weights; plans",
    "methods": "* reward gradients by method: time, memory, FLOPs and variance",
    "rollout": "* a rollout by option: time, FLOPs, memory, drift; a step's work by part",
    "step": "* a PRFL step by part, in seconds: the reference, eager, compiled, prfl_fast",
    "facts": "* what the GPU can do: copies, matrix products, attention backends, host copies",
}
DEFAULT = tuple(name for name, text in DESCRIPTIONS.items() if not text.startswith("*"))


def load(name: str) -> Callable[[Context], SuiteResult]:
    """The ``run`` function of a suite."""
    return importlib.import_module(f"suites.{name}").run
