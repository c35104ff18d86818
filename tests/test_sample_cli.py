"""`diffkernels sample`: the picture, that it comes again, and what is refused."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffkernels as dk
from diffkernels.cli import sample
from diffkernels.models import DiT, load, save
from diffkernels.models.checkpoint import describe
from diffkernels.quantize import Recipe, quantize_
from diffkernels.sampling import SOLVERS, Sampler

ASSET = Path(sample.__file__).parents[1] / "assets" / "digits_dit.safetensors"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of five classes that answers something: as built it would answer zero."""
    torch.manual_seed(0)
    model = DiT(8, 4, 1, hidden_size=16, depth=1, num_heads=2, num_classes=5, learn_sigma=False)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save(model, path)
    return str(path)


def call(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    sample.register(parser.add_subparsers(required=True))
    args = parser.parse_args(["sample", *argv])
    return args.run(args)


def small(tiny: str, out: Path, *argv: str) -> int:
    return call("--model", tiny, "--out", str(out), "--steps", "2", "--classes", "0-2", "--per-class", "3", "--quiet", *argv)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_bundled_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / ("long " * 20) / "[red]digits.png"
    out.parent.mkdir()
    assert call("--out", str(out), "--steps", "4", "--per-class", "2") == 0
    with Image.open(out) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        assert image.height > 10 * 70 and image.width > 2 * 70
        assert image.info["Software"].startswith("diffkernels ")
        settings = json.loads(image.info["diffkernels"])
    assert settings == {
        "model": "digits",
        "quantize": None,
        "solver": "dpmpp_2m",
        "options": {},
        "steps": 4,
        "spacing": None,
        "final": "zero",
        "threshold": None,
        "guidance": 2.0,
        "guidance_rescale": 0.0,
        "guidance_interval": None,
        "seed": 0,
        "classes": list(range(10)),
        "per_class": 2,
        "nfe": 4,
    }
    told = capsys.readouterr().out
    for word in ("digits", "norm_modulate", "solver_step", "rung ", "ms an image (20 images)", "seed", str(out)):
        assert word in told
    assert [p.name for p in out.parent.iterdir()] == ["[red]digits.png"]
    assert ASSET.stat().st_size < 2_000_000
    assert describe(ASSET)["about"]["steps"] >= 1500


def test_dit_is_digits(tmp_path: Path) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    for name, out in (("digits", a), ("dit", b)):
        assert call("--model", name, "--out", str(out), "--steps", "1", "--per-class", "1", "--quiet") == 0
    assert np.array_equal(pixels(a), pixels(b))


def test_bundled_dimr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dimr.png"
    assert call("--model", "dimr", "--out", str(out), "--steps", "4", "--per-class", "2") == 0
    told = capsys.readouterr().out
    for word in ("dimr", "td_params", "depthwise_conv2d", "geglu", "slice_moments", "solver_step", "rung "):
        assert word in told
    assert out.exists()
    asset = ASSET.with_name("digits_dimr.safetensors")
    assert asset.stat().st_size < 2_000_000 and describe(asset)["arch"] == "DiMR"
    assert describe(asset)["about"]["steps"] >= 4000


@pytest.mark.parametrize("kind", ["int8", "w4a8_lowrank"])
@pytest.mark.parametrize(("model", "fused"), [("digits", "4 DiTBlock"), ("dimr", "GegluMlp")])
def test_quantized_it_says_what_was_fused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, fused: str, kind: str
) -> None:
    out = tmp_path / "q.png"
    assert call("--model", model, "--quantize", kind, "--out", str(out), "--steps", "1", "--per-class", "1") == 0
    told = capsys.readouterr().out
    assert f"{kind}: " in told and fused in told and "linear_w8a8" in told and "geglu " not in told
    assert ("linear_w4a8_lowrank" in told) == (kind == "w4a8_lowrank")
    with Image.open(out) as image:
        assert json.loads(image.info["diffkernels"])["quantize"] == kind


