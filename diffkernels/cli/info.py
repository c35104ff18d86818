"""`diffkernels info`: what is installed, what was built, and which rung each op has here, with the reason for every blank."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from typing import Any

import torch

from .. import __version__, _ladder
from .._op import OPS
from ..bench.machine import machine

PACKAGES = ("torch", "triton", "numpy", "diffusers")


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("info", help="versions, build, machine, and an op × rung table", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--md", action="store_true", help="as Markdown, to paste into an issue")
    parser.set_defaults(run=run)


def gather() -> dict[str, Any]:
    """Everything that `info` shows."""
    versions = {"diffkernels": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    here = machine()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    table = {
        device: {
            op: {rung: _ladder.missing(rung, op, device) for rung in rungs}  # None: it runs
            for op in OPS
        }
        for device, rungs in _ladder.LADDER.items()
    }
    return {"versions": versions, "machine": here | {"gpus": gpus}, "rungs": table}


def run(args: argparse.Namespace) -> int:
    found = gather()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    if args.md:
        print(markdown(found))
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    for name, value in _facts(found):
        facts.add_row(name, value)
    console.print(facts)
    for device, ops in found["rungs"].items():
        table = Table(title=f"{device} tensors: the leftmost ✓ runs", title_justify="left", title_style="bold")
        table.add_column("op")
        for rung in _ladder.LADDER[device]:
            table.add_column(rung, justify="center")
        for op, rungs in ops.items():
            table.add_row(op, *("✓" if why is None else "–" for why in rungs.values()))
        console.print(table)
        for rung, why in _blanks(ops):
            console.print(f"  [dim]{rung}[/dim]  {why}", soft_wrap=True)
    return 0


def markdown(found: dict[str, Any]) -> str:
    """The same as Markdown tables."""
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _facts(found)), ""]
    for device, ops in found["rungs"].items():
        rungs = _ladder.LADDER[device]
        lines += [f"| {device} tensors | {' | '.join(rungs)} |", "|---" * (len(rungs) + 1) + "|"]
        lines += [f"| `{op}` | {' | '.join('✓' if r[g] is None else '–' for g in rungs)} |" for op, r in ops.items()]
        lines += ["", *(f"- `{rung}`: {why}" for rung, why in _blanks(ops)), ""]
    return "\n".join(lines).rstrip()


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    here = found["machine"]
    return [
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("build", f"{here['compiler']}, {here['flags']}, CUDA {here['cuda'] or 'left out: no nvcc'}, commit {here['commit']}"),
        ("processor", f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads, {' '.join(here['features'])}"),
        ("GPUs", ", ".join(here["gpus"]) or "none"),
        ("forced rung", _ladder.forced_rung.get() or "none"),
    ]


def _blanks(ops: dict[str, dict[str, str | None]]) -> list[tuple[str, str]]:
    """Each rung that misses an op, with its reason and, where not all ops share it, whose it is."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, rungs in ops.items():
        for rung, why in rungs.items():
            if why is not None:
                reasons.setdefault((rung, why), []).append(op)
    return [(rung, why if len(of) == len(ops) else f"{why}: {', '.join(of)}") for (rung, why), of in reasons.items()]
