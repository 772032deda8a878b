"""Define ahead-of-time compile cases of the norm operations; see aot_cases.py."""

import itertools

from aot_types import AotCase, argument_types

from prfl_fast.kernels.common.fp8 import converts
from prfl_fast.kernels.norm import modulate_triton, residual, residual_modulate_triton, rms
from prfl_fast.kernels.norm.modulate import KINDS

TOKENS = 32760  # of a Wan video at 480p
DIMS, DTYPES = (1536, 5120, 8192), ("bf16", "fp32")
ROWS: tuple[str, ...] = ("scale_ptr", "shift_ptr", "scale_table_ptr", "shift_table_ptr")
AFFINE: tuple[str, ...] = ("weight_ptr", "bias_ptr")
GATE: tuple[str, ...] = ("gate_ptr", "gate_table_ptr")


def norm_modulate_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the kernels of Wan 1.3B, 5B and 14B at 480p; ``every``: all flags, D to 8192."""
    indexed = (*ROWS, "row_index_ptr", "order_ptr", "bounds_ptr")
    dx: tuple[str, ...] = ("dx_ptr",)
    sums = ("dot_ptr", "total_ptr")
    chosen = [
        (1536, "bf16", "layer", ROWS, dx + sums),
        (3072, "bf16", "layer", indexed, dx + sums),
        (5120, "bf16", "layer", ROWS, dx + sums),
        (5120, "bf16", "layer", AFFINE, dx + sums),
        (5120, "fp32", "layer", ROWS, dx + sums),
    ]
    if every:
        givens = ((), AFFINE, ROWS, ROWS + AFFINE, indexed)
        chosen = list(itertools.product(DIMS, DTYPES, KINDS, givens, (dx, sums, dx + sums)))
    cases = {}
    for dim, dtype, kind, given, results in chosen:
        pointers = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", *given, *results), dtype)
        pointers |= {name: "fp32" for name in pointers if name in ROWS + AFFINE + sums}
        pointers |= {name: "i64" for name in pointers if name in indexed[4:]}
        lengths = {"length_x": "i32" if given == indexed else None, "length_g": None}
        itemsize = 4 if dtype == "fp32" else 2
        backward = modulate_triton.backward_launch(
            TOKENS, 1, dim, itemsize, capability, results != dx
        )
        forward = modulate_triton.forward_launch(TOKENS, dim, kind, capability)
        for kernel, launch in (
            (modulate_triton.forward_kernel, forward),
            (modulate_triton.backward_kernel, backward),
        ):
            types = argument_types(kernel, pointers, lengths)
            flags = "+".join(n.removesuffix("_ptr") for n in given + results if n in types)
            label = f"{kernel.__name__.split('_')[0]} {dtype} D={dim} {kind} {flags}"
            constexprs = launch.constants(dim, kind)
            constexprs |= {"CONVERTS": False} if kernel is modulate_triton.forward_kernel else {}
            cases[label] = AotCase(label, kernel, types, constexprs, **launch.options())
    return list(cases.values())


def norm_modulate_fp8_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the kernels of Wan 1.3B and 14B at 480p; ``every``: all flags, D to 8192."""
    indexed = (*ROWS, "row_index_ptr")
    chosen = [
        (1536, "bf16", "layer", ROWS),
        (5120, "bf16", "layer", ROWS),
        (5120, "fp32", "layer", AFFINE),
    ]
    if every:
        dims = (1536, 3072, 5120, 8192)
        givens = ((), AFFINE, ROWS, ROWS + AFFINE, indexed)
        chosen = list(itertools.product(dims, ("bf16", "fp32"), KINDS, givens))
    cases = []
    for dim, dtype, kind, given in chosen:
        pointers = {"x_ptr": dtype, "y_ptr": "u8", "y_scale_ptr": "fp32"}
        pointers |= {name: "i64" if name == "row_index_ptr" else "fp32" for name in given}
        lengths = {"length_x": "i32" if given == indexed else None}
        types = argument_types(modulate_triton.forward_kernel, pointers, lengths)
        launch = modulate_triton.forward_launch(TOKENS, dim, kind, capability, fp8=True)
        constexprs = launch.constants(dim, kind) | {"CONVERTS": converts(capability)}
        flags = "+".join(name.removesuffix("_ptr") for name in given)
        label = f"{dtype} D={dim} {kind} {flags}"
        cases.append(
            AotCase(label, modulate_triton.forward_kernel, types, constexprs, **launch.options())
        )
    return cases


