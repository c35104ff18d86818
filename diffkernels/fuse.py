"""The passes that 8 bits cost, taken away: codes come from the op that has the activation in hand, where that is proven."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .nn import (
    Fusable,
    Quantized,
    QuantizedConv2d,
    QuantizedLinear,
    RMSNorm,
    WeightOnlyLinear,
    channels_last,
    other_than,
    uncoded,
    watched,
)
from .ops._linear import COLUMNS


@dataclass(frozen=True)
class Fusion:
    """One line of a `Report`: a module, what of it is one chain ("" if nothing), and why the rest was left alone."""

    name: str
    kind: str
    chain: str = ""
    reason: str | None = None


@dataclass
class Report:
    """What `fuse_` did. `str(report)` is a table."""

    modules: list[Fusion] = field(default_factory=list)

    @property
    def fused(self) -> list[Fusion]:
        return [line for line in self.modules if line.chain]

    def __str__(self) -> str:
        lines = [(m.name or "the model", m.kind, m.chain or "–", m.reason or "") for m in self.modules]
        titles = ("module", "kind", "fused", "why not")
        wide = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
        rows = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, wide, strict=True)).rstrip() for line in (titles, *lines)]
        return "\n".join([*rows, f"{len(self.fused)} of {len(self.modules)} fused"])


def fuse_(model: nn.Module) -> Report:
    """Lets norms, activations and Linears of a quantized model hand 8-bit codes to each other, in place, for inference.

    A quantized layer codes its input in a pass of its own. Fused, the norm or activation before it writes the codes
    (`ops.norm_quantize`, `ops.act_quantize`, `ops.group_norm_quantize`), and a DiT block's gates and residuals go into the
    Linears' epilogues (`ops.linear_w8a8`). That is done where it is proven from the types and settings of the modules: in
    blocks and MLPs of `models.DiT`, MLPs of `models.DiMR` and whatever else is a `nn.Fusable`; in diffusers' ResnetBlock2D, and
    their FeedForward with GELU, GEGLU, SiLU or SwiGLU; in an `nn.Sequential`, where a QuantizedLinear follows a GELU, SiLU,
    LayerNorm or RMSNorm, or a QuantizedConv2d a GroupNorm, a SiLU or both (a Dropout that does nothing may stand between). Of
    `nn.WeightOnlyLinear`, which wants no codes, an MLP's GELU becomes the epilogue. The rest is left alone, with the reason
    in the report.

    The proof is repeated in each call: in training mode, or with hooks on an inner layer (so under `compare`), the layers
    are called as before. Results differ by roundings that the fused form does not make: inputs are [..., D], float32,
    float16 or bfloat16, and the result has their dtype, as before. No parameter changes, nor does a state dict: what is saved
    loads unfused. A second call looks again, at what has changed.

    Args:
        model: any module, in evaluation mode, after `quantize_`.

    Returns:
        A `Report` with a line for every module that has a fused form, and every quantized layer in none of them.

    Raises:
        TypeError: `model` is no module.

    Source: Xiao et al. 2023, SmoothQuant (codes from the norm); Li et al. 2024, SVDQuant (from the activation).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    report, inside, explained = Report(), set[nn.Module](), set[nn.Module]()
    for name, module in list(model.named_modules()):
        if module in inside:
            continue
        if (other := _other_class(module)) is not None:
            module.__class__ = other
        if isinstance(module, Fusable):
            kind, why = _kind(module), module.why_not()
            module.fused = why is None
            report.modules.append(Fusion(name, kind, module.chain() if module.fused else "", why or module.rest()))
            explained.update(module.covers())
            if module.fused:
                inside.update(module.covers())
            elif module.plain is not None:
                del module.fused
                module.__class__ = module.plain  # type: ignore[assignment]
        elif isinstance(module, Quantized) and module not in explained:
            if isinstance(module, WeightOnlyLinear):
                report.modules.append(Fusion(name, _kind(module), reason="its input is not coded"))
                continue
            around = f"in {_kind(model.get_submodule(name.rpartition('.')[0]))}, of which no pattern is known"
            report.modules.append(Fusion(name, _kind(module), reason=around if name else "the model itself"))
    return report


