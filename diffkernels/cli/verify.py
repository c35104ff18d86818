"""`diffkernels verify`: seeded random calls of every op on every rung that works here, against float64."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .. import _ladder
from .._op import OPS, Op
from ..bench import fuzz

INTERPRETED = 8  # of Triton's kernels: its interpreter takes a millisecond a program


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "verify", help="fuzz the kernels against float64; exit code 1 if one is wrong", description=__doc__
    )
    parser.add_argument("--op", help="one op, or several with commas (default: all)")
    parser.add_argument("--rung", help="one rung (default: all that work here)")
    parser.add_argument("--cases", type=int, default=64, help="calls of each op on each rung (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next ones count on (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the failures as JSON")
    parser.set_defaults(run=run)


def rungs(op: Op, wanted: str | None = None) -> list[tuple[str, str]]:
    """(rung, device) of all that can run `op` here. The definition itself is left out, unless it is asked for."""
    return [
        (rung, device)
        for device in _ladder.LADDER
        for rung in ((wanted,) if wanted else _ladder.RUNGS)
        if (wanted or rung != "reference") and _ladder.missing(rung, op.name, device) is None
    ]


def run(args: argparse.Namespace) -> int:
    from rich.progress import track

    try:
        ops = [OPS[name] for name in args.op.split(",")] if args.op else list(OPS.values())
    except KeyError as error:
        return _wrong(f"--op: expected one of {', '.join(OPS)}; got {error}")
    if args.rung and args.rung not in _ladder.RUNGS:
        return _wrong(f"--rung: expected one of {', '.join(_ladder.RUNGS)}; got {args.rung!r}")
    if args.cases < 1 or args.seed < 0:
        return _wrong(f"--cases, --seed: expected 1 or more, and 0 or more; got {args.cases}, {args.seed}")
    todo = [(op, rung, device) for op in ops for rung, device in rungs(op, args.rung)]
    if not todo:
        return _wrong(f"--rung: nothing to run on {args.rung!r} here: {_ladder.missing(args.rung, ops[0].name, 'cpu')}")
    outcomes: list[fuzz.Outcome] = []
    stopped = False
    try:
        for op, rung, device in track(todo, "verifying", transient=True, disable=args.json or not sys.stderr.isatty()):
            interpreted = rung == "triton" and device == "cpu" and not args.rung
            cases = min(args.cases, INTERPRETED) if interpreted else args.cases
            outcomes += (fuzz.check(op, rung, seed, device) for seed in range(args.seed, args.seed + cases))
    except KeyboardInterrupt:
        stopped = True
    failed = [o for o in outcomes if o.problem is not None]
    if args.json:
        print(json.dumps({"calls": len(outcomes), "failed": [vars(o) | {"again": again(o)} for o in failed]}, indent=1))
    else:
        _table(outcomes)
        for o in failed:
            print(f"\n{o.op} on {o.rung}, {o.dtype}: {o.problem}\n  {o.what}\n  {again(o)}")
        print(f"{len(outcomes)} calls, {len(failed)} wrong" + (" (stopped)" if stopped else ""))
    return 130 if stopped else 1 if failed else 0


def again(o: fuzz.Outcome) -> str:
    """The line that makes the same call again."""
    return f"diffkernels verify --op {o.op} --rung {o.rung} --seed {o.seed} --cases 1"


def _wrong(message: str) -> int:
    print(f"diffkernels verify: {message}", file=sys.stderr)
    return 2


def _table(outcomes: list[fuzz.Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="largest error, as a share of what is allowed")
    for name in ("op", "rung", "calls", "f32", "f16", "bf16", "refused", "wrong"):
        table.add_column(name, justify="left" if name in ("op", "rung") else "right")
    groups: dict[tuple[str, str], list[fuzz.Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.op, o.rung), []).append(o)
    for (op, rung), calls in groups.items():
        shares = [max((o.share for o in calls if o.dtype == dtype), default=None) for dtype in fuzz.DTYPES]
        refused, wrong = (sum(getattr(o, what) is not None for o in calls) for what in ("refused", "problem"))
        told = ["" if share is None else f"{100 * share:.0f} %" for share in shares]
        table.add_row(op, rung, str(len(calls)), *told, str(refused or ""), f"[red]{wrong}[/red]" if wrong else "")
    Console(highlight=False, width=120 if not sys.stdout.isatty() else None).print(table)