def gated_residual_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the kernels of Wan 1.3B and 14B at 480p; ``every``: all flags, D to 8192."""
    results: tuple[str, ...] = ("dy_ptr", "sum_ptr")
    indexed = (*GATE, "row_index_ptr", "order_ptr", "bounds_ptr")
    chosen = [(1536, "bf16", GATE, results), (5120, "bf16", GATE, results), (5120, "bf16", (), ())]
    if every:
        givens, some = ((), GATE[:1], GATE[1:], GATE, indexed), (results[:1], results[1:], results)
        chosen = list(itertools.product(DIMS, DTYPES, givens, some))
    cases = {}
    for dim, dtype, given, wanted in chosen:
        tokens = ("x_ptr", "y_ptr", "out_ptr", "grad_ptr", "dy_ptr")
        pointers = dict.fromkeys((*tokens[:4], *given, *wanted), dtype)
        pointers |= {name: "fp32" for name in pointers if name not in tokens}
        pointers |= {name: "i64" for name in pointers if name in indexed[2:]}
        lengths = {f"length_{name}": "i32" if given == indexed else None for name in "xyg"}
        backward = residual.backward_launch(TOKENS, 1, dim, capability, "sum_ptr" in wanted)
        for kernel, launch in (
            (residual.forward_kernel, residual.forward_launch(TOKENS, dim, capability)),
            (residual.backward_kernel, backward),
        ):
            if kernel is residual.backward_kernel and not given:
                continue  # without a gate, the gradients are the incoming one
            types = argument_types(kernel, pointers, lengths)
            flags = "+".join(n.removesuffix("_ptr") for n in given + wanted if n in types)
            label = f"{kernel.__name__.split('_')[0]} {dtype} D={dim} {flags}"
            constexprs = {"D": dim, "BLOCK_D": launch.block_d, "CHUNKS": launch.chunks}
            limit = residual.INDEXED_REGISTERS if "order_ptr" in types else None
            case = AotCase(label, kernel, types, constexprs, launch.num_warps, maxnreg=limit)
            cases[label] = case
    return list(cases.values())


def residual_norm_modulate_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the kernels between the parts of a Wan block; ``every``: all flags, D to 8192."""
    indexed = (*GATE, *ROWS, "row_index_ptr", "order_ptr", "bounds_ptr")
    sums: tuple[str, ...] = ("gate_sum_ptr", "dot_ptr", "total_ptr")
    results: tuple[str, ...] = ("dx_ptr", "dy_ptr")
    chosen = [
        (1536, "bf16", "layer", GATE + AFFINE, results + sums),
        (5120, "bf16", "layer", GATE + AFFINE, results + sums),
        (5120, "bf16", "layer", ROWS, results[:1] + sums[1:]),
        (5120, "fp32", "layer", GATE + ROWS, results + sums),
    ]
    if every:
        givens = ((), GATE + AFFINE, ROWS, GATE + ROWS + AFFINE, indexed)
        some = (results, sums, results + sums)
        chosen = list(itertools.product(DIMS, DTYPES, KINDS, givens, some))
    cases = {}
    for dim, dtype, kind, given, wanted in chosen:
        tokens = ("x_ptr", "y_ptr", "out_ptr", "h_ptr", "grad_ptr", "grad_h_ptr", *results)
        pointers = dict.fromkeys((*tokens[:6], *given, *wanted), dtype)
        pointers |= {name: "fp32" for name in pointers if name not in tokens}
        pointers |= {name: "i64" for name in pointers if name in indexed[6:]}
        others: dict[str, str | None] = dict.fromkeys(("gate_group", "norm_group"))
        others |= {f"length_{name}": "i32" if given == indexed else None for name in "xygh"}
        itemsize = 4 if dtype == "fp32" else 2
        backward = residual_modulate_triton.backward_launch(
            TOKENS, 1, dim, itemsize, capability, wanted != results
        )
        forward = residual_modulate_triton.forward_launch(TOKENS, dim, capability)
        launches = [(residual_modulate_triton.forward_kernel, forward, pointers)]
        for names in backward.passes:
            later = {name for name in wanted if name.removesuffix("_ptr") not in names}
            if later < set(wanted):
                now = {name: t for name, t in pointers.items() if name not in later}
                launches.append((residual_modulate_triton.backward_kernel, backward, now))
        for kernel, launch, passed in launches:
            types = argument_types(kernel, passed, others)
            flags = "+".join(n.removesuffix("_ptr") for n in given + wanted if n in types)
            label = f"{kernel.__name__.split('_')[0]} {dtype} D={dim} {kind} {flags}"
            constexprs = launch.constants(dim, kind) | {"gate_group": 1, "norm_group": 1}
            cases[label] = AotCase(label, kernel, types, constexprs, **launch.options())
    return list(cases.values())


