"""The measuring room: what is timed and how it becomes rows, files and pages. No test here depends on how fast anything is."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from diffkernels import cli
from diffkernels._op import OPS
from diffkernels.bench import dit, machine, peers, report, results, runner, suite, timing

ROOT = Path(__file__).parents[1]
QUICK = ["--seconds", "0.02", "--max-load", "100", "--processes", "2"]
RNG = np.random.default_rng(0)


def row(**more) -> dict:
    """A measured row as a file has it."""
    ratio = {"ratio": 2.0, "ratio_95": [1.9, 2.1]}
    named = {"op": "geglu", "case": "dimr-xl", "dtype": "f32", "rung": "cpu", "shape": [8, 257, 1920], "l2": "warm"}
    times = {"us": 10.0, "us_p10_p90": [9.0, 11.0], "kernel_us": 9.0, "again": ratio, "gb_per_s": 0.1, "percent_of_copy": 90.0}
    counts = {"bytes": 1000, "flops": 5000, "processes": 3, "rounds": 25, "load": 0.0, "page_faults": 0.0, "peak_bytes": 400}
    others = {
        "error": 1e-7,
        "peers": {"eager": {"us": 20.0, "error": 2e-7, **ratio}, "liger": {"skipped": "runs on a GPU only"}},
    }
    stamp = {"commit": "abc", "torch": "2.13", "threads": 2, "compiler": "GNU", "when": "2026-01-01T00:00:00+00:00"}
    return named | {"model": "a model", "device": "cpu"} | times | counts | others | stamp | more


ROOFS = {"copy_gb_per_s": 10.0, "cpu": {"f32": 60.0, "bf16": 30.0, "int8": 40.0}}
FILE = {"format": results.FORMAT, "machine": {"cpu": "A <CPU>", "cores": 2, "rooflines": ROOFS}, "rows": [row()]}


def write(path: Path, **more) -> Path:
    path.write_text(json.dumps(FILE | more))
    return path


# Timing


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {
        name: lambda name=name, n=n: (order.append(name), sum(range(n)))[1] for name, n in (("slow", 60000), ("fast", 10000))
    }
    found = timing.measure(contenders, seconds=0.01, rounds=10, limit=1.0)
    assert len(found.samples["slow"]) == len(found.samples["fast"]) >= 10
    assert "slow" in order[-40:] and "fast" in order[-40:]
    assert found.median("slow") > 0 and set(found.faults) == {"slow", "fast"}


def test_work_of_others_is_seen() -> None:
    """A process that keeps a core busy is; this one's own threads are not."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = timing.Load()
        time.sleep(1.0)
        assert (watch.share() or 1.0) > 0.2 / (os.cpu_count() or 1)
        with pytest.raises(timing.Busy, match=r"others took \d+% of the machine in the quietest of 2 windows, 1% allowed"):
            timing.measure({"it": lambda: time.sleep(1e-3)}, seconds=0.4, limit=0.01, tries=2)
    finally:
        other.kill()
        other.wait()


def test_our_own_work_is_not_foreign(monkeypatch) -> None:
    states = iter([(100.0, 50.0, 0.0), (101.5, 51.4, 1.0)])
    monkeypatch.setattr(timing.Load, "now", staticmethod(lambda: next(states)))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert timing.Load().share() == pytest.approx(0.05)
    monkeypatch.setattr(timing.Load, "now", staticmethod(lambda: None))
    assert timing.Load().share() is None


# Rows


def part(ours: float, peer: float, **more) -> dict:
    noise = 1 + 0.01 * RNG.standard_normal((2, 40))
    samples = {"ours": list(ours * noise[0]), "eager": list(peer * noise[1]), "again": list(ours * noise[1])}
    base = {"samples": samples, "faults": dict.fromkeys(samples, 1.0), "load": 0.01, "errors": {"eager": 2e-7}, "per": 2}
    return {
        "row": {"op": "o", "bytes": 8, "error": 1e-7},
        "skipped": {"liger": "why"},
        "peak_bytes": {"ours": 7},
        **base,
        **more,
    }


