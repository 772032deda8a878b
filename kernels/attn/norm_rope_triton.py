"""RMSNorm and rotation of the tokens of one tensor, forward and backward, as Triton functions.

A token is read in chunks of heads. A thread holds eight neighboring columns of a chunk: it loads 16
bytes at a time and holds both numbers of a pair, and all chunks share one row of angles. All loads
of a token are issued before the first is used.
"""

from dataclasses import dataclass

import torch

from prfl_fast.kernels.common.modulation_rows import token_offset
from prfl_fast.kernels.common.rope import load_turn, next_place, place, rotate
from prfl_fast.kernels.runtime.triton import multiprocessors, tl, triton


@dataclass(frozen=True)
class Launch:
    """Launch of chunks of ``block_h`` heads of ``head`` columns each, padded to ``block_d``."""

    head: int
    block_h: int
    block_d: int
    num_warps: int
    programs: int
    # Registers of a thread: 16 warps fit a processor. Without a limit ptxas spills one or two
    # registers of some kernels to fit one more program.
    registers: int = 128

    def constants(self, dim: int, per_head: bool, table: int = 0) -> dict[str, int | bool]:
        """Return the ``constexpr`` parameters; ``table``: columns of a table by token, else 0."""
        tile = {"HEAD": self.head, "BLOCK_H": self.block_h, "BLOCK_D": self.block_d}
        return {"DIM": dim, **tile, "PER_HEAD": per_head, "TABLE": table}


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _chunks(dim: int, head_dim: int | None, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Return head, block_h, block_d, num_warps; without ``head_dim`` D is cut to suit the warps."""
    # The fewest warps that hold a token without spills, in 40 elements a thread; 24 for float32 and
    # for heads padded to a power of two, which need masks. Small chunks leave few lanes of the last
    # chunk idle.
    padded = head_dim is not None and head_dim != _power_of_2(head_dim)
    most = 24 if padded or dtype == torch.float32 else 40
    for num_warps in (1, 2, 4, 8, 16):
        threads = 32 * num_warps
        head = min(8 * threads, _power_of_2(dim)) if head_dim is None else head_dim
        heads, block_d = -(-dim // head), max(4, _power_of_2(head))
        block_h = min(_power_of_2(heads), max(1, 8 * threads // block_d))
        held = -(-heads // block_h) * block_h * block_d
        # 8 warps of 32 elements would need more than the 128 registers of two programs.
        most = min(most, 24) if num_warps > 4 else most
        if held <= most * threads:
            break
    return head, block_h, block_d, num_warps


def forward_launch(
    tokens: int, dim: int, head_dim: int | None, dtype: torch.dtype, capability: tuple[int, ...]
) -> Launch:
    """Choose 8 tokens a program; fewer if multiprocessors would be idle."""
    head, block_h, block_d, num_warps = _chunks(dim, head_dim, dtype)
    programs = max(32 // num_warps * multiprocessors(capability), -(-tokens // 8))
    return Launch(head, block_h, block_d, num_warps, max(1, min(tokens, programs)))


def backward_launch(
    tokens: int, dim: int, head_dim: int | None, dtype: torch.dtype, capability: tuple[int, ...],
    wide: bool = False,
) -> Launch:  # fmt: skip
    """Choose one resident wave: each program writes a partial row of the weights' gradients.

    ``wide``: weights are float32.
    """
    head, block_h, block_d, num_warps = _chunks(dim, head_dim, dtype)
    # The sums of more than 24 elements a thread, with float32 weights, leave room for 12 warps.
    registers, warps = (168, 12) if num_warps <= 4 and dim > 768 * num_warps else (128, 16)
    if capability[0] == 10 and num_warps == 2:  # where 24 sums a thread spill, and 32 of float32
        registers, warps = (144, 14) if registers == 128 else (200, 10) if wide else (168, 12)
    programs = max(1, min(tokens, warps // num_warps * multiprocessors(capability)))
    return Launch(head, block_h, block_d, num_warps, programs, registers)


@triton.jit
def _columns(
    i, DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return the columns of chunk ``i`` and the mask of those that exist, ``[BH, BD]``."""
    o_d = tl.arange(0, BLOCK_D)
    o_x = (i * BLOCK_H + tl.arange(0, BLOCK_H))[:, None] * HEAD + o_d[None, :]
    if HEAD == BLOCK_D and (i + 1) * BLOCK_H * HEAD <= DIM:
        m_x = tl.full([BLOCK_H, BLOCK_D], True, tl.int1)  # a constant: the loads need no predicate
    else:
        m_x = (o_x < DIM) & (o_d < HEAD)[None, :]
    return o_x, m_x


@triton.jit
def _load_token(
    p_x, DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load the chunks of a token in its own dtype, a tuple of ``[BH, BD]``."""
    b_xs = ()
    for i in tl.static_range((DIM + BLOCK_H * HEAD - 1) // (BLOCK_H * HEAD)):
        o_x, m_x = _columns(i, DIM, HEAD, BLOCK_H, BLOCK_D)
        b_xs += (tl.load(p_x + o_x, mask=m_x, other=0.0),)  # type: ignore[assignment]
    return b_xs


@triton.jit
def _load_weight(weight_ptr, o_x, m_x, PER_HEAD: tl.constexpr):
    """Load w of a chunk in float32 ``[BH, BD]``; all tokens but the first read it from L1."""
    if PER_HEAD:  # one address per element of x: a row of w would need a change of layout
        o_x = tl.broadcast_to(tl.arange(0, o_x.shape[1])[None, :], o_x.shape)
    b_w = tl.load(weight_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_last")
    return b_w.to(tl.float32)


@triton.jit
def _load_angles(p_cos, p_sin, o_h, o_p, DIM: tl.constexpr, HEAD: tl.constexpr):
    """Load cos φ and sin φ of pairs ``o_p`` of heads ``o_h`` in float32."""
    o_table = o_h * (HEAD // 2) + o_p
    m_table = (o_table < DIM // 2) & (o_p < HEAD // 2)
    b_cos = tl.load(p_cos + o_table, mask=m_table, other=0.0).to(tl.float32)
    return b_cos, tl.load(p_sin + o_table, mask=m_table, other=0.0).to(tl.float32)


@triton.jit
def _load_turns(
    p_cos, p_sin, i, DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Load cos φ and sin φ of every head of chunk ``i`` in float32, ``[BH, BLOCK_D / 2]``."""
    if WIDE:
        # A thread has two neighboring pairs of float32 x, but would load four angles and pass them
        # on through shared memory. One load for each pair, in one dimension, has the layout of x.
        o_i = tl.arange(0, BLOCK_H * BLOCK_D // 4)
        o_h = i * BLOCK_H + o_i // (BLOCK_D // 4)
        o_p = o_i % (BLOCK_D // 4) * 2
        even_cos, even_sin = _load_angles(p_cos, p_sin, o_h, o_p, DIM, HEAD)
        odd_cos, odd_sin = _load_angles(p_cos, p_sin, o_h, o_p + 1, DIM, HEAD)
        b_cos = tl.reshape(tl.join(even_cos, odd_cos), (BLOCK_H, BLOCK_D // 2))
        b_sin = tl.reshape(tl.join(even_sin, odd_sin), (BLOCK_H, BLOCK_D // 2))
    else:
        o_h = (i * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
        o_p = tl.arange(0, BLOCK_D // 2)[None, :]
        b_cos, b_sin = _load_angles(p_cos, p_sin, o_h, o_p, DIM, HEAD)
    return b_cos, b_sin


@triton.jit
def _add_at(b_sums, i: tl.constexpr, b_more):
    """Return the tuple with ``b_more`` added to its i-th block."""
    b_new = ()
    for j in tl.static_range(len(b_sums)):
        if j == i:
            b_new += (b_sums[j] + b_more,)  # type: ignore[assignment]
        else:
            b_new += (b_sums[j],)  # type: ignore[assignment]
    return b_new


@triton.jit
def forward_tokens(
    x_ptr, y_ptr, weight_ptr, cos_ptr, sin_ptr, stride_b, stride_l, length, tokens,
    sizes, starts, eps,
    DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PER_HEAD: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Normalize and rotate the tokens of q or of k that belong to this program."""
    WIDE: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth > 16
    share = tl.cdiv(tokens, tl.num_programs(0))
    i_token = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(i_token + share, tokens)
    i_place = place(i_token, sizes)
    while i_token < end:  # range() takes no tensor bounds in the interpreter with numpy ≥ 2.4
        p_x = x_ptr + token_offset(i_token, stride_b, stride_l, length)
        b_xs = _load_token(p_x, DIM, HEAD, BLOCK_H, BLOCK_D)
        if cos_ptr is not None:
            if TABLE <= HEAD // 2:  # the heads share their angles
                b_cos, b_sin = load_turn(cos_ptr, sin_ptr, i_place, starts, HEAD, BLOCK_D, TABLE)
            p_table = i_place[0].to(tl.int64) * TABLE
            i_place = next_place(i_place, sizes)
        rho = 1.0
        if weight_ptr is not None and not PER_HEAD:
            b_square = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            for i in tl.static_range(len(b_xs)):
                b_square += b_xs[i].to(tl.float32) * b_xs[i].to(tl.float32)
            rho = tl.rsqrt(tl.sum(b_square) * (1.0 / DIM) + eps)
        for i in tl.static_range(len(b_xs)):
            o_x, m_x = _columns(i, DIM, HEAD, BLOCK_H, BLOCK_D)
            b_z = b_xs[i].to(tl.float32)  # [BH, BD]
            if weight_ptr is not None:
                if PER_HEAD:
                    rho = tl.rsqrt(tl.sum(b_z * b_z, 1) * (1.0 / HEAD) + eps)[:, None]
                b_z *= _load_weight(weight_ptr, o_x, m_x, PER_HEAD)
            if TABLE > HEAD // 2:
                b_cos, b_sin = _load_turns(
                    cos_ptr + p_table, sin_ptr + p_table, i, DIM, HEAD, BLOCK_H, BLOCK_D, WIDE
                )
            if cos_ptr is not None:  # scale the few angles by rho instead of the whole token
                b_z = rotate(b_z, b_cos * rho, b_sin * rho, BLOCK_H, BLOCK_D)
            else:
                b_z *= rho
            tl.store(y_ptr + i_token * DIM + o_x, b_z.to(y_ptr.dtype.element_ty), mask=m_x)
        i_token += 1


@triton.jit
def backward_tokens(  # noqa: C901 (the flags are constexpr: compiled kernels have few branches)
    grad_ptr, x_ptr, dx_ptr, dw_ptr, weight_ptr, cos_ptr, sin_ptr,
    stride_gb, stride_gl, length_g, stride_xb, stride_xl, length_x, tokens, sizes, starts, eps,
    DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PER_HEAD: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Compute d_x of this program's tokens of q or of k, and its partial row of d_w."""
    WIDE: tl.constexpr = grad_ptr.dtype.element_ty.primitive_bitwidth > 16
    share = tl.cdiv(tokens, tl.num_programs(0))
    pid = tl.program_id(0).to(tl.int64)
    i_token = pid * share
    end = tl.minimum(i_token + share, tokens)
    i_place = place(i_token, sizes)
    b_dws = (tl.zeros([BLOCK_H, BLOCK_D], tl.float32),)  # one block for all chunks if heads share w
    if not PER_HEAD:
        for _ in tl.static_range((DIM - 1) // (BLOCK_H * HEAD)):
            b_dws += (tl.zeros([BLOCK_H, BLOCK_D], tl.float32),)  # type: ignore[assignment]
    while i_token < end:
        p_g = grad_ptr + token_offset(i_token, stride_gb, stride_gl, length_g)
        b_gs = _load_token(p_g, DIM, HEAD, BLOCK_H, BLOCK_D)
        if weight_ptr is not None:
            p_x = x_ptr + token_offset(i_token, stride_xb, stride_xl, length_x)
            b_xs = _load_token(p_x, DIM, HEAD, BLOCK_H, BLOCK_D)
        if cos_ptr is not None:
            if TABLE <= HEAD // 2:  # the heads share their angles
                b_cos, b_sin = load_turn(cos_ptr, sin_ptr, i_place, starts, HEAD, BLOCK_D, TABLE)
            p_table = i_place[0].to(tl.int64) * TABLE
            i_place = next_place(i_place, sizes)
        rho = 1.0
        if weight_ptr is not None and not PER_HEAD:
            b_square = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            b_dot = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            b_turned = ()
            for i in tl.static_range(len(b_gs)):
                o_x, m_x = _columns(i, DIM, HEAD, BLOCK_H, BLOCK_D)
                b_n = b_xs[i].to(tl.float32)  # [BH, BD]
                b_dz = b_gs[i].to(tl.float32)  # [BH, BD]
                if TABLE > HEAD // 2:
                    b_cos, b_sin = _load_turns(
                        cos_ptr + p_table, sin_ptr + p_table, i, DIM, HEAD, BLOCK_H, BLOCK_D, WIDE
                    )
                if cos_ptr is not None:
                    b_dz = rotate(b_dz, b_cos, -b_sin, BLOCK_H, BLOCK_D)
                b_turned += (b_dz,)  # type: ignore[assignment]
                b_square += b_n * b_n
                b_w = tl.load(weight_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
                b_dot += b_dz * b_n * b_w
            # One reduction for both sums, since each reduction waits three times for all warps.
            b_both = tl.reshape(tl.join(b_square, b_dot), [BLOCK_H * BLOCK_D, 2])
            square, dot = tl.split(tl.sum(b_both, 0))
            rho = tl.rsqrt(square * (1.0 / DIM) + eps)
            mean = dot * (1.0 / DIM) * rho * rho * rho
        for i in tl.static_range(len(b_gs)):
            o_x, m_x = _columns(i, DIM, HEAD, BLOCK_H, BLOCK_D)
            if weight_ptr is None or PER_HEAD:
                b_g = b_gs[i]
            else:
                # Load again, from L1. The other eviction policy keeps the compiler from merging
                # these with the first loads, which would cost 50 registers, half of the warps.
                if TABLE > HEAD // 2:  # the angles of a head are longer than its gradient
                    b_g = b_turned[i]
                else:
                    b_g = tl.load(p_g + o_x, mask=m_x, other=0.0, eviction_policy="evict_first")
                b_x = tl.load(p_x + o_x, mask=m_x, other=0.0, eviction_policy="evict_first")
                b_x = b_x.to(tl.float32)
            if weight_ptr is not None and PER_HEAD:
                b_x = b_xs[i].to(tl.float32)
                rho = tl.rsqrt(tl.sum(b_x * b_x, 1) * (1.0 / HEAD) + eps)[:, None]
            b_dz = b_g.to(tl.float32)  # rho is a factor from here on
            if TABLE > HEAD // 2 and (weight_ptr is None or PER_HEAD):
                b_cos, b_sin = _load_turns(
                    cos_ptr + p_table, sin_ptr + p_table, i, DIM, HEAD, BLOCK_H, BLOCK_D, WIDE
                )
            if cos_ptr is not None and (TABLE <= HEAD // 2 or weight_ptr is None or PER_HEAD):
                b_dz = rotate(b_dz, b_cos * rho, -b_sin * rho, BLOCK_H, BLOCK_D)
            else:
                b_dz *= rho
            if weight_ptr is not None:
                if dw_ptr is not None:
                    # For absent heads rho is 1/√eps, which is infinite for an eps of zero.
                    b_dw = tl.where(m_x, b_dz * b_x, 0.0)
                    b_dws = _add_at(b_dws, 0 if PER_HEAD else i, b_dw)
                b_dz *= _load_weight(weight_ptr, o_x, m_x, PER_HEAD)
                if PER_HEAD:
                    mean = tl.sum(b_dz * b_x, 1)[:, None] * (1.0 / HEAD) * rho * rho
                b_dz -= b_x * mean
            if dx_ptr is not None:
                tl.store(dx_ptr + i_token * DIM + o_x, b_dz.to(dx_ptr.dtype.element_ty), mask=m_x)
        i_token += 1
    if dw_ptr is not None:
        if PER_HEAD:
            o_d = tl.arange(0, BLOCK_D)
            tl.store(dw_ptr + pid * HEAD + o_d, tl.sum(b_dws[0], 0), mask=o_d < HEAD)
        else:
            for i in tl.static_range(len(b_dws)):
                o_x, m_x = _columns(i, DIM, HEAD, BLOCK_H, BLOCK_D)
                tl.store(dw_ptr + pid * DIM + o_x, b_dws[i], mask=m_x)
