"""`diffkernels doctor`: every op on every rung that works here, against its definition in float64, in seconds."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from .. import _ladder
from .._case import Draw
from .._op import OPS
from ..bench import oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("doctor", help="self-test of every rung; exit code 1 if one is wrong", description=__doc__)
    parser.set_defaults(run=run)


def check(op: str, rung: str, device: str) -> tuple[int, str | None]:
    """How many calls were compared, and what was wrong, if something was."""
    declared, done = OPS[op], 0
    for case in declared.cases:
        for dtype in DTYPES if case.model is None else ():
            args = declared.bind((), case.args(Draw(dtype, device)))
            try:
                with _ladder.rung(rung), torch.no_grad():
                    outs = oracle.results(declared, declared.call, args)
                reference = oracle.results(declared, declared.reference, args)
                for got, exact, ref in zip(outs, oracle.exact(declared, args), reference, strict=True):
                    truncates = rung == "triton" and _ladder.interpreting() and dtype is torch.bfloat16
                    oracle.compare(got, exact, ref, c=declared.c, rms=not truncates)
            except (AssertionError, RuntimeError) as error:
                return done, f"{case.name}, {dtype}: {error}"
            done += 1
    return done, None


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console, wrong, start = Console(highlight=False), 0, time.perf_counter()
    for device, rungs in _ladder.LADDER.items():
        for rung in (*rungs, "triton") if device == "cpu" and _ladder.interpreting() else rungs:
            for op in OPS:
                why = _ladder.missing(rung, op, device)
                if why is not None:
                    console.print(f"[dim]–   {device:<5}{rung:<13}{op:<15} not run: {why}[/dim]")
                    continue
                done, problem = check(op, rung, device)
                wrong += problem is not None
                mark = "[red]✗[/red]" if problem else "[green]✓[/green]"
                console.print(f"{mark}   {device:<5}{rung:<13}{op:<15} {problem or f'{done} calls match float64'}")
    took = f"{time.perf_counter() - start:.1f} s"
    console.print(f"{wrong} wrong, in {took}" if wrong else f"all well, in {took}")
    return 1 if wrong else 0
