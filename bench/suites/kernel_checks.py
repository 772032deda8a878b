"""Define a case of an operation, draw its inputs, and compare its results with float64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Preset, relative_error

PASSES = ("forward", "backward", "both")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Draw:
    """Draw inputs of a size; ``randn(*shape)`` is seeded and in the activations' dtype."""

    preset: Preset
    randn: Callable[..., torch.Tensor]
    device: torch.device
    dtype: torch.dtype

    def tokens(self) -> torch.Tensor:
        return self.randn(1, self.preset.tokens, self.preset.dim)

    def param(self, *shape: int) -> torch.Tensor:
        return self.randn(*shape).float() * 0.1

    def latents(self) -> torch.Tensor:
        return self.randn(1, 16, *self.preset.latent).float()


@dataclass(frozen=True)
class Case:
    """Describe one operation at any size.

    Attributes:
        name: row of the table. op: registered name, decides which backends there are.
        make: draws the inputs.
        leaves: names of tensors that get a gradient.
        naive: ``(tensors, wide) -> outputs``; ``wide`` is the dtype of the formula's fp32 sites.
        ours: ``tensors -> outputs``.
        reads, kept: inputs that a forward and a backward must read; ``out0`` in ``kept`` is the
            first output.
        arithmetic: floating-point operations of a forward and a backward for each element of the
            first input read, counted in the formula (a square root, an exponential are one each).
        writes: inputs whose gradients a backward must write; ``leaves`` unless given.
        forward_flops: given if arithmetic bounds the operation; no bandwidth is reported then.
        passes: passes to time.
        decode: converts quantized outputs to those of the formula.
        tolerance: relative error allowed where quantized arithmetic cannot obey the twice rule.
    """

    name: str
    op: str
    make: Callable[[Draw], Tensors]
    leaves: tuple[str, ...]
    naive: Callable[[Tensors, torch.dtype], Any]
    ours: Callable[[Tensors], Any]
    reads: tuple[str, ...]
    kept: tuple[str, ...]
    arithmetic: tuple[int, int] = (0, 0)
    writes: tuple[str, ...] | None = None
    forward_flops: Callable[[Preset], float] | None = None
    naive_flops: Callable[[Preset], float] = lambda preset: 0.0
    passes: tuple[str, ...] = PASSES
    decode: Callable[[Any], Any] = lambda outputs: outputs
    tolerance: float | None = None

    @property
    def written(self) -> tuple[str, ...]:
        return self.leaves if self.writes is None else self.writes


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def draw_inputs(
    case: Case, preset: Preset, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    tensors = case.make(Draw(preset, randn, device, dtype))
    return {n: t.detach().requires_grad_(n in case.leaves) for n, t in tensors.items()}


def cotangents(outputs: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [
        torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(o.dtype)
        for o in outputs
    ]


def gradients(
    case: Case, outputs: Sequence[torch.Tensor], tensors: Tensors, given: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the leaves; the graph is kept."""
    leaves = [tensors[n] for n in case.leaves]
    return torch.autograd.grad(outputs, leaves, given, retain_graph=True) if leaves else ()


def results(
    case: Case, tensors: Tensors, run: Callable[[Tensors], Any], seed: int | list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return outputs and gradients, and the outputs' gradients: given, or drawn from a seed."""
    outputs = as_tuple(case.decode(run(tensors)))
    drawn = cotangents(outputs, seed) if isinstance(seed, int) else seed
    given = [c.to(o.dtype) for c, o in zip(drawn, outputs, strict=True)]
    return [*(o.detach() for o in outputs), *gradients(case, outputs, tensors, given)], given


def compare(
    case: Case, tensors: Tensors, dtype: torch.dtype, seed: int
) -> tuple[dict[str, tuple[float, float, float]], bool]:
    """Compare outputs and gradients with float64, beside the naive formula's in ``dtype``.

    Returns:
        By name, the error, the naive formula's error and what is allowed: twice that plus rounding.
        And if a second run gives the same bits.
    """
    ours, given = results(case, tensors, case.ours, seed)
    again, _ = results(case, tensors, case.ours, given)
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    del again
    plain, _ = results(case, tensors, lambda t: case.naive(t, torch.float32), given)
    wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in tensors.items()}
    wide = {n: t.requires_grad_(n in case.leaves) for n, t in wide.items()}
    exact, _ = results(case, wide, lambda t: case.naive(t, torch.float64), given)
    names = [f"output {i}" for i in range(len(ours) - len(case.leaves))]
    names += [f"gradient of {n}" for n in case.leaves]
    slack, found = 4 * torch.finfo(dtype).eps, {}
    for name, a, b, e in zip(names, ours, plain, exact, strict=True):
        error, base = relative_error(a, e), relative_error(b, e)
        allowed = 2 * base + slack if case.tolerance is None else case.tolerance
        found[name] = error, base, allowed
    return found, same


def moved_bytes(case: Case, preset: Preset, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that a forward and a backward must read and write, each tensor once."""
    meta = torch.device("meta")

    def randn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=meta, dtype=dtype)

    tensors = case.make(Draw(preset, randn, meta, dtype))
    outputs = as_tuple(case.ours(tensors))
    known = tensors | {"out0": outputs[0]}

    def nbytes(names: Sequence[str]) -> int:
        return sum(known[name].nbytes for name in names)

    written = sum(t.nbytes for t in outputs)
    moved = {"forward": nbytes(case.reads) + written}
    if case.leaves:
        moved["backward"] = nbytes(case.kept) + written + nbytes(case.written)
    return moved
