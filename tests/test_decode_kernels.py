"""What decode_attention's kernels do that its cases can't say: an index that is out of bounds, a cache in several parts."""

from __future__ import annotations

import pytest
import torch

from diffkernels import _ladder
from diffkernels._case import Draw
from diffkernels._op import OPS
from diffkernels.bench import fuzz, oracle
from diffkernels.cli import verify
from diffkernels.ops import _decode

OP = OPS["decode_attention"]
KERNELS = [(rung, device) for rung, device in verify.rungs(OP) if rung != "reference"]
pytestmark = pytest.mark.parametrize(("rung", "device"), KERNELS, ids=[f"{device}-{rung}" for rung, device in KERNELS])


def call(device: str, *args, dtype=torch.float32, **more):
    return OP.bind((), _decode._call(Draw(dtype, device), *args, **more))


@pytest.mark.parametrize("length", [40, 300])
@pytest.mark.parametrize("rotary", [0, 16])
def test_a_bad_index_is_its_samples_own(rung, device, length, rotary) -> None:
    """Where nobody can be told but by a NaN, that is, on a GPU; a kernel itself has no words for it anywhere."""
    good = call(device, 4, 3, 2, length, 16, [5, 20, 7, 30], rotary=rotary)
    bad = list(good)
    at = OP.names.index("index")
    bad[at] = good[at].clone()
    bad[at][1], bad[at][3] = -1, 31 if rotary else 2**31 - 3
    if rung != "triton" and device == "cpu":
        pytest.skip("the check tells of it before a CPU's kernel runs")
    expected, got = fuzz.run(OP, rung, good), fuzz.run(OP, rung, tuple(bad))
    before = [good[i] for i in OP.writes]
    assert got[0][[1, 3]].isnan().all()
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(*fuzz.bits([g[[0, 2]]]), *fuzz.bits([e[[0, 2]]]))
    for g, b in zip(got[1:], before, strict=True):
        assert torch.equal(*fuzz.bits([g[[1, 3]]]), *fuzz.bits([b[[1, 3]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("index", [0, 1, 200, 299, 560, 561, 700, 2000])
def test_a_long_cache_at_every_stage(rung, device, index, dtype) -> None:
    """Empty, filling, about to roll, rolling: the parts of the cache that hold something differ."""
    if rung == "triton" and device == "cpu" and (dtype == torch.float16) != (index in (1, 560)):
        pytest.skip("interpreted, a millisecond a program: one dtype is enough")
    args = call(device, 1, 4, 2, 564, 24, [index], sinks=3, rotary=24, rope="half", dtype=dtype)
    got = fuzz.run(OP, rung, args)
    for g, e, r in zip(got, oracle.exact(OP, args), oracle.results(OP, OP.reference, args), strict=True):
        oracle.compare(g, e, r, c=OP.c)


@pytest.mark.parametrize("rope", _decode.ROPES)
def test_the_largest_halves_turn(rung, device, rope) -> None:
    """A rotated query may be beyond float16: it overflows where the definition's does, not before."""
    args = list(call(device, 1, 2, 1, 20, 16, [9], rotary=16, rope=rope))
    for i, name in enumerate(OP.names):
        if name in ("q", "k", "v", "k_cache", "v_cache"):
            args[i] = args[i].half() * (1.0 if name[0] == "v" else 2e-3)
    args[0] = torch.full_like(args[0], 65504)
    exact, reference = oracle.exact(OP, tuple(args)), oracle.results(OP, OP.reference, tuple(args))
    for g, e, r in zip(fuzz.run(OP, rung, tuple(args)), exact, reference, strict=True):
        oracle.compare(g, e, r, c=OP.c, rms=False)


def test_what_a_kernel_refuses_it_leaves_alone(rung, device) -> None:
    kernel, good = _ladder.kernel(rung, OP.name), call(device, 2, 3, 2, 40, 16, [5, 20], rotary=16)
    for name, wrong in (
        ("q", good[0].double()),
        ("k", good[1][:, :2]),
        ("v_cache", good[4][:, :-1]),
        ("k_cache", good[3][:, :1].expand(-1, 40, -1, -1)),
        ("index", good[5].long()),
        ("cos", None),
        ("sin", good[7].double()),
        ("rope", "none"),
        ("sinks", 38),
        ("scale", float("nan")),
    ):
        args = list(OP.apart(good))
        args[OP.names.index(name)] = wrong
        out = OP.allocate(*good).fill_(7)
        before = fuzz.bits([t for t in args if isinstance(t, torch.Tensor)])
        assert isinstance(kernel(out, *args), str), name
        assert (out == 7).all()
        after = fuzz.bits([t for t in args if isinstance(t, torch.Tensor)])
        assert all(map(torch.equal, before, after)), name
