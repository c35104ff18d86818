"""Linear layers of 8-bit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import _broadcast
from ..ops._quantize import check_rotation, rotated
from ..ops.act_quantize import PLAIN
from ..ops.linear_w8a8 import COLUMNS


class QuantizedLinear(nn.Module):
    """A Linear whose weight and input are 8-bit codes, for inference: [..., in_features] -> [..., out_features].

    The weight has one scale an output, the input one a row, found anew in each call: nothing is calibrated. With `smooth`,
    [in_features], the input is multiplied by it before it is coded, and the weight's columns were divided by it: large columns
    of the weight are shared between both (Xiao et al. 2023). With `rotate`, 64, 128 or 256, groups of so many columns of both
    are mixed by an orthonormal Hadamard matrix, which changes nothing but that a large column is shared among its group
    (Ashkboos et al. 2024). The result has the input's dtype. A state dict holds `qweight`, int8 [out_features, in_features],
    `weight_scale`, float32 [out_features], `bias`, and where they are `smooth`, float32, and `rotate`, int32: what any machine
    packs for itself when it loads them.
    """

    packed: Tensor
    weight_scale: Tensor
    smooth: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        smooth: bool = False,
        rotate: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_rotation(in_features, rotate)
        self.in_features, self.out_features, self.rotate = in_features, out_features, rotate
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("packed", ops.pack_w8(codes), persistent=False)
        self.register_buffer("weight_scale", torch.ones(out_features, device=device))
        self.register_buffer("smooth", torch.ones(in_features, device=device) if smooth else None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.branches: list[SideBranch] = []  # what is added to the map, and is in no codes and no state dict

    @classmethod
    def of(cls, linear: nn.Linear, smooth: Tensor | None = None, rotate: int = 0) -> QuantizedLinear:
        """The same map, its weight rounded to codes of one scale an output; the bias is `linear`'s own.

        `smooth`: float32 [in_features], above 0, what the input is multiplied by. `rotate`: as for the class.
        """
        made = cls(linear.in_features, linear.out_features, bias=False, rotate=rotate, device=linear.weight.device)
        with torch.no_grad():
            inverse = None if smooth is None else 1 / smooth
            codes, made.weight_scale = ops.act_quantize(linear.weight, smooth=inverse, rotate=rotate)
            made.packed, made.smooth = ops.pack_w8(codes), smooth
        made.bias = linear.bias
        return made.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, float32, or the bias's dtype: for a look; no product uses it."""
        codes = ops.unpack_w8(self.packed, self.out_features, self.in_features)
        weight = codes * self.weight_scale.unsqueeze(-1)
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
        packed, scale = self.packed, self.weight_scale
        bias: Tensor | None = self.bias
        if outputs != (0, None):
            first, last = outputs
            if first % COLUMNS or (last or 0) % COLUMNS:
                raise ValueError(f"outputs: expected multiples of {COLUMNS}, or None for the end, got {outputs}")
            packed = packed[first // COLUMNS : None if last is None else last // COLUMNS]
            scale, bias = scale[first:last], None if bias is None else bias[first:last]
        name = str(dtype).removeprefix("torch.")
        if self.branches:  # they join before the activation: what follows is no epilogue
            y = ops.linear_w8a8(*coded, packed, scale, bias, dtype=name)
            for branch in self.branches:
                y = branch(coded, y, outputs)
            y = PLAIN[activation](y)
            y = y if gate is None else y * _broadcast.align(gate.to(dtype), y)
            return y if residual is None else y + residual.to(dtype)
        return ops.linear_w8a8(*coded, packed, scale, bias, gate, residual, activation, name)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}" + (
            f", rotate={self.rotate}" if self.rotate else ""
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        for branch in self.branches:
            branch._apply(fn, recurse)
        exact = {name: getattr(self, name) for name in ("weight_scale", "smooth")}
        super()._apply(fn, recurse)
        for name, before in exact.items():  # .half() and .to(dtype) are about the model's arithmetic
            if before is not None and getattr(self, name).dtype != torch.float32:
                setattr(self, name, before.to(self.packed.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"] = ops.unpack_w8(self.packed, self.out_features, self.in_features)
        if self.rotate:
            destination[prefix + "rotate"] = torch.tensor(self.rotate, dtype=torch.int32)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        codes, shape = state_dict.pop(prefix + "qweight", None), (self.out_features, self.in_features)
        if (rotate := int(state_dict.pop(prefix + "rotate", 0))) != self.rotate:
            errors.append(f"{prefix}rotate: expected {self.rotate}, got {rotate}")
        if codes is None:
            missing.append(prefix + "qweight")
        elif tuple(codes.shape) != shape or codes.dtype != torch.int8:
            errors.append(f"{prefix}qweight: expected int8 {list(shape)}, got {codes.dtype} {list(codes.shape)}")
        else:
            self.packed = ops.pack_w8(codes).to(self.packed.device if not self.packed.is_meta else codes.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class SideBranch(nn.Module):
    """scale · factor · up (down x), to be added to what a Linear makes of x: see `add_lora_`.

    Beside a QuantizedLinear x comes as that layer's codes, and `down` is coded as its weight is.
    """

    def __init__(self, layer: nn.Linear | QuantizedLinear, down: Tensor, up: Tensor, scale: float, factor: float) -> None:
        super().__init__()
        where = layer.packed if isinstance(layer, QuantizedLinear) else layer.weight
        dtype = torch.float32 if layer.bias is None else layer.bias.dtype
        linear = nn.Linear(layer.in_features, len(down), bias=False, device="meta")
        linear.weight = nn.Parameter(down.to(where.device, torch.float32), requires_grad=False)
        self.down = QuantizedLinear.of(linear, **layer.coding) if isinstance(layer, QuantizedLinear) else linear.to(dtype)
        self.up = nn.Parameter(up.to(where.device, dtype), requires_grad=False)
        self.scale, self.factor = scale, factor

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def alpha(self) -> float:
        """What up (down x) is multiplied by."""
        return self.scale * self.factor

    def forward(self, coded: Sequence[Tensor], y: Tensor, outputs: tuple[int, int | None]) -> Tensor:
        """y [..., N], contiguous, of some outputs of a QuantizedLinear, with this added in place."""
        h = self.down.from_codes(coded, y.dtype)  # type: ignore[operator]
        up = self.up[slice(*outputs)].to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), up.t(), alpha=self.alpha)
        return y
