"""The gradient of an op: the one that it declares, or else the vjp of its body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Gradient:
    """What torch.library asks an op for: `save` in the forward pass, `backward` after it."""

    def __init__(self, body: Callable, names: Sequence[str]) -> None:
        self.body = body
        self.names = names
        self.own: Callable | None = None
        self.outputs = False
        self.unsaved: set[int] = set()

    def declare(self, *, outputs: bool = False, unsaved: Sequence[str] = ()) -> Callable[[Callable], Callable]:
        """Decorates the op's own gradient: `f(inputs, outputs, grads, wanted)` returns one, or None, for each of the inputs.

        `outputs` says that f reads the op's outputs, `unsaved` names the inputs that it does not read: they are None there.
        """

        def declared(f: Callable) -> Callable:
            self.own, self.outputs = f, outputs
            self.unsaved = {self.names.index(name) for name in unsaved}
            return f

        return declared

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept: Any = [None if i in self.unsaved else value for i, value in enumerate(inputs)]
        leaves, ctx.spec = pytree.tree_flatten((kept, output if self.outputs else None))
        ctx.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaves[i] for i in ctx.where))

    def backward(self, ctx: Any, *grads: Any) -> Any:
        leaves = list(ctx.leaves)
        for i, saved in zip(ctx.where, ctx.saved_tensors, strict=True):
            leaves[i] = saved
        inputs, outputs = pytree.tree_unflatten(leaves, ctx.spec)
        if self.own is None:
            return self._vjp(inputs, grads)
        return self.own(inputs, outputs, pytree.tree_leaves(grads, is_leaf=lambda g: g is None), ctx.needs_input_grad)

    def _vjp(self, inputs: list[Any], grads: Any) -> tuple[Any, ...]:
        leaves, spec = pytree.tree_flatten(inputs)
        twice = torch.is_grad_enabled()  # create_graph: stay connected to the inputs
        wanted = []
        with torch.enable_grad(), torch._C._DisableAutocast():
            for i, saved in enumerate(leaves):
                if isinstance(saved, Tensor) and saved.requires_grad:
                    leaves[i] = saved.view_as(saved) if twice else saved.detach().requires_grad_()
                    wanted.append(i)
            outs = pytree.tree_leaves(self.body(*pytree.tree_unflatten(leaves, spec)))
            given = pytree.tree_leaves(grads, is_leaf=lambda g: g is None)
            pairs = [(o, g) for o, g in zip(outs, given, strict=True) if o.requires_grad and g is not None]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [leaves[i] for i in wanted],
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=twice,
            )
        result: list[Any] = [None] * len(leaves)
        for i, gradient in zip(wanted, found, strict=True):
            result[i] = gradient
        return tuple(pytree.tree_unflatten(result, spec))
