"""Small device functions that the Triton kernels share: the mask, phi, products of any dtypes.

Definition of the mask: reference/dropout.py; of phi: reference/decomposed_linear.py.
"""

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bf16 operands, and truncates to bf16.  So operands
# are widened first, which gives what the matrix units give (products of bf16 are exact in float32),
# and rounding to nearest even, as in hardware, is done by hand.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def keep_mask(seed, rows, first_col, K, threshold, BK: tl.constexpr, ALIGNED: tl.constexpr):
    """bool [BM, BK]: which elements of x[rows, first_col : first_col + BK] stay.  rows int64 [BM].

    ALIGNED: K is a multiple of 4, so that four neighbours share one word.  first_col must then be
    one too: callers step by BK, which is.
    """
    tl.static_assert(BK % 4 == 0)
    BM: tl.constexpr = rows.shape[0]
    start = seed.to(tl.uint64, bitcast=True)
    if ALIGNED:
        first = (rows[:, None] * K + first_col) // 4
        index = first + tl.arange(0, BK // 4)[None, :]
        word = _mix64(start + (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
        shifts = (16 * tl.arange(0, 4)).to(tl.uint64)
        lane = tl.reshape((word[:, :, None] >> shifts[None, None, :]) & 0xFFFF, (BM, BK))
    else:
        index = rows[:, None] * K + (first_col + tl.arange(0, BK))[None, :]
        word = _mix64(start + (index // 4 + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
        lane = (word >> (16 * (index % 4)).to(tl.uint64)) & 0xFFFF
    return lane.to(tl.int32) >= threshold


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def activate(t, PHI: tl.constexpr):
    """phi(t), float32.  PHI: the activation's place in factors.ACTIVATIONS."""
    if PHI == 1:  # a comparison lets NaN through
        t = tl.where(t < 0.0, 0.0, t)
    elif PHI == 2:
        t = t / (1.0 + tl.exp(-t))
    elif PHI == 3:
        t = 0.5 * t * (1.0 + tl.erf(t * 0.7071067811865476))
    elif PHI == 4:
        t = _tanh(t)
    return t


@triton.jit
def _tanh(t):
    """Below 1 by Lambert's continued fraction, where 1 - 2 / (exp(2 t) + 1) would cancel."""
    square = t * t
    above = t * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(t)) + 1.0)
    return tl.where(tl.abs(t) < 1.0, above / below, tl.where(t < 0.0, -far, far))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; a and b may differ in dtype, one float32 and the other narrow.

    Beside bf16 the float32 operand is taken as three bf16 parts, high first: they hold its 24 bits,
    and products of parts are exact in the accumulator.  Beside fp16, whose parts would leave its
    range, the narrow operand is widened in registers.  float32 is never multiplied as tf32.
    """
    if a.dtype == b.dtype:
        acc = _dot(a, b, acc)
    elif a.dtype == tl.bfloat16:
        high, middle, low = _three_parts(b)
        acc = _dot(a, low, _dot(a, middle, _dot(a, high, acc)))
    elif b.dtype == tl.bfloat16:
        high, middle, low = _three_parts(a)
        acc = _dot(low, b, _dot(middle, b, _dot(high, b, acc)))
    else:
        acc = _dot(a.to(tl.float32), b.to(tl.float32), acc)
    return acc


@triton.jit
def dot_for(a, b, acc, NARROW: tl.constexpr):
    """acc + a @ b in float32, for a sum that is rounded to bf16 or fp16 where NARROW.

    Two float32 operands are then taken as two bf16 parts each, and three of the four products
    carry all but 2^-16 of the value; the matrix units do the work.
    """
    if NARROW and a.dtype == tl.float32 and b.dtype == tl.float32:
        a_high, a_low = _two_parts(a)
        b_high, b_low = _two_parts(b)
        acc = _dot(a_high, b_high, _dot(a_low, b_high, _dot(a_high, b_low, acc)))
    else:
        acc = dot(a, b, acc)
    return acc


@triton.jit
def _dot(a, b, acc):
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _two_parts(wide):
    high = narrow(wide, tl.bfloat16)
    return high, narrow(wide - high.to(tl.float32), tl.bfloat16)


@triton.jit
def _three_parts(wide):
    high = narrow(wide, tl.bfloat16)
    rest = wide - high.to(tl.float32)
    middle = narrow(rest, tl.bfloat16)
    low = narrow(rest - middle.to(tl.float32), tl.bfloat16)
    return high, middle, low


@triton.jit
def narrow(wide, dtype: tl.constexpr):
    """A float32 tensor in ``dtype``, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = wide.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return wide.to(dtype)
