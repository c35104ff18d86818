"""The passes that 8 bits cost, taken away: codes come from the op that has the activation in hand, where that is proven."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .nn import Fusable, QuantizedLinear, RMSNorm, uncoded, watched
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

    A `QuantizedLinear` codes its input in a pass of its own. Fused, the norm or activation before it writes the codes
    (`ops.norm_quantize`, `ops.act_quantize`), and a DiT block's gates and residuals go into the Linears' epilogues
    (`ops.linear_w8a8`). That is done where it is proven from the types and settings of the modules: in blocks and MLPs of
    `models.DiT`, MLPs of `models.DiMR` and whatever else is a `nn.Fusable`; in diffusers' FeedForward with GELU, GEGLU, SiLU or
    SwiGLU; in an `nn.Sequential`, where a QuantizedLinear follows a GELU, SiLU, LayerNorm or RMSNorm (a Dropout that does
    nothing may stand between). The rest is left alone, with the reason in the report.

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
        elif isinstance(module, QuantizedLinear) and module not in explained:
            around = f"in {_kind(model.get_submodule(name.rpartition('.')[0]))}, of which no pattern is known"
            report.modules.append(Fusion(name, _kind(module), reason=around if name else "the model itself"))
    return report


def _other_class(module: nn.Module) -> type[Fusable] | None:
    """For a module of others that may have a fused form, its class with both forms; `fuse_` goes back where there is none."""
    if type(module) is nn.Sequential and any(isinstance(layer, QuantizedLinear) for layer in module):
        return FusedSequential
    kind: Any = type(module)
    return _feed_forward(kind) if _diffusers(module, "attention") == "FeedForward" else None


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
        return [layer for layer in self if isinstance(layer, QuantizedLinear)]

    def _pairs(self) -> tuple[dict[str, str], dict[str, str]]:
        """From the name of each layer that can write codes to that of the Linear behind it; and why other Linears have none."""
        pairs: dict[str, str] = {}
        alone: dict[str, str] = {}
        before = ""
        for name, layer in self._modules.items():
            assert layer is not None
            if isinstance(layer, QuantizedLinear):
                why = uncoded(name, layer)
                why = why or (_mute(before, self._modules[before], layer.in_features) if before else "it comes first")
                if why is None:
                    pairs[before] = name
                else:
                    alone[name] = why
            if not _idle(layer):
                before = name
        return pairs, alone

    def forward(self, x: Tensor) -> Tensor:
        if not self.fuses() or _autocast():
            return super().forward(x)
        pairs, layers = self._pairs()[0], iter(self._modules.items())
        for name, layer in layers:
            if name not in pairs:
                x = layer(x)  # type: ignore[misc]
                continue
            linear: QuantizedLinear = self._modules[pairs[name]]  # type: ignore[assignment]
            x = linear.from_codes(CODED[type(layer)](layer, x, linear.coding), x.dtype)  # type: ignore[index]
            for passed, _ in layers:  # the Linear, and before it a Dropout that does nothing
                if passed == pairs[name]:
                    break
        return x


class _FeedForward(Fusable):
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

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made where it is wanted: copies and pickles name its parent
        return _made, (self.plain,), self.__dict__


@functools.cache
def _feed_forward(plain: Any) -> type[Fusable]:
    return type(f"Fused{plain.__name__}", (_FeedForward, plain), {"plain": plain})


def _made(plain: Any) -> nn.Module:
    kind = _feed_forward(plain)
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


def _mute(name: str, layer: nn.Module | None, columns: int) -> str | None:
    """Why a layer can't write the codes of a Linear's [..., columns] instead of its result, or None."""
    assert layer is not None
    if type(layer) not in CODED:
        return f"{_kind(layer)} writes no codes"
    if isinstance(layer, nn.SiLU) and layer.inplace:
        return f"{name} writes into its input"
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and tuple(layer.normalized_shape) != (columns,):
        return f"{name} norms {list(layer.normalized_shape)}, not [{columns}]"
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
