"""Every op's CPU kernels from several threads at once, each with threads of its own, against what one thread makes.

`tests/sanitize thread` runs it under ThreadSanitizer, in a build where every item of work may be a thread's own and which
starts those threads itself: of torch's pool, which is not instrumented, it would see nothing.
"""

from __future__ import annotations

import argparse
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import diffkernels as dk
from diffkernels import _ladder
from diffkernels._case import Draw
from diffkernels._op import OPS
from diffkernels.bench import oracle

CALLERS, CREW = 3, 4
FULL = 100_000  # elements up to which a case runs as often as asked; larger ones fewer times
LARGEST = 3_200_000  # samples of several chunks are among these

leaves = pytree.tree_leaves


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b))) if a.numel() else True


def race(call, args, expected, repeats: int) -> int:
    """How often a result differed. What a caller raises is raised."""
    start = threading.Barrier(CALLERS)

    def caller(_: int) -> int:
        torch.set_num_threads(CREW)
        start.wait()
        return sum(not all(same(g, e) for g, e in zip(leaves(call(*args)), expected, strict=True)) for _ in range(repeats))

    with ThreadPoolExecutor(CALLERS) as callers:
        return sum(callers.map(caller, range(CALLERS)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100, help="of every case, by each of the callers (%(default)s)")
    parser.add_argument("--op", choices=OPS, help="this one only")
    given = parser.parse_args()
    wrong, ran = [], 0
    for name, op in OPS.items() if given.op is None else [(given.op, OPS[given.op])]:
        for rung in _ladder.LADDER["cpu"][:-1]:
            if _ladder.missing(rung, name, "cpu") is not None:
                continue
            for case in op.cases:
                args = op.bind((), case.args(Draw(torch.float32)))
                size = sum(t.numel() for t in leaves(args) if isinstance(t, Tensor))
                if size > LARGEST:
                    continue

                def call(*args, op=op, rung=rung):
                    with dk.rung(rung), torch.no_grad():
                        return oracle.results(op, op.call, args)

                torch.set_num_threads(1)
                expected = leaves(call(*args))
                if differs := race(call, args, expected, max(2, min(given.repeats, given.repeats * FULL // max(1, size)))):
                    wrong.append(f"{name} {case.name} on {rung}: {differs} results differ")
                ran += 1
        print(f"{name}: {ran} cases so far", flush=True)
    print("\n".join(wrong) or f"{ran} cases, up to {CALLERS * given.repeats} times each: the bits of one thread")
    return bool(wrong) or not ran


if __name__ == "__main__":
    sys.exit(main())
