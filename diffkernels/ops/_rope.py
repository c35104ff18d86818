"""Rotary embedding (Su et al. 2021), as the definitions of qkv_prep and decode_attention have it."""

from __future__ import annotations

import torch
from torch import Tensor

ROPES = ("interleaved", "half")


def rotated(h: Tensor, cos: Tensor | None, sin: Tensor | None, rope: str) -> Tensor:
    """h [B, S, H, D], wide; cos, sin [S, R / 2] or [B, S, R / 2]."""
    if cos is None or sin is None:
        return h
    half = cos.shape[-1]
    c, s = (t.to(h.dtype).unsqueeze(-2) for t in (cos, sin))  # [(B,) S, 1, R/2]
    turned, rest = h[..., : 2 * half], h[..., 2 * half :]
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if rope == "interleaved" else turned.split(half, -1)
    pair = a * c - b * s, b * c + a * s
    turned = torch.stack(pair, -1).flatten(-2) if rope == "interleaved" else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1)
