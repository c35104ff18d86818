"""The one rule by which a per-sample operand meets x: it aligns left.

With x [B, ..., D]: [D] is shared; [B, D] (also [B, 1, D]) per sample; [B, S, D] per token; [B, F, 1, D] per frame, where x
is [B, F, S, D], or [B, N, D] with F | N (token n belongs to frame n // (N / F)). Leading dimensions match x's from the
left and 1s go before D; anything else is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def matches(t: Tensor, x: Tensor) -> bool:
    """Whether operand `t` has a shape that the rule allows for `x`."""
    if t.ndim < 1 or t.shape[-1] != x.shape[-1]:
        return False
    frames = _frames(t, x)
    prefix = _prefix(t)
    if frames:
        return t.shape[:-3] == x.shape[:-2] and frames > 0 and x.shape[-2] % frames == 0
    return len(prefix) < x.ndim and tuple(prefix) == tuple(x.shape[: len(prefix)])


def drawn(draw: Any, pick: Any, narrowest: int = 1, multiple: int = 1) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
    """For fuzzing: a shape for x, and what draws an operand that meets it."""
    b, f, s, d = pick.size(4, 0), pick.size(3), pick.size(6, 0), multiple * max(narrowest, pick.size(2500 // multiple))
    shape, more = pick.choice(
        (
            ((d,), []),
            ((b, d), [(b, d), (b, 1, d)]),
            ((b, f * s, d), [(b, d), (b, 1, d), (b, f * s, d), (b, f, 1, d)]),
            ((b, f, s, d), [(b, d), (b, f, d), (b, f, 1, d), (b, f, s, d)]),
        )
    )
    return shape, lambda: pick.choice((draw, draw, draw.f32))(*pick.choice([(d,), *more]))


def align(t: Tensor, x: Tensor) -> Tensor:
    """Operand `t` in a shape that broadcasts against `x` as PyTorch does."""
    frames = _frames(t, x)
    if frames:
        return t.squeeze(-2).repeat_interleave(x.shape[-2] // frames, dim=-2)
    prefix = _prefix(t)
    return t.reshape(*prefix, *(1,) * (x.ndim - 1 - len(prefix)), t.shape[-1])


def expected(x: Tensor) -> str:
    """The allowed shapes, for error messages."""
    b, d = x.shape[0], x.shape[-1]
    return f"[{d}], leading dimensions of {list(x.shape)} then 1s then {d}, or [{b}, F, 1, {d}] with F dividing the tokens"


def _frames(t: Tensor, x: Tensor) -> int:
    """F where `t` is [B, F, 1, D] beside x [B, N, D], else 0."""
    return t.shape[-3] if t.ndim == x.ndim + 1 and t.ndim >= 4 and t.shape[-2] == 1 else 0


def _prefix(t: Tensor) -> list[int]:
    prefix = list(t.shape[:-1])
    while prefix and prefix[-1] == 1:
        prefix.pop()
    return prefix


def rows(t: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """Operand `t` as [R, D], and how many consecutive rows of `x` (leading dimensions flattened) share one of its rows."""
    matrix = t.reshape(-1, t.shape[-1])
    return matrix, max(1, x.numel() // max(1, x.shape[-1] * matrix.shape[0]))


def gather(values: Tensor, t: Tensor) -> Tensor:
    """The transpose of `align`: `values`, shaped like x, summed over the rows that share a row of operand `t`; in t's shape."""
    count = t.numel() // max(1, t.shape[-1])
    rows = values.reshape(-1, values.shape[-1]) if values.numel() else values.new_zeros(0, t.shape[-1])
    return rows.reshape(count, len(rows) // max(1, count), t.shape[-1]).sum(1).reshape(t.shape)
