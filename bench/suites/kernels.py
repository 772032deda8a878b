"""Every operation of prfl_fast.kernels against plain PyTorch, forward, backward and both.

"Naive" is the formula as diffusers' Wan and its schedulers write it, in eager mode. An operation
whose result is off gets no speed-up: outputs and every gradient are compared with float64 on a
small grid (error at most twice the naive one's, plus rounding), and with the naive result at the
timed size.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import report
import torch
import torch.nn.functional as F
from harness import PRESETS, Context, Preset, SuiteResult, Table, Timing, Unavailable
from torch import nn
from torch.func import functional_call

from prfl_fast import kernels
from prfl_fast.modules import QueryAttentionPool

PASSES = ("forward", "backward", "both")
POOL_HEADS = 8
POOL_TARGET = 8  # times faster than nn.MultiheadAttention on a CPU at 1.3B-480p
EPS = 1e-6
# Wan2.2 gives the first frame another timestep than the rest: two rows of modulation.
TIME_ROWS = 2
UNIPC_TERMS = (0.9, -0.15, 0.3, -0.05)
CPU_FLOPS = 2e12  # a case above this would take a CPU the better part of a minute
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One operation at any size.

    Attributes:
        name: row of the table. op: registered name, decides which backends there are.
        make: ``(preset, randn, device, dtype) -> tensors``; ``randn(*shape)`` is seeded and in the
            activations' dtype.
        leaves: names of tensors that get a gradient.
        naive: ``(tensors, wide) -> outputs``; ``wide`` is the dtype of the formula's fp32 sites.
        ours: ``tensors -> outputs``.
        reads, kept: inputs that a forward and a backward must read; ``out0`` in ``kept`` is the
            first output.
        writes: inputs whose gradients a backward must write; ``leaves`` unless given.
        forward_flops: if the operation is bound by arithmetic; no bandwidth is reported then.
        passes: what is timed.
    """

    name: str
    op: str
    make: Callable[[Preset, Callable[..., torch.Tensor], torch.device, torch.dtype], Tensors]
    leaves: tuple[str, ...]
    naive: Callable[[Tensors, torch.dtype], Any]
    ours: Callable[[Tensors], Any]
    reads: tuple[str, ...]
    kept: tuple[str, ...]
    writes: tuple[str, ...] | None = None
    forward_flops: Callable[[Preset], float] | None = None
    naive_flops: Callable[[Preset], float] = lambda preset: 0.0
    passes: tuple[str, ...] = PASSES


def _tokens(preset: Preset, randn: Any) -> torch.Tensor:
    return randn(1, preset.tokens, preset.dim)


def _param(randn: Any, *shape: int) -> torch.Tensor:
    return randn(*shape).float() * 0.1


