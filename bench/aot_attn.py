"""Define ahead-of-time compile cases of the attention operations; see aot_cases.py."""

import itertools
from typing import Any

import torch
from aot_types import AotCase, argument_types

from prfl_fast.kernels.attn import norm_rope, pool, quantize_kv, rollout
from prfl_fast.kernels.attn.rollout_variants import VARIANTS, choose_variant


def qk_norm_rope_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the kernels of self-attention in Wan 1.3B and 14B and of cross-attention in 14B.

    ``every``: each gradient alone, one weight, a rotation or a norm alone, D to 8192.
    """
    all_of_it = ("qk", "qk", "qk")  # normalized, moved by d_x, weights trained
    chosen = [
        (1536, 128, "bf16", all_of_it, True, False),
        (5120, 128, "bf16", all_of_it, True, False),
        (5120, 128, "bf16", all_of_it, False, False),
        (5120, 128, "fp32", all_of_it, True, False),
    ]
    if every:
        sizes = ((1536, 128), (3072, 96), (5120, 128), (5120, 40), (8192, 128))
        parts = (all_of_it, ("qk", "qk", ""), ("qk", "", "qk"), ("q", "qk", "q"), ("", "qk", ""))
        flags = itertools.product(sizes, ("bf16", "fp32"), parts, (True, False), (True, False))
        chosen = [
            (dim, head_dim, dtype, part, turned, per_head)
            for (dim, head_dim), dtype, part, turned, per_head in flags
            if part[0] or turned
        ]
    cases = {}
    for dim, head_dim, dtype, (normed, moved, trained), turned, per_head in chosen:
        pointers = {f"{x}{end}_ptr": dtype for x in "qk" for end in ("", "_out", "_grad")}
        pointers |= {f"{x}_weight_ptr": "fp32" if every else dtype for x in normed}
        pointers |= {f"d{x}_ptr": dtype for x in moved}
        pointers |= {f"d{x}_weight_ptr": "fp32" for x in trained}
        pointers |= {f"{x}_ptr": "fp32" for x in ("cos", "sin") if turned}
        lengths = dict.fromkeys(("length_q", "length_k", "length_gq", "length_gk"))
        size = (32760, dim, head_dim if turned or per_head else None)
        torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        for kernel, choose, flag in (
            (norm_rope.forward_kernel, norm_rope.forward_launch, ""),
            (norm_rope.backward_kernel, norm_rope.backward_launch, f" dx={moved} dw={trained}"),
        ):
            launch = choose(*size, torch_dtype, capability)
            label = f"{kernel.__name__.split('_')[0]} {dtype} D={dim} d={head_dim} norm={normed}"
            label += f"{flag} rope={turned} per_head={per_head}"
            types = argument_types(kernel, pointers, lengths)
            constants = launch.constants(dim, per_head)
            cases[label] = AotCase(
                label, kernel, types, constants, launch.num_warps, maxnreg=launch.registers
            )
    return list(cases.values())


def query_pool_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return 8 heads at the D of Wan 1.3B, 5B, 14B; ``every``: up to 64, each gradient alone."""
    merged = dict.fromkeys(("max_ptr", "sum_ptr", "partial_ptr", "pooled_ptr", "lse_ptr"), "fp32")
    cases = []
    for label, ones in (("merge", {}), ("merge of one", {"chunks": 1, "heads": 1})):
        types = argument_types(pool.merge_kernel, merged, dict.fromkeys(ones))
        cases.append(AotCase(label, pool.merge_kernel, types, {**pool.MERGE_BLOCK, **ones}, 4))
    chosen: list[tuple[str, Any, dict]] = [("forward", pool.forward_kernel, {})]
    for x, u in ((True, True), (True, False), (False, True))[: 3 if every else 1]:
        flags = {"NEED_X": x, "NEED_QUERIES": u}
        chosen.append((f"backward x={x} u={u}", pool.backward_kernel, flags))
    every_heads, dims = (8, 32, 64) if every else (8,), (1536, 3072, 5120)
    dtypes = (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for dim, (name, dtype), heads in itertools.product(dims, dtypes, every_heads):
        launch = pool.launch_config(heads, dtype)
        for label, kernel, flags in chosen:
            pointers = dict.fromkeys((n for n in kernel.arg_names if n.endswith("_ptr")), "fp32")
            pointers |= {n: name for n in ("x_ptr", "dx_ptr") if n in pointers}
            types = argument_types(kernel, pointers, {"stride_xb": "i64:16"})
            constants = {**launch.constants(dim), **flags}
            label = f"{label} {name} D={dim} H={heads}"
            sizes = (launch.num_warps, launch.num_stages)
            cases.append(AotCase(label, kernel, types, constants, *sizes))
    return cases


def rollout_attention_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the chip's best variant at 128 channels; ``every``: all it runs, 32 to 256."""
    best = choose_variant(capability, torch.bfloat16, 128).variant
    chosen = [(best, 128, "bf16")]
    if every:
        variants = VARIANTS if capability >= (8, 9) else ("int8",)
        sizes = (*((d, "bf16") for d in (32, 64, 80, 128)), (128, "fp16"), (256, "bf16"))
        chosen = [(variant, *size) for variant in variants for size in sizes]
    cases = []
    for variant, head_dim, dtype in chosen:
        int8, small = variant != "fp8", variant != "int8"
        launch = rollout.attention_launch(head_dim, variant, capability)
        pointers = {"q_ptr": dtype, "out_ptr": dtype, "k_scale_ptr": "fp32"}
        pointers |= {"k8_ptr": "i8" if int8 else "fp8e4nv", "v_ptr": "fp8e4nv" if small else dtype}
        pointers |= dict.fromkeys(("v_scale_ptr", "v_mean_ptr") if small else (), "fp32")
        types = argument_types(rollout.attention_kernel, pointers)
        constants, label = launch.constants(head_dim, variant), f"{variant} {dtype} d={head_dim}"
        shape = (launch.num_warps, launch.num_stages)
        cases.append(
            AotCase(f"attention {label}", rollout.attention_kernel, types, constants, *shape)
        )
        cases += _quantize_kv_cases(head_dim, dtype, launch.block_n, int8, small)
    return list({case.label: case for case in cases}.values())


def _quantize_kv_cases(
    head_dim: int, dtype: str, block_n: int, int8: bool, values: bool
) -> list[AotCase]:
    """Return the three kernels at one size, for keys and values of Triton's ``dtype``."""
    launch = quantize_kv.quantize_launch(head_dim, block_n)
    ending = " and values" if values else ""
    label = f"{dtype} d={head_dim} N={block_n} {'int8' if int8 else 'e4m3'}{ending}"
    statistics = {"CHUNK": quantize_kv.CHUNK, **quantize_kv.STATISTICS_TILE}
    cases = []
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
        cases.append(AotCase(name, kernel, types, constexprs, num_warps))
    return cases
