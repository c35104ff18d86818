"""Rows for people: a table in the terminal, Markdown, one HTML page that is whole in itself, plots."""

from __future__ import annotations

import html as escape
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Files = list[dict[str, Any]]

METHOD = (
    "Median of several processes, in each of which all contenders take turns in alternating order; [the 95 % interval], a "
    "bootstrap over processes and rounds. × is how many times ours is faster. A/A is ours beside itself: what the machine's "
    "noise alone makes. % of copy: the time that a copy of as many bytes takes, in the same rounds. % of floor: the time that "
    "bytes and arithmetic need at the measured peaks. Error: the largest, relative to the largest result, against float64."
)
NAMED = ("op", "case", "shape", "dtype", "rung")
TIMES = ("µs", "kernel µs", "GB/s", "% of copy", "% of floor", "A/A", "× eager", "× compile", "× other")
COLUMNS = (*NAMED, *TIMES, "error", "eager's", "peak MB")


def cells(row: Row, rooflines: dict[str, Any] | None = None) -> list[str]:
    """A row's COLUMNS as text."""
    shape = "×".join(map(str, row["shape"]))
    cold = " (cold)" if row["l2"] == "cold" else ""
    named = [row["op"], row["case"] + cold, shape, row["dtype"], row["rung"] or ""]
    if "not_measured" in row:
        return [*named, f"not measured: {row['not_measured']}", *[""] * (len(COLUMNS) - 6)]
    peers = row["peers"]
    others = [name for name in peers if name not in ("eager", "compile") and "ratio" in peers[name]]
    floor = percent_of_floor(row, rooflines or {})
    error, theirs = row.get("error"), peers.get("eager", peers.get(others[0], {}) if others else {}).get("error")
    return [
        *named,
        _number(row["us"]),
        _number(row.get("kernel_us")),
        _number(row.get("gb_per_s")),
        _number(row.get("percent_of_copy")),
        _number(floor),
        _ratio(row.get("again")),
        _ratio(peers.get("eager")),
        _ratio(peers.get("compile")),
        "; ".join(f"{_ratio(peers[name])} {name}" for name in others),
        "" if error is None else f"{error:.1e}",
        "" if theirs is None else f"{theirs:.1e}",
        "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.1f}",
    ]


def percent_of_floor(row: Row, rooflines: dict[str, Any]) -> float | None:
    """How much of the row's time its bytes, or its arithmetic, need at the measured peaks: what the case says it multiplies,
    else float32's, or bfloat16's of a rung that multiplies these faster."""
    peaks = rooflines.get(row["rung"] or "") or rooflines.get("torch.mm") or {}
    kinds = ("f32", "bf16") if row["dtype"] == "bf16" else ("f32",)
    peak = max(peaks.get(what) or 0.0 for what in ((row["arithmetic"],) if row.get("arithmetic") else kinds))
    copy = row.get("percent_of_copy")
    if copy is None:
        return None
    work = 100 * row["flops"] / (peak * 1e9) / (row["us"] / 1e6) if peak and row.get("flops") else 0.0
    return max(copy, work)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(peer: dict[str, Any] | None) -> str:
    if peer is None or "ratio" not in peer:
        return "" if peer is None else "–"
    low, high = peer["ratio_95"]
    return f"{peer['ratio']:.2f} [{low:.2f}–{high:.2f}]"


def skipped(rows: list[Row]) -> list[str]:
    """Why a peer is missing, a line each."""
    whys: dict[str, list[str]] = {}
    for row in rows:
        for name, peer in row.get("peers", {}).items():
            if "skipped" in peer:
                whys.setdefault(f"{name}: {peer['skipped']}", []).append(row["op"])
    return [f"{why} ({', '.join(dict.fromkeys(ops))})" for why, ops in whys.items()]


def told(machine: dict[str, Any]) -> str:
    """A machine in a line."""
    peaks = machine.get("rooflines") or {}
    arithmetic = [
        f"{rung} " + ", ".join(f"{what} {value:.0f}" for what, value in found.items() if value)
        for rung, found in peaks.items()
        if isinstance(found, dict)
    ]
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    if "copy_gb_per_s" not in peaks:
        return name
    return f"{name}; a copy moves {peaks['copy_gb_per_s']:.1f} GB/s; GFLOP/s (int8: GOP/s): {'; '.join(arithmetic)}"


