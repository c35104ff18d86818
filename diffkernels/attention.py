"""A function with the signature and the meaning of PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on `ops.attention`: same arguments, same meaning. Differentiable.

    Args:
        query: [..., Sq, D]; key: [..., Sk, D]; value: [..., Sk, Dv]; float32, float16, bfloat16 or float64, alike (autocast
            casts them, as it does for torch); any strides. D and Dv are 1 to 256. The leading dimensions, [B, H] as a rule,
            may be any number and broadcast; nothing is copied for that where strides can say it.
        attn_mask: bool, True where a query sees a key, or a float that is added to the scores; broadcasts to [..., Sq, Sk].
        dropout_p: 0; nothing else is done here.
        is_causal: query i sees the keys up to i, counted from the top left, whatever Sq and Sk are. Not beside attn_mask.
        scale: None is 1 / sqrt(D).
        enable_gqa: dimension -3 of key and of value divides query's: query head h reads head h // (H / Hk).

    Returns:
        [..., Sq, Dv] of query's dtype, as a view whose memory is laid out [..., Sq, H, Dv]. A query that sees no key gives 0,
        as torch's does.

    Raises:
        ValueError: dropout_p above 0, attn_mask beside is_causal, shapes that do not broadcast, or heads that do not divide.
        TypeError: a dtype outside of the above.

    Source: Vaswani et al. 2017, with the arguments of torch 2.5 and later.
    """
    if dropout_p != 0:
        raise ValueError(f"dropout_p: expected 0, got {dropout_p}: there is no dropout of attention here")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: expected None beside is_causal")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.ndim < (3 if enable_gqa else 2):
            raise ValueError(f"{name}: expected {'[..., H, S, D]' if enable_gqa else '[..., S, D]'}, got {list(t.shape)}")
    query, key, value = _autocast(query, key, value)
    if enable_gqa:
        key, value = _grouped(query, key, value)
    leads = [query.shape[:-2], *((*t.shape[:-3], 1) if enable_gqa else t.shape[:-2] for t in (key, value))]
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        shapes = ", ".join(str(list(t.shape)) for t in (query, key, value))
        raise ValueError(f"key, value: expected leading dimensions that broadcast with query's, got {shapes}") from None
    batch, heads = tuple(lead[:-1]), lead[-1] if lead else 1
    b = 0 if 0 in lead else math.prod(batch)

    def folded(t: Tensor) -> Tensor:
        """[B, S, H, D]; [0, S, 1, D] of nothing."""
        own = t.shape[-3] if enable_gqa else heads
        return t.expand(*batch, own, *t.shape[-2:]).reshape(b, own if b else 1, *t.shape[-2:]).transpose(1, 2)

    if attn_mask is not None:
        attn_mask = _folded_mask(attn_mask, (*batch, heads, query.shape[-2], key.shape[-2]), b)
    out = ops.attention(folded(query), folded(key), folded(value), attn_mask, "top-left" if is_causal else "none", scale)
    return out.transpose(1, 2).reshape(*lead, *out.shape[1::2])


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """What autocast makes of them for torch's own function."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """key and value with heads that divide query's, and as many of one as of the other."""
    h = query.shape[-3]
    for name, t in (("key", key), ("value", value)):
        if t.shape[-3] < 1 or h % t.shape[-3]:
            raise ValueError(f"{name}: expected a number of heads that divides query's {h}, got {t.shape[-3]}")
    if key.shape[-3] == value.shape[-3]:
        return [key, value]
    return [t.repeat_interleave(h // t.shape[-3], -3) for t in (key, value)]


def _folded_mask(mask: Tensor, full: tuple[int, ...], b: int) -> Tensor | None:
    """mask, which broadcasts to `full`, [..., H, Sq, Sk], as what broadcasts to [b, H, Sq, Sk]."""
    if mask.ndim > len(full) or any(n not in (1, m) for n, m in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {list(full)}, got {list(mask.shape)}")
    if b == 0:
        return None
    if all(n == 1 for n in mask.shape[:-3]):
        return mask.reshape(mask.shape[-3:])
    return mask.expand(*full[:-3], *mask.shape[-3:]).reshape(b, *mask.shape[-3:])
