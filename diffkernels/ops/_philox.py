"""Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) and the normal numbers made of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four random words of four words of counter and two of key; words are int64 tensors in [0, 2^32)."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p, q = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c  # wrap to int64; their bits are right
        a, b, c, d = (q >> 32) & WORD ^ b ^ k0, q & WORD, (p >> 32) & WORD ^ d ^ k1, p & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return [a, b, c, d]


def normal(seed: Tensor, step: Tensor, slot: int, elements: int) -> Tensor:
    """[B, elements] standard normal numbers in float64.

    Element e of sample b: lane e % 4 of the block with key seed[b] and counter (e/4 low, e/4 high, step, slot). A word r is
    u = (r >> 8) 2^-24 + 2^-25 in (0, 1); Box-Muller makes lanes (0, 1) of words (0, 1), and lanes (2, 3) of words (2, 3):
    sqrt(-2 log u) cos(2 pi v) and sqrt(-2 log u) sin(2 pi v). The kernels are within 4 ulp of
    float32, and 1e-6 where |z| < 0.1.
    """
    blocks = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(blocks)
    counter = [blocks & WORD, blocks >> 32, (step.to(torch.int64) & WORD) + zero, zero + slot]
    key = [(seed & WORD)[:, None], ((seed >> 32) & WORD)[:, None]]
    u = [(word >> 8).to(torch.float64) * 2.0**-24 + 2.0**-25 for word in philox4x32(counter, key)]
    lanes = []
    for i in (0, 2):
        radius, angle = torch.sqrt(-2 * torch.log(u[i])), 2 * math.pi * u[i + 1]
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(lanes, -1).flatten(1)[:, :elements]
