"""Honest medians on a noisy machine: every contender in one process, interleaved, in alternating order."""

from __future__ import annotations

import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PINNED = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967295"}


def pin_allocator() -> None:
    """Starts the process again with an allocator that keeps its memory: else page faults are what is measured."""
    if sys.platform == "linux" and any(os.environ.get(name) is None for name in PINNED):
        os.environ.update(PINNED)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@dataclass
class Timing:
    """Seconds a call of each contender, a sample a round; round i of all of them happened together."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)  # page faults a call

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def spread(self, name: str) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        cuts = statistics.quantiles(self.samples[name], n=10)
        return cuts[0], cuts[-1]

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """How many times faster `fast` is: the median over rounds, and its bootstrap 95 % interval."""
        pairs = [s / f for s, f in zip(self.samples[slow], self.samples[fast], strict=True)]
        rng = random.Random(0)
        medians = sorted(statistics.median(rng.choices(pairs, k=len(pairs))) for _ in range(1000))
        return statistics.median(pairs), medians[25], medians[974]


def measure(contenders: dict[str, Callable[[], object]], seconds: float = 2.0, rounds: int = 25) -> Timing:
    """Times all contenders for at least `seconds` and `rounds` rounds; a call shorter than 1 ms is repeated to fill it."""
    repeats = {}
    for name, run in contenders.items():
        run()
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, min(1000, round(1e-3 / (time.perf_counter() - start))))
    timing = Timing({name: [] for name in contenders}, dict.fromkeys(contenders, 0.0))
    order = list(contenders)
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < seconds:
        for name in order if done % 2 == 0 else reversed(order):
            run, n = contenders[name], repeats[name]
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            for _ in range(n):
                run()
            timing.samples[name].append((time.perf_counter() - start) / n)
            timing.faults[name] += (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / n
        done += 1
    timing.faults = {name: total / done for name, total in timing.faults.items()}
    return timing
