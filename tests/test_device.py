"""`benchmarks/device.sh` with a Python that only says what it was asked: stages, resumption, logs, exit codes.

The real one takes minutes: run it without a GPU, and it rehearses.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/device.sh"
STAGES = ["build", "suite", "mutations", "sanitizer", "measure"]
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists() or shutil.which("bash") is None, reason="benchmarks is not beside the tests"
)

# Answers `-c "import torch..."` as a machine without a GPU; everything else it notes, and fails where $FAIL is in it.
PYTHON = """#!/bin/sh
case "$*" in *"import torch"*) echo cpu; exit 0;; esac
echo "asked: $*" | tee -a "$ASKED"
case "$*" in *"${FAIL:-nothing fails}"*) echo "it broke"; exit 3;; esac
"""


@pytest.fixture
def device(tmp_path):
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*args: str, fail: str = "nothing fails") -> tuple[int, str, str]:
        asked.write_text("")
        env = os.environ | {"PYTHON": str(python), "ASKED": str(asked), "FAIL": fail}
        done = subprocess.run([SCRIPT, *args], env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, asked.read_text()

    return run


def test_every_stage_runs_once_and_keeps_its_log(device, tmp_path) -> None:
    out = tmp_path / "out"
    code, said, asked = device(str(out), "1000")
    assert code == 0, said
    assert "a rehearsal on the CPU's rungs" in said
    for word in (
        "build_ext --inplace",
        "doctor",
        "-m pytest",
        "tests/mutation.py --device cpu",
        "bench --device cpu",
        "--report",
    ):
        assert word in asked, word
    assert [(out / f"{name}.log").exists() for name in STAGES] == [True] * len(STAGES)
    assert (out / "stages").read_text().split() == STAGES
    code, said, asked = device(str(out), "1000")
    assert code == 0 and said.count("done before") == len(STAGES)
    assert "-m pytest" not in asked and "--report" in asked


def test_a_stage_that_fails_is_told_and_run_again(device, tmp_path) -> None:
    out = tmp_path / "out"
    code, said, asked = device(str(out), "1000", fail="pytest")
    assert code == 1 and "suite: FAILED with code 3" in said and "it broke" in said
    assert "bench --device cpu" in asked, "the others run all the same"
    code, said, asked = device(str(out), "1000")
    assert code == 0 and "-m pytest" in asked and "mutation" not in asked


def test_no_time_is_no_success(device, tmp_path) -> None:
    code, said, asked = device(str(tmp_path / "out"), "3")
    assert code == 1 and said.count("no time is left") == len(STAGES) and "-m pytest" not in asked


@pytest.mark.parametrize("args", [[], ["a", "b"], ["a", "1", "2"]])
def test_wrong_words(device, args) -> None:
    code, said, _ = device(*args)
    assert code == 2 and "usage: benchmarks/device.sh OUT [SECONDS]" in said