def _other_class(module: nn.Module) -> type[Fusable] | None:
    """For a module of others that may have a fused form, its class with both forms; `fuse_` goes back where there is none."""
    if type(module) is nn.Sequential and any(_takes_codes(layer) for layer in module):
        return FusedSequential
    kind: Any = type(module)
    if _diffusers(module, "attention") == "FeedForward":
        return _fused(_FeedForward, kind)
    return _fused(_ResnetBlock, kind) if _diffusers(module, "resnet") == "ResnetBlock2D" else None


def _takes_codes(layer: nn.Module | None) -> bool:
    return isinstance(layer, Quantized) and not isinstance(layer, WeightOnlyLinear)


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Fused")


class FusedSequential(Fusable, nn.Sequential):
    """What `fuse_` makes of an nn.Sequential, in place: it answers the same, and is one in everything else."""

    plain = nn.Sequential

    def chain(self) -> str:
        return ", ".join(f"{first} {_kind(self._modules[first])} → codes, {last}" for first, last in self._pairs()[0].items())

    def obstacle(self) -> str | None:
        pairs, alone = self._pairs()
        return None if pairs else _listed(alone)

    def rest(self) -> str | None:
        return _listed(self._pairs()[1])

    def covers(self) -> list[nn.Module]:
        return [layer for layer in self if _takes_codes(layer)]

    def _pairs(self) -> tuple[dict[str, str], dict[str, str]]:
        """From the name of each layer that can write codes to that of the product behind it; and why others have none."""
        pairs: dict[str, str] = {}
        alone: dict[str, str] = {}
        before: list[str] = []
        for name, layer in self._modules.items():
            if isinstance(layer, Quantized) and _takes_codes(layer):
                writer, why = self._writer(before, layer)
                why = other_than(QuantizedConv2d if isinstance(layer, QuantizedConv2d) else QuantizedLinear, name, layer) or why
                if why is None:
                    pairs[writer] = name
                else:
                    alone[name] = why
            if layer is not None and not _idle(layer):
                before.append(name)
        return pairs, alone

    def _writer(self, before: list[str], layer: Quantized) -> tuple[str, str | None]:
        """Of the layers before a product the first of those that can write its codes, and why they can't, or None."""
        run = before[-1:]
        if isinstance(layer, QuantizedConv2d) and before and type(self._modules[before[-1]]) is nn.SiLU:
            norm = self._modules[before[-2]] if len(before) > 1 else None
            run = before[-2:] if type(norm) is nn.GroupNorm else run
        whys = [_mute(name, self._modules[name], layer) for name in run]
        return (run[0], next(filter(None, whys), None)) if run else ("", "it comes first")

    def forward(self, x: Tensor) -> Tensor:
        if not self.fuses() or _autocast():
            return super().forward(x)
        pairs, layers = self._pairs()[0], iter(self._modules.items())
        for name, layer in layers:
            after: Any = self._modules[pairs[name]] if name in pairs else None
            picture = isinstance(after, QuantizedConv2d)
            if after is None or (picture and x.ndim != 4):
                x = layer(x)  # type: ignore[misc]
                continue
            activation, dtype = "silu" if type(layer) is nn.SiLU else "none", x.dtype
            for passed, between in layers:  # a SiLU of a GroupNorm, a Dropout that does nothing; the product
                if passed == pairs[name]:
                    break
                activation = "silu" if type(between) is nn.SiLU else activation
            if picture:
                norm = layer if isinstance(layer, nn.GroupNorm) else None
                x = after.from_codes(_group_norm(norm, channels_last(x), after, activation), dtype).permute(0, 3, 1, 2)
            else:
                x = after.from_codes(CODED[type(layer)](layer, x, after.coding), dtype)  # type: ignore[index]
        return x