def table(machine: dict[str, Any], rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=told(machine), caption=METHOD)
    lines = [cells(row, machine.get("rooflines")) for row in rows]
    used = [i for i in range(len(COLUMNS)) if i < 6 or any(line[i] for line in lines)]
    for i in used:
        drawn.add_column(COLUMNS[i], justify="left" if i < 5 else "right", overflow="fold", no_wrap=i != 5)
    for line in lines:
        drawn.add_row(*(line[i].replace("; ", "\n") if i > 5 else line[i] for i in used))
    console = Console(highlight=False, markup=False, width=220 if not sys.stdout.isatty() else None)
    console.print(drawn)
    for why in skipped(rows):
        console.print(why)


def comparison(rows: list[Row]) -> None:
    """Of two result files: `results.compare`'s rows, the slowest first."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title="now over then; certain where the ranges from the 10th to the 90th percentile do not meet")
    for i, name in enumerate(("op", "case", "dtype", "rung", "then µs", "now µs", "now / then", "")):
        drawn.add_column(name, justify="left" if i < 4 else "right")
    for row in sorted(rows, key=lambda row: -row["slower"]):
        times = (_number(row["old_us"]), _number(row["us"]), f"{row['slower']:.2f}")
        drawn.add_row(row["op"], row["case"], row["dtype"], row["rung"] or "", *times, "certain" if row["certain"] else "")
    Console(highlight=False, markup=False, width=160 if not sys.stdout.isatty() else None).print(drawn)


def _lines(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] * len(header)
    return [f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in (header, rule, *rows)]


def markdown(files: Files) -> str:
    """The files' rows as Markdown."""
    out = []
    for file in files:
        lines = [cells(row, file["machine"].get("rooflines")) for row in file["rows"]]
        used = [i for i in range(len(COLUMNS)) if i < 6 or any(line[i] for line in lines)]
        out += [f"## {told(file['machine'])}", ""]
        out += _lines([COLUMNS[i] for i in used], [[line[i] for i in used] for line in lines])
        out += ["", *(f"* {why}" for why in skipped(file["rows"])), ""]
    return "\n".join([*out, METHOD, ""])


def index(files: Files) -> str:
    """benchmarks/results/README.md: every case on every machine, *not measured* where there is no row."""
    from . import suite

    out = [
        "# Results",
        "",
        "Written by `diffkernels bench --report` from the files beside it, which `diffkernels bench` wrote. Rows where we lose",
        "are printed like the others.",
        "",
        METHOD,
        "",
    ]
    if not any("gpu" in file["machine"] for file in files):
        out += ["No GPU has run these kernels yet: every row of the rungs `sm90`, `cuda` and `triton` is *not measured*.", ""]
    for file in files:
        machine, rows = file["machine"], list(file["rows"])
        device = "cuda" if "gpu" in machine else "cpu"
        have = {(row["op"], row["case"], row["dtype"]) for row in rows if row["l2"] == "warm"}
        for task in suite.tasks([*suite.OPS, *suite.MODELS], device=device):
            row = task.row()
            if (row["op"], row["case"], row["dtype"]) not in have:
                rows.append(row | {"rung": None, "not_measured": "no row yet"})
        rows.sort(key=lambda row: (row["op"], row["case"], row["dtype"], str(row["rung"]), row["l2"]))
        commits = sorted({row["commit"] for row in rows if "commit" in row})
        out += [
            f"## {told(machine)}",
            "",
            f"Commits {', '.join(commits)}; torch {', '.join(_all(rows, 'torch'))}; {', '.join(_all(rows, 'compiler'))}.",
            "",
        ]
        lines = [cells(row, machine.get("rooflines")) for row in rows]
        out += _lines(list(COLUMNS), lines)
        out += ["", *(f"* {why}" for why in skipped(rows)), ""]
    return "\n".join(out).rstrip() + "\n"


MARKS = ("<!-- numbers: cut by `diffkernels bench --report` -->", "<!-- numbers: end -->")


def put_into(readme: str, files: Files) -> str:
    """The README with its table made anew, of the machine with the most rows; unchanged where it has no place for one."""
    begin, end = (readme.find(mark) for mark in MARKS)
    if begin < 0 or end < begin:
        return readme
    file = max(files, key=lambda file: len(file["rows"]))
    return f"{readme[:begin]}{MARKS[0]}\n\n{told(file['machine'])}.\n\n{cut(file)}\n{readme[end:]}"


def _all(rows: list[Row], name: str) -> list[str]:
    return sorted({row[name] for row in rows if name in row})


