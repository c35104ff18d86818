"""The gradient of an op without one of its own: the vjp of its body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    leaves, ctx.spec = pytree.tree_flatten(inputs)
    ctx.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    ctx.where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    ctx.save_for_backward(*(leaves[i] for i in ctx.where))


def vjp_of(body: Callable) -> Callable:
    """The vjp of the op's body: what an op's gradient is until it has a kernel of its own."""

    def backward(ctx: Any, grads: Any) -> Any:
        leaves = list(ctx.leaves)
        twice = torch.is_grad_enabled()  # create_graph: stay connected to the inputs
        with torch.enable_grad():
            wanted = []
            for i, saved in zip(ctx.where, ctx.saved_tensors, strict=True):
                leaf = saved
                if saved.requires_grad:
                    leaf = saved.view_as(saved) if twice else saved.detach().requires_grad_()
                    wanted.append((i, leaf))
                leaves[i] = leaf
            outs = pytree.tree_leaves(body(*pytree.tree_unflatten(leaves, ctx.spec)))
            pairs = [(o, g) for o, g in zip(outs, pytree.tree_leaves(grads), strict=True) if o.requires_grad and g is not None]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [leaf for _, leaf in wanted],
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=twice,
            )
        result: list[Any] = [None] * len(leaves)
        for (i, _), gradient in zip(wanted, found, strict=True):
            result[i] = gradient
        spread = pytree.tree_unflatten(result, ctx.spec)
        return tuple(spread)

    return backward
