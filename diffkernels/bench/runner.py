"""Rows, each the median of several processes: memory, code and clocks fall differently into each, and one is no sample.

A worker is this package in a process of its own, its allocator pinned, that answers a line of JSON with another. The workers
of a run stay alive and take turns, so that a row is whole before the next begins; one that dies costs its row alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from . import timing
from .suite import Task

PROCESSES = 3
PATIENCE = 300.0  # seconds that a worker may take for a row: compilation, oracle, timing
SERVE = "import sys; sys.path.insert(0, sys.argv[1]); from diffkernels.bench import runner; runner.serve()"


def serve() -> None:
    """A worker's loop: a Task, or "rooflines", in; its part, or them, out. Ends where its input does."""
    from . import machine, suite

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which writes what there is
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    for line in sys.stdin:
        told = json.loads(line)
        if told.keys() == {"rooflines"}:
            found: Any = machine.rooflines(told["rooflines"])
        else:
            shape, vs = told["shape"], told["vs"]
            found = suite.part(Task(**told | {"shape": None if shape is None else tuple(shape), "vs": tuple(vs)}))
        print(json.dumps(found), file=answers, flush=True)


class Worker:
    """One measuring process; starts at the first question, and again after it has died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[str] | None = None

    def ask(self, question: dict[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
        """The answer, or {"not_measured": why}."""
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the worker
            here = str(Path(__file__).resolve().parents[2])
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVE, here],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                env=os.environ | {name: os.environ.get(name, value) for name, value in timing.PINNED.items()},
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], patience)
            line = self.process.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        why = f"took more than {patience:.0f} s" if line is None else f"its process ended: {self._last_words()}"
        self.close()
        return {"not_measured": why}

    def _last_words(self) -> str:
        assert self.process is not None and self.errors is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.returncode
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        told = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"{told}: {lines[-1]}" if lines else told

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        if self.errors is not None:
            self.errors.close()
        self.process = self.errors = None


class Workers:
    """A run's workers; a context manager, so that none outlives it."""

    def __init__(self, count: int = PROCESSES) -> None:
        self.workers = [Worker() for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self.workers:
            worker.close()

    def rooflines(self, device: str) -> dict[str, Any]:
        return self.workers[0].ask({"rooflines": device})

    def rows(self, tasks: list[Task]) -> Iterator[dict[str, Any]]:
        """A row a task, in their order, as they are measured."""
        for task in tasks:
            parts: list[dict[str, Any]] = []
            for worker in self.workers:
                parts.append({"row": task.row()} | worker.ask(asdict(task)))
                if "not_measured" in parts[-1]:
                    break  # one window that can't be had is enough: no row
            yield combined(parts)


def combined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of several processes' samples: medians, the 10th and 90th percentile, ratios with their 95 % interval.

    The interval is a bootstrap over both levels: which processes, and which of their rounds.
    """
    row = dict(parts[-1]["row"])
    if "not_measured" in parts[-1]:
        return row | {"not_measured": parts[-1]["not_measured"]}
    per = parts[0]["per"]
    samples = [{name: np.array(s) / per for name, s in p["samples"].items()} for p in parts]

    def median(name: str) -> float:
        return float(np.median([np.median(s[name]) for s in samples]))

    def against(name: str) -> dict[str, Any]:
        pairs = [s[name] / s["ours"] for s in samples]
        return {"ratio": float(np.median([np.median(p) for p in pairs])), "ratio_95": interval(pairs)}

    ours = np.concatenate([s["ours"] for s in samples])
    row |= {
        "us": 1e6 * median("ours"),
        "us_p10_p90": [1e6 * float(q) for q in np.percentile(ours, (10, 90))],
        "processes": len(parts),
        "rounds": min(len(s["ours"]) for s in samples),
        "load": max((p["load"] for p in parts if p["load"] is not None), default=None),
        "page_faults": float(np.median([p["faults"]["ours"] for p in parts])),
        "peak_bytes": parts[0]["peak_bytes"].get("ours"),
    }
    for name, field in (("kernel", "kernel_us"), ("called", "call_us")):
        if name in samples[0]:
            row[field] = 1e6 * median(name)
    if "again" in samples[0]:
        row["again"] = against("again")
    if "copy" in samples[0]:
        row["gb_per_s"] = row["bytes"] / median("ours") / 1e9
        row["percent_of_copy"] = 100 * against("copy")["ratio"]
    row["peers"] = {name: {"skipped": why} for name, why in parts[0]["skipped"].items()}
    for name in samples[0]:
        if name not in ("ours", "again", "kernel", "called", "copy"):
            told = {"error": parts[0]["errors"].get(name), "peak_bytes": parts[0]["peak_bytes"].get(name)}
            row["peers"][name] = {"us": 1e6 * median(name), **against(name), **told}
    return row


def interval(pairs: list[np.ndarray], draws: int = 1000) -> list[float]:
    """The 95 % interval of the median of the processes' medians."""
    rng = np.random.default_rng(0)
    within = np.stack([np.median(p[rng.integers(0, len(p), (draws, len(p)))], axis=1) for p in pairs])
    which = rng.integers(0, len(pairs), (draws, len(pairs)))
    medians = np.median(within[which, np.arange(draws)[:, None]], axis=1)
    return [float(q) for q in np.percentile(medians, (2.5, 97.5))]