def _modulation(
    tensors: Tensors, wide: torch.dtype, rows: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Modulation vectors as diffusers computes them: table + time in fp32, expanded over tokens by
    broadcasting.
    """
    time_rows = tensors["time"] if rows is None else tensors["time"][rows[0].long()][None]
    summed = tensors["table"].to(wide) + time_rows.to(wide)  # [B, n, D] or [B, L, n, D]
    if rows is not None:
        return [part.squeeze(2) for part in summed.chunk(summed.shape[2], dim=2)]
    return list(summed.chunk(summed.shape[1], dim=1))


def _make_norm(preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype) -> Tensors:
    table = _param(randn, 2, preset.dim)
    return {"x": _tokens(preset, randn), "time": randn(1, 2, preset.dim), "table": table}


def _naive_norm(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    shift, scale = _modulation(t, wide, t.get("rows"))
    x = t["x"]
    return (F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS) * (1 + scale) + shift).type_as(x)


def _norm(t: Tensors) -> torch.Tensor:
    (shift, scale), (shift_table, scale_table) = t["time"].unbind(1), t["table"].unbind(0)
    return kernels.norm_modulate(
        t["x"],
        scale=scale,
        shift=shift,
        scale_table=scale_table,
        shift_table=shift_table,
        row_index=t.get("rows"),
        eps=EPS,
    )


def _make_norm_rows(
    preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype
) -> Tensors:
    frames = preset.grid[0]
    rows = torch.arange(preset.tokens, device=device) >= preset.tokens // frames
    tensors = _make_norm(preset, randn, device, dtype)
    return tensors | {"time": randn(TIME_ROWS, 2, preset.dim), "rows": rows[None].int()}


def _make_residual(preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype) -> Tensors:
    return {
        "x": _tokens(preset, randn),
        "y": _tokens(preset, randn),
        "time": randn(1, 3, preset.dim),
        "table": _param(randn, 3, preset.dim),
    }


def _naive_residual(t: Tensors, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gate, shift, scale = _modulation(t, wide)
    x = t["x"]
    x = (x.to(wide) + t["y"] * gate).type_as(x)
    return x, (F.layer_norm(x.to(wide), x.shape[-1:], eps=EPS) * (1 + scale) + shift).type_as(x)


def _residual(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    (gate, shift, scale), (gate_table, shift_table, scale_table) = (
        t["time"].unbind(1),
        t["table"].unbind(0),
    )
    return kernels.residual_norm_modulate(
        t["x"],
        t["y"],
        gate,
        gate_table=gate_table,
        scale=scale,
        shift=shift,
        scale_table=scale_table,
        shift_table=shift_table,
        eps=EPS,
    )


def _make_gated(preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype) -> Tensors:
    return {
        "x": _tokens(preset, randn),
        "y": _tokens(preset, randn),
        "time": randn(1, 1, preset.dim),
        "table": _param(randn, 1, preset.dim),
    }


def _naive_gated(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    (gate,) = _modulation(t, wide)
    return (t["x"].to(wide) + t["y"].to(wide) * gate).type_as(t["x"])


def _gated(t: Tensors) -> torch.Tensor:
    return kernels.gated_residual(t["x"], t["y"], t["time"][:, 0], gate_table=t["table"][0])


def _make_rope(preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype) -> Tensors:
    head_dim = preset.dim // preset.heads
    cos, sin = kernels.rope_table(max(preset.grid), head_dim, device=device)
    pairs = head_dim // 2
    parts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)

    def per_token(table: torch.Tensor) -> torch.Tensor:
        columns = []
        for axis, (part, side) in enumerate(zip(table.split(parts, 1), preset.grid, strict=True)):
            shape = [side if i == axis else 1 for i in range(3)]
            columns.append(part[:side].view(*shape, -1).expand(*preset.grid, -1))
        return torch.cat(columns, -1).reshape(1, preset.tokens, 1, pairs)

    return {
        "q": _tokens(preset, randn),
        "k": _tokens(preset, randn),
        "q_weight": 1 + _param(randn, preset.dim),
        "k_weight": 1 + _param(randn, preset.dim),
        "cos": cos,
        "sin": sin,
        # As in diffusers, made once a forward for all blocks, so not part of what is timed.
        "token_cos": per_token(cos),
        "token_sin": per_token(sin),
        "grid": torch.tensor(preset.grid),
        "heads": torch.tensor(preset.heads),
    }


def _naive_rope(t: Tensors, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
    outputs = []
    for name in ("q", "k"):
        x = t[name]
        x = F.rms_norm(x, x.shape[-1:], t[f"{name}_weight"].to(x.dtype), EPS).unflatten(
            2, (int(t["heads"]), -1)
        )
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = t["token_cos"].to(wide), t["token_sin"].to(wide)
        out = torch.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        outputs.append(out.flatten(2))
    return tuple(outputs)


def _rope(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.qk_norm_rope(
        t["q"],
        t["k"],
        t["q_weight"],
        t["k_weight"],
        heads=int(t["heads"]),
        cos=t["cos"],
        sin=t["sin"],
        grid=tuple(t["grid"].tolist()),
        eps=EPS,
    )


def _make_gelu(preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype) -> Tensors:
    return {"x": randn(1, preset.tokens, preset.ffn_dim), "bias": _param(randn, preset.ffn_dim)}


def _naive_gelu(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    return F.gelu(t["x"] + t["bias"].type_as(t["x"]), approximate="tanh")


def _make_attention(
    preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype
) -> Tensors:
    return {name: _tokens(preset, randn) for name in "qkv"} | {"heads": torch.tensor(preset.heads)}


def _naive_attention(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    q, k, v = (t[name].unflatten(2, (int(t["heads"]), -1)).transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _make_pool(preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype) -> Tensors:
    dim, gain = preset.dim, 10 / preset.dim**0.5
    return {
        "x": _tokens(preset, randn),
        "queries": _param(randn, 1, dim) * 10,
        "multihead_attn.in_proj_weight": _param(randn, 3 * dim, dim) * gain,
        "multihead_attn.in_proj_bias": _param(randn, 3 * dim),
        "multihead_attn.out_proj.weight": _param(randn, dim, dim) * gain,
        "multihead_attn.out_proj.bias": _param(randn, dim),
    }


def _naive_pool(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    x = t["x"]
    prefix = "multihead_attn."
    weights = {n.removeprefix(prefix): p.type_as(x) for n, p in t.items() if n.startswith(prefix)}
    with torch.device("meta"):
        module = nn.MultiheadAttention(x.shape[-1], POOL_HEADS, batch_first=True)
    query = t["queries"].type_as(x).expand(len(x), -1, -1)
    attended, _ = functional_call(module, weights, (query, x, x), {"need_weights": False})
    return (attended + query).mean(1)


def _pool(t: Tensors) -> torch.Tensor:
    with torch.device("meta"):
        module = QueryAttentionPool(t["x"].shape[-1], POOL_HEADS)
    return functional_call(module, {n: p for n, p in t.items() if n != "x"}, (t["x"],)).type_as(
        t["x"]
    )


_POOL_LEAVES = (
    "x",
    "queries",
    "multihead_attn.in_proj_weight",
    "multihead_attn.in_proj_bias",
    "multihead_attn.out_proj.weight",
    "multihead_attn.out_proj.bias",
)


def _latents(preset: Preset, randn: Any) -> torch.Tensor:
    return randn(1, 16, *preset.latent).float()


def _make_step(preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype) -> Tensors:
    return {name: _latents(preset, randn) for name in ("x", "velocity", "previous", "older")}


def _naive_step(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    terms = (
        c * t[n].to(wide)
        for c, n in zip(UNIPC_TERMS, ("x", "velocity", "previous", "older"), strict=True)
    )
    return sum(terms, torch.zeros((), dtype=wide, device=t["x"].device)).type_as(t["x"])


def _step(t: Tensors) -> torch.Tensor:
    return kernels.flow_step([t["x"], t["velocity"], t["previous"], t["older"]], list(UNIPC_TERMS))


def _make_loss(preset: Preset, randn: Any, device: torch.device, dtype: torch.dtype) -> Tensors:
    return {
        "velocity": _latents(preset, randn).to(dtype),
        "noise": _latents(preset, randn),
        "latents": _latents(preset, randn),
    }


def _naive_loss(t: Tensors, wide: torch.dtype) -> torch.Tensor:
    return F.mse_loss(t["velocity"].to(wide), (t["noise"] - t["latents"]).to(wide))


def _attention_flops(preset: Preset) -> float:
    return 4.0 * preset.tokens**2 * preset.dim


def _pool_flops(preset: Preset) -> float:
    return 12.0 * preset.tokens * preset.dim**2  # key and value projections, forward and backward


POOL = Case(
    "query_pool (vs nn.MultiheadAttention)",
    "query_pool",
    _make_pool,
    _POOL_LEAVES,
    _naive_pool,
    _pool,
    reads=("x",),
    kept=("x",),
    writes=("x",),
    naive_flops=_pool_flops,
)
CASES = (
    Case(
        "norm_modulate",
        "norm_modulate",
        _make_norm,
        ("x", "time", "table"),
        _naive_norm,
        _norm,
        reads=("x",),
        kept=("x",),
    ),
    Case(
        "norm_modulate, time per token",
        "norm_modulate",
        _make_norm_rows,
        ("x", "time", "table"),
        _naive_norm,
        _norm,
        reads=("x", "rows"),
        kept=("x", "rows"),
    ),
    Case(
        "residual_norm_modulate",
        "residual_norm_modulate",
        _make_residual,
        ("x", "y", "time", "table"),
        _naive_residual,
        _residual,
        reads=("x", "y"),
        kept=("out0", "y"),
    ),
    Case(
        "gated_residual",
        "gated_residual",
        _make_gated,
        ("x", "y", "time", "table"),
        _naive_gated,
        _gated,
        reads=("x", "y"),
        kept=("y",),
        writes=("y",),
    ),
    Case(
        "qk_norm_rope",
        "qk_norm_rope",
        _make_rope,
        ("q", "k", "q_weight", "k_weight"),
        _naive_rope,
        _rope,
        reads=("q", "k"),
        kept=("q", "k"),
    ),
    Case(
        "bias_gelu",
        "bias_gelu",
        _make_gelu,
        ("x", "bias"),
        _naive_gelu,
        lambda t: kernels.bias_gelu(t["x"], t["bias"]),
        reads=("x",),
        kept=("x",),
    ),
    Case(
        "attention",
        "attention",
        _make_attention,
        ("q", "k", "v"),
        _naive_attention,
        lambda t: kernels.attention(t["q"], t["k"], t["v"], heads=int(t["heads"]))[0],
        reads=("q", "k", "v"),
        kept=("q", "k", "v", "out0"),
        forward_flops=_attention_flops,
        naive_flops=lambda p: 3.5 * _attention_flops(p),
    ),
    POOL,
    Case(
        "flow_step, UniPC",
        "flow_step",
        _make_step,
        ("velocity",),
        _naive_step,
        _step,
        reads=("x", "velocity", "previous", "older"),
        kept=(),
    ),
    Case(
        "flow_loss",
        "flow_loss",
        _make_loss,
        ("velocity",),
        _naive_loss,
        lambda t: kernels.flow_loss(t["velocity"], t["noise"], t["latents"]),
        reads=("velocity", "noise", "latents"),
        kept=("velocity", "noise", "latents"),
    ),
)


def make_tensors(case: Case, preset: Preset, context: Context, offset: int = 0) -> Tensors:
    """Inputs of a case; leaves require a gradient."""
    generator = context.generator(offset)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=context.device, dtype=context.dtype)

    tensors = case.make(preset, randn, context.device, context.dtype)
    for name in case.leaves:
        tensors[name] = tensors[name].detach().requires_grad_()
    return tensors


def _tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _cotangents(outputs: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [
        torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(o.dtype)
        for o in outputs
    ]


def _gradients(
    case: Case, outputs: Sequence[torch.Tensor], tensors: Tensors, cotangents: Any
) -> Any:
    return torch.autograd.grad(
        outputs, [tensors[n] for n in case.leaves], cotangents, retain_graph=True
    )


def verify(case: Case, context: Context) -> float:
    """The worst relative error of outputs and gradients against float64, on a small grid.

    Raises:
        AssertionError: one error exceeds twice that of the naive formula plus rounding.
    """
    frames, height, width = (
        min(side, limit) for side, limit in zip(context.preset.grid, (3, 6, 10), strict=True)
    )
    preset = replace(context.preset, latent=(frames, 2 * height, 2 * width))
    tensors = make_tensors(case, preset, context)
    wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in tensors.items()}
    for name in case.leaves:
        wide[name].requires_grad_()
    oracle = _tuple(case.naive(wide, torch.float64))
    cotangents = _cotangents(_tuple(case.naive(tensors, torch.float32)), context.seed + 1)
    expected = [*oracle, *_gradients(case, oracle, wide, [c.double() for c in cotangents])]
    names = [f"output {i}" for i in range(len(oracle))] + [f"gradient of {n}" for n in case.leaves]
    found = []
    for run in (lambda: case.naive(tensors, torch.float32), lambda: case.ours(tensors)):
        outputs = _tuple(run())
        values = [*outputs, *_gradients(case, outputs, tensors, cotangents)]
        found.append([harness.relative_error(v, e) for v, e in zip(values, expected, strict=True)])
    slack = 4 * torch.finfo(context.dtype).eps
    for name, plain, error in zip(names, *found, strict=True):
        assert error <= 2 * plain + slack, f"{name}: error {error:.1e}, naive {plain:.1e}"
    return max(found[1])


def _nbytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def backends(case: Case, context: Context) -> list[str]:
    """Backends that have this operation for these tensors, the automatic choice last."""
    available = []
    # Triton's interpreter is for tests, not for timing.
    names = ("reference",) if context.device.type == "cpu" else ("reference", "triton", "cuda")
    for name in names:
        try:
            with harness.backend(name):
                if kernels.report(context.device, context.dtype)[case.op].backend == name:
                    available.append(name)
        except Unavailable:
            continue
    chosen = kernels.report(context.device, context.dtype)[case.op].backend
    return sorted(available, key=lambda name: name == chosen)


class Variant:
    """One implementation with its inputs: results of a first run, thunks of each pass."""

    def __init__(
        self, case: Case, run: Callable[[Tensors], Any], sets: list[Tensors], context: Context
    ) -> None:
        self.case, self.run, self.sets, self.context = case, run, sets, context
        start = time.perf_counter()
        first: list[tuple[torch.Tensor, ...]] = []
        parameters = [sets[0][n] for n in case.leaves if n not in case.reads and n not in case.kept]
        self.kept = harness.saved_bytes(
            lambda: first.append(_tuple(run(sets[0]))), exclude=parameters
        )
        self.outputs = first
        self.cotangents = _cotangents(first[0], context.seed + 1)
        self.gradients = _gradients(case, first[0], sets[0], self.cotangents)
        harness.synchronize(context.device)
        self.first = time.perf_counter() - start

    def results(self) -> list[torch.Tensor]:
        """Outputs and gradients of the first run."""
        return [*self.outputs[0], *self.gradients]

    def forget(self) -> None:
        """Free what the comparison needed."""
        del self.gradients
        if self.case.passes == ("both",):
            self.outputs.clear()

    def thunks(self, part: str) -> list[Callable[[], object]]:
        """One function per set of inputs that runs ``forward``, ``backward`` or ``both``."""
        case, run, cotangents = self.case, self.run, self.cotangents
        if part == "forward":
            return [lambda t=t: run(t) for t in self.sets]
        if part == "both":
            return [lambda t=t: _gradients(case, _tuple(run(t)), t, cotangents) for t in self.sets]
        self.outputs += [_tuple(run(t)) for t in self.sets[len(self.outputs) :]]
        return [
            lambda t=t, o=o: _gradients(case, o, t, cotangents)
            for t, o in zip(self.sets, self.outputs, strict=True)
        ]


def _compiled(case: Case) -> Callable[[Tensors], Any]:
    run = torch.compile(lambda t: case.naive(t, torch.float32), dynamic=False)

    def call(tensors: Tensors) -> Any:
        # The timed backward keeps its graph, which buffers donated to it would not survive.
        with torch._functorch.config.patch(donated_buffer=False):
            return run(tensors)

    return call


def _free_bytes(context: Context) -> int:
    if context.device.type == "cuda":
        return torch.cuda.mem_get_info(context.device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _check_fits(case: Case, preset: Preset, context: Context) -> None:
    """Raise ``Unavailable`` for a case that this machine cannot hold or finish."""
    widest = preset.ffn_dim if case.op == "bias_gelu" else preset.dim
    # Inputs, outputs, cotangents, gradients and the naive formula's fp32 temporaries, twice.
    need = 24 * preset.tokens * widest * 4
    free = _free_bytes(context)
    if need > free:
        raise Unavailable(f"needs about {report.size(need)}, {report.size(free)} are free")
    work = case.naive_flops(preset)
    if context.device.type == "cpu" and work > CPU_FLOPS:
        raise Unavailable(f"{report.flops(work)} for the baseline, minutes on a CPU")


def measure(
    case: Case, preset: Preset, context: Context, ceiling: float, seconds: float = 0.15
) -> dict[str, Any]:
    """Check and time one case; a record of plain values.

    Raises:
        Unavailable: it does not fit here. AssertionError: a check failed; the message says which.
    """
    _check_fits(case, preset, context)
    record: dict[str, Any] = {"case": case.name, "op": case.op, "preset": preset.name}
    record["error"] = verify(case, context)
    sets = [make_tensors(case, preset, context)]
    touched = [t for t in sets[0].values() if t.dim() > 1]
    record["shape"] = list(touched[0].shape)
    count = harness.input_sets(_nbytes(touched), context.device)
    if context.device.type == "cpu" and case.naive_flops(preset) > 1e10:
        count = 1  # arithmetic dominates, cold inputs would only cost memory
    sets += [make_tensors(case, preset, context, offset) for offset in range(1, count)]

    runs: dict[str, Callable[[Tensors], Any]] = {"naive": lambda t: case.naive(t, torch.float32)}
    if context.compile_ops:
        runs["compiled"] = _compiled(case)
    for name in backends(case, context):
        runs[f"prfl_fast {name}"] = lambda t, name=name: run_on(name, case, t)
    variants: dict[str, Variant] = {}
    for name, run in runs.items():
        try:
            variants[name] = Variant(case, run, sets, context)
        except Exception as error:
            if name != "compiled":
                raise
            record["compiled_error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    expected = variants["naive"].results()
    limit = TOLERANCE[context.dtype]
    for name, variant in variants.items():
        if name.startswith("prfl_fast"):
            for i, (value, want) in enumerate(zip(variant.results(), expected, strict=True)):
                off = harness.relative_error(value, want)
                assert off <= limit, (
                    f"{name}, result {i}: {off:.1e} off the naive one at the timed size"
                )
    outputs, gradients = (
        variants["naive"].outputs[0],
        dict(zip(case.leaves, variants["naive"].gradients, strict=True)),
    )
    known = sets[0] | {"out0": outputs[0]}
    written = case.leaves if case.writes is None else case.writes
    moved = {
        "forward": _nbytes([sets[0][n] for n in case.reads]) + _nbytes(outputs),
        "backward": _nbytes([known[n] for n in case.kept])
        + _nbytes(outputs)
        + _nbytes([gradients[n] for n in written]),
    }
    moved["both"] = moved["forward"] + moved["backward"]
    record["bytes"] = moved
    del expected, outputs, gradients, known
    record["kept_bytes"] = {name: variant.kept for name, variant in variants.items()}
    for variant in variants.values():
        variant.forget()
    if context.device.type == "cuda":
        record["peak_bytes"] = {
            name: harness.peak_bytes(variant.thunks("both")[0], context.device)
            for name, variant in variants.items()
        }
    record["times"] = {}
    for part in case.passes:
        slow = {n: v for n, v in variants.items() if part == "both" and v.first > 2}
        timings = {n: Timing.of([v.first]) for n, v in slow.items()}
        timings |= harness.time_side_by_side(
            {n: v.thunks(part) for n, v in variants.items() if n not in slow},
            context.device,
            seconds=seconds,
        )
        record["times"][part] = {name: timing.record() for name, timing in timings.items()}
    if case.forward_flops is not None:
        work = case.forward_flops(preset)
        record["flops"] = {"forward": work, "backward": 2.5 * work, "both": 3.5 * work}
    record["copy_ceiling"] = ceiling
    return record


def run_on(name: str, case: Case, tensors: Tensors) -> Any:
    """The case's outputs by one backend."""
    with harness.backend(name):
        return case.ours(tensors)


def _ours(times: dict[str, Any]) -> str:
    """The variant reported as prfl_fast: the automatic choice, which is measured last."""
    return [name for name in times if name.startswith("prfl_fast")][-1]


def rows(record: dict[str, Any], compiled: bool) -> list[list[str]]:
    """The table's rows of one measured case."""
    lines = []
    for part, times in record["times"].items():
        ours = _ours(times)
        naive, fast = times["naive"]["median_s"], times[ours]["median_s"]
        line = [
            record["case"] if part == next(iter(record["times"])) else "",
            part,
            report.seconds(naive),
        ]
        if compiled:
            line.append(
                report.seconds(times["compiled"]["median_s"] if "compiled" in times else None)
            )
        spread = f"{report.seconds(times[ours]['p20_s'])} … {report.seconds(times[ours]['p80_s'])}"
        line += [report.seconds(fast), spread, report.ratio(naive / fast)]
        if "flops" in record:
            line += [f"{record['flops'][part] / fast / 1e12:.3g} TFLOP/s", report.BLANK]
        else:
            rate = record["bytes"][part] / fast
            line += [f"{rate / 1e9:.3g} GB/s", f"{100 * rate / record['copy_ceiling']:.0f} %"]
        last = part == list(record["times"])[-1]
        kept, peak = record["kept_bytes"], record.get("peak_bytes")
        line += [report.size(kept["naive"]), report.size(kept[ours])] if last else ["", ""]
        if peak is not None:
            line += [report.size(peak["naive"]), report.size(peak[ours])] if last else ["", ""]
        line.append(f"{record['error']:.0e}" if last else "")
        lines.append(line)
    return lines


def run(context: Context) -> SuiteResult:
    """All cases at the preset; at the tiny one also the pooling at Wan2.1-1.3B's 480p size."""
    ceiling = harness.copy_ceiling(context.device)
    todo = [(case, context.preset) for case in CASES]
    large = PRESETS["wan1.3b-480p"]
    if context.preset.name == "tiny":
        name = f"query_pool, L = {large.tokens}, D = {large.dim}"
        todo.append((replace(POOL, name=name, passes=("both",)), large))
    cases: list[dict[str, Any]] = []
    problems, notes = [], []
    with context.bar(len(todo), "kernels") as bar:
        for case, preset in todo:
            bar.set_postfix_str(case.name)
            try:
                cases.append(measure(case, preset, replace(context, preset=preset), ceiling))
            except Unavailable as error:
                notes.append(f"{case.name}: skipped, {error}.")
                cases.append({"case": case.name, "skipped": str(error)})
            except AssertionError as error:
                problems.append(f"{case.name}: {error}")
                cases.append({"case": case.name, "failed": str(error)})
            bar.update()
    measured = [c for c in cases if "times" in c]
    compiled = any("compiled" in c["kept_bytes"] for c in measured)
    columns = [
        "operation",
        "pass",
        "naive",
        *(["compiled"] if compiled else []),
        "prfl_fast",
        "20 … 80 %",
        "speed-up",
    ]
    columns += ["rate", "of copy", "kept, naive", "kept, prfl_fast"]
    if any("peak_bytes" in c for c in measured):
        columns += ["peak, naive", "peak, prfl_fast"]
    columns.append("error")
    body = [line for c in measured for line in rows(c, compiled)]
    width = len(columns)
    body += [[c["case"], "check failed", *[""] * (width - 2)] for c in cases if "failed" in c]
    used = sorted({_ours(t).partition(" ")[2] for c in measured for t in c["times"].values()})
    plural = "s" if len(used) > 1 else ""
    preset = context.preset
    dtype = str(context.dtype).removeprefix("torch.")
    notes = [
        f"L = {preset.tokens}, D = {preset.dim}, {dtype}; prfl_fast runs its {', '.join(used)} "
        f"implementation{plural}. Medians; inputs come from memory, not from a cache.",
        "rate: bytes that must move (or FLOPs of attention) over time; of copy: against "
        f"{ceiling / 1e9:.3g} GB/s, read plus written, of a large copy in this run.",
        "kept: bytes held for the backward, each storage once, weights not counted; error: worst "
        "relative error of outputs and gradients against float64.",
        *notes,
    ]
    tables = [Table("kernels", "Operations against plain PyTorch", columns, body, notes)]
    pool = next(
        (c for c in measured if c["preset"] == large.name and c["op"] == "query_pool"), None
    )
    if pool is not None and context.device.type == "cpu":
        times = pool["times"]["both"]
        factor = times["naive"]["median_s"] / times[_ours(times)]["median_s"]
        tables[0].notes.append(
            f"Query pooling, L = {large.tokens}, D = {large.dim}, forward + backward: "
            f"{report.ratio(factor)} faster than nn.MultiheadAttention (target {POOL_TARGET}×)."
        )
    figures = {"kernels.png": _figure(measured, context)} if measured else {}
    return SuiteResult(tables, cases, figures, problems)


def _figure(measured: list[dict[str, Any]], context: Context) -> Any:
    figure, (left, right) = report.new_figure(11, 0.45 * len(measured) + 1.4, ncols=2, sharey=True)
    names = [c["case"] for c in measured]
    both = [c["times"]["both"] for c in measured]
    kinds = ["naive", *(["compiled"] if any("compiled" in t for t in both) else [])]
    times = {k: [t[k]["median_s"] * 1e3 if k in t else None for t in both] for k in kinds}
    times["prfl_fast"] = [t[_ours(t)]["median_s"] * 1e3 for t in both]
    speedups = [
        report.ratio(a / b) for a, b in zip(times["naive"], times["prfl_fast"], strict=True)
    ]
    labels = {k: [""] * len(names) for k in kinds} | {"prfl_fast": speedups}
    report.grouped_bars(
        left,
        names,
        times,
        title="Forward + backward (label: speed-up over naive)",
        unit="milliseconds",
        log=True,
        labels=labels,
    )
    kept = {k: [c["kept_bytes"].get(k, 0) / 1e6 for c in measured] for k in kinds}
    kept["prfl_fast"] = [
        c["kept_bytes"][_ours(t)] / 1e6 for c, t in zip(measured, both, strict=True)
    ]
    report.grouped_bars(
        right, names, kept, title="Kept for the backward", unit="megabytes", log=True
    )
    right.legend(fontsize=8, loc="upper right")
    preset = context.preset
    on = harness.device_name(context.device)
    figure.suptitle(f"Operations on {on}, L = {preset.tokens}, D = {preset.dim}", fontsize=11)
    return figure