def test_a_row_is_the_median_of_processes() -> None:
    found = runner.combined([part(1e-3, 3e-3), part(2e-3, 6e-3), part(9e-3, 18e-3, load=0.02)])
    assert found["us"] == pytest.approx(1000, rel=0.02)  # of two steps
    assert found["peers"]["eager"]["ratio"] == pytest.approx(3, rel=0.02)
    low, high = found["peers"]["eager"]["ratio_95"]
    assert low < 2.9 and high < 3.1, "one of three processes saw 2: the interval has to know"
    assert found["again"]["ratio"] == pytest.approx(1, abs=0.02)
    assert found["load"] == 0.02 and found["processes"] == 3 and found["peers"]["liger"] == {"skipped": "why"}
    assert found["error"] == 1e-7 and found["peers"]["eager"]["error"] == 2e-7


def test_no_speed_without_all_processes() -> None:
    found = runner.combined([part(1e-3, 3e-3), {"row": {"op": "o"}, "not_measured": "the machine was busy"}])
    assert found == {"op": "o", "not_measured": "the machine was busy"}


def test_a_wrong_kernel_has_no_speed(monkeypatch) -> None:
    op = OPS["slice_moments"]
    monkeypatch.setattr(op, "call", lambda *a, **k: [t * 1.001 for t in op.reference(*op.bind(a, k))])
    (task,) = suite.tasks(["slice_moments"], ["f32"], seconds=0.01, limit=1.0)
    found = suite.part(task)
    assert "samples" not in found and "allowed" in found["not_measured"]


def test_a_peer_that_fails_is_a_row_with_its_reason(monkeypatch) -> None:
    def broken(op, case, kwargs):
        return lambda given: lambda: 1 / 0

    monkeypatch.setitem(peers.PEERS, "compile", broken)
    (task,) = suite.tasks(["slice_moments"], ["f32"], seconds=0.01, limit=1.0, vs=("eager", "compile", "sdpa-math", "liger"))
    found = suite.part(task)
    assert found["skipped"] == {
        "compile": "ZeroDivisionError: division by zero",
        "sdpa-math": "stands in for attention's forward only",
        "liger": "has nothing for slice_moments",
    }
    assert {"ours", "again", "kernel", "eager", "copy"} == set(found["samples"])
    assert found["row"]["error"] < 1e-6 and found["row"]["bytes"] > 0 and found["row"]["flops"] > 0


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if any(c.model for c in op.cases)])
def test_eager_formulas_say_what_the_op_says(name) -> None:
    """A formula that computes something else would make a ratio of nothing."""
    op = OPS[name]
    smallest = {c.eager: c for c in sorted(op.cases, key=lambda c: -math.prod(c.shape))}
    for case in smallest.values():
        if case.eager is None or sum(n for n in case.shape) > 10000 or (case.flops and case.flops(*case.shape) > 2e9):
            continue
        (task,) = suite.tasks([f"{name}/{case.name}"], ["f32"], vs=("eager",))[:1]
        subject = suite._op_subject(task)
        error = subject.errors["eager"]
        codes = any(
            not t.is_floating_point()
            for t in pytree.tree_leaves(op.allocate(*op.bind((), case.args(suite.Draw(torch.float32)))))
        )
        assert error is None or error < (1 / 126 if codes else 1e-5), case.name  # a tie may fall to either side
        assert case.flops is None or case.flops(*case.shape) > 0