def cut(file: dict[str, Any]) -> str:
    """The README's table: the measured rows of one machine, the columns that people ask for first."""
    want = ("shape", "dtype", "µs", "% of copy", "× eager", "× compile", "error", "eager's")
    at = [COLUMNS.index(name) for name in want]
    rows = [row for row in file["rows"] if row["l2"] == "warm" and "us" in row and row["op"] != "scheduler step"]
    lines = []
    for row in sorted(rows, key=lambda row: (row["op"], row["case"], row["dtype"])):
        line = cells(row, file["machine"].get("rooflines"))
        lines.append([f"`{row['op']}` {row['case']}", *(line[i] for i in at)])
    steps = [row for row in file["rows"] if row["op"] == "scheduler step" and "us" in row]
    out = _lines(["", *want], lines)
    if steps:
        out += ["", "Whole scheduler steps over a null model beside diffusers', float32:", ""]
        told = []
        for row in sorted(steps, key=lambda row: row["case"]):
            line, peer = cells(row), row["peers"]["diffusers"]
            told.append([row["case"], line[5], _ratio(peer), line[14], f"{peer['error']:.1e}"])
        out += _lines(["", "µs a step", "× diffusers", "error", "diffusers'"], told)
    return "\n".join(out) + "\n"


# Plots


