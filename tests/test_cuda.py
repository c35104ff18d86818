"""What only a GPU shows: streams, devices, graphs, and blocks that have to wait for one another. Nothing here names an op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import diffkernels as dk
from diffkernels._case import Draw
from diffkernels._ladder import LADDER, missing
from diffkernels._op import OPS
from diffkernels.bench import oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

leaves = pytree.tree_leaves


def kernels(every: bool = False) -> list:
    """Every op on every rung that has it here, in its first case or in every one."""
    return [
        pytest.param(op, case, rung, id=f"{name}-{case.name}-{rung}")
        for name, op in OPS.items()
        for rung in LADDER["cuda"][:-1]
        if missing(rung, name, "cuda") is None
        for case in (op.cases if every else op.cases[:1])
    ]


def drawn(op, case, device: str = "cuda") -> tuple:
    return op.bind((), case.args(Draw(torch.float32, device)))


def run(op, rung: str, args) -> list[Tensor]:
    with dk.rung(rung), torch.no_grad():
        return oracle.results(op, op.call, args)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.numel() else t


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(bits(g), bits(e)) for g, e in zip(got, expected, strict=True))


def is_float(a) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


@pytest.mark.parametrize(("op", "case", "rung"), kernels())
def test_the_current_stream_is_used(op, case, rung) -> None:
    """Inputs that are there late, on a side stream; a kernel on another one would read the NaNs before them."""
    args = drawn(op, case)
    expected = run(op, rung, args)
    late = drawn(op, case)
    for t in filter(is_float, leaves(late)):
        t.fill_(torch.nan)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for to, value in zip(leaves(late), leaves(args), strict=True):
            if is_float(to):
                to.copy_(value, non_blocking=True)
        got = run(op, rung, late)
        torch.cuda._sleep(200_000_000)  # and nothing waits here for what was launched
        assert not side.query(), "the call waited for the GPU"
    side.synchronize()
    assert same(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize(("op", "case", "rung"), kernels())
def test_tensors_of_a_second_device(op, case, rung) -> None:
    expected = run(op, rung, drawn(op, case))
    with torch.cuda.device(0):
        got = run(op, rung, drawn(op, case, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(g.device.index == 1 for g in got) and same([g.to("cuda:0") for g in got], expected)


@pytest.mark.parametrize(("op", "case", "rung"), kernels(every=True))
def test_a_crowded_gpu_gives_the_same_bits(op, case, rung) -> None:
    """Warps that come late show a barrier that is missing: other work takes turns with the blocks."""
    args = drawn(op, case)
    first = run(op, rung, args)
    expected = oracle.results(op, op.reference, args)
    for g, e in zip(first, expected, strict=True):  # a race may give the same wrong bits each time
        assert not e.numel() or (g.float() - e.float()).abs().max() <= 1e-2 * e.float().abs().max()
    side, crowd = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            crowd = torch.nn.functional.normalize(crowd @ crowd)
    for _ in range(50):
        assert same(run(op, rung, args), first)
    torch.cuda.synchronize()


@pytest.mark.parametrize(("op", "case", "rung"), kernels())
def test_a_graph_replays_new_values(op, case, rung) -> None:
    """Nothing is read on the host and frozen, and nothing is launched outside of the capture."""
    args = drawn(op, case)
    expected = run(op, rung, args)
    held = drawn(op, case)
    for t in filter(is_float, leaves(held)):
        t.zero_()
    run(op, rung, held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(op, rung, held)
    for to, value in zip(leaves(held), leaves(args), strict=True):
        if is_float(to):
            to.copy_(value)
    graph.replay()
    assert same(got, expected)
