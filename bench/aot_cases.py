"""Define ahead-of-time compile cases of every operation with a Triton kernel.

A function ``cases(capability, every)`` returns the specializations of an operation's kernels: the
ones that Wan runs at 480p, and with ``every`` all combinations of flags. :data:`OPERATIONS` lists
the functions; ``aot.py`` compiles what they return.
"""

import itertools
from collections.abc import Callable

from aot_attn import qk_norm_rope_cases, query_pool_cases, rollout_attention_cases
from aot_norm import (
    gated_residual_cases,
    norm_modulate_cases,
    norm_modulate_fp8_cases,
    residual_norm_modulate_cases,
    rms_norm_cases,
)
from aot_types import AotCase, argument_types

from prfl_fast.kernels.common import fp8
from prfl_fast.kernels.flow import loss, step
from prfl_fast.kernels.linear import gelu


def bias_gelu_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the kernels at the widths of Wan's feed-forward; ``every``: all flags, more widths."""
    both, only_x, only_bias = ("dx_ptr", "partial_ptr"), ("dx_ptr",), ("partial_ptr",)
    chosen = [
        (8960, "bf16", "bf16", both),
        (13824, "bf16", "bf16", both),
        (13824, "bf16", "", only_x),
        (13824, "fp32", "fp32", both),
    ]
    if every:
        dims = (100, 5120, 8192, 8960, 13824)
        chosen = [
            (dim, dtype, bias, results)
            for dim, dtype, bias in itertools.product(dims, ("bf16", "fp32"), ("", "bf16", "fp32"))
            for results in ((both, only_x, only_bias) if bias else (only_x,))
        ]
    cases = {}
    for dim, dtype, bias, results in chosen:
        pointers = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", *results), dtype)
        pointers |= {"bias_ptr": bias} if bias else {}
        pointers |= {"partial_ptr": "fp32"} if "partial_ptr" in results else {}
        for kernel in (gelu.forward_kernel, gelu.backward_kernel):
            flags = "+".join(n.removesuffix("_ptr") for n in results if n in kernel.arg_names)
            name = f"{kernel.__name__.split('_')[0]} {flags}".strip()
            label = f"{name} {dtype} D={dim} bias {bias or 'none'}"
            one_axis = dict.fromkeys(n for n in kernel.arg_names if n.startswith("length"))
            types = argument_types(kernel, pointers, one_axis)
            launch = gelu.map_launch(32760, dim)
            constexprs = {"D": dim, "BLOCK_R": launch.block_r, "BLOCK_D": launch.block_d}
            cases[label] = AotCase(label, kernel, types, constexprs, launch.num_warps)
    return list(cases.values())


def gelu_fp8_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the kernels at the widths of Wan's feed-forward; ``every``: all flags, more widths."""
    chosen = [(8960, "bf16", "bf16"), (13824, "bf16", "bf16"), (13824, "fp32", "")]
    if every:
        dims = (1536, 5120, 8192, 8960, 13824, 14336, 16384)
        chosen = list(itertools.product(dims, ("bf16", "fp32"), ("", "bf16", "fp32")))
    return [
        _row_case(f"{dtype} D={dim} bias {bias or 'none'}", dim, dtype, bias, True, capability)
        for dim, dtype, bias in chosen
    ]


def fp8_linear_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return the kernels for rows of Wan's weights; ``every``: more dtypes and D."""
    chosen = [(5120, "bf16"), (13824, "bf16")]
    if every:
        dims = (64, 1536, 5120, 8192, 8960, 13824, 16384)
        chosen = list(itertools.product(dims, ("bf16", "fp16", "fp32")))
    return [
        _row_case(f"quantize {dtype} D={dim}", dim, dtype, "", False, capability)
        for dim, dtype in chosen
    ]


def _row_case(
    label: str, dim: int, dtype: str, bias: str, gelu: bool, capability: tuple[int, int]
) -> AotCase:
    """Return the row kernel for dense rows of ``dtype``; ``bias`` is its dtype, or empty."""
    pointers = {"x_ptr": dtype, "y_ptr": "u8", "y_scale_ptr": "fp32"}
    pointers |= {"bias_ptr": bias} if bias else {}
    types = argument_types(fp8.row_kernel, pointers, {"length_x": None})
    launch = fp8.row_launch(dim, capability)
    return AotCase(label, fp8.row_kernel, types, launch.constants(dim, gelu), launch.num_warps)


def flow_loss_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return a bfloat16 or float32 velocity with float32 latents; ``every``: any mix of dtypes."""
    chosen = [("bf16", "fp32", "fp32"), ("fp32", "fp32", "fp32")]
    if every:
        kinds = ("bf16", "fp16", "fp32")
        chosen = list(itertools.product(kinds, kinds, kinds))
    cases = []
    for velocity, noise, latents in chosen:
        pointers = {"velocity_ptr": velocity, "noise_ptr": noise, "latents_ptr": latents}
        pointers |= {"dv_ptr": velocity, "grad_ptr": "fp32", "partial_ptr": "fp64"}
        for kernel, launch in (
            (loss.forward_kernel, loss.sum_launch(2**22, capability)),
            (loss.backward_kernel, loss.map_launch(2**22)),
        ):
            types = argument_types(kernel, pointers, {"elements": "i32:16", "share": "i32:16"})
            label = f"{kernel.__name__.split('_')[0]} {velocity}, {noise} - {latents}"
            cases.append(AotCase(label, kernel, types, {"BLOCK": launch.block}, launch.num_warps))
    return cases


def flow_step_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """Return Euler and UniPC with guidance, float32 latents; ``every``: any number of terms."""
    chosen = [("fp32", "bf16", 2), ("fp32", "bf16", 7)]
    if every:
        dtypes = ("fp32", "bf16", "fp16")
        chosen = list(itertools.product(dtypes, dtypes, range(1, step.TERMS + 1)))
    launch = step.launch_config(2**22)
    cases = []
    for first, rest, count in chosen:
        for kernel in (step.forward_kernel, step.backward_kernel):
            terms = [n for n in kernel.arg_names if n[1].isdigit() and n.endswith("_ptr")]
            pointers = dict.fromkeys(terms[:count], rest) | {terms[0]: first}
            pointers |= {"y_ptr": first, "grad_ptr": first}
            numbers = {f"c{i}": "fp32" if i < count else None for i in range(step.TERMS)}
            types = argument_types(kernel, pointers, {"elements": "i32:16", **numbers})
            label = f"{kernel.__name__.split('_')[0]} {first} + {count - 1} {rest}"
            cases.append(AotCase(label, kernel, types, {"BLOCK": launch.block}, launch.num_warps))
    return cases


OPERATIONS: dict[str, Callable[[tuple[int, int], bool], list[AotCase]]] = {
    "bias_gelu": bias_gelu_cases,
    "flow_loss": flow_loss_cases,
    "flow_step": flow_step_cases,
    "fp8_linear": fp8_linear_cases,
    "gated_residual": gated_residual_cases,
    "gelu_fp8": gelu_fp8_cases,
    "norm_modulate": norm_modulate_cases,
    "norm_modulate_fp8": norm_modulate_fp8_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "query_pool": query_pool_cases,
    "residual_norm_modulate": residual_norm_modulate_cases,
    "rms_norm": rms_norm_cases,
    "rollout_attention": rollout_attention_cases,
}
