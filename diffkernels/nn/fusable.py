"""What `fuse_` asks of a module: whether a second forward, on 8-bit codes, gives what the first one does."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as _module

from .quantized import QuantizedLinear


class Fusable(nn.Module):
    """A module that has two forwards of one meaning: by calling its layers, and fused, on 8-bit codes.

    The protocol: `chain()` says in words what is fused, `obstacle()` why nothing can be; `fuse_` sets `fused`; the forward asks
    `fuses()` in each call. So a hook, a mode or a layer that came later is met by the layers as they are. No parameter
    changes, and `fused` is in no state dict.
    """

    fused = False
    plain: type[nn.Module] | None = None  # whose module this is, where `fuse_` made this class of it

    def chain(self) -> str:
        """What the fused forward does, a word or two a pass."""
        raise NotImplementedError

    def obstacle(self) -> str | None:
        """Why a fused forward would not do what the layers do, in words, or None. Cheap: it is asked in each call."""
        raise NotImplementedError

    def rest(self) -> str | None:
        """What `chain()` leaves out and why, or None: it has it all."""
        return None

    def covers(self) -> Iterable[nn.Module]:
        """The modules that `chain()`, `obstacle()` and `rest()` speak of."""
        return (module for module in self.modules() if module is not self)

    def why_not(self) -> str | None:
        """`obstacle()`, and what is one for every module."""
        if self.training:
            return "in training mode"
        if "forward" in self.__dict__:
            return "has a forward of its own"
        if _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return "all modules have hooks"
        return self.obstacle()

    def fuses(self) -> bool:
        return self.fused and self.why_not() is None


def watched(name: str, layer: nn.Module) -> str | None:
    """Who would notice that a layer is not called: hooks, or a forward that was set on it; None where nobody does."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return f"{name} has hooks"
    return f"{name} has a forward of its own" if "forward" in layer.__dict__ else None


def other_than(kind: type[nn.Module], name: str, layer: nn.Module | None) -> str | None:
    """Why a layer is not exactly a `kind` that nobody watches, or None. A subclass may do something else."""
    if type(layer) is not kind:
        return f"{name} is no {kind.__name__}: {type(layer).__name__}"
    return watched(name, layer)  # type: ignore[arg-type]


def uncoded(name: str, layer: nn.Module | None) -> str | None:
    """Why a layer can't be handed codes, or None."""
    return other_than(QuantizedLinear, name, layer)