@pytest.mark.parametrize("model", ["digits", "dimr"])
def test_weight_only_it_names_its_op(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    out = tmp_path / "q.png"
    assert call("--model", model, "--quantize", "w4a16", "--out", str(out), "--steps", "1", "--per-class", "1") == 0
    told = capsys.readouterr().out
    assert "w4a16: " in told and "linear_w4a16" in told and "linear_w8a8" not in told and "act_quantize" not in told


def test_a_quantized_file_is_fused_and_says_what_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = load(ASSET), tmp_path / "q.safetensors"
    quantize_(model, Recipe(min_elements=0))
    save(model, path, about=describe(ASSET)["about"])
    assert call("--model", str(path), "--out", str(tmp_path / "q.png"), "--steps", "1", "--per-class", "1") == 0
    told = capsys.readouterr().out
    assert "as it was saved; fused: 4 DiTBlock" in told and "linear_w8a8" in told and "gate_residual_norm" not in told


def test_bundled_digits_are_read_as_meant() -> None:
    """By a judge of another kind than `digits.Judge`: the nearest real digit. And the reference rungs draw the same."""
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn holds the real digits").load_digits()
    model = load(ASSET)
    sampler = Sampler("ddim", schedule=sample.SCHEDULES["linear"](), prediction="eps")
    y = torch.arange(10).repeat_interleave(8)
    noise = torch.randn(len(y), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = sampler(model, noise, steps=25, guidance=2.0, cond={"y": y}, uncond={"y": torch.full_like(y, 10)})
    real = torch.from_numpy(data.images / 8 - 1).float().flatten(1)
    read = torch.from_numpy(data.target)[torch.cdist(made.clamp(-1, 1).flatten(1), real).argmin(1)]
    assert (read == y).float().mean() >= 0.95
    few = y[::8]
    with dk.rung("reference"):
        plain = sampler(model, noise[::8], steps=25, guidance=2.0, cond={"y": few}, uncond={"y": torch.full_like(few, 10)})
    assert (made[::8] - plain).abs().max() <= 1e-3


def test_same_seed_same_pixels(tiny: str, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    for solver in ("dpmpp_2m", "ddpm"):  # ddpm draws noise on the way
        assert small(tiny, a, "--solver", solver) == small(tiny, b, "--solver", solver) == 0
        assert a.read_bytes() == b.read_bytes()
        assert small(tiny, c, "--solver", solver, "--seed", "1") == 0
        assert not np.array_equal(pixels(a), pixels(c))


def test_pictures_do_not_depend_on_their_neighbours(tiny: str) -> None:
    model = load(tiny)
    sampler = Sampler("ddpm", schedule=sample.SCHEDULES["linear"]())
    guided = {"guidance": 1.5, "guidance_rescale": 0.3, "guidance_interval": None}
    args = argparse.Namespace(steps=3, **guided, per_class=2, seed=4, quiet=True)
    many = sample.sample(model, sampler, [3, 3, 1], args)
    few = sample.sample(model, sampler, [1], args)
    # Not to the bit: a matrix product rounds differently in another batch, and a drawn model makes much of it.
    torch.testing.assert_close(many[4:], few, rtol=1e-3, atol=1e-3)
    assert not torch.equal(many[:2], many[2:4])  # the second line of threes goes on, it does not repeat


def test_every_solver_is_offered(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for solver in SOLVERS:
        done = small(tiny, tmp_path / "s.png", "--solver", solver, "--steps", "3")
        assert done == (2 if solver == "consistency" else 0), solver
    assert "consistency: expected a schedule with alpha = 1" in capsys.readouterr().err  # the model's has not


def test_options_of_the_solver_and_of_the_run(tiny: str, tmp_path: Path) -> None:
    """Each of them changes the picture, is written into it, and the picture's title names the solver's."""
    out, seen = tmp_path / "s.png", {}
    for key, value, *argv in (
        ("options", {}),
        ("options", {"kind": "taylor"}, "--option", "kind=taylor"),
        (
            "options",
            {"lower_order_final": False, "kind": "heun"},
            "--option",
            "lower_order_final=false",
            "--option",
            "kind=heun",
        ),
        ("spacing", "karras", "--spacing", "karras"),
        ("final", "sigma_min", "--final", "sigma_min"),
        ("threshold", 0.7, "--threshold", "0.7"),
        ("guidance_rescale", 0.7, "--guidance-rescale", "0.7"),
        ("guidance_interval", [0.5, 5.0], "--guidance-interval", "0.5", "5"),
    ):
        assert small(tiny, out, "--steps", "5", *argv) == 0, argv
        with Image.open(out) as image:
            assert json.loads(image.info["diffkernels"])[key] == value
            seen[str(argv)] = np.array(image).tobytes()
    assert len(set(seen.values())) == len(seen) == 8
    assert small(tiny, out, "--solver", "ddim", "--option", "eta=1") == 0


def test_layout(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "s.png"
    assert small(tiny, out) == 0
    first = pixels(out).shape
    assert small(tiny, out, "--per-class", "5") == 0
    assert pixels(out).shape[:2] == (first[0], first[1] + 2 * 76)  # more pictures: wider
    assert small(tiny, out, "--per-class", "18", "--steps", "1") == 0
    assert pixels(out).shape[0] == first[0] + 3 * 76  # more than 16: a second line for each class
    rgb = sample.sheet(torch.rand(2, 3, 32, 32) * 2 - 1, [7, 12], "t")
    assert rgb.mode == "RGB" and rgb.height > 2 * 64


def test_quiet_says_nothing(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small(tiny, tmp_path / "s.png") == 0
    assert capsys.readouterr() == ("", "")


def test_file_follows_umask_and_links(tiny: str, tmp_path: Path) -> None:
    out, link = tmp_path / "s.png", tmp_path / "link.png"
    link.symlink_to(out)
    before = os.umask(0o027)
    try:
        assert small(tiny, link) == 0
    finally:
        os.umask(before)
    assert link.is_symlink() and out.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--steps", "-3"], "--steps: expected 1 or more"),
        (["--steps", "1001"], "steps: expected at most the 1000"),
        (["--guidance", "nan"], "--guidance: expected a finite number, got nan"),
        (["--guidance=-inf"], "--guidance: expected a finite number"),
        (["--guidance", "1e38"], "--guidance: the samples are not finite"),
        (["--option", "kind"], "--option: expected NAME=VALUE, got 'kind'"),
        (["--option", "kind="], "--option: expected NAME=VALUE"),
        (["--option", "eta=1"], "--option: dpmpp_2m has kind, lower_order_final, euler_at_final; got 'eta'"),
        (["--option", "prediction=v"], "--option: dpmpp_2m has kind"),
        (["--option", "kind=magic"], "kind: expected one of midpoint, taylor, heun; got 'magic'"),
        (["--solver", "euler", "--option", "eta=1"], "--option: euler has none; got 'eta'"),
        (["--solver", "ddim", "--option", "eta=much"], "--option: eta: expected a number, got 'much'"),
        (["--solver", "ddim", "--option", "eta=2"], "eta: expected 0 to 1, got 2"),
        (["--threshold", "1.5"], "threshold: expected q in [0, 1]"),
        (["--spacing", "linspace", "--final", "sigma_min"], "final: 'linspace' ends at timestep 0 already"),
        (["--guidance-rescale", "2"], "--guidance-rescale: expected 0 to 1, got 2.0"),
        (["--guidance-interval", "2", "1"], "--guidance-interval: expected LO and HI with 0 <= LO < HI, got 2.0 1.0"),
        (["--per-class", "0"], "--per-class: expected 1 or more"),
        (["--per-class", "99999999999"], "--per-class: expected at most 4096 pictures"),
        (["--seed", "-1"], "--seed: expected 0 to"),
        (["--seed", str(1 << 64)], "--seed: expected 0 to"),
        (["--classes", "0-9"], "has the labels 0 to 4, got 9"),
        (["--classes", ""], "--classes: expected labels"),
        (["--classes", "a"], "--classes: expected labels"),
        (["--classes", "1,,2"], "--classes: expected labels"),
        (["--classes", "4-2"], "--classes: expected labels"),
        (["--classes=-1"], "--classes: expected labels"),
        (["--classes", "1.5"], "--classes: expected labels"),
        (["--classes", "٣"], "--classes: expected labels"),
        (["--classes", "0-999999"], "expected at most 4096"),
        (["--model", "cats"], "--model: expected digits, dit, dimr or a .safetensors file, got 'cats'"),
        (["--model", "no/such.safetensors"], "no such file"),
        (["--model", "model.pt"], "pickles"),
        (["--out", "sheet.jpg"], "--out: expected a .png file"),
        (["--out", "no/such/dir.png"], "is no directory"),
        (["--out", "folder.png"], "folder.png is there and no file"),
        (["--out", "/dev/null"], "--out: expected a .png file"),
        (["--out", "/proc/s.png"], "--out: can't write to /proc"),
    ],
)
def test_refusals(
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert small(tiny, tmp_path / "s.png", *argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_forced_rung_that_is_not_here(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with dk.rung("sm90"):
        assert small(tiny, tmp_path / "s.png") == 2
    assert "rung 'sm90' was forced" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_solver_lists_what_there_is(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        small(tiny, tmp_path / "s.png", "--solver", "magic")
    assert exit_.value.code == 2
    assert "dpmpp_2m" in capsys.readouterr().err


def test_models_that_can_not_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"input_size": 8, "patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    path = tmp_path / "m.safetensors"
    for config, about, words in (
        ({"in_channels": 4}, {}, "expected a DiT or DiMR of 1 or 3 channels"),
        ({"in_channels": 1, "class_dropout_prob": 0.0}, {}, "trained without label dropout"),
        ({"in_channels": 1}, {"schedule": "secret"}, "got 'eps' and 'secret'"),
        ({"in_channels": 1}, {"prediction": ["eps"]}, "expected a prediction among"),
    ):
        save(DiT(**{**sizes, **config}), path, about=about)
        assert small(str(path), tmp_path / "s.png") == 2
        assert words in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-9])
    assert small(str(path), tmp_path / "s.png") == 2
    assert "expected a whole safetensors file" in capsys.readouterr().err


def test_interrupt_leaves_nothing(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s.png"
    out.write_bytes(b"what was there")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for where in ("sample", "sheet"):
        with monkeypatch.context() as patch:
            patch.setattr(sample, where, interrupted)
            assert small(tiny, out) == 130
        assert capsys.readouterr().err == "diffkernels sample: stopped; nothing was written\n"
        assert [p.name for p in tmp_path.iterdir()] == ["s.png"] and out.read_bytes() == b"what was there"


def test_full_disk_is_a_line(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert small(tiny, tmp_path / "s.png") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_adaptive_steps(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one solver that is no row of SOLVERS: what it took is in the picture, what it can't take is refused."""
    out = tmp_path / "a.png"
    adaptive = ["--solver", "dpm_adaptive", "--classes", "0", "--per-class", "1"]
    assert small(tiny, out, *adaptive, "--option", "rtol=0.5", "--guidance", "1") == 0
    with Image.open(out) as image:
        settings = json.loads(image.info["diffkernels"])
    assert settings["options"] == {"rtol": 0.5} and settings["nfe"] > 3
    for wrong in (["--spacing", "logsnr"], ["--guidance-interval", "0", "1"], ["--option", "schedule=1"]):
        assert small(tiny, out, *adaptive, *wrong) == 2
        assert capsys.readouterr().err.startswith(f"diffkernels sample: {wrong[0]}")