@pytest.mark.parametrize("peer", ["openvino", "onnxruntime"])
def test_libraries_agree_with_the_definition(peer) -> None:
    pytest.importorskip(peer)
    (task,) = suite.tasks(["slice_moments"], ["f32"], shapes=[(2, 33, 960)], seconds=0.01, limit=1.0, vs=(peer,))
    found = suite.part(task)
    assert peer in found["samples"], found
    op, case = OPS["slice_moments"], next(c for c in OPS["slice_moments"].cases if c.model)
    kwargs = case.args(suite.Draw(torch.float32), (2, 33, 960))
    y, var, mean = peers.PEERS[peer](op, case, kwargs)(kwargs)()
    for got, expected in zip((y, var, mean), torch.utils._pytree.tree_leaves(case.eager(**kwargs)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_openvino_in_8_bits_answers_what_the_model_does() -> None:
    pytest.importorskip("nncf")
    model = dit.drawn("S/8", depth=2)
    x, t, y = torch.randn(2, *model.sample_shape), torch.tensor([500.0, 20.0]), torch.tensor([1, 2])
    with torch.no_grad():
        found, exact = dit.openvino(model, x, t, y), dit.eager(model, x, t, y)
    assert set(found) == {"openvino", "openvino weights"}
    for name, call in found.items():
        assert dit.psnr(call(), exact) > 20, name


def test_peers_of_4_bits_answer_what_the_op_does() -> None:
    op = OPS["linear_w4a16"]
    case = next(c for c in op.cases if c.name == "few-rows")
    kwargs = case.args(suite.Draw(torch.bfloat16), (5, 256, 192))
    for peer in ("linear", "int4pack"):
        got = peers.PEERS[peer](op, case, kwargs)(kwargs)()
        assert (got.double() - op.call(**kwargs).double()).norm() < 0.02 * got.double().norm(), peer
    rest = next(c for c in op.cases if c.name == "tails").args(suite.Draw(torch.bfloat16))
    for peer in ("linear", "int4pack", "torchao"):
        with pytest.raises(peers.Skip):
            peers.PEERS[peer](op, case, rest)


def test_peers_are_named_alone_by_family_or_all() -> None:
    assert peers.chosen(None) == peers.ALWAYS and peers.chosen("all") == tuple(peers.PEERS)
    assert peers.chosen("sdpa,eager") == ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "sdpa-math", "eager")


def attention_case(name):
    op = OPS["attention_forward"]
    case = next(c for c in op.cases if c.name == name)
    return op, case, case.args(suite.Draw(torch.float32))


@pytest.mark.parametrize(
    "name", ["self", "dimr", "grouped", "causal", "causal-top-left", "mask", "relative-bias", "negative-scale"]
)
def test_sdpa_backends_compute_attention(name) -> None:
    """They answer o, the first of our results, and that is what is compared."""
    op, case, kwargs = attention_case(name)
    exact = suite.oracle.exact(op, op.bind((), kwargs))
    for peer in ("sdpa-math", "sdpa-flash"):
        answer = [peers.PEERS[peer](op, case, kwargs)(kwargs)()]
        error = suite._worst(answer, exact)
        assert error is not None and error < 1e-6
        assert suite._worst([answer[0] * 1.001], exact) > 5e-4 and suite._worst([*answer, *answer], exact) is None
    assert suite._worst([], exact) is None


def test_attention_that_a_peer_does_not_have_is_skipped_with_the_reason() -> None:
    for name, missing in {
        "bias": "mask",  # beside a bias
        "causal-longer": "causal bottom-right",
        "lengths-causal": "key_lengths, causal bottom-right",
        "packed": "cu_q",
        "indexed": "kv_index",
    }.items():
        with pytest.raises(peers.Skip, match=f"^has no {missing}$"):
            peers.PEERS["sdpa-math"](*attention_case(name))
    for name, missing in {"flash-attn": "mask", "sageattention": "grouped heads", "xformers": "causal"}.items():
        case = {"mask": "mask", "grouped heads": "grouped", "causal": "causal"}[missing]
        with pytest.raises(peers.Skip, match=f"^has no {missing}$"):
            peers.PEERS[name](*attention_case(case))
        with pytest.raises(peers.Skip, match="GPU only"):
            peers.PEERS[name](*attention_case("self"))
    op = OPS["attention_backward"]
    with pytest.raises(peers.Skip, match="forward only"):
        peers.PEERS["sdpa-math"](op, op.cases[0], {})


def test_a_cold_cache_takes_other_tensors_in_turn() -> None:
    (task,) = suite.tasks(["solver_step/dpmpp-2m-cfg-512"], ["f32"], seconds=0.01, limit=1.0, l2="cold")
    found = suite.part(task)
    assert found["row"]["l2"] == "cold" and found["samples"]["ours"]
    turns = []
    call = suite._in_turn([lambda i=i: turns.append(i) for i in range(3)])
    for _ in range(5):
        call()
    assert turns == [0, 1, 2, 0, 1]


def test_peak_memory_of_a_call() -> None:
    x = torch.randn(1000)
    assert 8000 <= suite.peak_bytes(lambda: (x + 1) * 2, "cpu") < 8100  # two of 4000 at a time, and scalars
    assert (suite.peak_bytes(lambda: x.add_(1), "cpu") or 0) < 100


def test_rooflines_are_of_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(machine, "_copy", lambda device, seconds: 1.0)
    found = machine.rooflines("cpu", 0.01)
    assert found["copy_gb_per_s"] == 1.0
    for rung, peaks in found.items():
        assert rung == "copy_gb_per_s" or (set(peaks) == set(machine.ARITHMETIC) and min(peaks.values()) > 0)
    assert machine.cache() >= 2**18


# Workers


def test_a_worker_that_dies_costs_its_row_alone(monkeypatch) -> None:
    monkeypatch.setattr(
        runner, "SERVE", "import os, sys\nfor line in sys.stdin: print('last words', file=sys.stderr); os.abort()"
    )
    with runner.Workers(1) as workers:
        (found,) = workers.rows([suite.Task("geglu", "dimr-xl")])
        assert found["not_measured"] == "its process ended: SIGABRT: last words"
        monkeypatch.setattr(runner, "SERVE", 'import sys\nfor line in sys.stdin: print(\'{"it": "lives"}\', flush=True)')
        assert workers.rooflines("cpu") == {"it": "lives"}


def test_a_worker_that_hangs_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(runner, "SERVE", "import time; time.sleep(60)")
    worker = runner.Worker()
    assert worker.ask({}, patience=0.2) == {"not_measured": "took more than 0 s"}
    assert worker.process is None


# The command


def bench(*args: str) -> int:
    return cli.main(["bench", *args])


def test_the_command_measures_writes_and_merges(tmp_path, capsys) -> None:
    extra = ["--html", str(tmp_path / "page.html"), "--md", str(tmp_path / "page.md"), "--plot", str(tmp_path)]
    (tmp_path / "out").mkdir()
    assert bench("slice_moments", "call overhead", "--dtype", "f32", "--out", str(tmp_path / "out"), *QUICK, *extra) == 0
    (path,) = (tmp_path / "out").iterdir()
    content = results.load(path)
    assert [r["op"] for r in content["rows"]] == ["call overhead", "slice_moments"]
    found = content["rows"][1]
    assert found["us"] > 0 and found["processes"] == 2 and found["rounds"] >= 25 and found["commit"] and found["when"]
    assert found["error"] < 1e-6 and set(found["peers"]) == {"eager", "compile"} and found["kernel_us"] > 0
    assert content["machine"]["rooflines"]["copy_gb_per_s"] > 0
    out = capsys.readouterr().out
    assert "× eager" in out and "slice_moments" in out and "call overhead" in out
    assert "slice_moments" in (tmp_path / "page.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == len(report.PLOTS)


def test_ctrl_c_keeps_what_was_measured(tmp_path, monkeypatch) -> None:
    def rows(self, tasks):
        if tasks[0].dtype == "bf16":
            raise KeyboardInterrupt
        yield row(op=tasks[0].op, case=tasks[0].case, rung="cpu")

    monkeypatch.setattr(runner.Workers, "rows", rows)
    monkeypatch.setattr(runner.Workers, "rooflines", lambda self, device: ROOFS)
    assert bench("geglu", "--out", str(tmp_path)) == 130
    (path,) = tmp_path.glob("*.json")
    assert [r["dtype"] for r in results.load(path)["rows"]] == ["f32"]


def test_a_budget_begins_with_what_is_missing(tmp_path, monkeypatch) -> None:
    asked: list[tuple[str, str]] = []

    def rows(self, tasks):
        asked.append((tasks[0].case, tasks[0].dtype))
        yield row(
            op=tasks[0].op, case=tasks[0].case, dtype=tasks[0].dtype, rung=tasks[0].row()["rung"], shape=tasks[0].row()["shape"]
        )

    monkeypatch.setattr(runner.Workers, "rows", rows)
    monkeypatch.setattr(runner.Workers, "rooflines", lambda self, device: ROOFS)
    assert bench("row_covariance/sd15-512", "--dtype", "bf16", "--out", str(tmp_path)) == 0
    asked.clear()
    assert bench("row_covariance", "--budget", "100", "--out", str(tmp_path)) == 0
    assert asked[-1] == ("sd15-512", "bf16") and len(asked) == 4
    asked.clear()
    assert bench("row_covariance", "--budget", "-1", "--out", str(tmp_path)) == 0
    assert not asked


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["attention"], "op: expected one of act_quantize"),
        (["norm_modulate/flux"], "norm_modulate has the cases dit-xl-256, pixart-1024"),
        (["--dtype", "f64"], "--dtype: expected one of f32, f16, bf16; got 'f64'"),
        (["--rung", "fast"], "rung: expected one of"),
        (["--rung", "sm90"], "nothing to run on 'sm90' here: does not run on cpu tensors"),
        (["--vs", "eager,magic"], "--vs: expected all, or one of eager, compile, liger"),
        (["--shapes", "8x"], "--shapes: expected 8x256x1152"),
        (["--shapes", "1x2x3x4x5x6x7"], "no case has a shape of as many dimensions"),
        (["--seconds", "nan"], "expected more than 0"),
        (["--processes", "0"], "expected more than 0"),
        (["--out", "no-such-folder"], "no-such-folder is no folder"),
        (["--html", "no-such-folder/page.html"], "--html: no-such-folder is no folder"),
        (["--plot", "no-such-folder"], "--plot: no-such-folder is no folder"),
        (["--compare", "no.json", "no.json"], "no.json: not a result file"),
        (["--report", "--out", str(ROOT / "tests")], "--report: no result file in"),
        pytest.param(["--device", "cuda"], "cuda can't be used here", marks=pytest.mark.skipif("torch.cuda.is_available()")),
    ],
)  # fmt: skip
def test_bad_input(args, words, capsys) -> None:
    assert bench(*args) == 2
    assert words in capsys.readouterr().err


