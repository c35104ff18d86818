"""What rows are measured on, and the rooflines it sets: bandwidth of a copy, peak arithmetic of each rung."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import _C, _ladder
from . import timing

BUILD = ("commit", "torch", "threads", "compiler", "flags", "cuda", "clocks_mhz", "driver")  # what a row was measured with
ARITHMETIC = ("f32", "bf16", "int8")


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine, and the build that runs on it."""
    model, found = platform.processor() or platform.machine(), _cpuinfo()
    if "model name" in found:
        model = found["model name"]
        if "model" in found:
            model += f" family {found['cpu family']} model {found['model']} stepping {found['stepping']}"
    here: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": list(_C.cpu_features()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _C.build["commit"],
        "compiler": _C.build["compiler"],
        "flags": _C.build["flags"],
        "cuda": _C.build["cuda"],
        "clocks_mhz": {"cpu": found.get("cpu MHz")},
    }
    if device == "cuda":
        here["gpu"] = torch.cuda.get_device_name()
        here["gpu_memory"] = torch.cuda.get_device_properties(0).total_memory
        here["driver"] = torch.version.cuda
        try:
            here["clocks_mhz"]["gpu"] = torch.cuda.clock_rate()
        except (RuntimeError, ImportError):  # needs NVML
            here["clocks_mhz"]["gpu"] = None
    return here


def slug(machine: dict[str, Any]) -> str:
    """The machine's name as a file's: letters, digits and dashes."""
    name = machine.get("gpu") or f"{machine['cpu']} {machine['cores']} cores"
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(w for w in words if w not in ("r", "tm", "cpu", "processor", "family"))


def _cpuinfo() -> dict[str, str]:
    try:
        with open("/proc/cpuinfo") as lines:
            return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines) if k.strip()}
    except OSError:
        return {}


def cache(device: str = "cpu") -> int:
    """Bytes of the last cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units), default=32 * 2**20)


def rooflines(device: str = "cpu", seconds: float = 0.3) -> dict[str, Any]:
    """GB/s of a copy of 256 MB (read and written bytes), and GFLOP/s by rung and kind of arithmetic.

    A CPU rung's are multiply-adds of its own instructions in registers; a GPU's those of torch's matrix products.
    """
    found: dict[str, Any] = {"copy_gb_per_s": _copy(device, seconds)}
    if device == "cuda":
        found["torch.mm"] = {what: _product(what) for what in ARITHMETIC}
        return found
    out, rounds = torch.empty(torch.get_num_threads()), 20000
    for rung in _ladder.LADDER["cpu"]:
        kernel = _ladder.kernel(rung, "roofline") if _ladder.unavailable(rung, "cpu") is None else None
        if kernel is not None:
            work = 2 * 4096 * rounds * out.numel()
            found[rung] = {
                what: work / _best(functools.partial(kernel, out, rounds, what), device, seconds) / 1e9 for what in ARITHMETIC
            }
    return found


def _copy(device: str, seconds: float) -> float:
    half = torch.zeros(2**27, dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    return 2**28 / _best(lambda: other.copy_(half), device, seconds) / 1e9


def _product(what: str, n: int = 4096) -> float | None:
    """GFLOP/s of torch's n × n matrix product."""
    try:
        if what == "int8":
            a = torch.ones(n, n, dtype=torch.int8, device="cuda")
            return 2 * n**3 / _best(lambda: torch._int_mm(a, a.t()), "cuda", 0.3) / 1e9
        b = torch.randn(n, n, device="cuda", dtype=torch.bfloat16 if what == "bf16" else torch.float32)
        return 2 * n**3 / _best(lambda: b @ b, "cuda", 0.3) / 1e9
    except RuntimeError:
        return None


def _best(run: timing.Call, device: str, seconds: float) -> float:
    """Seconds a call, the fastest of many: a roofline is what the machine can do when it is left alone."""
    measured = timing.measure({"it": run}, seconds, 5, device=device, limit=1.0)
    return min(measured.samples["it"])
