"""Honest medians on a noisy machine: every contender in one process, interleaved, in alternating order, guarded."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# An allocator that keeps its memory: else page faults are what is measured. For the environment of a measuring process.
PINNED = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967295"}
Call = Callable[[], object]


class Busy(RuntimeError):
    """Other processes took too much of the machine in every window."""


class Load:
    """What part of the machine's processors others have taken since this was made, steal by other virtual machines included."""

    def __init__(self) -> None:
        self.begin = self.now()

    @staticmethod
    def now() -> tuple[float, float, float] | None:
        """Seconds: that the processors were busy or stolen, that were ours, and of the clock."""
        try:
            with open("/proc/stat") as stat:
                ticks = [int(n) for n in stat.readline().split()[1:9]]  # user nice system idle iowait irq softirq steal
        except (OSError, ValueError):
            return None
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        own = resource.getrusage(resource.RUSAGE_SELF)
        return busy, own.ru_utime + own.ru_stime, time.perf_counter()

    def share(self) -> float | None:
        """0 to 1, or None where the system does not tell."""
        end = self.now()
        if self.begin is None or end is None:
            return None
        busy, own, clock = (b - a for a, b in zip(self.begin, end, strict=True))
        return max(0.0, busy - own) / (clock * (os.cpu_count() or 1))


@dataclass
class Timing:
    """Seconds a call of each contender, a sample a round; round i of all of them happened together."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)  # page faults a call
    load: float | None = None  # the part of the machine that others took

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])


def cpu(run: Call, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        run()
    return time.perf_counter() - start


def cuda(run: Call, n: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def graphed(run: Call, n: int) -> Call | None:
    """What replays n calls as one CUDA graph, or None where the call can't be captured (it waits for the device, say)."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for _ in range(n):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def measure(
    contenders: dict[str, Call],
    seconds: float = 1.0,
    rounds: int = 25,
    *,
    device: str = "cpu",
    graphs: tuple[str, ...] = (),
    limit: float = 0.03,
    tries: int = 4,
) -> Timing:
    """Times all contenders for at least `seconds` and `rounds` rounds; a call shorter than 1 ms is repeated to fill it.

    `graphs` are the contenders that a CUDA device replays as graphs, so that it is the kernels that are timed; the others are
    called. A window in which others took more than `limit` of the machine is thrown away and repeated; after `tries` of them
    raises Busy.
    """
    clock, repeats, run = cuda if device == "cuda" else cpu, {}, dict(contenders)
    for name, call in contenders.items():
        for _ in range(2):
            clock(call, 1)
        repeats[name] = n = max(1, min(1000, round(1e-3 / max(clock(call, 1), 1e-9))))
        if device == "cuda" and name in graphs and (replay := graphed(call, n)) is not None:
            run[name] = replay
    least = 1.0
    for attempt in range(tries):
        if attempt:
            time.sleep(1.0)
        watch, timing = Load(), Timing({name: [] for name in run}, dict.fromkeys(run, 0.0))
        begin, done = time.perf_counter(), 0
        while done < rounds or time.perf_counter() - begin < seconds:
            for name in run if done % 2 == 0 else reversed(run):
                n, calls = repeats[name], 1 if run[name] is not contenders[name] else repeats[name]
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                timing.samples[name].append(clock(run[name], calls) / n)
                timing.faults[name] += (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / n
            done += 1
        timing.faults = {name: total / done for name, total in timing.faults.items()}
        timing.load = watch.share()
        if timing.load is None or timing.load <= limit:
            return timing
        least = min(least, timing.load)
    raise Busy(f"others took {least:.0%} of the machine in the quietest of {tries} windows, {limit:.0%} allowed")
