"""Define ahead-of-time compile cases of every operation with a Triton kernel.

A function ``cases(capability, every)`` yields the specializations of an operation's kernels: the
ones that Wan runs at 480p, and with ``every`` all combinations of flags. :data:`OPERATIONS` lists
the functions; ``aot.py`` compiles what they yield.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from aot_types import AotCase, argument_types, element_types, flags_of, part_of

from prfl_fast.kernels.attn import norm_rope, pool, quantize_kv, rollout, sparse, sparse_triton
from prfl_fast.kernels.attn.rollout_variants import VARIANTS, choose_variant
from prfl_fast.kernels.common import fp8
from prfl_fast.kernels.flow import loss, step
from prfl_fast.kernels.linear import gelu
from prfl_fast.kernels.norm import modulate_triton, residual, residual_modulate_triton, rms
from prfl_fast.kernels.norm.modulate import KINDS

TOKENS, ELEMENTS = 32760, 2**22  # of a Wan video at 480p; of its latents, about
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}
DIMS, DTYPES, HALVES = (1536, 5120, 8192), ("bf16", "fp32"), ("bf16", "fp16", "fp32")
OPTIONAL = ("", "bf16", "fp32")  # dtypes of a parameter that may be missing
ROWS = ("scale_ptr", "shift_ptr", "scale_table_ptr", "shift_table_ptr")
AFFINE, GATE = ("weight_ptr", "bias_ptr"), ("gate_ptr", "gate_table_ptr")
INDEX, BOTH = ("row_index_ptr", "order_ptr", "bounds_ptr"), ("dx_ptr", "partial_ptr")
Capability = tuple[int, int]
OPERATIONS: dict[str, Callable[[Capability, bool], list[AotCase]]] = {}


def operation(cases: Callable[[Capability, bool], Iterator[AotCase]]) -> Callable[..., object]:
    """List a generator ``OPERATION_cases``, of whose cases with one label the last counts."""

    def by_label(capability: Capability, every: bool) -> list[AotCase]:
        return list({case.label: case for case in cases(capability, every)}.values())

    OPERATIONS[cases.__name__.removesuffix("_cases")] = by_label
    return cases


def _lengths(axes: str, indexed: bool = False) -> dict[str, str | None]:
    """Return types of ``length_*``: given for rows with an index, otherwise None."""
    return {f"length_{axis}": "i32" if indexed else None for axis in axes}


# Norms. With ``every``: all flags, D to 8192.


@operation
def norm_modulate_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the kernels of Wan 1.3B, 5B and 14B at 480p."""
    dx, sums = ("dx_ptr",), ("dot_ptr", "total_ptr")
    givens = ((), AFFINE, ROWS, ROWS + AFFINE, ROWS + INDEX)
    wan = [
        (1536, "bf16", "layer", ROWS, dx + sums),
        (3072, "bf16", "layer", ROWS + INDEX, dx + sums),
        (5120, "bf16", "layer", ROWS, dx + sums),
        (5120, "bf16", "layer", AFFINE, dx + sums),
        (5120, "fp32", "layer", ROWS, dx + sums),
    ]
    chosen = product(DIMS, DTYPES, KINDS, givens, (dx, sums, dx + sums)) if every else wan
    for dim, dtype, kind, given, results in chosen:
        pointers = element_types(dtype, "x_ptr", "y_ptr", "grad_ptr", *given, *results)
        lengths = _lengths("x", given == ROWS + INDEX) | _lengths("g")
        size = (TOKENS, 1, dim, TORCH[dtype].itemsize, capability)
        crowded = len(given) > len(ROWS)
        forward = modulate_triton.forward_launch(TOKENS, dim, kind, capability, crowded)
        backward = modulate_triton.backward_launch(*size, results != dx)
        for kernel, launch, more in (
            (modulate_triton.forward_kernel, forward, {"CONVERTS": False}),
            (modulate_triton.backward_kernel, backward, {}),
        ):
            types = argument_types(kernel, pointers, lengths)
            flags = flags_of(kernel, given + results)
            label = f"{part_of(kernel)} {dtype} D={dim} {kind} {flags}"
            constexprs = launch.constants(dim, kind) | more
            yield AotCase(label, kernel, types, constexprs, **launch.options())