class _OfDiffusers(Fusable):
    """A class of theirs, fused: made where it is wanted, for diffusers need not be there."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles name the class's parent
        return _made, (type(self).__mro__[1], self.plain), self.__dict__


class _FeedForward(_OfDiffusers):
    """diffusers' FeedForward, fused. net: their activation, which begins with a Linear; Dropout; Linear; perhaps Dropout."""

    net: Any

    def chain(self) -> str:
        return f"proj, {_kind(self.net[0])} → codes, 2"

    def obstacle(self) -> str | None:
        if len(self.net) not in (3, 4):
            return f"net has {len(self.net)} modules, not 3 or 4"
        first, last = self.net[0], self.net[2]
        activation = _activation(first)
        if activation is None:
            return f"net.0: {_kind(first)} has no kernel"
        for i in (1, 3):
            if i < len(self.net) and not _idle(self.net[i]):
                return f"net.{i} is no idle Dropout"
        why = watched("net.0", first) or uncoded("net.0.proj", first.proj) or uncoded("net.2", last)
        if why is None and activation in GATED and last.in_features % COLUMNS:
            return f"net.2: {last.in_features} inputs are no multiple of {COLUMNS}"
        return why

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = hidden_states
        if args or kwargs or not self.fuses() or _autocast():
            return super().forward(x, *args, **kwargs)
        first, last = self.net[0], self.net[2]
        activation, coded = _activation(first), ops.act_quantize(x, **first.proj.coding)
        if activation in GATED:  # its first half is the value, its second half the gate: ops.act_quantize has them otherwise
            gate = first.proj.from_codes(coded, x.dtype, activation=GATED[activation], outputs=(last.in_features, None))
            h, activation = first.proj.from_codes(coded, x.dtype, gate, outputs=(0, last.in_features)), "none"
        else:
            h = first.proj.from_codes(coded, x.dtype)
        return last.from_codes(ops.act_quantize(h, activation, **last.coding), x.dtype)


class _ResnetBlock(_OfDiffusers):
    """diffusers' ResnetBlock2D, fused: each GroupNorm with its SiLU writes the codes of the convolution behind it."""

    norm1: Any
    norm2: Any
    conv1: Any
    conv2: Any
    conv_shortcut: Any
    time_emb_proj: Any
    nonlinearity: Any
    dropout: Any
    upsample: Any
    downsample: Any
    skip_time_act: bool
    time_embedding_norm: str
    output_scale_factor: float

    def chain(self) -> str:
        return "norm1 → codes, conv1 + time, norm2 → codes, conv2 + residual"

    def obstacle(self) -> str | None:
        if self.upsample is not None or self.downsample is not None:
            return "resizes between norm1 and conv1"
        if self.time_emb_proj is None and self.time_embedding_norm == "scale_shift":
            return "scales by time, of which it has no projection"
        why = watched("nonlinearity", self.nonlinearity) or watched("dropout", self.dropout)
        if why is None and type(self.nonlinearity) is not nn.SiLU:
            why = f"nonlinearity: {_kind(self.nonlinearity)} has no kernel"
        if why is None and not _idle(self.dropout):
            why = "dropout is no idle Dropout"
        if why is not None:
            return why
        for i in ("1", "2"):
            norm, conv = getattr(self, f"norm{i}"), getattr(self, f"conv{i}")
            why = other_than(nn.GroupNorm, f"norm{i}", norm) or other_than(QuantizedConv2d, f"conv{i}", conv)
            why = why or _mute(f"norm{i}", norm, conv)
            if why is not None:
                return why
        return None

    def rest(self) -> str | None:
        return "conv_shortcut codes its own input" if type(self.conv_shortcut) is QuantizedConv2d else None

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        odd = args or kwargs or input_tensor.ndim != 4 or (temb is None) != (self.time_emb_proj is None)
        if not odd and temb is not None:  # which the layers broadcast, and promote
            odd = temb.ndim != 2 or temb.shape[0] != input_tensor.shape[0] or temb.dtype != input_tensor.dtype
        if not odd and self.norm1.weight is not None:
            odd = self.norm1.weight.dtype != input_tensor.dtype
        if odd or not self.fuses() or _autocast():
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, dtype = channels_last(input_tensor), input_tensor.dtype
        time: Any = None
        scale: tuple[Tensor, ...] = ()
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                time, scale = None, time.chunk(2, 1)
        h = self.conv1.from_codes(_group_norm(self.norm1, x, self.conv1, "silu"), dtype, residual=time)
        coded = _group_norm(self.norm2, h, self.conv2, "silu", *scale)
        if self.conv_shortcut is not None:
            x = channels_last(self.conv_shortcut(input_tensor))
        y = self.conv2.from_codes(coded, dtype, residual=x).permute(0, 3, 1, 2)
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor


