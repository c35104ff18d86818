"""Philox noise, bit for bit that of csrc/philox.h: what calls it is compiled without `enable_fp_fusion`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _radius(word):
    """sqrt(-2 log u), u = ((word >> 8) + 1/2) 2^-24."""
    k = (word >> 8).to(tl.float32)
    octave = (k + 0.5).to(tl.int32, bitcast=True) - 0x3F3504F3
    shift = octave & -0x800000
    r = (k * (0x3F800000 - shift).to(tl.float32, bitcast=True) - 1.0) + (0x3F000000 - shift).to(tl.float32, bitcast=True)
    square = r * r
    e = ((octave >> 23) - 24).to(tl.float32)
    p = r * -0.17400860786437988 + 0.2853497266769409
    p = p * r + -0.29829537868499756
    p = p * r + 0.3315517008304596
    p = p * r + -0.3992612659931183
    p = p * r + 0.5000267624855042
    p = p * r + -0.6666781902313232
    t = p * r * square + square
    return tl.sqrt_rn(((t + e * 4.2438888e-4) - (r + r)) + e * -1.38671875)


@triton.jit
def _pair(word, angle):
    """The two normal numbers of two uint32 words."""
    turn = ((angle & 0xFFFFFF80) | 0x80) + 0x20000000
    t = (((turn >> 7) & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    z = t * t
    sine = z * -0.00460165785625577 + 0.07968003302812576
    sine = sine * z + -0.6459634900093079
    sine = (sine * z + 1.5707963705062866) * t
    cosine = z * -0.02039858140051365 + 0.25359493494033813
    cosine = cosine * z + -1.233696699142456
    cosine = cosine * z + 0.9999999403953552
    swapped = (turn & 0x40000000) != 0
    x = tl.where(swapped, sine, cosine).to(tl.uint32, bitcast=True) ^ ((turn + 0x40000000) & 0x80000000)
    y = tl.where(swapped, cosine, sine).to(tl.uint32, bitcast=True) ^ (turn & 0x80000000)
    length = _radius(word)
    return length * x.to(tl.float32, bitcast=True), length * y.to(tl.float32, bitcast=True)


@triton.jit
def normals(seed, step, slot, first, COUNT: tl.constexpr):
    """Elements [first, first + COUNT) of a sample's noise; `first` is a multiple of 4."""
    block = first // 4 + tl.arange(0, COUNT // 4).to(tl.int64)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, step, slot)
    z0, z1 = _pair(a, b)
    z2, z3 = _pair(c, d)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