@operation
def norm_modulate_fp8_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the kernels of Wan 1.3B and 14B at 480p."""
    wan = [
        (1536, "bf16", "layer", ROWS),
        (5120, "bf16", "layer", ROWS),
        (5120, "fp32", "layer", AFFINE),
    ]
    givens = ((), AFFINE, ROWS, ROWS + AFFINE, ROWS + INDEX[:1])
    chosen = product((1536, 3072, 5120, 8192), DTYPES, KINDS, givens) if every else wan
    kernel = modulate_triton.forward_kernel
    for dim, dtype, kind, given in chosen:
        pointers = element_types(dtype, "x_ptr", "y_scale_ptr", *given) | {"y_ptr": "u8"}
        types = argument_types(kernel, pointers, _lengths("x", INDEX[0] in given))
        crowded = len(given) > len(ROWS)
        launch = modulate_triton.forward_launch(TOKENS, dim, kind, capability, crowded)
        constexprs = launch.constants(dim, kind) | {"CONVERTS": fp8.converts(capability)}
        label = f"{dtype} D={dim} {kind} {flags_of(kernel, given)}"
        yield AotCase(label, kernel, types, constexprs, **launch.options())


@operation
def gated_residual_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the kernels of Wan 1.3B and 14B at 480p."""
    results = ("dy_ptr", "sum_ptr")
    wan = [(1536, "bf16", GATE, results), (5120, "bf16", GATE, results), (5120, "bf16", (), ())]
    givens, some = ((), GATE[:1], GATE[1:], GATE, GATE + INDEX), (results[:1], results[1:], results)
    for dim, dtype, given, wanted in product(DIMS, DTYPES, givens, some) if every else wan:
        tokens = ("x_ptr", "y_ptr", "out_ptr", "grad_ptr")
        pointers = element_types(dtype, *tokens, *given, *wanted)
        indexed = given == GATE + INDEX
        backward = residual.backward_launch(TOKENS, 1, dim, capability, "sum_ptr" in wanted)
        limit = residual.INDEXED_REGISTERS
        for kernel, launch, maxnreg in (
            (residual.forward_kernel, residual.forward_launch(TOKENS, dim, capability), None),
            (residual.backward_kernel, backward, limit if indexed else None),
        ):
            if kernel is residual.backward_kernel and not given:
                continue  # without a gate, the gradients are the incoming one
            types = argument_types(kernel, pointers, _lengths("xyg", indexed))
            label = f"{part_of(kernel)} {dtype} D={dim} {flags_of(kernel, given + wanted)}"
            constexprs = {"D": dim, "BLOCK_D": launch.block_d, "CHUNKS": launch.chunks}
            yield AotCase(label, kernel, types, constexprs, launch.num_warps, maxnreg=maxnreg)


