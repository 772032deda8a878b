"""Fixtures of the whole suite: interpreter mode without a GPU, poisoned ``torch.empty``, skip
reasons in words.
"""

import functools
import gc
import inspect
import os
import random
import sys
from collections import Counter, defaultdict

import pytest
import torch

# torch.device contexts list the functions they redirect at their first use, and would list poisoned
# ones.
with torch.device("meta"):
    torch.empty(0)

# Imports and collection make a million objects that stay. Looking for garbage among them takes 4 of
# 26 s, and so does each later search until they are frozen.
gc.disable()

# Tests kill processes, not the machine. To wait for its disk takes 4 ms a file.
os.fsync = lambda descriptor: None

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton decorates kernels for the interpreter only if this is set before prfl_fast.kernels is
    # imported.
    os.environ["TRITON_INTERPRET"] = "1"


import prfl_fast.kernels as kernels  # noqa: E402
from prfl_fast.kernels.runtime.registry import get_backend  # noqa: E402
from prfl_fast.kernels.runtime.triton import HAS_TRITON  # noqa: E402

if HAS_TRITON and not HAS_GPU:
    # For each call of a device function, Triton's interpreter looks through all members of its
    # language for the functions that it replaces: 70 % of the time of a test of a kernel.
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, *rest):
        for name in builtins_of(package):
            member = getattr(package, name)
            if is_builtin(member):  # not replaced yet
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin

# Cases of a test that the default tier runs in Triton's slow interpreter. Of the tests that
# operations share, in classes, it is the smoke test alone: their numbers are tested by each one's.
INTERPRETED = 1


def leave_cases_to_the_slow_tier(items):
    """Mark cases slow beyond the number of ``cases(n)``, or of those in Triton's interpreter."""
    tests = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("cases")
        interpreted = not HAS_GPU and item.get_closest_marker("triton")
        if mark or interpreted:
            shared = item.cls is not None and "gpu_smoke" not in item.keywords
            number = mark.args[0] if mark else 0 if shared else INTERPRETED
            tests[item.nodeid.partition("[")[0], number].append(item)
    for (name, number), cases in tests.items():
        # The same ones in every process of a run.
        for item in random.Random(name).sample(cases, max(0, len(cases) - number)):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    leave_cases_to_the_slow_tier(items)
    for item in items:
        if HAS_GPU and {"triton", "gpu_smoke"} & set(item.keywords):
            item.add_marker(pytest.mark.gpu)  # there the kernels run compiled: -m gpu takes them
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if {"triton", "aot"} & set(item.keywords) and not HAS_TRITON:
            item.add_marker(pytest.mark.skip(reason="needs triton"))
    leave_out_slow(config, items)


def leave_out_slow(config, items):
    """Deselect the slow tier unless ``-m`` names it: half of all cases, and a skip costs as much as
    a short test.
    """
    if "slow" not in (config.option.markexpr or ""):
        slow = [item for item in items if "slow" in item.keywords]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if "slow" not in item.keywords]


def pytest_collection_finish():
    gc.enable()
    gc.freeze()
    # Of what tests make, little is garbage in cycles, and modules that they import add a hundred
    # thousand objects each: the usual thresholds take 5 % of the time of all tests.
    gc.set_threshold(20_000, 10, 50)


def pytest_report_header():
    return "slow tier: pytest -m slow"


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    for reason, count in Counter(
        str(r.longrepr[2]).removeprefix("Skipped: ") for r in skipped
    ).most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


@pytest.fixture(autouse=True)
def _seed_and_backend():
    torch.manual_seed(0)
    backend = get_backend()
    yield
    kernels.set_backend(backend)


@pytest.fixture
def triton_backend():
    """Run the test on the Triton kernels: on the GPU, or in Triton's interpreter on CPU tensors."""
    if not HAS_TRITON:
        pytest.skip("needs triton")
    kernels.set_backend("triton")


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """Fill what ``torch.empty`` and friends return with NaN when prfl_fast asks, so unwritten
    outputs show.
    """

    new_empty = torch.Tensor.new_empty

    def poisoned(original):
        def make(*args, **kwargs):
            compiling = torch.compiler.is_compiling()
            if compiling and original is new_empty:  # dynamo cannot trace a method as a function
                return args[0].new_zeros(*args[1:], **kwargs)
            tensor = original(*args, **kwargs)
            if compiling:  # nor frames
                return tensor
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if (
                caller.startswith("prfl_fast")
                and tensor.is_floating_point()
                and tensor.device.type != "meta"
            ):
                if type(tensor) is torch.Tensor:
                    tensor.fill_(float("nan"))
            return tensor

        return make

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
