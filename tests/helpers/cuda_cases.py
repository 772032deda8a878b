"""Inputs, references and comparisons of the tests of the CUDA C++ kernels on the CPU."""

from types import SimpleNamespace

import cuda_on_cpu as emulated
import torch
from numerics import assert_within_twice
from op_checks import run
from plain_torch import wide

from prfl_fast.kernels.runtime import cuda_launch

OPS = ("query_pool", "query_pool_backward")


def install(patch, libraries, capability, multiprocessors, order=0):
    """Set ``torch.ops.prfl_fast_cuda`` to the emulation; return the list of launches it fills."""
    launches = []

    def operator(name):
        def run(*arguments):
            launches.append(arguments[-4:])
            return getattr(emulated, name)(libraries(name), *arguments, order=order)

        return run

    patch.setattr(cuda_launch, "capability", lambda device: capability)
    patch.setattr(cuda_launch, "multiprocessors", lambda capability: multiprocessors)
    namespace = SimpleNamespace(**{name: operator(name) for name in OPS})
    patch.setattr(torch.ops, "prfl_fast_cuda", namespace, raising=False)
    return launches


def within(x):
    """Return ``x`` with NaN on all sides, so that reads out of bounds show."""
    return torch.nn.functional.pad(x, (8, 8, 1, 1), value=float("nan"))[:, 1:-1, 8:-8]


def assert_all_within_twice(ours, plain, oracle, **options):
    for triple in zip(ours, plain, oracle, strict=True):
        assert_within_twice(*triple, **options)


def assert_notices(outcomes, expected):
    """Assert that some order of threads gives an error of a fiftieth of the largest value."""
    errors = [
        [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(out, expected, strict=True)]
        for out in outcomes
    ]
    assert not all(error < 0.02 for out in errors for error in out), errors


def attention(x, queries):
    """Compute attention in 16 bits: scores, weights and sums rounded to x's dtype."""
    scores = x @ queries.to(x.dtype).t()
    pooled = torch.softmax(scores, dim=1).transpose(1, 2) @ x
    return wide(pooled), wide(torch.logsumexp(scores, dim=1))


def make_pool(batch, tokens, dim, heads, dtype):
    x = torch.randn(batch, tokens, dim).to(dtype)
    return within(x), 3 * torch.randn(heads, dim) / dim**0.5


def pool_gradients(x, queries, grads):
    """Return d_x and d_queries of :func:`attention`; each incoming gradient may be None."""
    return tuple(run(attention, {"x": x, "queries": queries}, grads)[1].values())


def pool_backward(x, queries, grads, need_x=True, need_queries=True):
    """Run the kernel's backward from the exact pooled and lse, rounded as the forward rounds."""
    pooled, lse = (t.float() for t in attention(x.double(), queries.double()))
    return cuda_launch.query_pool_backward(*grads, x, queries, pooled, lse, need_x, need_queries)
