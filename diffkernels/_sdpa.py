"""Our attention under PyTorch's own name: kernels in place of torch's flash attention, from enable_sdpa to disable_sdpa."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops

NAME = "diffkernels"  # among torch.nn.attention's implementations of flash attention
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NONE = (None,) * 4  # key_lengths, cu_q, cu_k, kv_index


class Registration:
    """Our kernels for some of aten's ops on one dispatch key, until `remove`: the handle that torch.nn.attention keeps.

    A kernel's first argument calls torch's own: `own(query, ...)`.
    """

    def __init__(self, key: str, kernels: dict[str, Callable[..., Any]]) -> None:
        owns = {name: torch.library.get_kernel(f"aten::{name}", key) for name in kernels}
        self.library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is overridden: it is meant
            for name, kernel in kernels.items():
                self.library.impl(name, self._bound(kernel, owns[name]), key, with_keyset=True)

    @staticmethod
    def _bound(kernel: Callable[..., Any], own: Any) -> Callable[..., Any]:
        @torch.no_grad()  # below autograd, where leaves still look as if they wanted a gradient
        def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
            return kernel(functools.partial(own.call_boxed, keys), *args, **kwargs)

        return call

    def remove(self) -> None:
        self.library._destroy()


def _ours(query: Tensor, dropout_p: float) -> bool:
    """Whether our kernels do it. Forward and backward ask alike: each reads its own forward's logsumexp."""
    return query.dtype in DTYPES and 1 <= query.shape[-1] <= 256 and dropout_p == 0


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: str, scale: float | None) -> tuple[Tensor, Tensor]:
    """Of [B, H, S, D]: the output in the order of q's memory, which compiled graphs count on, and lse [B, H, Sq]."""
    o, lse = ops.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, causal, scale, lse=True)
    o = o.transpose(1, 2)
    if torch.empty_like(q, device="meta").transpose(1, 2).is_contiguous():
        return o, lse
    return torch.empty_like(q).copy_(o), lse


def _backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, out, lse, mask, causal, scale
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, [B, H, S, D] each."""
    bias, mask = (None, mask) if mask is None or mask.dtype == torch.bool else (mask, None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    found = ops.attention_backward(grad, None, q, k, v, out, lse, bias, mask, *NONE, causal, scale, 7)
    return tuple(t.transpose(1, 2) for t in found)


def _forward_cpu(  # type: ignore[no-untyped-def]
    own, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None
):
    if not _ours(query, dropout_p):
        return own(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    out, lse = _forward(query, key, value, attn_mask, "top-left" if is_causal else "none", scale)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)  # torch's lies as [B, Sq, H]


def _backward_cpu(  # type: ignore[no-untyped-def]
    own, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    args = (grad_out, query, key, value, out, logsumexp)
    if not _ours(query, dropout_p):
        return own(*args, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    return _backward(*args, attn_mask, "top-left" if is_causal else "none", scale)


def _forward_cuda(  # type: ignore[no-untyped-def]
    own, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    """Causal is bottom-right here: torch asks for the top left only where Sq = Sk, its CausalBias for the bottom right."""
    if not _ours(query, dropout_p) or return_debug_mask:
        return own(query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)
    out, lse = _forward(query, key, value, None, "bottom-right" if is_causal else "none", scale)
    seed, offset = (query.new_zeros(shape, dtype=torch.uint64) for shape in ((2,), ()))  # of the dropout that is not
    return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)


def _backward_cuda(  # type: ignore[no-untyped-def]
    own, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    args = (grad_out, query, key, value, out, logsumexp)
    if not _ours(query, dropout_p):
        rest = (cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset)
        return own(*args, *rest, scale=scale)
    return _backward(*args, None, "bottom-right" if is_causal else "none", scale)


def _kernels(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {name: forward, f"{name}_backward": backward}


ON_CPU = _kernels("_scaled_dot_product_flash_attention_for_cpu", _forward_cpu, _backward_cpu)
ON_CUDA = _kernels("_scaled_dot_product_flash_attention", _forward_cuda, _backward_cuda)
_active: dict[str, Registration] = {}  # on the CPU; torch.nn.attention holds CUDA's


def enable_sdpa(device: str = "cpu") -> None:
    """From here on, `torch.nn.functional.scaled_dot_product_attention` runs our kernels, in the whole process.

    They take the place of torch's flash attention, in eager mode and in graphs that torch.compile makes or has made, with its
    gradient. What torch gives to another backend stays there: on a CPU, inputs that are not [B, H, S, D], empty or broadcast
    ones, a value head dimension that is not query's, dropout, a mask that wants a gradient, `sdpa_kernel(SDPBackend.MATH)`.
    What our kernels don't do (float64, D above 256) goes to torch's own kernel. Importing diffkernels never does this.

    Args:
        device: "cpu", or "cuda", where the kernels become the implementation "diffkernels" of torch.nn.attention, in place of
            the active one, and where torch prefers cuDNN, it has to be told:
            `with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True)`. That has not run on a GPU
            yet.

    Raises:
        ValueError: another device. RuntimeError: this torch can't register a kernel there.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    if not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.library.get_kernel, so its own kernel could not be reached")
    if device == "cpu":
        if "cpu" not in _active:
            _active["cpu"] = Registration("CPU", ON_CPU)
    else:
        from torch.nn import attention

        if not hasattr(attention, "activate_flash_attention_impl"):
            raise RuntimeError(f"torch {torch.__version__} has no torch.nn.attention.activate_flash_attention_impl")
        if attention.current_flash_attention_impl() != NAME:
            attention.register_flash_attention_impl(NAME, register_fn=lambda: Registration("CUDA", ON_CUDA))
            attention.activate_flash_attention_impl(NAME)


def disable_sdpa() -> None:
    """Undoes `enable_sdpa` on every device: torch's own kernels are back. Does nothing where it was not called."""
    if "cpu" in _active:
        _active.pop("cpu").remove()
    from torch.nn import attention

    if getattr(attention, "current_flash_attention_impl", lambda: None)() == NAME:
        attention.restore_flash_attention_impl()
