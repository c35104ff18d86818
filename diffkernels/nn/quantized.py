"""Linear layers and convolutions of 8-bit or 4-bit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._linear import COLUMNS, MOST
from ..ops._quantize import check_rotation, rotated
from ..ops.linear_w4a8_lowrank import GROUPS, whole_w4


class Quantized(nn.Module):
    """What layers of codes share: a weight's parts come and go together in state dicts, and keep their dtypes.

    A layer has what a state dict names: `_blank(device)` are a weight's codes before there are any, `_pack` takes codes as this
    machine reads them, `_unpacked()` gives them back.
    """

    packed: Tensor
    weight_scale: Tensor
    group_scale: Tensor | None
    down: Tensor | None
    down_scale: Tensor | None
    up: Tensor | None
    smooth: Tensor | None
    bits, rank, rotate = 8, 0, 0
    branches: Sequence[SideBranch] = ()  # what is added to the map, and is in no codes and no state dict

    def _blank(self, device: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Codes, group scales and the branch's codes, as a state dict has them."""
        raise NotImplementedError

    def _pack(self, codes: Tensor, group_scale: Tensor | None, down: Tensor | None) -> None:
        raise NotImplementedError

    def _unpacked(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """What the weight takes, in bytes: codes, scales and branch."""
        parts = (self.packed, self.group_scale, self.weight_scale, self.down, self.down_scale, self.up)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def _apply(self, fn: Any, recurse: bool = True) -> Quantized:
        for branch in self.branches:
            branch._apply(fn, recurse)
        exact = {name: getattr(self, name) for name in SCALES}
        super()._apply(fn, recurse)
        for name, before in exact.items():  # .half() and .to(dtype) are about the model's arithmetic
            if before is not None and getattr(self, name).dtype != before.dtype:
                setattr(self, name, before.to(self.packed.device))
        for name in ("packed", "group_scale", "down"):  # .to(memory_format=...) is about pictures
            if (t := getattr(self, name)) is not None and not t.is_contiguous():
                setattr(self, name, t.contiguous())
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, t in zip(CODES, self._unpacked(), strict=True):
            if t is not None:
                destination[prefix + name] = t
        if self.rotate:
            destination[prefix + "rotate"] = torch.tensor(self.rotate, dtype=torch.int32)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        # The weight's parts come together or not at all: old codes with new scales would be another weight.
        words = (missing, unexpected, errors)
        before, given = sum(map(len, words)), list[Tensor | None]()
        if (rotate := int(state_dict.pop(prefix + "rotate", 0))) != self.rotate:
            errors.append(f"{prefix}rotate: expected {self.rotate}, got {rotate}")
        keeps = self.packed.is_meta or local_metadata.get("assign_to_params_buffers")
        blank = dict(zip(CODES, self._blank("meta"), strict=True))
        for name in CODES + SCALES:
            key, own = prefix + name, blank[name] if name in CODES else getattr(self, name)
            t = state_dict.pop(key, None) if name in CODES or own is None else state_dict.get(key)
            if own is None and t is not None:
                unexpected.append(key)
            elif own is not None and t is None:
                missing.append(key)
            elif own is not None and (t.shape != own.shape or (name in CODES and t.dtype != own.dtype)):
                wanted = f"{str(own.dtype).removeprefix('torch.')} {list(own.shape)}"
                errors.append(f"{key}: expected {wanted}, got {t.dtype} {list(t.shape)}")
            if name in CODES:
                given.append(t if t is None or keeps else t.to(self.packed.device))
        if sum(map(len, words)) == before:
            try:
                self._pack(*given)  # type: ignore[arg-type]
            except ValueError as error:
                errors.append(f"{prefix}{error}")
        if sum(map(len, words)) > before:
            state_dict |= {prefix + name: own for name in SCALES if (own := getattr(self, name)) is not None}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class QuantizedLinear(Quantized):
    """A Linear whose weight and input are codes, for inference: [..., in_features] -> [..., out_features].

    The input has 8-bit codes with one scale a row, found anew in each call: nothing is calibrated. The weight has codes of
    `bits`: 8, with one scale an output; or 4, with one also for each `group` of 64 or 128 inputs (Lin et al. 2024). With
    `rank` a branch of so many columns beside them, down in 8 bits and up in bfloat16, holds what the codes lose most of
    (Li et al. 2024). With `smooth`, [in_features], the input is multiplied by it before it is coded, and the weight's columns
    were divided by it: large columns of the weight are shared between both (Xiao et al. 2023). With `rotate`, 64, 128 or 256,
    groups of so many columns of both are mixed by an orthonormal Hadamard matrix, which changes nothing but that a large column
    is shared among its group (Ashkboos et al. 2024). The result has the input's dtype.

    A state dict holds what any machine packs for itself when it loads them: `qweight`, int8 [out_features, in_features];
    `weight_scale`, float32 [out_features]; `bias`; and where they are `group_scale`, uint8 [out_features, groups]; `down`, int8
    [rank, in_features], `down_scale`, float32 [rank], and `up`, bfloat16 [rank, out_features]; `smooth`, float32; `rotate`,
    int32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        smooth: bool = False,
        rotate: int = 0,
        bits: int = 8,
        group: int = 64,
        rank: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_rotation(in_features, rotate)
        if bits not in (4, 8):
            raise ValueError(f"bits: expected 4 or 8, got {bits!r}")
        _check_group(group)
        if rank < 0:
            raise ValueError(f"rank: expected 0 or more, got {rank}")
        self.in_features, self.out_features, self.rotate = in_features, out_features, rotate
        self.bits, self.group, self.rank = bits, group, rank
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("group_scale", None, persistent=False)
        self.register_buffer("down", None, persistent=False)
        self._pack(*self._blank(device))
        self.register_buffer("weight_scale", torch.ones(out_features, device=device))
        self.register_buffer("down_scale", torch.ones(rank, device=device) if rank else None)
        self.register_buffer("up", torch.zeros(rank, out_features, device=device, dtype=torch.bfloat16) if rank else None)
        self.register_buffer("smooth", torch.ones(in_features, device=device) if smooth else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.branches: list[SideBranch] = []

    def _blank(self, device: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        n, k, groups = self.out_features, self.in_features, -(-self.in_features // self.group)
        scale = torch.ones(n, groups, dtype=torch.uint8, device=device) if self.bits == 4 else None
        down = torch.zeros(self.rank, k, dtype=torch.int8, device=device) if self.rank else None
        return torch.zeros(n, k, dtype=torch.int8, device=device), scale, down

    def _pack(self, codes: Tensor, group_scale: Tensor | None, down: Tensor | None) -> None:
        if group_scale is None:
            self.packed = ops.pack_w8(codes)
        else:
            self.packed, self.group_scale = ops.pack_w4(codes, group_scale)
        self.down = None if down is None else ops.pack_w8(down)

    def _unpacked(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        n, k, scale = self.out_features, self.in_features, None
        if self.group_scale is None:
            codes = ops.unpack_w8(self.packed, n, k)
        else:
            codes, scale = ops.unpack_w4(self.packed, self.group_scale, n, k)
        return codes, scale, None if self.down is None else ops.unpack_w8(self.down, self.rank, k)

    @classmethod
    @torch.no_grad()
    def of(
        cls, linear: nn.Linear, smooth: Tensor | None = None, rotate: int = 0, bits: int = 8, group: int = 64, rank: int = 0
    ) -> QuantizedLinear:
        """The same map, its weight rounded to codes; the bias is `linear`'s own.

        `smooth`: float32 [in_features], above 0, what the input is multiplied by. `rotate`, `bits`, `group`, `rank`: as for the
        class; the rank is the weight's own where that is less.
        """
        n, k = linear.out_features, linear.in_features
        _check_smooth(smooth, k)
        made = cls(k, n, False, smooth is not None, rotate, bits, group, min(rank, n, k), device=linear.weight.device)
        inverse = None if smooth is None else 1 / smooth
        if bits == 8 and not made.rank:
            codes, made.weight_scale = ops.act_quantize(linear.weight, smooth=inverse, rotate=rotate)
            made._pack(codes, None, None)
        else:
            weight = linear.weight.float() if inverse is None else linear.weight.float() * inverse
            made._code(rotated(weight, rotate) * rotate**-0.5 if rotate else weight)
        made.smooth, made.bias = smooth, linear.bias
        return made.train(linear.training)

    def _code(self, weight: Tensor) -> None:
        """Codes of a smoothed and rotated weight, and a branch beside them: in turn each of what the other leaves."""
        left, least, best = weight, torch.inf, None
        for _ in range(1 + REFINED if self.rank else 1):
            branch, kept = _low_rank(left, self.rank) if self.rank else (None, torch.zeros_like(weight))
            codes, group_scale, scale = self._codes(weight - kept)
            left = weight - self._wide(codes, group_scale) * scale.unsqueeze(-1)
            if best is None or (left - kept).norm().item() < least:
                least, best = (left - kept).norm().item(), (codes, group_scale, scale, branch)
        assert best is not None
        codes, group_scale, self.weight_scale, branch = best
        self._pack(codes, group_scale, None if branch is None else branch[0])
        if branch is not None:
            _, self.down_scale, self.up = branch

    def _codes(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if self.bits == 4:
            return ops.code_w4(weight, self.group)
        codes, scale = ops.act_quantize(weight)
        return codes, None, scale

    def _wide(self, codes: Tensor, group_scale: Tensor | None) -> Tensor:
        """The whole numbers that stand for the weight in units of its outputs' scales."""
        if group_scale is None:
            return codes
        return codes.to(torch.int16) * group_scale.to(torch.int16).repeat_interleave(self.group, 1)[:, : codes.shape[1]]

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, float32, or the bias's dtype: for a look; no product uses it."""
        codes, group_scale, down = self._unpacked()
        weight = self._wide(codes, group_scale) * self.weight_scale.unsqueeze(-1)
        if down is not None and self.up is not None and self.down_scale is not None:
            weight = weight + self.up.float().t() @ (down * self.down_scale.unsqueeze(-1))
        weight = rotated(weight, self.rotate) * self.rotate**-0.5 if self.rotate else weight
        weight = weight if self.smooth is None else weight * self.smooth
        return weight if self.bias is None else weight.to(self.bias.dtype)

    @property
    def coding(self) -> dict[str, Any]:
        """How this layer's input is coded: keyword arguments of `ops.act_quantize` and `ops.norm_quantize`."""
        return {"smooth": self.smooth, "rotate": self.rotate}

    def forward(self, x: Tensor) -> Tensor:
        return self.from_codes(ops.act_quantize(x, **self.coding), x.dtype)

    def from_codes(
        self,
        coded: Sequence[Tensor],
        dtype: torch.dtype,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
        outputs: tuple[int, int | None] = (0, None),
    ) -> Tensor:
        """activation(the map of an input that another op has coded) · gate + residual, with one epilogue.

        Args:
            coded: [codes, code_scale] of [..., in_features], made with this layer's `coding`: what `ops.norm_quantize` and
                `ops.act_quantize` return.
            dtype: the result's, float32, float16 or bfloat16.
            gate, residual, activation: as in `ops.linear_w8a8`.
            outputs: which outputs are wanted, from a multiple of 64 to a multiple of 64 or to the end (None).

        Raises as `ops.linear_w8a8` does, and ValueError for outputs that begin or end within a panel of 64.
        """
        if coded[0].shape[-1] != self.in_features:
            raise ValueError(f"x: expected [..., {self.in_features}], got shape {list(coded[0].shape)}")
        packed, group_scale, scale = self.packed, self.group_scale, self.weight_scale
        bias: Tensor | None = self.bias
        low, up = self._low(coded)
        if outputs != (0, None):
            first, last = outputs
            if first % COLUMNS or (last or 0) % COLUMNS:
                raise ValueError(f"outputs: expected multiples of {COLUMNS}, or None for the end, got {outputs}")
            panels = slice(first // COLUMNS, None if last is None else last // COLUMNS)
            packed, group_scale = packed[panels], None if group_scale is None else group_scale[panels]
            scale, bias = scale[first:last], None if bias is None else bias[first:last]
            up = None if up is None else up[:, first:last]
        rest = (scale, bias, low, up, gate, residual, activation, str(dtype).removeprefix("torch."))
        if group_scale is None:
            return ops.linear_w8a8(*coded, packed, *rest)
        return ops.linear_w4a8_lowrank(*coded, packed, group_scale, *rest)

    def _low(self, coded: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The branches' columns of an input, and their way up again, all side by side."""
        own = [] if self.down is None else [(_down(coded, self.down, self.down_scale), self.up)]
        parts = own + [(branch.low(coded), branch.up) for branch in self.branches]
        if len(parts) < 2:
            return parts[0] if parts else (None, None)
        lows, ups = zip(*parts, strict=True)
        return torch.cat(lows, -1), torch.cat(ups)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}" + (
            (f", rotate={self.rotate}" if self.rotate else "")
            + (f", bits=4, group={self.group}" if self.bits == 4 else "")
            + (f", rank={self.rank}" if self.rank else "")
        )


class WeightOnlyLinear(Quantized):
    """A Linear whose weight is codes of 4 bits, and whose input stays as it is: [..., in_features] -> [..., out_features].

    Where a layer waits for its weight, of few rows, that is a quarter of the bytes; and no rounding of the input is added to
    that of the weight. The codes are `QuantizedLinear`'s of 4 bits, with a scale an output and one for each `group` of 64 or
    128 inputs. For inference; the result has the input's dtype.

    A state dict holds `qweight`, int8 [out_features, in_features]; `group_scale`, uint8 [out_features, groups];
    `weight_scale`, float32 [out_features]; `bias`.
    """

    group_scale: Tensor
    down = down_scale = up = smooth = None
    bits = 4

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, group: int = 64, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        _check_group(group)
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("group_scale", None, persistent=False)
        self._pack(*self._blank(device))
        self.register_buffer("weight_scale", torch.ones(out_features, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.branches: list[SideBranch] = []

    def _blank(self, device: Any) -> tuple[Tensor, Tensor, None]:
        n, k = self.out_features, self.in_features
        scale = torch.ones(n, -(-k // self.group), dtype=torch.uint8, device=device)
        return torch.zeros(n, k, dtype=torch.int8, device=device), scale, None

    def _pack(self, codes: Tensor, group_scale: Tensor | None, down: Tensor | None) -> None:
        assert group_scale is not None
        self.packed, self.group_scale = ops.pack_w4(codes, group_scale)

    def _unpacked(self) -> tuple[Tensor, Tensor, None]:
        return *ops.unpack_w4(self.packed, self.group_scale, self.out_features, self.in_features), None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, group: int = 64) -> WeightOnlyLinear:
        """The same map, its weight rounded to codes; the bias is `linear`'s own."""
        made = cls(linear.in_features, linear.out_features, False, group, device=linear.weight.device)
        codes, group_scale, made.weight_scale = ops.code_w4(linear.weight, group)
        made._pack(codes, group_scale, None)
        made.bias = linear.bias
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, float32, or the bias's dtype: for a look; no product uses it."""
        weight = whole_w4(self.packed, self.group_scale, self.out_features, self.in_features) * self.weight_scale.unsqueeze(-1)
        return weight if self.bias is None else weight.to(self.bias.dtype)

    def forward(
        self, x: Tensor, gate: Tensor | None = None, residual: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        """activation(the map of x) · gate + residual, as `ops.linear_w4a16` has them, and as it raises."""
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected [..., {self.in_features}], got shape {list(x.shape)}")
        low = up = None
        if self.branches:
            low = torch.cat([branch.beside(x) for branch in self.branches], -1)
            up = torch.cat([branch.up for branch in self.branches])
        given = (self.packed, self.group_scale, self.weight_scale, self.bias, low, up, gate, residual, activation)
        return ops.linear_w4a16(x, *given)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, group={self.group}"


class QuantizedConv2d(Quantized):
    """A Conv2d whose weight and input are codes of 8 bits, for inference: [B, C, H, W] -> [B, out_channels, H', W'].

    Both lie with their channels last in memory, as `torch.channels_last` has it; an input that does not is copied. The input
    has one scale a sample, found anew in each call, for a window mixes pixels; the weight has one an output. `smooth`,
    [in_channels]: as for `QuantizedLinear`. The result has the input's dtype. Kernel, stride, padding (by zeros) and dilation
    are one number each, for both directions; groups of channels there are none.

    A state dict holds `qweight`, int8 [out_channels, in_channels, kernel, kernel]; `weight_scale`, float32 [out_channels];
    `bias`; and where it is `smooth`, float32.
    """

    group_scale = down = down_scale = up = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
        smooth: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
        for name, size in sizes.items():
            least = 0 if name == "padding" else 1
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{name}: expected one whole number of {least} or more, got {size!r}")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.register_buffer("packed", None, persistent=False)
        self._pack(*self._blank(device))
        self.register_buffer("weight_scale", torch.ones(out_channels, device=device))
        self.register_buffer("smooth", torch.ones(in_channels, device=device) if smooth else None)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    def _blank(self, device: Any) -> tuple[Tensor, None, None]:
        shape = (self.out_channels, self.in_channels, self.kernel_size, self.kernel_size)
        return torch.zeros(shape, dtype=torch.int8, device=device), None, None

    def _pack(self, codes: Tensor, group_scale: Tensor | None, down: Tensor | None) -> None:
        self.packed = ops.pack_w8(codes.permute(0, 2, 3, 1).flatten(1))

    def _unpacked(self) -> tuple[Tensor, None, None]:
        size = self.kernel_size
        codes = ops.unpack_w8(self.packed, self.out_channels, size * size * self.in_channels)
        return codes.unflatten(1, (size, size, self.in_channels)).permute(0, 3, 1, 2).contiguous(), None, None

    @staticmethod
    def unfit(conv: nn.Conv2d) -> str | None:
        """Why a Conv2d has no counterpart of codes, or None."""
        if conv.groups != 1:
            return f"{conv.groups} groups of channels"
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            return f"padding {conv.padding!r} of {conv.padding_mode}"
        for name in ("kernel_size", "stride", "padding", "dilation"):
            if len(set(getattr(conv, name))) != 1:
                return f"{name} {getattr(conv, name)} is not one number"
        if conv.in_channels * conv.kernel_size[0] ** 2 > MOST:
            return f"windows of more than {MOST} numbers"
        return None

    @staticmethod
    def settings(conv: nn.Conv2d) -> tuple[int, int, int, int, int, int]:
        """The channels, kernel_size, stride, padding and dilation of a Conv2d that is not `unfit`."""
        kernel, padding = conv.kernel_size[0], int(conv.padding[0])
        return conv.in_channels, conv.out_channels, kernel, conv.stride[0], padding, conv.dilation[0]

    @classmethod
    @torch.no_grad()
    def of(cls, conv: nn.Conv2d, smooth: Tensor | None = None) -> QuantizedConv2d:
        """The same map, its weight rounded to codes; the bias is `conv`'s own. Raises ValueError where `unfit` has a reason.

        `smooth`: float32 [in_channels], above 0, what the input is multiplied by.
        """
        if (why := cls.unfit(conv)) is not None:
            raise ValueError(f"conv: expected one kernel for all channels, in one size for both directions; got {why}")
        _check_smooth(smooth, conv.in_channels)
        made = cls(*cls.settings(conv), False, smooth is not None, device=conv.weight.device)
        weight = conv.weight if smooth is None else conv.weight.float() / smooth[:, None, None]
        codes, made.weight_scale = ops.act_quantize(weight.flatten(1))
        made._pack(codes.view_as(weight), None, None)
        made.smooth, made.bias = smooth, conv.bias  # type: ignore[assignment]
        return made.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, float32, or the bias's dtype: for a look; no product uses it."""
        weight = self._unpacked()[0] * self.weight_scale[:, None, None, None]
        weight = weight if self.smooth is None else weight * self.smooth[:, None, None]
        return weight if self.bias is None else weight.to(self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self(x.unsqueeze(0)).squeeze(0)
        if x.ndim != 4:
            raise ValueError(f"x: expected [B, {self.in_channels}, H, W] or without B, got shape {list(x.shape)}")
        coded = ops.group_norm_quantize(channels_last(x), 0, smooth=self.smooth, activation="none")
        return self.from_codes(coded, x.dtype).permute(0, 3, 1, 2)

    def from_codes(
        self,
        coded: Sequence[Tensor],
        dtype: torch.dtype,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """activation(the map of an input that another op has coded) · gate + residual, [B, H', W', out_channels].

        Args:
            coded: [codes, code_scale] of [B, H, W, in_channels], made with this layer's `smooth`, as
                `ops.group_norm_quantize` returns them.
            dtype: the result's, float32, float16 or bfloat16.
            gate, residual, activation: as in `ops.conv2d_w8a8`, as are errors.
        """
        if coded[0].shape[-1] != self.in_channels:
            b, h, w, c = coded[0].shape
            raise ValueError(f"x: expected [B, {self.in_channels}, H, W], got shape {[b, c, h, w]}")
        how = (self.kernel_size, self.stride, self.padding, self.dilation, activation, str(dtype).removeprefix("torch."))
        return ops.conv2d_w8a8(*coded, self.packed, self.weight_scale, self.bias, gate, residual, *how)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )


def _check_group(group: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"group: expected 64 or 128, got {group!r}")


def _check_smooth(smooth: Tensor | None, columns: int) -> None:
    if smooth is None:
        return
    if smooth.shape != (columns,):
        raise ValueError(f"smooth: expected shape [{columns}], got {list(smooth.shape)}")
    if not (smooth > 0).all():
        raise ValueError(f"smooth: expected numbers above 0, got {smooth.min().item():g}")


def channels_last(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C], contiguous: no copy where x is `torch.channels_last` in memory."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


CODES = ("qweight", "group_scale", "down")  # a state dict's names of what is packed, and of what goes with it
SCALES = ("weight_scale", "down_scale", "up", "smooth")
REFINED = 4  # times that codes and branch are found anew beside each other: 0.7 dB where columns differ in size


def _low_rank(weight: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The rank that holds most of a weight [N, K]: (down, its scale, up) as they are kept, and what they stand for."""
    # Halko et al. 2011: the range of a few random columns, after four more products; its own generator draws alike anywhere.
    draw = torch.Generator().manual_seed(0)
    found = torch.randn(weight.shape[1], min(rank + 8, *weight.shape), generator=draw).to(weight.device)
    for _ in range(4):
        found = torch.linalg.qr(weight.t() @ torch.linalg.qr(weight @ found).Q).Q
    u, s, v = torch.linalg.svd(weight @ found, full_matrices=False)
    v = (v @ found.t()).t()
    root = s[:rank].sqrt()
    down, scale = ops.act_quantize((v[:, :rank] * root).t())
    up = (u[:, :rank] * root).t().to(torch.bfloat16).contiguous()
    return (down, scale, up), up.float().t() @ (down * scale.unsqueeze(-1))


def _down(coded: Sequence[Tensor], packed: Tensor, scale: Any) -> Tensor:
    return ops.linear_w8a8(*coded, packed, scale, dtype="bfloat16")


class SideBranch(nn.Module):
    """scale · factor · up (down x), to be added to what a Linear makes of x: see `add_lora_`.

    Beside a QuantizedLinear x comes as that layer's codes, `down` has 8 bits, smoothed and rotated as the layer's weight is,
    and `up`, [rank, out_features], is bfloat16. Beside another layer both are of the dtype of its bias, or float32.
    """

    def __init__(
        self, layer: nn.Linear | QuantizedLinear | WeightOnlyLinear, down: Tensor, up: Tensor, scale: float, factor: float
    ) -> None:
        super().__init__()
        coded = isinstance(layer, QuantizedLinear)
        where = layer.packed if isinstance(layer, Quantized) else layer.weight
        dtype = torch.float32 if layer.bias is None else layer.bias.dtype
        linear = nn.Linear(layer.in_features, len(down), bias=False, device="meta")
        linear.weight = nn.Parameter(down.to(where.device, torch.float32), requires_grad=False)
        self.down = QuantizedLinear.of(linear, **layer.coding) if isinstance(layer, QuantizedLinear) else linear.to(dtype)
        up = up.t().to(where.device, torch.bfloat16 if coded else dtype)
        self.register_buffer("up", up.contiguous())
        self.coded, self.scale, self.factor = coded, scale, factor

    up: Tensor

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    @property
    def alpha(self) -> float:
        """What up (down x) is multiplied by."""
        return self.scale * self.factor

    def low(self, coded: Sequence[Tensor]) -> Tensor:
        """alpha · down x, of a QuantizedLinear's codes of x."""
        return _down(coded, self.down.packed, self.down.weight_scale * self.alpha)  # type: ignore[arg-type, operator]

    def beside(self, x: Tensor) -> Tensor:
        """alpha · down x, of an x that is not coded; of float16 in float32, for float16 may not hold it."""
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        return self.alpha * F.linear(x.to(wide), self.down.weight.to(wide))  # type: ignore[arg-type, union-attr]

    def _apply(self, fn: Any, recurse: bool = True) -> SideBranch:
        up = self.up
        super()._apply(fn, recurse)
        if self.coded and self.up.dtype != up.dtype:
            self.up = up.to(self.up.device)
        return self