def rms_norm_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return heads of 128 in a packed qkv and rows of Wan 1.3B and 14B; ``every``: all flags."""
    both: tuple[str, ...] = ("dx_ptr", "partial_ptr")
    rows: dict[str, str | None] = {"length_x2": None, "length_g2": None}
    heads: dict[str, str | None] = rows | {"length_x2": "i32"}
    transposed: dict[str, str | None] = heads | {"length_x1": "i32", "length_g2": "i32"}
    chosen = [
        (128, "bf16", "bf16", heads, both),
        (1536, "bf16", "fp32", rows, both),
        (5120, "bf16", "bf16", rows, both),
        (5120, "fp32", "fp32", rows, both),
    ]
    if every:
        chosen = [
            (dim, dtype, weight, lengths, results)
            for dim, dtype, weight in itertools.product(
                (100, 128, 1536, 5120, 8192), ("bf16", "fp32"), ("", "bf16", "fp32")
            )
            for lengths in (heads, rows, transposed)
            for results in ((both, both[:1], both[1:]) if weight else (both[:1],))
        ]
    cases = {}
    for dim, dtype, weight, lengths, results in chosen:
        pointers = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", *results), dtype)
        pointers |= {"weight_ptr": weight} if weight else {}
        pointers |= {"partial_ptr": "fp32"} if "partial_ptr" in results else {}
        for kernel, launch in (
            (rms.forward_kernel, rms.forward_launch(TOKENS, dim, capability)),
            (rms.backward_kernel, rms.backward_launch(TOKENS, dim, capability)),
        ):
            others = {"length_x1": None, "length_g1": None, **lengths}
            types = argument_types(kernel, pointers, others)
            axes = 1 + sum(name in types for name in ("length_x1", "length_x2"))
            flags = "+".join(n.removesuffix("_ptr") for n in results if n in types)
            name = f"{kernel.__name__.split('_')[0]} {flags}".strip()
            label = f"{name} {dtype} D={dim} weight {weight or 'none'} axes {axes}"
            constexprs = {"D": dim, "BLOCK_R": launch.block_r, "BLOCK_D": launch.block_d}
            limit = rms.FORWARD_REGISTERS if kernel is rms.forward_kernel else None
            case = AotCase(label, kernel, types, constexprs, launch.num_warps, maxnreg=limit)
            cases[label] = case
    return list(cases.values())
