"""Norms whose affine part depends on time or on a condition; all of the arithmetic is in `ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .stack import Stack


class TimeDependentParameter(nn.Module):
    """A vector [D] that moves between two with time: s · param0 + (1 - s) · param1, s = sigmoid(tau (1 + w) + b).

    Parameters, all [D]: param0 and param1, which start at `init`; nodecay_weight (w) and nodecay_bias (b), which start at 0
    and get no weight decay.

    Source: DiMR (arXiv 2406.09416) §3.2, in the released code's per-channel form.
    """

    NAMES = ("param0", "param1", "nodecay_weight", "nodecay_bias")

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.param0 = nn.Parameter(torch.full((dim,), float(init)))
        self.param1 = nn.Parameter(torch.full((dim,), float(init)))
        self.nodecay_weight = nn.Parameter(torch.zeros(dim))
        self.nodecay_bias = nn.Parameter(torch.zeros(dim))
        self.slot: tuple[int, int, int] | None = None  # first and last column in a TimeTable, and its width

    def forward(self, tau: Tensor) -> Tensor:
        """tau [T], any float dtype, -> [T, D] in the parameters' dtype."""
        return ops.td_params(self.param0, self.param1, self.nodecay_weight, self.nodecay_bias, tau)

    def of(self, table: Tensor) -> Tensor:
        """Its columns of the network's table: [T, P] -> [T, D], a view.

        Raises ValueError where it belongs to no TimeTable, or to one of another width.
        """
        if self.slot is None:
            raise ValueError("table: this parameter belongs to no TimeTable; expected tau instead")
        if table.ndim != 2 or table.shape[1] != self.slot[2]:
            raise ValueError(f"table: expected shape [T, {self.slot[2]}], got {list(table.shape)}")
        return table[:, self.slot[0] : self.slot[1]]

    def extra_repr(self) -> str:
        return f"{self.param0.shape[0]}"


class TimeTable:
    """The time-dependent parameters of a whole network, for any times, in one launch.

    It collects every TimeDependentParameter of `module` in the order of `modules()` and tells each which columns are its.
    Parameter names stay; their memory becomes four flat buffers (see `Stack`). Where modules are exchanged later, make a
    new TimeTable.

    Raises:
        ValueError: a module without time-dependent parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [m for m in module.modules() if isinstance(m, TimeDependentParameter)]
        if not self._parts:
            raise ValueError(f"module: expected time-dependent parameters in it, {type(module).__name__} has none")
        sizes = [part.param0.shape[0] for part in self._parts]
        self.width = sum(sizes)
        start = 0
        for part, size in zip(self._parts, sizes, strict=True):
            part.slot = (start, start + size, self.width)
            start += size
        self._stacks = [Stack() for _ in TimeDependentParameter.NAMES]

    def __call__(self, tau: Tensor) -> Tensor:
        """tau [T], any float dtype, -> [T, P] in the parameters' dtype, P = `width`."""
        flats = []
        for stack, name in zip(self._stacks, TimeDependentParameter.NAMES, strict=True):
            flats.append(stack.flat([_named(part, name) for part in self._parts]))
        return ops.td_params(*flats, tau)


