"""Parameters of several modules as one: laid side by side in one buffer, so that one launch or one GEMM serves them all."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_laying = threading.Lock()


class Stack:
    """Lays parameters one after the other in a buffer of which they become views, and gives that buffer.

    The parameters stay who they are (`p.data` is what changes), so names, state dicts and optimizers don't notice, and the
    buffer is the only copy of the weights. They are laid at the first use, and anew whenever they were moved in between:
    by `.to()`, `load_state_dict(assign=True)`, a deepcopy. A use compares one list of addresses. Nothing but numbers is
    kept here: the parameters themselves hold the buffer.

    Do the first call before a CUDA graph is captured, as its warm-up does. Parameters that were shared with another
    process are no longer shared once they are laid.
    """

    def __init__(self) -> None:
        self._where: list[int] = []

    def __call__(self, params: Sequence[Tensor]) -> Tensor | None:
        """The parameters as one tensor [sum of their sizes], without a copy, or None where that can't be.

        It can't be while compiling, in grad mode with a parameter that requires grad (the gradient goes to the parameters,
        not to the buffer), and where they are not plain: not exactly nn.Parameter (DTensor, quantized, functional_call), of
        several dtypes or devices, on "meta", made in inference mode, or one of them twice.
        """
        if torch.compiler.is_compiling() or set(map(type, params)) != {nn.Parameter}:
            return None
        if torch.is_grad_enabled() and any([p.requires_grad for p in params]):
            return None
        size = sum([p.numel() for p in params])
        # The same addresses may by chance be those of other tensors, side by side: then the storage ends too soon.
        if [p.data_ptr() for p in params] != self._where or not _holds(params[0], size):
            with _laying:
                if not _laid(params, size) and not _lay(params):
                    return None
                self._where = [p.data_ptr() for p in params]
        first = params[0].detach()
        return first.as_strided((size,), (1,), first.storage_offset())

    def flat(self, params: Sequence[Tensor]) -> Tensor:
        """As a call, but with a concatenation, which gradients pass through, where there is no buffer."""
        out = self(params)
        return torch.cat([p.reshape(-1) for p in params]) if out is None else out


class StackedLinear:
    """Several Linear layers of one input in one GEMM. It keeps addresses only: the layers are given in each call."""

    def __init__(self) -> None:
        self._weights, self._biases = Stack(), Stack()

    def __call__(self, layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
        """[layer(x) for layer in layers], as views of one tensor where the layers are plain and their weights can be laid.

        Otherwise, which includes training and torch.compile, the layers are called one by one: a copy of their weights in
        each call would cost more than one GEMM saves. So are layers with hooks, subclasses (LoRA, quantized) and any under
        autocast, whose cache of cast weights works by parameter.

        Args:
            layers: nn.Linear of one input width, all with a bias or all without.
            x: [..., D].

        Returns:
            A tensor [..., out] for each layer.
        """
        weight, bias = self._flat(layers, x)
        if weight is None:
            return [layer(x) for layer in layers]
        out = F.linear(x, weight.view(-1, x.shape[-1]), bias)
        return list(out.split([layer.out_features for layer in layers], dim=-1))  # type: ignore[misc]

    def _flat(self, layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if torch.compiler.is_compiling() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return None, None
        for layer in layers:
            if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
                return None, None
            if layer.in_features != x.shape[-1] or (layer.bias is None) != (layers[0].bias is None):
                return None, None
        weight = self._weights([layer.weight for layer in layers])  # type: ignore[misc]
        if weight is None or layers[0].bias is None:
            return weight, None
        bias = self._biases([layer.bias for layer in layers])  # type: ignore[misc]
        return (None, None) if bias is None else (weight, bias)


def _holds(first: Tensor, size: int) -> bool:
    """Whether the storage of the first parameter is long enough for all."""
    return (first.storage_offset() + size) * first.element_size() <= first.untyped_storage().nbytes()


def _laid(params: Sequence[Tensor], size: int) -> bool:
    """Whether the parameters lie one after the other in one storage."""
    at, dtype = params[0].data_ptr(), params[0].dtype
    for p in params:
        if p.data_ptr() != at or p.dtype != dtype or not p.is_contiguous():
            return False
        at += p.numel() * p.element_size()
    return params[0].data_ptr() != 0 and _holds(params[0], size)


def _lay(params: Sequence[Tensor]) -> bool:
    first = params[0]
    if len({id(p) for p in params}) < len(params) or first.is_meta:
        return False
    if any(p.dtype != first.dtype or p.device != first.device or p.is_inference() for p in params):
        return False
    with torch.inference_mode(False), torch.no_grad():  # a buffer made in inference mode could never be trained again
        buffer = torch.cat([p.detach().reshape(-1) for p in params])
        for p, part in zip(params, buffer.split([p.numel() for p in params]), strict=True):
            p.data = part.view(p.shape)
    return True