def test_the_list_names_everything(capsys) -> None:
    assert bench("--list") == 0
    out = capsys.readouterr().out
    for name in (*suite.MODELS, *peers.PEERS, "norm_modulate/dit-xl-256", "avx512"):
        assert name in out


# Result files


def test_foreign_and_cut_files_are_refused(tmp_path) -> None:
    path = tmp_path / "machine.json"
    whole = json.dumps(FILE)
    for content in (
        "{",
        '{"format": 99, "rows": []}',
        '{"rows": 3}',
        "[]",
        whole[:-30],
        whole.replace('"us": 10.0', '"us": -1'),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"machine\.json: not a result file"):
            results.merge(path, {"cpu": "x"}, [])
        assert path.read_text() == content


def test_merging_keeps_what_is_known(tmp_path) -> None:
    path = tmp_path / "machine.json"
    results.merge(path, {"cpu": "x", "threads": 2}, [row(), row(dtype="bf16")])
    results.merge(path, {"cpu": "x", "threads": 2}, [row(us=5.0), row(dtype="bf16") | {"not_measured": "busy"}])
    assert [(r["dtype"], r["us"], "not_measured" in r) for r in results.load(path)["rows"]] == [
        ("bf16", 10.0, False),
        ("f32", 5.0, False),
    ]
    assert os.stat(path).st_mode & 0o777 == 0o644 and list(tmp_path.iterdir()) == [path]