@operation
def residual_norm_modulate_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the kernels between the parts of a Wan block."""
    indexed = GATE + ROWS + INDEX
    results, sums = ("dx_ptr", "dy_ptr"), ("gate_sum_ptr", "dot_ptr", "total_ptr")
    wan = [
        (1536, "bf16", "layer", GATE + AFFINE, results + sums),
        (5120, "bf16", "layer", GATE + AFFINE, results + sums),
        (5120, "bf16", "layer", ROWS, results[:1] + sums[1:]),
        (5120, "fp32", "layer", GATE + ROWS, results + sums),
    ]
    givens = ((), GATE + AFFINE, ROWS, GATE + ROWS, GATE + ROWS + AFFINE, indexed)
    chosen = product(DIMS, DTYPES, KINDS, givens, (results, sums, results + sums))
    for dim, dtype, kind, given, wanted in chosen if every else wan:
        tokens = ("x_ptr", "y_ptr", "out_ptr", "h_ptr", "grad_ptr", "grad_h_ptr")
        pointers = element_types(dtype, *tokens, *given, *wanted)
        others = dict.fromkeys(("gate_group", "norm_group")) | _lengths("xygh", given == indexed)
        size = (TOKENS, 1, dim, TORCH[dtype].itemsize, capability)
        backward = residual_modulate_triton.backward_launch(*size, wanted != results)
        crowded = given == GATE + ROWS + AFFINE, given == indexed
        forward = residual_modulate_triton.forward_launch(TOKENS, *size[2:], *crowded)
        launches = [(residual_modulate_triton.forward_kernel, forward, pointers)]
        for names in backward.passes:
            later = {name for name in wanted if name.removesuffix("_ptr") not in names}
            if later < set(wanted):
                now = {name: t for name, t in pointers.items() if name not in later}
                launches.append((residual_modulate_triton.backward_kernel, backward, now))
        for kernel, launch, passed in launches:
            types = argument_types(kernel, passed, others)
            flags = flags_of(kernel, (name for name in given + wanted if name in passed))
            label = f"{part_of(kernel)} {dtype} D={dim} {kind} {flags}"
            constexprs = launch.constants(dim, kind) | {"gate_group": 1, "norm_group": 1}
            yield AotCase(label, kernel, types, constexprs, **launch.options())


@operation
def rms_norm_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield heads of 128 in a packed qkv and rows of Wan 1.3B and 14B."""
    rows = dict.fromkeys(("length_x1", "length_g1", "length_x2", "length_g2"))
    heads = rows | {"length_x2": "i32"}
    transposed = heads | {"length_x1": "i32", "length_g2": "i32"}
    chosen = [
        (128, "bf16", "bf16", heads, BOTH),
        (1536, "bf16", "fp32", rows, BOTH),
        (5120, "bf16", "bf16", rows, BOTH),
        (5120, "fp32", "fp32", rows, BOTH),
    ]
    if every:
        chosen = [
            (*size, lengths, results)
            for *size, lengths in product(
                (100, 128, 1536, 5120, 8192), DTYPES, OPTIONAL, (heads, rows, transposed)
            )
            for results in ((BOTH, BOTH[:1], BOTH[1:]) if size[2] else (BOTH[:1],))
        ]
    for dim, dtype, weight, lengths, results in chosen:
        pointers = element_types(dtype, "x_ptr", "y_ptr", "grad_ptr", *results)
        pointers |= {"weight_ptr": weight} if weight else {}
        size = (TOKENS, dim, capability)
        long = dim > rms.LONG and not lengths["length_x1"]
        for kernel, launch in (
            (rms.forward_kernel, rms.forward_launch(*size)),
            (rms.backward_kernel, rms.backward_launch(*size)),
        ):
            types = argument_types(kernel, pointers, lengths)
            axes = 1 + sum(name in types for name in ("length_x1", "length_x2"))
            name = f"{part_of(kernel)} {flags_of(kernel, results)}".strip()
            label = f"{name} {dtype} D={dim} weight {weight or 'none'} axes {axes}"
            constexprs = {"D": dim, "BLOCK_R": launch.block_r, "BLOCK_D": launch.block_d}
            options = {"num_warps": launch.num_warps, "maxnreg": launch.registers}
            if long:
                kernel, types, constexprs, options = _long_rows(
                    part_of(kernel), pointers, lengths["length_x2"], dim, capability
                )
            yield AotCase(label, kernel, types, constexprs, **options)