def _named(module: nn.Module, name: str) -> Tensor:
    """getattr, by the short way where there is one: a network has some four hundred of these."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


class ScheduledTimes:
    """A model whose time-dependent parameters are computed once for all times of a schedule; it is a sampler's model.

    A call finds its rows on the device, without a host sync. A time that is not in the schedule gives NaN, never another
    time's row; they are compared in t's own precision, at least float32. The table has the model's weights, dtype and
    device as they are now: make a new one after a change.

    Args:
        model: has `time_table(times) -> [T, P]` and takes `time=[1 or B, P]`, as `models.DiMR` does.
        times: the times that the model will be called with, such as `sampler.grid(20).time`: numbers or a tensor [T].
        shared: all samples of a batch always have the same time, so one row serves them all (NaN if they do not).

    Raises:
        ValueError: no times, or more than one dimension of them.
    """

    def __init__(self, model: Any, times: Sequence[float] | Tensor, shared: bool = False) -> None:
        given = torch.as_tensor(times)
        if given.ndim != 1 or not given.numel():
            raise ValueError(f"times: expected [T] with T of 1 or more, got shape {list(given.shape)}")
        self.model, self.shared = model, shared
        with torch.no_grad():
            known = torch.unique(given.to(torch.promote_types(given.dtype, torch.float32)))  # sorted
            self._known = known.to(next(model.parameters()).device)
            rows = model.time_table(self._known)
            self._table = torch.cat([rows, torch.full_like(rows[:1], torch.nan)])

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """model(x, t, **cond) with t [B], [1] or [], integer or float."""
        return self.model(x, t, time=self.rows(t), **cond)

    def rows(self, t: Tensor) -> Tensor:
        """[1 or B, P]: the rows of times t [B], [1] or []."""
        t = t.reshape(-1).to(torch.promote_types(t.dtype, torch.float32))
        known, absent = self._known.to(t.dtype), len(self._known)
        i = torch.searchsorted(known, t)
        i = torch.where(known[i.clamp(max=absent - 1)] == t, i, absent)
        if self.shared:
            i = torch.where((i == i[:1]).all(), i[:1], absent)
        return self._table.index_select(0, i)


class _TimeDependentNorm(nn.Module):
    """What the two norms share: `affine` gives weight and bias at a time, the rest is the ops'."""

    norm: str
    eps: float
    eps_mode: str

    def _parts(self) -> tuple[TimeDependentParameter, TimeDependentParameter | None]:
        raise NotImplementedError

    def affine(self, tau: Tensor | None = None, table: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, [T, D] each: computed from tau [T], or a view of the network's table [T, P].

        Raises ValueError unless exactly one of them is given.
        """
        if (tau is None) == (table is None):
            raise ValueError(f"tau, table: expected one of them, got {'both' if table is not None else 'none'}")
        weight, bias = (
            None if p is None else p.of(table) if table is not None else p(tau)
            for p in self._parts()
        )  # fmt: skip
        assert weight is not None
        return weight, bias

    def forward(self, x: Tensor, tau: Tensor | None = None, *, table: Tensor | None = None) -> Tensor:
        """The norm over the last dimension.

        Args:
            x: [B, ..., D], any strides, float32, float16 or bfloat16 (or float64, on the reference).
            tau: [1] for one time, [B] for one a sample; any float dtype. Or, instead,
            table: [1, P] or [B, P], what the network's TimeTable gave.

        Returns:
            A contiguous tensor like x; statistics are float32.

        Raises:
            ValueError: a shape outside of the above, or not exactly one of tau and table.
        """
        weight, bias = self.affine(tau, table)
        return ops.norm_modulate(x, None, None, weight, bias, self.norm, self.eps, self.eps_mode)

    def residual(self, x: Tensor, delta: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor]:
        """(x + delta, its norm) in one pass; without a delta, x as it is and its norm. [B, ..., D], table as in `forward`."""
        if delta is None:
            return x, self(x, table=table)
        weight, bias = self.affine(None, table)
        x, h = ops.gate_residual_norm(x, delta, None, None, None, weight, bias, self.norm, self.eps, self.eps_mode)
        return x, h


class TimeDependentLayerNorm(_TimeDependentNorm):
    """LayerNorm with weight(tau) and bias(tau); eps 1e-5 inside the root. Parameters: weight.*, bias.*.

    Source: DiMR (arXiv 2406.09416) §3.2, TD-LN.
    """

    norm, eps, eps_mode = "layer", 1e-5, "inside"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = TimeDependentParameter(dim, 1.0)
        self.bias = TimeDependentParameter(dim, 0.0)

    def _parts(self) -> tuple[TimeDependentParameter, TimeDependentParameter | None]:
        return self.weight, self.bias


class TimeDependentRMSNorm(_TimeDependentNorm):
    """RMSNorm with scale(tau): x · scale / (rms(x) + 1e-8), eps outside of the root. Parameters: scale.*.

    Source: DiMR's released code (TDRMSNorm), which its published models use in every block.
    """

    norm, eps, eps_mode = "rms", 1e-8, "outside"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = TimeDependentParameter(dim, 1.0)

    def _parts(self) -> tuple[TimeDependentParameter, TimeDependentParameter | None]:
        return self.scale, None


class AdaLayerNorm(nn.Sequential):
    """LayerNorm, then · (1 + scale) + shift, where [shift | scale] = Linear(SiLU(c)). Parameters: 1.weight [2 D, C], 1.bias.

    It is the official Sequential(SiLU, Linear) by its parameters' names: DiT's final layer (Peebles & Xie 2023).
    """

    def __init__(self, dim: int, cond_dim: int | None = None, eps: float = 1e-6) -> None:
        super().__init__(nn.SiLU(), nn.Linear(cond_dim or dim, 2 * dim))
        self.eps = eps

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, ..., D], c [B, C] -> a tensor like x."""
        shift, scale = super().forward(c).chunk(2, dim=-1)
        return ops.norm_modulate(x, scale, shift, eps=self.eps)


class AdaLayerNormZero(nn.Sequential):
    """The first norm of an adaLN-Zero block and what the block's rest needs. Parameters: 1.weight [6 D, C], 1.bias.

    Linear(SiLU(c)) = [shift | scale | gate | shift2 | scale2 | gate2], three for each half of the block. It starts at zero:
    the caller's initialisation may draw it, ours doesn't. Source: DiT (Peebles & Xie 2023) §3.2.
    """

    def __init__(self, dim: int, cond_dim: int | None = None, eps: float = 1e-6) -> None:
        super().__init__(nn.SiLU(), nn.Linear(cond_dim or dim, 6 * dim))
        self.eps = eps
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """x [B, ..., D], c [B, C] -> (the modulated norm of x, gate, shift2, scale2, gate2), the latter [B, D] views.

        The block goes on with `x, h = ops.gate_residual_norm(x, attention, gate, scale2, shift2)`.
        """
        shift, scale, *rest = super().forward(c).chunk(6, dim=-1)
        return ops.norm_modulate(x, scale, shift, eps=self.eps), *rest


class AdaLayerNormSingle(nn.Sequential):
    """PixArt's adaLN-single: one Linear(SiLU(t)) for all blocks, to which each block adds its table. Parameters: 1.weight
    [6 D, D], 1.bias (the model's `t_block`). Source: PixArt-α (arXiv 2310.00426) §2.3.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, t: Tensor) -> Tensor:  # type: ignore[override]
        """t [B, D] -> [B, 6, D]: shift, scale, gate of attention, then of the MLP, before a block's table."""
        return super().forward(t).unflatten(-1, (6, -1))

    @staticmethod
    def modulation(table: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """A block's `scale_shift_table` [n, D] with t [B, n, D] from `forward`, or [B, D] -> n views [B, D].

        The final layer has a table of two, shift and scale, and takes t itself ([B, D]), not what `forward` made of it.

        Raises ValueError for a t of other shape.
        """
        t = t.unsqueeze(1) if t.ndim == 2 else t
        if t.ndim != 3 or t.shape[1] not in (1, table.shape[0]) or t.shape[2] != table.shape[1]:
            n, d = table.shape
            raise ValueError(f"t: expected [B, {n}, {d}] or [B, {d}], got {list(t.shape)}")
        return (table + t).unbind(1)


class AdaLayerNormContinuous(nn.Module):
    """norm(x) · (1 + scale) + shift, where [scale | shift] = Linear(SiLU(c)): the other order than DiT's.

    Parameters: linear.weight [2 D, C], linear.bias and, with `elementwise_affine`, norm.weight, norm.bias, as in diffusers,
    whose defaults these are too. norm_type: "layer_norm", or "rms_norm", which has no bias.

    Raises:
        ValueError: another norm_type.
    """

    def __init__(
        self,
        dim: int,
        cond_dim: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        bias: bool = True,
        norm_type: str = "layer_norm",
    ) -> None:
        super().__init__()
        if norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f"norm_type: expected 'layer_norm' or 'rms_norm', got {norm_type!r}")
        self.linear = nn.Linear(cond_dim, 2 * dim, bias=bias)
        self.norm: nn.Module
        if norm_type == "layer_norm":
            self.norm = nn.LayerNorm(dim, eps, elementwise_affine, bias)
        else:
            self.norm = RMSNorm(dim, eps, elementwise_affine)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, ..., D], c [B, C] -> a tensor like x."""
        scale, shift = self.linear(F.silu(c).to(x.dtype)).chunk(2, dim=-1)
        kind = "layer" if isinstance(self.norm, nn.LayerNorm) else "rms"
        bias = getattr(self.norm, "bias", None)
        return ops.norm_modulate(x, scale, shift, self.norm.weight, bias, kind, self.norm.eps)  # type: ignore[arg-type]


class RMSNorm(nn.Module):
    """x · weight / sqrt(mean(x²) + eps). Parameters: weight [D] with `elementwise_affine` (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dim)) if elementwise_affine else None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> a contiguous tensor like it; statistics are float32."""
        return ops.norm_modulate(x, weight=self.weight, norm="rms", eps=self.eps)