def test_a_busy_hour_lowers_no_roofline(tmp_path) -> None:
    path = tmp_path / "machine.json"
    first = {"copy_gb_per_s": 20.0, "cpu": {"f32": 60.0, "bf16": None}, "amx": {"int8": 9.0}}
    for found in (first, {"copy_gb_per_s": 15.0, "cpu": {"f32": 70.0, "bf16": 3.0}}):
        results.merge(path, {"cpu": "x", "rooflines": found}, [row()])
    assert results.load(path)["machine"]["rooflines"] == {
        "copy_gb_per_s": 20.0,
        "cpu": {"f32": 70.0, "bf16": 3.0},
        "amx": {"int8": 9.0},
    }


def test_comparing_two_files(tmp_path, capsys) -> None:
    old = write(tmp_path / "old.json", rows=[row(), row(dtype="bf16"), row(dtype="f16")])
    slower, noisy = row(us=14.0, us_p10_p90=[13.0, 15.0]), row(dtype="bf16", us=14.0, us_p10_p90=[8.0, 20.0])
    new = write(tmp_path / "new.json", rows=[slower, noisy, row(dtype="f16", us=5.0, us_p10_p90=[4.9, 5.1])])
    assert bench("--compare", str(old), str(new)) == 0
    assert bench("--compare", str(old), str(new), "--fail-if-slower", "50%") == 0
    capsys.readouterr()
    assert bench("--compare", str(old), str(new), "--fail-if-slower", "5%") == 1
    told = capsys.readouterr()
    assert told.err == "slower: geglu dimr-xl f32 on cpu: 1.40×\n" and "0.50" in told.out
    assert bench("--compare", str(old), str(write(tmp_path / "none.json", rows=[]))) == 2
    assert bench("--compare", str(old), str(new), "--fail-if-slower", "much") == 2


