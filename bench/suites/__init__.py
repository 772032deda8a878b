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
    "methods": "RGB ReFL and PRFL: time, memory and FLOPs per gradient point",
    "alignment": "train a small generator and its reward model, compare methods over training",
    "memory": "* peak and time of a PRFL step by checkpoint policy, offload and weights; plans",
    "facts": "* what the GPU can do: copies, matrix products, attention backends, host copies",
}
DEFAULT = tuple(name for name, text in DESCRIPTIONS.items() if not text.startswith("*"))


def load(name: str) -> Callable[[Context], SuiteResult]:
    """The ``run`` function of a suite."""
    return importlib.import_module(f"suites.{name}").run