def _long_rows(
    part: str, pointers: dict[str, str], length: str | None, dim: int, capability: Capability
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """Return kernel, types, constexprs and options of rms_norm's long rows."""
    kernel = getattr(modulate_triton, f"{part}_kernel")
    given = {n.replace("partial", "dot"): kind for n, kind in pointers.items()}
    types = argument_types(kernel, given, {"length_x": length, "length_g": None})
    if part == "forward":
        launch = modulate_triton.forward_launch(TOKENS, dim, "rms", capability)
        more = {"CONVERTS": False}
    else:
        size = TORCH[pointers["x_ptr"]].itemsize
        sums = "partial_ptr" in pointers
        launch = modulate_triton.backward_launch(TOKENS, 1, dim, size, capability, sums)
        more = {}
    return kernel, types, launch.constants(dim, "rms") | more, launch.options()


# Feed-forward. With ``every``: all flags, more widths.


@operation
def bias_gelu_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the kernels at the widths of Wan's feed-forward."""
    chosen = [
        (8960, "bf16", "bf16", BOTH),
        (13824, "bf16", "bf16", BOTH),
        (13824, "bf16", "", BOTH[:1]),
        (13824, "fp32", "fp32", BOTH),
    ]
    if every:
        chosen = [
            (*size, results)
            for size in product((100, 5120, 8192, 8960, 13824), DTYPES, OPTIONAL)
            for results in ((BOTH, BOTH[:1], BOTH[1:]) if size[2] else (BOTH[:1],))
        ]
    for dim, dtype, bias, results in chosen:
        pointers = element_types(dtype, "x_ptr", "y_ptr", "grad_ptr", *results)
        pointers |= {"bias_ptr": bias} if bias else {}
        for kernel, launch in (
            (gelu.forward_kernel, gelu.forward_launch(TOKENS, dim)),
            (gelu.backward_kernel, gelu.backward_launch(TOKENS, dim, capability)),
        ):
            constexprs = {"D": dim, "BLOCK_R": launch.block_r, "BLOCK_D": launch.block_d}
            name = f"{part_of(kernel)} {flags_of(kernel, results)}".strip()
            label = f"{name} {dtype} D={dim} bias {bias or 'none'}"
            one_axis = dict.fromkeys(n for n in kernel.arg_names if n.startswith("length"))
            types = argument_types(kernel, pointers, one_axis)
            yield AotCase(label, kernel, types, constexprs, launch.num_warps)


def _row_case(
    label: str, dim: int, dtype: str, bias: str, gelu: bool, capability: Capability
) -> AotCase:
    """Return the row kernel for dense rows of ``dtype``; ``bias`` is its dtype, or empty."""
    pointers = {"x_ptr": dtype, "y_ptr": "u8", "y_scale_ptr": "fp32"}
    pointers |= {"bias_ptr": bias} if bias else {}
    types = argument_types(fp8.row_kernel, pointers, {"length_x": None})
    launch = fp8.row_launch(TOKENS, dim, capability)
    constexprs, registers = launch.constants(dim, gelu), launch.registers
    return AotCase(label, fp8.row_kernel, types, constexprs, launch.num_warps, maxnreg=registers)


@operation
def gelu_fp8_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the kernels at the widths of Wan's feed-forward."""
    wan = [(8960, "bf16", "bf16"), (13824, "bf16", "bf16"), (13824, "fp32", "")]
    dims = (1536, 5120, 8192, 8960, 13824, 14336, 16384)
    for dim, dtype, bias in product(dims, DTYPES, OPTIONAL) if every else wan:
        label = f"{dtype} D={dim} bias {bias or 'none'}"
        yield _row_case(label, dim, dtype, bias, True, capability)


@operation
def fp8_linear_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the kernels for rows of Wan's weights."""
    wan = [(5120, "bf16"), (13824, "bf16")]
    dims = (64, 1536, 5120, 8192, 8960, 13824, 16384)
    for dim, dtype in product(dims, HALVES) if every else wan:
        yield _row_case(f"quantize {dtype} D={dim}", dim, dtype, "", False, capability)


# Flow matching.


@operation
def flow_loss_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield a bfloat16 or float32 velocity with float32 latents; ``every``: any mix of dtypes."""
    wan = [("bf16", "fp32", "fp32"), ("fp32", "fp32", "fp32")]
    for velocity, noise, latents in product(HALVES, HALVES, HALVES) if every else wan:
        pointers = {"velocity_ptr": velocity, "noise_ptr": noise, "latents_ptr": latents}
        pointers |= {"dv_ptr": velocity, "grad_ptr": "fp32", "partial_ptr": "fp64"}
        for kernel, launch in (
            (loss.forward_kernel, loss.sum_launch(ELEMENTS, capability)),
            (loss.backward_kernel, loss.map_launch(ELEMENTS)),
        ):
            types = argument_types(kernel, pointers, {"elements": "i32:16", "share": "i32:16"})
            label = f"{part_of(kernel)} {velocity}, {noise} - {latents}"
            yield AotCase(label, kernel, types, {"BLOCK": launch.block}, launch.num_warps)


@operation
def flow_step_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield Euler and UniPC with guidance, float32 latents; ``every``: any number of terms."""
    wan = [("fp32", "bf16", 2), ("fp32", "bf16", 7)]
    dtypes, counts = ("fp32", "bf16", "fp16"), range(1, step.TERMS + 1)
    launch = step.launch_config(ELEMENTS)
    for first, rest, count in product(dtypes, dtypes, counts) if every else wan:
        numbers = {f"c{i}": "fp32" if i < count else None for i in range(step.TERMS)}
        for kernel in (step.forward_kernel, step.backward_kernel):
            terms = [n for n in kernel.arg_names if n[1].isdigit() and n.endswith("_ptr")]
            pointers = dict.fromkeys(terms[:count], rest) | {terms[0]: first}
            pointers |= {"y_ptr": first, "grad_ptr": first}
            types = argument_types(kernel, pointers, {"elements": "i32:16", **numbers})
            label = f"{part_of(kernel)} {first} + {count - 1} {rest}"
            yield AotCase(label, kernel, types, {"BLOCK": launch.block}, launch.num_warps)


# Attention.


@operation
def qk_norm_rope_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the kernels of self-attention in Wan 1.3B and 14B and of cross-attention in 14B.

    Those of HunyuanVideo and LTX too, whose tables have a row for every token. ``every``: each
    gradient alone, one weight, a rotation or a norm alone, D to 8192.
    """
    all_of_it = ("qk", "qk", "qk")  # normalized, moved by d_x, weights trained
    wan = [
        ((1536, 128), "bf16", all_of_it, True, False),
        ((5120, 128), "bf16", all_of_it, True, False),
        ((5120, 128), "bf16", all_of_it, False, False),
        ((5120, 128), "fp32", all_of_it, True, False),
        *(((3072, 128), dtype, all_of_it, 64, True) for dtype in DTYPES),
        *(((2048, 64), dtype, all_of_it, 1024, False) for dtype in DTYPES),
    ]
    sizes = ((1536, 128), (3072, 96), (5120, 128), (5120, 40), (8192, 128))
    parts = (all_of_it, ("qk", "qk", ""), ("qk", "", "qk"), ("q", "qk", "q"), ("", "qk", ""))
    chosen = [*product(sizes, DTYPES, parts, (True, False), (True, False))] if every else []
    # A rotation is True for the table of a grid, a number for the columns of a table by token.
    chosen += wan
    for (dim, head_dim), dtype, (normed, moved, trained), turned, per_head in chosen:
        if not (normed or turned):
            continue
        pointers = {f"{x}{end}_ptr": dtype for x in "qk" for end in ("", "_out", "_grad")}
        pointers |= {f"{x}_weight_ptr": "fp32" if every else dtype for x in normed}
        pointers |= {f"d{x}_ptr": dtype for x in moved}
        pointers |= {f"d{x}_weight_ptr": "fp32" for x in trained}
        pointers |= {f"{x}_ptr": "fp32" for x in ("cos", "sin") if turned}
        lengths = _lengths("qk") | dict.fromkeys(("length_gq", "length_gk"))
        size = (TOKENS, dim, head_dim if turned or per_head else None, TORCH[dtype], capability)
        for kernel, launch, flag in (
            (norm_rope.forward_kernel, norm_rope.forward_launch(*size), ""),
            (
                norm_rope.backward_kernel,
                norm_rope.backward_launch(*size, every),
                f" dx={moved} dw={trained}",
            ),
        ):
            label = f"{part_of(kernel)} {dtype} D={dim} d={head_dim} norm={normed}"
            label += f"{flag} rope={turned} per_head={per_head}"
            types = argument_types(kernel, pointers, lengths)
            table = 0 if isinstance(turned, bool) else turned
            constexprs, warps = launch.constants(dim, per_head, table), launch.num_warps
            yield AotCase(label, kernel, types, constexprs, warps, maxnreg=launch.registers)


@operation
def query_pool_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield 8 heads at the D of Wan 1.3B, 5B, 14B; ``every``: up to 64, each gradient alone."""
    merged = dict.fromkeys(("max_ptr", "sum_ptr", "partial_ptr", "pooled_ptr", "lse_ptr"), "fp32")
    for label, ones in (("merge", {}), ("merge of one head", {"heads": 1})):
        types = argument_types(pool.merge_kernel, merged, dict.fromkeys(ones))
        yield AotCase(label, pool.merge_kernel, types, {**pool.MERGE_BLOCK, **ones}, 4)
    kernels = [("forward", pool.forward_kernel, {})]
    for x, u in ((True, True), (True, False), (False, True))[: 3 if every else 1]:
        flags = {"NEED_X": x, "NEED_QUERIES": u}
        kernels.append((f"backward x={x} u={u}", pool.backward_kernel, flags))
    every_heads = (8, 32, 64) if every else (8,)
    for dim, dtype, heads in product((1536, 3072, 5120), DTYPES, every_heads):
        launch = pool.launch_config(heads, TORCH[dtype])
        for label, kernel, flags in kernels:
            pointers = {n: "fp32" for n in kernel.arg_names if n.endswith("_ptr")}
            pointers |= {n: dtype for n in ("x_ptr", "dx_ptr") if n in pointers}
            types = argument_types(kernel, pointers, {"stride_xb": "i64:16"})
            constexprs, label = (
                {**launch.constants(dim), **flags},
                f"{label} {dtype} D={dim} H={heads}",
            )
            yield AotCase(label, kernel, types, constexprs, launch.num_warps, launch.num_stages)


@operation
def rollout_attention_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield the chip's best variant at 128 channels; ``every``: all it runs, 32 to 256."""
    best = choose_variant(capability, torch.bfloat16, 128).variant
    variants = VARIANTS if capability >= (8, 9) else ("int8",)
    sizes = (*((d, "bf16") for d in (32, 64, 80, 128)), (128, "fp16"), (256, "bf16"))
    for variant, (head_dim, dtype) in product(variants, sizes) if every else [(best, sizes[3])]:
        int8, small = variant != "fp8", variant != "int8"
        launch = rollout.attention_launch(head_dim, variant, capability)
        pointers = {"q_ptr": dtype, "out_ptr": dtype, "k_scale_ptr": "fp32"}
        pointers |= {"k8_ptr": "i8" if int8 else "fp8e4nv", "v_ptr": "fp8e4nv" if small else dtype}
        pointers |= dict.fromkeys(("v_scale_ptr", "v_mean_ptr") if small else (), "fp32")
        types = argument_types(rollout.attention_kernel, pointers)
        constexprs, label = launch.constants(head_dim, variant), f"{variant} {dtype} d={head_dim}"
        shape = (launch.num_warps, launch.num_stages)
        yield AotCase(f"attention {label}", rollout.attention_kernel, types, constexprs, *shape)
        yield from _quantize_kv_cases(head_dim, dtype, launch.block_n, int8, small)


@operation
def sparse_attention_cases(capability: Capability, every: bool) -> Iterator[AotCase]:
    """Yield 16 bits and the chip's best 8 bits at 128 channels; ``every``: other blocks too.

    The kernels that quantize are those of rollout_attention, at the mask's block of keys.
    """
    best = choose_variant(capability, torch.bfloat16, 128).variant
    chosen = [(v, 128, "bf16", sparse.BLOCK_Q, sparse.BLOCK_K) for v in ("exact", best)]
    if every:
        variants = ("exact", *VARIANTS) if capability >= (8, 9) else ("exact", "int8")
        sizes = ((32, "bf16"), (64, "bf16"), (128, "fp16"), (128, "bf16"))
        blocks = product((16, 64, 128), (32, 64))
        chosen = [(v, *size, *tile) for v, size, tile in product(variants, sizes, list(blocks))]
    kernel = sparse_triton.sparse_kernel
    for variant, head_dim, dtype, block_q, block_k in chosen:
        exact, small = variant == "exact", variant in ("int8_fp8", "fp8")
        codes = "fp8e4nv" if variant == "fp8" else "i8"
        launch = sparse_triton.sparse_launch(head_dim, variant, block_q, block_k, capability)
        pointers = {"q_ptr": dtype, "out_ptr": dtype, "index_ptr": "i32", "count_ptr": "i32"}
        pointers |= {"k_ptr": dtype if exact else codes, "v_ptr": "fp8e4nv" if small else dtype}
        pointers |= {} if exact else {"k_scale_ptr": "fp32"}
        pointers |= dict.fromkeys(("v_scale_ptr", "v_mean_ptr") if small else (), "fp32")
        types = argument_types(kernel, pointers, {"stride_mb": "i32", "stride_mh": "i32"})
        constexprs = launch.constants(head_dim, variant)
        label = f"{variant} {dtype} d={head_dim} blocks {block_q}x{block_k}"
        yield AotCase(label, kernel, types, constexprs, launch.num_warps, launch.num_stages)


def _quantize_kv_cases(
    head_dim: int, dtype: str, block_n: int, int8: bool, values: bool
) -> Iterator[AotCase]:
    """Yield the three kernels at one size, for keys and values of Triton's ``dtype``."""
    launch = quantize_kv.quantize_launch(head_dim, block_n)
    ending = " and values" if values else ""
    label = f"{dtype} d={head_dim} N={block_n} {'int8' if int8 else 'e4m3'}{ending}"
    statistics = {"CHUNK": quantize_kv.CHUNK, **quantize_kv.STATISTICS_TILE}
    constants = launch.constants(head_dim, int8)
    for name, kernel, constexprs, num_warps in (
        (f"statistics {dtype}{ending}", quantize_kv.statistics_kernel, statistics, 4),
        (f"merge{ending}", quantize_kv.merge_kernel, quantize_kv.MERGE_CONSTANTS, 4),
        (f"quantize {label}", quantize_kv.quantize_kernel, constants, launch.num_warps),
    ):
        pointers = {n: "fp32" for n in kernel.arg_names if n.endswith("_ptr")}
        pointers |= {"k_ptr": dtype, "v_ptr": dtype}
        pointers |= {"k8_ptr": "i8" if int8 else "fp8e4nv", "v8_ptr": "fp8e4nv"}
        if not values:
            pointers = {n: kind for n, kind in pointers.items() if not n.startswith("v")}
        types = argument_types(kernel, pointers, {"dim": "i32:16"})
        yield AotCase(name, kernel, types, constexprs, num_warps)
