"""The command line, as a user meets it: `info`, `doctor`, `bench` (for `sample` see test_sample_cli.py)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import diffkernels as dk
from diffkernels import _ladder, cli
from diffkernels._ladder import LADDER
from diffkernels._op import OPS
from diffkernels.cli import doctor


def diffkernels(*args: str, code: int = 0) -> str:
    """Runs the command in a process of its own; what it wrote on both streams."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", "import sys; from diffkernels.cli import main; sys.exit(main())", *args],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == code, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout + run.stderr


def test_info_names_every_op_rung_and_reason(capsys) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["rungs"]) == set(LADDER)
    for device, ops in found["rungs"].items():
        assert set(ops) == set(OPS)
        assert all(list(rungs) == list(LADDER[device]) for rungs in ops.values())
        assert all(why is None or why for rungs in ops.values() for why in rungs.values())
    assert found["rungs"]["cpu"]["norm_modulate"]["cpu"] is None
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["commit"]
    for form in (["info"], ["info", "--md"]):
        assert cli.main(form) == 0
        text = capsys.readouterr().out
        assert all(op in text for op in OPS) and ("no CUDA device" in text or torch.cuda.is_available())


@pytest.fixture
def not_interpreting(monkeypatch) -> None:
    """Without Triton's interpreter the doctor takes seconds; its kernels are tested elsewhere."""
    monkeypatch.setattr(_ladder, "interpreting", lambda: False)


def test_doctor_is_well(not_interpreting, capsys) -> None:
    assert cli.main(["doctor"]) == 0
    assert "all well" in capsys.readouterr().out


def test_doctor_finds_a_wrong_kernel(not_interpreting, monkeypatch, capsys) -> None:
    op = OPS["norm_modulate"]
    monkeypatch.setattr(doctor, "OPS", {op.name: op})
    right = op.body
    monkeypatch.setattr(op, "body", lambda *args: right(*args) * (1 + 1e-3))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "✗" in out and "allowed" in out and "wrong, in" in out


def test_version_and_help() -> None:
    assert dk.__version__ in diffkernels("--version")
    text = diffkernels("--help")
    assert all(command in text for command in ("info", "doctor", "verify", "sample", "bench"))
    assert "usage" in diffkernels(code=2)