def _label(row: Row) -> str:
    return f"{row['op']} {row['case']} {row['dtype']}" + (" cold" if row["l2"] == "cold" else "")


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _speedups(axes: Any, file: dict[str, Any]) -> None:
    from .peers import PEERS

    names = (*PEERS, "diffusers")  # a row's other contenders say what a part costs, not what one would use instead
    found = [(row, [name for name in names if "ratio" in row.get("peers", {}).get(name, {})]) for row in file["rows"]]
    rows = [(row, mine) for row, mine in found if mine]
    bars: dict[str, list[tuple[float, float, dict[str, Any]]]] = {}
    for i, (row, mine) in enumerate(rows):
        for k, name in enumerate(mine):
            thick = 0.8 / len(mine)
            bars.setdefault(name, []).append((i + (k + 0.5) * thick - 0.4, thick, row["peers"][name]))
    for name in sorted(bars, key=names.index):
        at, thick, peers = zip(*bars[name], strict=True)
        values = [p["ratio"] for p in peers]
        spread = [
            [max(0, p["ratio"] - p["ratio_95"][0]) for p in peers],
            [max(0, p["ratio_95"][1] - p["ratio"]) for p in peers],
        ]
        axes.barh(at, values, thick, xerr=spread, label=name, error_kw={"lw": 0.8})
    axes.axvline(1, color="gray", lw=1)
    axes.set_yticks(range(len(rows)), [_label(row) for row, _ in rows], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times faster than the peer, with its 95 % interval")
    _legend(axes)


def _bandwidth(axes: Any, file: dict[str, Any]) -> None:
    rows = [row for row in file["rows"] if row.get("gb_per_s")]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = sorted((row["bytes"], row["gb_per_s"]) for row in rows if row["op"] == op)
        axes.plot(*zip(*mine, strict=True), "o-", ms=4, lw=0.8, label=op)
    copies = sorted((row["bytes"], 100 * row["gb_per_s"] / row["percent_of_copy"]) for row in rows)
    if copies:
        axes.plot(*zip(*copies, strict=True), "k--", lw=1, label="a copy of as many bytes")
    axes.set_xscale("log")
    axes.set_xlabel("bytes read and written")
    axes.set_ylabel("GB/s")
    _legend(axes)


def _roofline(axes: Any, file: dict[str, Any]) -> None:
    peaks = file["machine"].get("rooflines") or {}
    rows = [row for row in file["rows"] if row.get("flops") and row.get("bytes")]
    if not rows or "copy_gb_per_s" not in peaks:
        axes.set_axis_off()
        return
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [(row["flops"] / row["bytes"], row["flops"] / row["us"] / 1e3) for row in rows if row["op"] == op]
        axes.plot(*zip(*mine, strict=True), "o", ms=5, label=op)
    intensity = [2.0**k for k in range(-5, 9)]
    for rung, found in peaks.items():
        if isinstance(found, dict) and found.get("f32"):
            axes.plot(
                intensity,
                [min(found["f32"], i * peaks["copy_gb_per_s"]) for i in intensity],
                lw=1,
                label=f"roof of {rung}, f32",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("floating point operations a byte")
    axes.set_ylabel("GFLOP/s")
    _legend(axes)


def _errors(axes: Any, file: dict[str, Any]) -> None:
    rows = [row for row in file["rows"] if row.get("error") and (row.get("peers", {}).get("eager") or {}).get("error")]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [(row["peers"]["eager"]["error"], row["error"]) for row in rows if row["dtype"] == dtype]
        axes.plot(*zip(*mine, strict=True), "o", ms=5, label=dtype)
    if rows:
        ends = [min(row["error"] for row in rows) / 2, max(row["peers"]["eager"]["error"] for row in rows) * 2]
        axes.plot(ends, ends, "--", color="gray", lw=1, label="as wrong as eager")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("eager's error against float64")
    axes.set_ylabel("ours")
    _legend(axes)


PLOTS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "speedup": _speedups,
    "bandwidth": _bandwidth,
    "roofline": _roofline,
    "error": _errors,
}


def _figure(name: str, file: dict[str, Any], format: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"plots are drawn by matplotlib, which can't be imported here ({error}): pip install 'diffkernels[bench]'"
        ) from None
    tall = 1 + 0.3 * len(file["rows"]) if name == "speedup" else 4.5
    with matplotlib.rc_context({"svg.hashsalt": "diffkernels", "font.size": 8}):
        figure = Figure(figsize=(9 if name == "speedup" else 7, max(3.0, tall)), layout="constrained")
        PLOTS[name](figure.add_subplot(), file)
        out = io.BytesIO()
        figure.savefig(out, format=format, dpi=120, metadata={"Date": None} if format == "svg" else None)
    return out.getvalue()


def plots(files: Files, folder: Path) -> None:
    """A PNG of each plot and machine. Raises ValueError where there is no matplotlib."""
    from . import machine

    for file in files:
        for name in PLOTS:
            (folder / f"{machine.slug(file['machine'])}-{name}.png").write_bytes(_figure(name, file, "png"))


STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1500px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:nth-child(-n+5), td:nth-child(-n+5) { text-align: left; }
td.lost { color: #c33; } td.missing { color: #888; text-align: left; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; display: inline-block; max-width: 100%; }
figure svg { max-width: 100%; height: auto; } figcaption { color: #333; font-size: 13px; }
"""
CAPTIONS = {
    "speedup": "How many times faster ours is than each peer.",
    "bandwidth": "Bytes moved a second, over the size of the call; dashed: a copy.",
    "roofline": "Where the kernels stand under the machine's roofs, which were measured in the same run.",
    "error": "Errors beside eager's: below the dashed line ours is nearer to float64.",
}


def html(files: Files) -> str:
    """One page that is whole in itself: styles and plots inside, no script, nothing fetched."""
    body = ["<h1>diffkernels: benchmarks</h1>", f"<p>{escape.escape(METHOD)}</p>"]
    for file in files:
        peaks = file["machine"].get("rooflines")
        name, _, roofs = told(file["machine"]).partition("; ")
        body.append(f"<h2>{escape.escape(name)}</h2><p>{escape.escape(roofs)}</p>")
        commits = ", ".join(_all(file["rows"], "commit"))
        body.append(f"<p>Commit {escape.escape(commits)}; torch {escape.escape(', '.join(_all(file['rows'], 'torch')))}.</p>")
        body.append(
            "<table><thead><tr>" + "".join(f"<th>{escape.escape(name)}</th>" for name in COLUMNS) + "</tr></thead><tbody>"
        )
        for row in file["rows"]:
            body.append("<tr>" + "".join(_cell(i, text, row) for i, text in enumerate(cells(row, peaks))) + "</tr>")
        body.append("</tbody></table>")
        body += [f"<p>{escape.escape(why)}</p>" for why in skipped(file["rows"])]
        for name in PLOTS:
            drawing = _figure(name, file, "svg").decode()
            drawing = drawing[drawing.index("<svg") :]
            body.append(f"<figure>{drawing}<figcaption>{escape.escape(CAPTIONS[name])}</figcaption></figure>")
    title = "<title>diffkernels: benchmarks</title>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{title}<style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _cell(i: int, text: str, row: Row) -> str:
    peer = {"× eager": "eager", "× compile": "compile"}.get(COLUMNS[i])
    lost = peer is not None and row.get("peers", {}).get(peer, {}).get("ratio", 2) < 1
    kind = ' class="lost"' if lost else ' class="missing"' if text.startswith("not measured") else ""
    return f"<td{kind}>{escape.escape(text).replace('; ', '<br>')}</td>"