# Reports


def test_what_was_not_measured_is_told() -> None:
    gap = {name: value for name, value in row(dtype="bf16").items() if name not in ("us", "peers")} | {"not_measured": "busy"}
    text = report.markdown([FILE | {"rows": [row(), gap]}])
    assert "not measured: busy" in text and "2.00 [1.90–2.10]" in text and "liger: runs on a GPU only (geglu)" in text
    index = report.index([FILE])
    assert index.count("not measured: no row yet") > 30 and "No GPU has run these kernels yet" in index
    assert "bench" in report.put_into(f"a\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nz", [FILE])
    assert report.put_into("no place", [FILE]) == "no place"


def test_the_floor_is_bytes_or_arithmetic() -> None:
    assert report.percent_of_floor(row(), ROOFS) == 90.0
    assert report.percent_of_floor(row(flops=590_000), ROOFS) == pytest.approx(98.3, abs=0.1)
    assert report.percent_of_floor(row(flops=393_333, arithmetic="int8"), ROOFS) == pytest.approx(98.3, abs=0.1)


def test_the_page_is_whole_in_itself(tmp_path) -> None:
    text = report.html([FILE])
    assert text.count("<svg") == len(report.PLOTS) and "A &lt;CPU&gt;" in text and "<script" not in text
    outside = [word for word in text.replace("http://www.w3.org", "").split('"') if word.startswith(("http:", "https:", "//"))]
    assert not [
        word for word in outside if "purl.org" not in word and "creativecommons" not in word and "matplotlib" not in word
    ]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_shows_the_page(tmp_path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(report.html([FILE]), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1600", f"--user-data-dir={tmp_path}/profile"]
    subprocess.run(["chromium", *flags, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    from PIL import Image

    with Image.open(picture) as shown:
        colours = shown.convert("RGB").getcolors(maxcolors=2**24)
    assert colours is not None and len(colours) > 50, "an empty page"
    dom = subprocess.run(
        ["chromium", *flags, "--dump-dom", page.as_uri()], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert dom.count("<svg") == len(report.PLOTS) and "2.00 [1.90–2.10]" in dom


@pytest.mark.skipif(not (ROOT / "benchmarks/results").is_dir(), reason="the results are not beside the tests")
def test_what_is_generated_is_what_the_files_say() -> None:
    files = [results.load(path) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))]
    assert files
    assert (ROOT / "benchmarks/results/README.md").read_text() == report.index(files), "run: diffkernels bench --report"
    readme = (ROOT / "README.md").read_text()
    assert report.put_into(readme, files) == readme and report.MARKS[0] in readme, "run: diffkernels bench --report"