def _group_norm(norm: nn.GroupNorm | None, x: Tensor, conv: QuantizedConv2d, activation: str, *scale: Tensor) -> list[Tensor]:
    """The codes of a convolution's input; `scale` and shift, [B, C], follow the norm."""
    if norm is None:
        return ops.group_norm_quantize(x, 0, smooth=conv.smooth, activation=activation)
    how = dict(zip(("scale", "shift"), scale, strict=False))
    return ops.group_norm_quantize(
        x, norm.num_groups, norm.weight, norm.bias, smooth=conv.smooth, activation=activation, eps=norm.eps, **how
    )


@functools.cache
def _fused(form: Any, plain: Any) -> type[Fusable]:
    return type(f"Fused{plain.__name__}", (form, plain), {"plain": plain})


def _made(form: Any, plain: Any) -> nn.Module:
    kind = _fused(form, plain)
    return kind.__new__(kind)


def _diffusers(module: nn.Module | None, file: str) -> str | None:
    """The name of a class of diffusers' own, or None; diffusers itself need not be there."""
    kind = type(module)
    return kind.__qualname__ if kind.__module__ == f"diffusers.models.{file}" else None


GATED = {"geglu": "gelu", "swiglu": "silu"}


def _activation(layer: Any) -> str | None:
    """What a module of diffusers' `activations` does behind its Linear `proj`, in our ops' words, or None."""
    name = _diffusers(layer, "activations")
    if name == "GELU":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(layer.approximate)
    if name == "GEGLU":
        return "geglu"
    if name in ("SwiGLU", "LinearActivation") and type(layer.activation) is nn.SiLU and not watched("", layer.activation):
        return "swiglu" if name == "SwiGLU" else "silu"
    return None


def _autocast() -> bool:
    """Under it torch's own layers choose their results' dtypes: its norms answer float32, whatever they are given."""
    return any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def _listed(reasons: Mapping[str, str]) -> str | None:
    return "; ".join(f"{name}: {why}" for name, why in reasons.items()) or None


def _idle(layer: nn.Module) -> bool:
    """Whether a layer answers its input, and nobody would notice that it was not called."""
    if watched("", layer):
        return False
    return type(layer) is nn.Identity or (type(layer) is nn.Dropout and not (layer.training and layer.p))


def _mute(name: str, layer: nn.Module | None, after: Quantized) -> str | None:
    """Why a layer can't write the codes of a product's input instead of its result, or None."""
    assert layer is not None
    picture = isinstance(after, QuantizedConv2d)
    columns = after.in_channels if picture else after.in_features
    if type(layer) not in ((nn.GroupNorm, nn.SiLU) if picture else CODED):
        return f"{_kind(layer)} writes no codes"
    if isinstance(layer, nn.SiLU) and layer.inplace:
        return f"{name} writes into its input"
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and tuple(layer.normalized_shape) != (columns,):
        return f"{name} norms {list(layer.normalized_shape)}, not [{columns}]"
    if isinstance(layer, nn.GroupNorm) and not layer.eps >= 0:
        return f"{name} has an eps of {layer.eps}"
    if isinstance(layer, nn.GroupNorm) and layer.num_channels != columns:
        return f"{name} norms {layer.num_channels} channels, not {columns}"
    if isinstance(layer, nn.RMSNorm) and layer.eps is None:
        return f"{name} has no eps"
    return watched(name, layer)


def _gelu(layer: nn.GELU, x: Tensor, coding: dict[str, Any]) -> list[Tensor]:
    return ops.act_quantize(x, "gelu" if layer.approximate == "none" else "gelu_tanh", **coding)


def _silu(layer: nn.SiLU, x: Tensor, coding: dict[str, Any]) -> list[Tensor]:
    return ops.act_quantize(x, "silu", **coding)


def _layer_norm(layer: nn.LayerNorm, x: Tensor, coding: dict[str, Any]) -> list[Tensor]:
    return ops.norm_quantize(x, weight=layer.weight, bias=layer.bias, norm="layer", eps=layer.eps, **coding)


def _rms_norm(layer: Any, x: Tensor, coding: dict[str, Any]) -> list[Tensor]:
    return ops.norm_quantize(x, weight=layer.weight, norm="rms", eps=layer.eps, **coding)


# What can write codes instead of its result: exactly these types, for a subclass may do something else.
CODED: dict[type[nn.Module], Callable[[Any, Tensor, dict[str, Any]], list[Tensor]]] = {
    nn.GELU: _gelu,
    nn.SiLU: _silu,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    RMSNorm: _rms_norm,
}
