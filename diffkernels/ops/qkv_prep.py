"""What queries, keys and values go through before attention, in one pass: the projection's bias, a norm, the rotation."""

from __future__ import annotations

from torch import Tensor

from .._op import empty_like, op
from . import _qkv


def _check(q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, rope, norm, across, eps):  # type: ignore[no-untyped-def]
    _qkv.check(q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, rope, norm, across, eps)


def _allocate(q, k, v, q_bias, k_bias, v_bias, q_weight, k_weight, q_shift, k_shift, cos, sin, rope, norm, across, eps):  # type: ignore[no-untyped-def]
    return [empty_like(t) for t in (q, k, v) if t is not None]


@op(allocate=_allocate, check=_check, fuzz=_qkv.fuzz, cases=_qkv.CASES)
def qkv_prep(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_shift: Tensor | None = None,
    k_shift: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope: str = "interleaved",
    norm: str = "none",
    across: bool = False,
    eps: float = 1e-6,
) -> list[Tensor]:
    """What `attention` wants of a packed projection: q and k with bias, norm and rotary embedding; v with its bias.

    In this order, of q (and of k likewise): q + q_bias; h = e / sqrt(mean(e²) + eps), where e is q less its mean
    ("layer") or q ("rms"); h · q_weight + q_shift; and of the first R columns of each head the pairs (a, b) become
    (a cos - b sin, b cos + a sin).

    Args:
        q: [B, S, H, D], k: [B, Sk, Hkv, D], v: [B, Sk, Hkv, Dv] or None, where there is nothing to do to it: one dtype,
            float32, float16, bfloat16 (or float64, on the reference), any strides; views of a packed projection are
            read as they are.
        q_bias, k_bias, v_bias: [H · D] of that tensor, as the projection has them.
        q_weight, k_weight, q_shift, k_shift: the norm's affine part, [D], or [H · D] with `across`; None with "none".
        cos, sin: float32 (or float64, on the reference) [S, R/2] or [B, S, R/2], R <= D, together; they want S = Sk.
            `nn.rope_table` and `nn.axial_rope` make them.
        rope: the pairs: "interleaved", columns (2i, 2i + 1); "half", (i, i + R/2).
        norm: "none", "rms" or "layer": over D, or `across` all heads of a token. eps: >= 0.

    Returns:
        [q, k], or [q, k, v] where v is given: contiguous, of the inputs' shapes and dtype. Arithmetic is float32,
        rounded once at the end.

    Raises:
        TypeError: a dtype outside the list. ValueError: a shape or value outside of the above.

    Source: Su et al. 2021 (RoPE), eq. 34; Zhang & Sennrich 2019, eq. 4; Ba et al. 2016, eq. 3; Henry et al. 2020 (QK norm).
    """
    found = []
    for t, bias, weight, shift in ((q, q_bias, q_weight, q_shift), (k, k_bias, k_weight, k_shift)):
        h = _qkv.prepared(t, bias, weight, shift, cos, sin, rope, norm, across, eps)
        found.append(h.to(t.dtype, copy=True))  # never an input itself
    return found if v is None else [*found, _qkv.biased(v, v_bias).to(v.dtype, copy=True)]
