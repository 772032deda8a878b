"""Compute exp2 and reciprocals in one instruction each, where Triton's functions take four or five.

These functions flush subnormal numbers to zero, which Triton's do not. All other errors are equal,
about one unit in the last place. The interpreter runs no PTX and takes Triton's functions.
"""

from prfl_fast.kernels.runtime.triton import INTERPRETING, tl, triton

PTX = tl.constexpr(not INTERPRETING)


@triton.jit
def exp2(b_t):
    """Return 2ᵗ in float32."""
    if PTX:
        b_e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [b_t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        b_e = tl.exp2(b_t)
    return b_e


@triton.jit
def reciprocal(b_x):
    """Return 1/x in float32."""
    if PTX:
        b_r = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        b_r = 1.0 / b_x
    return b_r


@triton.jit
def gelu(b_h):
    """Return h·σ(2u), the tanh form of GELU; -0 where the exponential is infinite."""
    b_t = b_h * (-2.302208198144325 - 2.302208198144325 * 0.044715 * b_h * b_h)  # -2u·log₂e
    return b_h * reciprocal(1.0 + exp2(b_t))
