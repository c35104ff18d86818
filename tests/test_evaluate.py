"""The judge of digits, `diffkernels sample --evaluate`, and the example that trains what it judges."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffkernels.cli import sample
from diffkernels.digits import TRAINED_ON, Judge, digits, frechet
from diffkernels.models import DiMR, DiT, load, save
from diffkernels.models.checkpoint import describe

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_digits.py"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("sklearn", reason="scikit-learn holds the real digits")
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    sample.register(parser.add_subparsers(required=True))
    args = parser.parse_args(["sample", "--evaluate", *argv])
    return args.run(args)


def row(told: str, name: str) -> list[str]:
    """The cells of a line of the table, but the first."""
    line = next(line for line in told.splitlines() if name in line)
    return [cell.strip() for cell in line.split("│")[2:4]]


def test_frechet_distance_of_known_gaussians() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=draw, dtype=torch.float64)
    b = torch.randn(200_000, 3, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0, 0])
    assert frechet(a, b) == pytest.approx(1 + 0 + 1 + 0.25, rel=0.02)  # |mean|² + sum (s_a - s_b)²
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64)).Q  # covariances that don't commute
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b), rel=1e-9)
    assert frechet(a @ turn * 2, b) == pytest.approx(frechet(b, a @ turn * 2), rel=1e-9)


def test_judge_of_real_and_of_noise() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn holds the real digits")
    judge = Judge()
    x, _, held, y = digits()
    assert len(x) == TRAINED_ON and len(held) == judge.held == 297
    assert judge.accuracy(held, y) == judge.real[0] >= 0.97
    assert judge.distance(x) == pytest.approx(0, abs=1e-6)
    assert 0.1 < judge.real[1] < 1
    noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(0))
    assert judge.accuracy(noise, y) < 0.3 and judge.distance(noise) > 10


@pytest.mark.parametrize("model", ["digits", "dimr"])
def test_bundled(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both bundled models draw digits that the judge reads, and a seed gives the same alone and among others."""
    pytest.importorskip("sklearn", reason="scikit-learn holds the real digits")
    monkeypatch.chdir(tmp_path)
    few = ("--model", model, "--steps", "8", "--per-class", "8")
    assert call(*few, "--seeds", "2") == 0
    told, progress = capsys.readouterr()
    assert "seed 1" in progress and "solver_step: " in told
    assert ("td_params: " in told) == (model == "dimr")
    accuracy, distance = row(told, "mean ± deviation")
    assert float(accuracy.split("±")[0]) >= 90 and 0.5 < float(distance.split("±")[0]) < 4
    assert row(told, "297 real digits, held out")[0] == "98.3 %"
    if model == "digits":
        assert call(*few, "--seeds", "1", "--seed", "1", "--quiet") == 0
        again, progress = capsys.readouterr()
        assert row(again, "seed 1") == row(told, "seed 1") and progress == ""
        assert row(again, "mean ± deviation")[0].endswith("± 0.0 %")
    assert not list(tmp_path.iterdir())  # no sheet


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--seeds", "0"], "--seeds: expected 1 or more, got 0"),
        (["--classes", "0-4"], "expected --classes 0-9 and more than 64 pictures a seed"),
        (["--per-class", "6"], "got --classes 0-9 and 10 × 6"),
        (["--guidance", "1e38", "--steps", "2", "--per-class", "7"], "--guidance: the samples are not finite at 1e+38"),
    ],
)
def test_refusals(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn holds the real digits")
    assert call("--quiet", *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


@pytest.mark.parametrize("about", [{}, {"data": "MNIST digits"}, {"data": 3}])
def test_only_of_these_digits(about: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    save(DiT(8, 4, 1, hidden_size=16, depth=1, num_heads=2, num_classes=10, learn_sigma=False), path, about=about)
    assert call("--model", str(path)) == 2
    assert "--evaluate: the judge knows scikit-learn's digits only; " in capsys.readouterr().err


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sklearn", "sklearn.datasets", "sklearn.svm"):
        monkeypatch.setitem(sys.modules, name, None)
    assert call() == 2
    assert "--evaluate: the digits come with scikit-learn: pip install 'diffkernels[train]'" in capsys.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn holds the real digits")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "sample", interrupted)
    assert call("--quiet") == 130
    assert capsys.readouterr() == ("", "diffkernels sample: stopped; nothing was written\n")


@pytest.mark.parametrize("argv", [["--model", "dit"], ["--model", "dimr"], ["--model", "dimr", "--frozen-tau"]])
def test_example_trains(argv: list[str], example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.safetensors"
    assert example.main([*argv, "--steps", "3", "--out", str(path)]) == 0
    said, model = describe(path), load(path)
    assert isinstance(model, DiT | DiMR) and path.stat().st_size < 2_000_000
    assert said["about"]["steps"] == 3 and said["about"]["frozen_tau"] == ("--frozen-tau" in argv)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    with torch.no_grad():
        early, late = (model(x, torch.full((4,), t), y) for t in (10, 990))
    # After three steps the time has hardly begun to matter, but it does.
    assert torch.equal(early, late) == ("--frozen-tau" in argv)


def test_example_freezes_what_it_trained(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = example.build("dimr").eval()
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        still, other = (model(x, torch.full((4,), t), y) for t in (example.STILL, 900))
        assert not torch.allclose(still, other, atol=1e-3)
        example.freeze(model)
        torch.testing.assert_close(model(x, torch.full((4,), 900), y), still, rtol=1e-4, atol=1e-4)


def test_example_decays_all_but_nodecay_and_drops_labels(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, seen = [], []
    adam, run = torch.optim.AdamW, DiMR.forward_stages

    def optimizer(params: list[dict], **options: object) -> torch.optim.Optimizer:
        groups.extend(params)
        return adam(params, **options)

    def forward(self: DiMR, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        seen.append((t, y))
        return run(self, x, t, y)

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    monkeypatch.setattr(DiMR, "forward_stages", forward)
    example.train("dimr", 6, 0, still=True)
    decayed, spared = groups
    names = {n for n, _ in example.build("dimr").named_parameters() if "nodecay" in n}
    assert len(spared["params"]) == len(names) > 0
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    t, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert t.eq(499).all()
    assert 0.05 < y.eq(10).double().mean() < 0.15


def test_example_keeps_what_there_is(example: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    path, calls, objective = tmp_path / "m.safetensors", [], example.objective

    def impatient(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return objective(*args)

    monkeypatch.setattr(example, "objective", impatient)
    assert example.main(["--steps", "9", "--out", str(path)]) == 0
    assert "stopped after 2 steps" in capsys.readouterr().err
    assert describe(path)["about"]["steps"] == 2 and load(path) is not None


def test_example_evaluates_by_the_command(example: ModuleType, monkeypatch, capsys) -> None:
    """The held-out noise error is its own; all else is asked of `diffkernels sample --evaluate`."""
    asked: list[list[str]] = []
    monkeypatch.setattr(example, "diffkernels", lambda argv: asked.append(argv) or 0)
    asset = Path(sample.__file__).parents[1] / "assets" / "digits_dimr.safetensors"
    assert example.main(["--load", str(asset)]) == 0
    error = float(capsys.readouterr().out.removeprefix("held-out noise error "))
    assert 0.05 < error < 0.1
    assert [argv[-1] for argv in asked] == ["1", "2"] and all("--evaluate" in argv and str(asset) in argv for argv in asked)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--frozen-tau"], "--frozen-tau: expected the training of --model dimr"),
        (["--load", "no/such.safetensors"], "no such file"),
        (["--load", "m.safetensors"], "expected a DiT or DiMR of 1 × 8 × 8 digits"),
    ],
)
def test_example_refusals(argv: list[str], words: str, example: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save(DiT(8, 4, 1, hidden_size=16, depth=1, num_heads=2, num_classes=5), tmp_path / "m.safetensors")
    try:
        code = example.main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2 and words in capsys.readouterr().err
