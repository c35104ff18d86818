"""`diffkernels bench`: our kernels beside PyTorch eager and torch.compile, in one process, with the error beside the speed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..bench.timing import pin_allocator


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="time the kernels against eager and torch.compile", description=__doc__)
    parser.add_argument("op", nargs="*", help="ops to time (default: all), or dimr-xl-forward")
    parser.add_argument("--dtype", help="f32, f16, bf16, or several with commas (default: f32,bf16)")
    parser.add_argument("--rung", help="force a rung (default: the one that runs)")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least this long a row (default: %(default)s)")
    parser.add_argument("--out", help="folder of the machine's result file (default: benchmarks/results, where there is one)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.own_process:
        pin_allocator()
    from rich.console import Console

    from .. import RungError, rung
    from ..bench import suite

    out = Path(args.out or "benchmarks/results")
    here, rows = suite.machine(), []
    try:
        chosen = suite.cases(args.op, args.dtype.split(",") if args.dtype else None)
        if args.rung:
            with rung(args.rung):  # a wrong name is an error before anything is measured
                pass
        if not args.seconds > 0:
            raise ValueError(f"--seconds: expected more than 0, got {args.seconds}")
        if args.out and not out.is_dir():
            raise ValueError(f"--out: {out} is no folder")
        console = Console(stderr=True, highlight=False)
        stopped = False
        try:
            with console.status("measuring") as status:
                for row in suite.all_rows(chosen, args.rung, args.seconds, [n for n in args.op if n in suite.MODELS]):
                    rows.append(row)
                    status.update(f"measuring: {len(rows)} rows done")
        except KeyboardInterrupt:
            stopped = True
        if args.json:
            print(json.dumps({"machine": here, "rows": rows}, indent=1))
        else:
            _table(rows)
        if rows and out.is_dir():
            path = out / f"{suite.slug(here)}.json"
            suite.merge(path, here, rows)
            console.print(f"written: {path}")
        return 130 if stopped else 0
    except (ValueError, RungError) as error:
        print(f"diffkernels bench: {error}", file=sys.stderr)
        return 2


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="median of interleaved rounds; × with its 95 % interval; error relative to the largest result")
    for name in ("op", "shape", "dtype", "rung", "µs", "GB/s", "% of copy", "× eager", "× compile", "× other", "error", "its"):
        table.add_column(name, justify="left" if name in ("op", "shape", "dtype", "rung") else "right", no_wrap=True)
    for row in rows:
        peers = row["peers"]

        def times(name: str, peers: dict[str, Any] = peers) -> str:
            if name not in peers:
                return ""
            low, high = peers[name]["ratio_95"]
            return f"{peers[name]['ratio']:.2f} [dim]{low:.2f}–{high:.2f}[/dim]"

        other = next((name for name in peers if name not in ("eager", "compile") and "ratio" in peers[name]), "")
        compared = peers.get("eager", peers.get(other, {})).get("error")

        timed = "gb_per_s" in row
        table.add_row(
            row["op"],
            "×".join(map(str, row["shape"])),
            row["dtype"],
            row["rung"],
            f"{row['us']:.1f}",
            f"{row['gb_per_s']:.1f}" if timed else "",
            f"{row['percent_of_copy']:.0f}" if timed else "",
            times("eager"),
            times("compile"),
            f"{times(other)} {other}" if other else "",
            f"{row['error']:.1e}" if "error" in row else "",
            f"{compared:.1e}" if compared is not None else "",
        )
    Console(highlight=False, width=180 if not sys.stdout.isatty() else None).print(table)
