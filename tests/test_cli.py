"""The command line, as a user meets it: `info`, `doctor`, `bench` (for `sample` see test_sample_cli.py)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import diffkernels as dk
from diffkernels import cli
from diffkernels._ladder import LADDER
from diffkernels._op import OPS
from diffkernels.bench import suite, timing


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


def test_doctor_is_well(capsys) -> None:
    assert cli.main(["doctor"]) == 0
    assert "all well" in capsys.readouterr().out


def test_doctor_finds_a_wrong_kernel(monkeypatch, capsys) -> None:
    op = OPS["norm_modulate"]
    right = op.body
    monkeypatch.setattr(op, "body", lambda *args: right(*args) * (1 + 1e-3))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "✗" in out and "allowed" in out and "wrong, in" in out


def test_bench_measures_writes_and_merges(tmp_path) -> None:
    flags = ["--dtype", "f32", "--seconds", "0.05", "--out", str(tmp_path)]
    out = diffkernels("bench", "solver_step", *flags)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    rows = {suite.key(row): row for row in content["rows"]}
    assert len(rows) == 1 + sum(case.model is not None for case in OPS["solver_step"].cases)
    for row in content["rows"]:
        assert row["us"] > 0 and row["commit"]
        if row["op"] == "solver_step":
            assert set(row["peers"]) == {"eager", "compile"}
            assert row["error"] < 1e-5 and row["gb_per_s"] > 0
            low, high = row["peers"]["eager"]["ratio_95"]
            assert low <= row["peers"]["eager"]["ratio"] <= high
    assert "× eager" in out and "call overhead" in out
    fresh = content["rows"][0] | {"us": 1.0}
    suite.merge(path, suite.machine(), [fresh])
    merged = json.loads(path.read_text())["rows"]
    assert len(merged) == len(rows) and {r["us"] for r in merged if suite.key(r) == suite.key(fresh)} == {1.0}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["attention"], "schedulers; got 'attention'"),
        (["--dtype", "f64"], "--dtype: expected one of f32, f16, bf16; got 'f64'"),
        (["--rung", "fast"], "rung: expected one of"),
        (["--rung", "sm90"], "sm90"),
        (["--seconds", "nan"], "--seconds: expected more than 0"),
        (["--out", "no-such-folder"], "no-such-folder is no folder"),
    ],
)
def test_bench_refuses_in_words(args, words, capsys) -> None:
    assert cli.main(["bench", *args]) == 2
    assert words in capsys.readouterr().err


def test_foreign_result_files_are_refused(tmp_path) -> None:
    path = tmp_path / "machine.json"
    for content in ("{", '{"format": 99, "rows": []}', '{"rows": 3}', "[]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"machine\.json: not a result file"):
            suite.merge(path, suite.machine(), [])
        assert path.read_text() == content


def test_timing_interleaves_and_finds_the_faster() -> None:
    order: list[str] = []
    contenders = {
        name: lambda name=name, n=n: (order.append(name), sum(range(n)))[1] for name, n in (("slow", 60000), ("fast", 10000))
    }
    found = timing.measure(contenders, seconds=0.01, rounds=10)
    assert len(found.samples["slow"]) == len(found.samples["fast"]) >= 10
    ratio, low, high = found.ratio("slow", "fast")
    assert low <= ratio <= high
    assert "slow" in order[-40:] and "fast" in order[-40:]


def test_version_and_help() -> None:
    assert dk.__version__ in diffkernels("--version")
    text = diffkernels("--help")
    assert all(command in text for command in ("info", "doctor", "sample", "bench"))
    assert "usage" in diffkernels(code=2)
