"""`diffkernels bench`: our kernels beside what people would call instead, with the error beside the speed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench", help="time the kernels beside eager, torch.compile and other peers", description=__doc__
    )
    parser.add_argument("op", nargs="*", help="ops, an op's case (norm_modulate/flux-1024), or whole things; default: all ops")
    parser.add_argument("--list", action="store_true", help="print the cases, peers and rungs that there are")
    parser.add_argument("--shapes", help="other shapes than the cases' own: 8x256x1152, several with commas")
    parser.add_argument("--dtype", help="f32, f16, bf16, or several with commas (default: f32,bf16)")
    parser.add_argument("--rung", help="force a rung (default: the one that runs)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--vs", help="peers, with commas, or all (default: eager,compile)")
    parser.add_argument(
        "--l2", choices=("warm", "cold"), default="warm", help="the last cache before each call (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="at least this long, a row and process (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=3, help="whose median a row is (default: %(default)s)")
    parser.add_argument(
        "--max-load",
        type=float,
        default=3.0,
        metavar="PERCENT",
        help="of the machine that others may take while a row is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begin no row after this time; rows that are missing come first, then the oldest",
    )
    parser.add_argument("--out", help=f"folder of the machine's result file (default: {RESULTS}, where there is one)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--md", metavar="FILE", help="write the rows as Markdown")
    parser.add_argument("--html", metavar="FILE", help="write a page with tables and plots, whole in itself")
    parser.add_argument("--plot", metavar="FOLDER", help="write the plots as PNG")
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure nothing: the reports are made of the result files, and README.md beside them anew",
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("OLD", "NEW"), help="measure nothing: two result files beside each other"
    )
    parser.add_argument(
        "--fail-if-slower",
        metavar="PERCENT",
        help="with --compare: exit code 1 where a row is slower by more, and certainly so",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .. import RungError

    try:
        if args.list:
            return _list()
        if args.compare:
            return _compare(args.compare[0], args.compare[1], args.fail_if_slower)
        _targets(args)
        return _report(args) if args.report else _measure(args)
    except (ValueError, RungError) as error:
        print(f"diffkernels bench: {error}", file=sys.stderr)
        return 2


def _tasks(args: argparse.Namespace) -> list[Any]:
    from .. import _ladder, rung
    from .._op import OPS
    from ..bench import peers, suite

    if args.device == "cuda" and (why := _ladder.unavailable("cuda", "cuda")) is not None:
        raise ValueError(f"--device: cuda can't be used here: {why}")
    if args.rung:
        with rung(args.rung):  # a wrong name is an error before anything is measured
            pass
    if not args.seconds > 0 or args.processes < 1 or not args.max_load > 0:
        raise ValueError("--seconds, --processes, --max-load: expected more than 0")
    try:
        shapes = (
            [tuple(int(n) for n in s.lower().replace("×", "x").split("x")) for s in args.shapes.split(",")]
            if args.shapes
            else None
        )
    except ValueError:
        raise ValueError(f"--shapes: expected 8x256x1152, or several with commas; got {args.shapes!r}") from None
    common = {
        "rung": args.rung,
        "vs": peers.chosen(args.vs),
        "l2": args.l2,
        "seconds": args.seconds,
        "limit": args.max_load / 100,
    }
    tasks = suite.tasks(args.op, args.dtype.split(",") if args.dtype else None, shapes, args.device, **common)
    whys = {_ladder.missing(args.rung, task.op, args.device) for task in tasks if task.op in OPS} if args.rung else {None}
    if whys and None not in whys:
        raise ValueError(f"--rung: nothing to run on {args.rung!r} here: {', '.join(sorted(map(str, whys)))}")
    if not tasks:
        raise ValueError("nothing to measure: no case has a shape of as many dimensions" if shapes else "nothing to measure")
    return tasks


def _targets(args: argparse.Namespace) -> None:
    """Raises ValueError where a report could not be written: before anything is measured, not after."""
    for name, folder in (
        ("md", args.md and Path(args.md).parent),
        ("html", args.html and Path(args.html).parent),
        ("plot", args.plot),
    ):
        if folder and not Path(folder).is_dir():
            raise ValueError(f"--{name}: {folder} is no folder")
    if (args.html or args.plot) and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--html, --plot: plots are drawn by matplotlib, which is not installed: pip install 'diffkernels[bench]'"
        )


def _measure(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..bench import machine, report, results, runner

    out = Path(args.out) if args.out else RESULTS
    if args.out and not out.is_dir():
        raise ValueError(f"--out: {out} is no folder")
    tasks, here = _tasks(args), machine.machine(args.device)
    path = out / f"{machine.slug(here)}.json"
    if args.budget is not None:
        known = {results.key(row)[:6]: row for row in results.load(path)["rows"]} if path.exists() else {}
        seen = [known.get(results.key(task.row())[:6], {}) for task in tasks]
        order = sorted(range(len(tasks)), key=lambda i: "" if "us" not in seen[i] else seen[i]["when"])
        tasks = [tasks[i] for i in order]
    console, stopped, begin = Console(stderr=True, highlight=False), False, time.monotonic()
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        runner.Workers(args.processes) as workers,
        Progress(*columns, console=console, transient=True, refresh_per_second=1) as progress,
    ):
        bar = progress.add_task("rooflines", total=len(tasks))
        try:
            here["rooflines"] = workers.rooflines(args.device)
            for task in tasks:
                if args.budget is not None and time.monotonic() - begin > args.budget:
                    console.print(f"the time is up: {len(tasks) - len(rows)} rows not begun")
                    break
                progress.update(bar, description=f"{task.op} {task.case} {task.dtype}")
                rows += workers.rows([task])
                progress.advance(bar)
                if out.is_dir():  # row by row: nothing is lost, whatever happens next
                    results.merge(path, here, rows[-1:])
        except KeyboardInterrupt:
            stopped = True
    rows = results.stamped(rows, here)
    if args.json:
        print(json.dumps({"format": results.FORMAT, "machine": here, "rows": rows}, indent=1))
    else:
        report.table(here, rows)
    _write(args, [{"machine": here, "rows": rows}])
    if rows and out.is_dir():
        console.print(f"written: {path}")
    return 130 if stopped else 0


def _write(args: argparse.Namespace, files: list[dict[str, Any]]) -> None:
    from ..bench import report

    for name, make in (("md", report.markdown), ("html", report.html)):
        if target := getattr(args, name):
            try:
                Path(target).write_text(make(files), encoding="utf-8")
            except OSError as error:
                raise ValueError(f"--{name}: {error}") from None
    if args.plot:
        report.plots(files, Path(args.plot))


def _report(args: argparse.Namespace) -> int:
    from ..bench import report, results

    folder = Path(args.out) if args.out else RESULTS
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"--report: no result file in {folder}")
    files = [results.load(path) for path in paths]
    (folder / "README.md").write_text(report.index(files), encoding="utf-8")
    readme = folder.absolute().parents[1] / "README.md"
    if readme.exists():
        readme.write_text(report.put_into(readme.read_text(encoding="utf-8"), files), encoding="utf-8")
    _write(args, files)
    return 0


def _compare(old: str, new: str, limit: str | None) -> int:
    from ..bench import report, results

    try:
        allowed = 1 + float((limit or "inf").removesuffix("%")) / 100
    except ValueError:
        raise ValueError(f"--fail-if-slower: expected a percentage such as 5%, got {limit!r}") from None
    rows = results.compare(results.load(Path(old)), results.load(Path(new)))
    if not rows:
        raise ValueError(f"--compare: {old} and {new} have no measured case in common")
    slower = [row for row in rows if row["slower"] > allowed and row["certain"]]
    report.comparison(rows)
    for row in slower:
        print(f"slower: {row['op']} {row['case']} {row['dtype']} on {row['rung']}: {row['slower']:.2f}×", file=sys.stderr)
    return 1 if slower else 0


def _list() -> int:
    from .. import _ladder
    from .._op import OPS
    from ..bench import peers, suite

    for name, op in OPS.items():
        for case in op.cases:
            if case.model:
                print(f"{name}/{case.name:<24} {'×'.join(map(str, case.shape)):<18} {case.model}")
    for name, model in suite.MODELS.items():
        for case_name in model.cases:
            print(f"{name}/{case_name}")
    print("peers:", ", ".join(peers.PEERS))
    print("rungs:", ", ".join(_ladder.RUNGS))
    return 0
