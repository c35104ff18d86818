"""What follows a concatenation of channels, without the concatenation: the Linear's columns are split instead."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops


def concat_linear(xs: Iterable[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Linear(cat(xs, -1)) as one GEMM for each of the xs, accumulated (a U-ViT's long skip).

    Args:
        xs: [..., D_i] each, one leading shape and dtype.
        weight: [out, sum of D_i]. bias: [out] or None.

    Returns:
        [..., out]. In half precision the partial sums are rounded to it.

    Raises:
        ValueError: the widths don't add up to the weight's.
    """
    out, at, shape = None, 0, torch.Size()
    for x in xs:
        part, at = weight[:, at : at + x.shape[-1]], at + x.shape[-1]
        if out is None:
            shape = x.shape[:-1]
            out = F.linear(x.reshape(-1, x.shape[-1]), part, bias)
        else:
            out = _accumulate(out, x.reshape(-1, x.shape[-1]), part)
    _whole(at, weight)
    assert out is not None
    return out.view(*shape, -1)


class ConcatNormLinear:
    """Linear(LayerNorm(cat(xs, -1)) · gamma + beta) of slices that come one at a time, and need not be kept.

    With z_i = x_i · gamma_i and W_i the Linear's columns of slice i,

        out = r (sum_i z_i W_i^T - mean · W gamma) + W beta + b,

    where mean and r = 1 / sqrt(var + eps) are the whole row's, merged from the slices' own (Chan, Golub & LeVeque 1983).
    z_i and the moments of a slice come from one pass over it (`ops.slice_moments`). Sums are float32 or wider; in half
    precision each slice's product is rounded to it first. Differentiable.

    Args:
        gamma, beta: [D] or [1, D], shared, or [B, D], one a sample; D is the width of the whole row.
        weight: [out, D]. bias: [out] or None.
        eps: inside the root.

    Source: DiMR (arXiv 2406.09416) §3.1, whose cascade is this over all of a stage's blocks.
    """

    def __init__(self, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> None:
        for name, t in (("gamma", gamma), ("beta", beta)):
            if t.ndim not in (1, 2) or t.shape[-1] != weight.shape[1] or t.shape != gamma.shape:
                raise ValueError(
                    f"{name}: expected [{weight.shape[1]}] or [B, {weight.shape[1]}], both alike; got {list(t.shape)}"
                )
        self.gamma, self.beta, self.weight, self.bias, self.eps = gamma, beta, weight, bias, eps
        self._at = 0
        self._sum: Tensor | None = None
        self._moments: list[Tensor] = []
        self._sizes: list[int] = []
        self._like = gamma

    def add(self, x: Tensor) -> None:
        """Takes the next slice, [B, ..., D_i] of any strides."""
        d = x.shape[-1]
        columns = slice(self._at, self._at + d)
        self._at += d
        if self._at > self.weight.shape[1]:
            _whole(self._at, self.weight)
        z, moments = ops.slice_moments(x, self.gamma[..., columns])
        self._moments.append(moments)
        self._sizes.append(d)
        rows, part = z.view(-1, d), self.weight[:, columns]
        if self._sum is None:
            self._like = x
            product = F.linear(rows, part)
            self._sum = product.to(moments.dtype)
            self._narrow = product.dtype != moments.dtype
        elif self._narrow:
            product = F.linear(rows, part)
            self._sum = self._sum + product if torch.is_grad_enabled() else self._sum.add_(product)
        else:
            self._sum = _accumulate(self._sum, rows, part)

    def result(self) -> Tensor:
        """[B, ..., out] in the slices' dtype. Raises ValueError where slices are missing."""
        _whole(self._at, self.weight)
        x, total = self._like, self._sum
        assert total is not None
        mean, r = self._statistics()
        both = F.linear(torch.stack([self.gamma, self.beta]).to(self.weight.dtype), self.weight).to(total.dtype)
        both = both.view(2, -1, *(1,) * (x.ndim - 2), both.shape[-1])  # [2, 1 or B, 1, ..., out]
        offset = both[1] if self.bias is None else both[1] + self.bias
        centred = torch.addcmul(total.view(*x.shape[:-1], -1), mean, both[0], value=-1)
        return torch.addcmul(offset, centred, r).to(x.dtype)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and 1 / deviation of the whole rows, [B, ..., 1] each."""
        means, squares = torch.stack(self._moments).unbind(-1)
        sizes, width = torch.cat([means.new_full((1,), size) for size in self._sizes]), sum(self._sizes)
        sizes = sizes.view(-1, *(1,) * (means.ndim - 1))
        mean = (means * sizes).sum(0) / width
        var = (squares + sizes * (means - mean).square()).sum(0) / width
        return mean.unsqueeze(-1), torch.rsqrt(var + self.eps).unsqueeze(-1)


def concat_norm_linear(
    xs: Iterable[Tensor], gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Linear(LayerNorm(cat(xs, -1)) · gamma + beta) without the concatenation: see `ConcatNormLinear`, which it runs.

    Args:
        xs: [B, ..., D_i] each. The rest is as there.

    Returns:
        [B, ..., out] of the xs' dtype.

    Raises:
        ValueError: shapes that don't fit each other.
    """
    norm = ConcatNormLinear(gamma, beta, weight, bias, eps)
    for x in xs:
        norm.add(x)
    return norm.result()


def _accumulate(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total + x W^T; into total itself where no gradient is recorded (and autocast, which knows addmm only, is off)."""
    if torch.is_grad_enabled() or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        return torch.addmm(total, x, weight.t())
    return total.addmm_(x, weight.t())


def _whole(width: int, weight: Tensor) -> None:
    if width != weight.shape[1]:
        raise ValueError(f"xs: expected {weight.shape[1]} channels in all, as weight has, got {width}")
