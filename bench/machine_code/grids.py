"""Return the grid that an operation launches for a case at the size of a Wan video."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from aot_cases import ELEMENTS, TOKENS
from aot_types import AotCase

from prfl_fast.kernels.attn import norm_rope
from prfl_fast.kernels.common import fp8
from prfl_fast.kernels.flow import loss
from prfl_fast.kernels.linear import gelu
from prfl_fast.kernels.norm import modulate_triton, residual, residual_modulate_triton, rms

Capability = tuple[int, int]
SIZES = {
    "bf16": 2, "fp16": 2, "fp32": 4, "i8": 1, "u8": 1, "fp8e4nv": 1, "fp64": 8, "i64": 8, "i32": 4,
}  # fmt: skip
HEADS = 12  # rows of rms_norm for each token if it normalizes heads


@dataclass(frozen=True)
class Grid:
    """Describe a launch.

    Attributes:
        blocks: their number.
        trips: number of trips of each token loop of a block; empty if the kernel has no loop.
        elements: number of elements of every streamed tensor, by its pointer.
        extra: bytes of partial sums that the kernel writes and a second one reads.
        passes: how often the kernel loads a streamed tensor, by its pointer; once if not given.
    """

    blocks: int
    trips: list[int]
    elements: dict[str, int]
    extra: int = 0
    passes: dict[str, int] | None = None


def element_sizes(case: AotCase) -> dict[str, int]:
    """Return the bytes of an element by pointer."""
    kinds = {n: t.removesuffix(":16") for n, t in case.types.items() if t.startswith("*")}
    return {name: SIZES[kind.removeprefix("*")] for name, kind in kinds.items()}


def _streams(case: AotCase, names: str, count: int) -> dict[str, int]:
    pointers = {f"{name}_ptr" for name in names.split()} & case.types.keys()
    return dict.fromkeys(sorted(pointers), count)


def _is_forward(case: AotCase) -> bool:
    return case.kernel.__name__ == "forward_kernel"


def _row_sums(case: AotCase, names: tuple[str, ...]) -> int:
    return sum(f"{name}_ptr" in case.types for name in names)


def _norm_modulate(case: AotCase, capability: Capability) -> Grid:
    dim, sizes = case.constexprs["D"], element_sizes(case)
    sums = _row_sums(case, ("dot", "total"))
    if _is_forward(case):
        launch: modulate_triton.tiles.Launch = modulate_triton.forward_launch(
            TOKENS, dim, case.constexprs["KIND"], capability
        )
    else:
        size = (TOKENS, 1, dim, sizes["grad_ptr"], capability)
        launch = modulate_triton.backward_launch(*size, sums > 0)
    streams = _streams(case, "x y grad dx", TOKENS * dim)
    extra = 4 * dim * launch.programs * sums
    return Grid(launch.programs, [-(-TOKENS // launch.programs)], streams, extra)


def _residual_norm_modulate(case: AotCase, capability: Capability) -> Grid:
    dim, sizes = case.constexprs["D"], element_sizes(case)
    sums = _row_sums(case, ("gate_sum", "dot", "total"))
    launch: residual_modulate_triton.tiles.Launch
    if _is_forward(case):
        launch = residual_modulate_triton.forward_launch(
            TOKENS, dim, sizes["x_ptr"], capability, False, False
        )
    else:
        item = max(sizes[n] for n in ("grad_h_ptr", "x_ptr", "y_ptr") if n in sizes)
        size = (TOKENS, 1, dim, item, capability)
        launch = residual_modulate_triton.backward_launch(*size, sums > 0)
    streams = _streams(case, "x y out h grad grad_h dx dy", TOKENS * dim)
    extra = 4 * dim * launch.programs * sums
    return Grid(launch.programs, [-(-TOKENS // launch.programs)], streams, extra)


def _gated_residual(case: AotCase, capability: Capability) -> Grid:
    dim, sums = case.constexprs["D"], _row_sums(case, ("sum",))
    if _is_forward(case):
        launch = residual.forward_launch(TOKENS, dim, capability)
    else:
        launch = residual.backward_launch(TOKENS, 1, dim, capability, sums > 0)
    streams = _streams(case, "x y out grad dy", TOKENS * dim)
    extra = 4 * dim * launch.programs * sums
    trips = [-(-TOKENS // launch.programs)]
    return Grid(launch.programs * launch.chunks, trips, streams, extra)


def _rms_norm(case: AotCase, capability: Capability) -> Grid:
    dim = case.constexprs["D"]
    if dim > rms.LONG:
        return _norm_modulate(case, capability)
    rows = TOKENS * (HEADS if dim <= 256 else 1)
    forward = _is_forward(case)
    launch = (rms.forward_launch if forward else rms.backward_launch)(rows, dim, capability)
    streams = _streams(case, "x y grad dx", rows * dim)
    trips = [launch.rows_per_program // launch.block_r]
    return Grid(launch.programs, trips, streams, 0 if forward else 4 * dim * launch.programs)


def _bias_gelu(case: AotCase, capability: Capability) -> Grid:
    dim, summed = case.constexprs["D"], "partial_ptr" in case.types
    launch = gelu.forward_launch(TOKENS, dim)
    if not _is_forward(case):
        launch = gelu.backward_launch(TOKENS, dim, capability)
    streams = _streams(case, "x y grad dx", TOKENS * dim)
    blocks = launch.chunks * -(-dim // launch.block_d)
    trips = [launch.rows_per_program // launch.block_r]
    return Grid(blocks, trips, streams, 4 * dim * launch.chunks if summed else 0)


def _rows_to_fp8(case: AotCase, capability: Capability) -> Grid:
    programs = fp8.row_launch(TOKENS, case.constexprs["D"], capability).programs
    streams = _streams(case, "x y", TOKENS * case.constexprs["D"])
    return Grid(programs, [-(-TOKENS // programs)], streams)


def _qk_norm_rope(case: AotCase, capability: Capability) -> Grid:
    c, dtype = case.constexprs, {"bf16": torch.bfloat16}.get(case.types["q_ptr"][1:5])
    head = c["HEAD"] if "cos_ptr" in case.types or c["PER_HEAD"] else None
    size = (TOKENS, c["DIM"], head, dtype or torch.float32, capability)
    if _is_forward(case):
        launch = norm_rope.forward_launch(*size)
    else:
        launch = norm_rope.backward_launch(*size, case.types.get("q_weight_ptr") == "*fp32:16")
    names = "q k q_out k_out q_grad k_grad dq dk"
    sums = _row_sums(case, ("dq_weight", "dk_weight")) * 4 * launch.programs
    return Grid(
        2 * launch.programs,
        [-(-TOKENS // launch.programs)],
        _streams(case, names, TOKENS * c["DIM"]),
        sums * (c["HEAD"] if c["PER_HEAD"] else c["DIM"]),
    )


def _query_pool(case: AotCase, capability: Capability) -> Grid | None:
    c = case.constexprs
    if "DIM" not in c:
        return None  # the merge of chunks moves few bytes
    chunks, heads, trips = -(-TOKENS // c["BLOCK_T"]), int(case.label.split("H=")[1]), None
    trips = -(-c["DIM"] // c["BLOCK_D"])
    streams = _streams(case, "x dx", TOKENS * c["DIM"])
    return Grid(chunks, [trips, trips], streams, chunks * heads * c["DIM"] * 4, {"x_ptr": 2})


def _flow_step(case: AotCase, capability: Capability) -> Grid:
    streams = dict.fromkeys(element_sizes(case), ELEMENTS)
    return Grid(-(-ELEMENTS // case.constexprs["BLOCK"]), [], streams)


def _flow_loss(case: AotCase, capability: Capability) -> Grid:
    streams = _streams(case, "velocity noise latents dv", ELEMENTS)
    if not _is_forward(case):
        return Grid(-(-ELEMENTS // case.constexprs["BLOCK"]), [], streams)
    launch = loss.sum_launch(ELEMENTS, capability)
    return Grid(launch.programs, [launch.share // launch.block], streams)


# Operations whose time is bytes over bandwidth, by name in aot_cases.OPERATIONS.
GRIDS: dict[str, Callable[[AotCase, Capability], Grid | None]] = {
    "bias_gelu": _bias_gelu,
    "flow_loss": _flow_loss,
    "flow_step": _flow_step,
    "fp8_linear": _rows_to_fp8,
    "gated_residual": _gated_residual,
    "gelu_fp8": _rows_to_fp8,
    "norm_modulate": _norm_modulate,
    "norm_modulate_fp8": _norm_modulate,
    "qk_norm_rope": _qk_norm_rope,
    "query_pool": _query_pool,
    "residual_norm_modulate": _residual_norm_modulate,
    "rms_norm": _rms_norm,
}
