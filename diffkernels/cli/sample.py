"""`diffkernels sample`: pictures from a small diffusion model, on one labelled sheet; or what a judge makes of them."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .. import RungError, __version__, digits, running
from ..fuse import fuse_
from ..models import DiMR, DiT, load
from ..models.checkpoint import KINDS, describe
from ..nn import Quantized, QuantizedLinear, WeightOnlyLinear
from ..quantize import Recipe, quantize_
from ..sampling import PREDICTIONS, SOLVERS, DiscreteVP, Sampler, dpm_adaptive
from ..sampling.schedules import FINALS

BUNDLED = {"digits": "digits_dit.safetensors", "dit": "digits_dit.safetensors", "dimr": "digits_dimr.safetensors"}
OPS = {  # what each architecture runs
    DiT: ("norm_modulate", "gate_residual_norm", "solver_step"),
    DiMR: ("norm_modulate", "gate_residual_norm", "td_params", "slice_moments", "geglu", "depthwise_conv2d", "solver_step"),
}
OPS_IN_CODES = {  # and what it runs quantized and fused
    DiT: ("norm_modulate", "norm_quantize", "act_quantize", "linear_w8a8", "solver_step"),
    DiMR: (*(op for op in OPS[DiMR] if op != "geglu"), "act_quantize", "linear_w8a8"),
}
SCHEDULES: dict[str, Callable[[], DiscreteVP]] = {"linear": DiscreteVP.linear, "cosine": DiscreteVP.cosine}
MOST = 4096  # pictures on a sheet
BATCH = 256

PAPER, GROUND, INK, FADED = (250, 247, 241), (255, 254, 251), (24, 33, 58), (128, 124, 118)
CELL, GAP, MARGIN, WIDE = 70, 6, 28, 16  # pixels; pictures in a line


ADAPTIVE = "dpm_adaptive"  # chooses its own steps
ADAPTIVE_OPTIONS = ("order", "predict", "kind", "atol", "rtol", "theta", "h_init")


class Refused(ValueError):
    """What was asked for can't be done; the text says why, in a line."""


def register(subparsers: Any) -> None:
    """Adds the subcommand to argparse's `subparsers`; its namespace holds `run`."""
    parser = subparsers.add_parser("sample", help="make pictures with a small diffusion model", description=__doc__)
    parser.add_argument("--model", default="digits", help=f"{', '.join(BUNDLED)}, or a .safetensors file (default: digits)")
    parser.add_argument("--quantize", choices=KINDS, help="the model's Linear layers as codes (default: as they are)")
    parser.add_argument("--solver", default="dpmpp_2m", choices=[*SOLVERS, ADAPTIVE], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="solver steps (default: %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=2.0, help="classifier-free guidance; 1 is none (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="PHI",
        help="0 to 1: keep the contrast of the guided (default: 0)",
    )
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), help="guide where LO < sigma / alpha <= HI alone"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the solver, such as eta=1 (repeatable)",
    )
    parser.add_argument(
        "--spacing", choices=DiscreteVP.spacings, help=f"of the noise levels (default: {DiscreteVP.spacings[0]})"
    )
    parser.add_argument("--final", choices=FINALS, default="zero", help="the last noise level (default: %(default)s)")
    parser.add_argument("--threshold", type=float, metavar="Q", help="dynamic thresholding at this quantile, 0.995 for example")
    parser.add_argument("--classes", default="0-9", help='labels, a line each: "0-9", "3,3,7" (default: %(default)s)')
    parser.add_argument("--per-class", type=int, help="pictures of each label (default: 10; 30 with --evaluate)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same pictures (default: %(default)s)")
    parser.add_argument("--out", default="digits.png", help="the PNG to write (default: %(default)s)")
    parser.add_argument(
        "--evaluate", action="store_true", help="no sheet: a judge's accuracy and the Fréchet distance, over several seeds"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds --evaluate takes (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors and what --evaluate finds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 once the picture is written; 2 and a line on stderr if the request can't be met; 130 on Ctrl-C."""
    try:
        _run(args)
    except KeyboardInterrupt:
        print("diffkernels sample: stopped; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError, RungError) as error:
        print(f"diffkernels sample: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.steps < 1:
        raise Refused(f"--steps: expected 1 or more, got {args.steps}")
    if not math.isfinite(args.guidance):
        raise Refused(f"--guidance: expected a finite number, got {args.guidance}")
    if not 0 <= args.guidance_rescale <= 1:
        raise Refused(f"--guidance-rescale: expected 0 to 1, got {args.guidance_rescale}")
    if args.guidance_interval is not None and not 0 <= args.guidance_interval[0] < args.guidance_interval[1]:
        raise Refused("--guidance-interval: expected LO and HI with 0 <= LO < HI, got {} {}".format(*args.guidance_interval))
    if args.per_class is None:
        args.per_class = 30 if args.evaluate else 10
    if args.seeds < 1:
        raise Refused(f"--seeds: expected 1 or more, got {args.seeds}")
    if args.per_class < 1:
        raise Refused(f"--per-class: expected 1 or more, got {args.per_class}")
    if not 0 <= args.seed < 1 << 63:
        raise Refused(f"--seed: expected 0 to 2^63 - 1, got {args.seed}")
    classes = parse_classes(args.classes)
    if len(classes) * args.per_class > MOST:
        raise Refused(f"--per-class: expected at most {MOST} pictures in all, got {len(classes)} × {args.per_class}")
    model, about = _model(args.model)
    args.recipe = _quantize(model, args) if args.quantize else None
    if args.recipe is None and any(isinstance(layer, Quantized) for layer in model.modules()):  # as its file has it
        args.recipe = f"as it was saved; fused: {_fused(model)}"
    highest = model.labels - 1
    if max(classes) > highest:
        raise Refused(f"--classes: {args.model} has the labels 0 to {highest}, got {max(classes)}")
    if args.guidance != 1 and model.null_class is None:
        raise Refused(f"--guidance: {args.model} was trained without label dropout: only 1 works, got {args.guidance}")
    sampler = _sampler(args, about)
    sampler.nfe(args.steps)  # wrong steps are known now
    if args.evaluate:
        return _evaluate(model, about, sampler, classes, args)

    with _Written(args.out) as out:  # before the work: an unwritable path is known now
        start = time.perf_counter()
        pictures = sample(model, sampler, classes, args)
        seconds, nfe = time.perf_counter() - start, sampler.nfe(args.steps)
        settings = {
            "model": args.model,
            "quantize": args.quantize,
            "solver": args.solver,
            "options": _options(args),
            "steps": args.steps,
            "spacing": sampler.spacing,
            "final": args.final,
            "threshold": args.threshold,
            "guidance": args.guidance,
            "guidance_rescale": args.guidance_rescale,
            "guidance_interval": args.guidance_interval,
            "seed": args.seed,
            "classes": classes,
            "per_class": args.per_class,
            "nfe": nfe,
        }
        title = f"{' '.join([args.solver, *args.option])}   {_steps(args)}   guidance {args.guidance:g}   seed {args.seed}"
        info = PngInfo()
        info.add_text("Software", f"diffkernels {__version__}")
        info.add_text("diffkernels", json.dumps(settings))
        sheet(pictures, classes, title).save(out.partial, format="PNG", pnginfo=info)
    if not args.quiet:
        _tell(args, model, out.path, nfe, 1000 * seconds / len(pictures), len(pictures))


def _quantize(model: DiT | DiMR, args: argparse.Namespace) -> str:
    """Quantizes and fuses; says in a line what came of it. Raises Refused where there is nothing to quantize."""
    report = quantize_(model, Recipe(args.quantize, min_elements=0))
    if not report.quantized:
        raise Refused(f"--quantize: {args.model} has no Linear layer that can be quantized")
    return f"{args.quantize}: {len(report.quantized)} of {len(report.layers)} layers; fused: {_fused(model)}"


def _fused(model: DiT | DiMR) -> str:
    """Fuses what can be, and says how many of what."""
    kinds = Counter(line.kind for line in fuse_(model).fused)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"


def parse_classes(text: str) -> list[int]:
    """Labels from "0-9", "3,3,7" or "0-3,7". Raises Refused for anything else."""
    classes: list[int] = []
    for part in text.split(","):
        first, dash, last = (s.strip() for s in part.partition("-"))
        ends = [first, last] if dash else [first]
        # int() would also take "٣", "1_0" and "+1"
        if not all(s.isascii() and s.isdigit() and len(s) < 7 for s in ends) or int(ends[-1]) < int(first):
            raise Refused(f'--classes: expected labels such as "0-9" or "3,3,7", got {text!r}')
        classes += range(int(first), min(int(ends[-1]), int(first) + MOST) + 1)
    return classes


def sample(model: DiT | DiMR, sampler: Sampler | _Adaptive, classes: Sequence[int], args: argparse.Namespace) -> Tensor:
    """[len(classes) · per_class, C, H, W] float32, a class after the other.

    Picture j of a class depends on the seed, the class and j only, not on what else is on the sheet.
    Raises Refused where the guidance is so strong that they are not finite.
    """
    seen: dict[int, int] = {}
    labels, generators = [], []
    for label in classes:
        for _ in range(args.per_class):
            j = seen[label] = seen.get(label, -1) + 1
            state = np.random.SeedSequence([args.seed, label, j]).generate_state(1, np.uint64)
            labels.append(label)
            generators.append(torch.Generator().manual_seed(int(state[0] >> 1)))
    noise = torch.stack([torch.randn(model.sample_shape, generator=g) for g in generators])
    y = torch.tensor(labels)
    null = None if model.null_class is None else torch.full_like(y, model.null_class)
    done = []
    for i in range(0, len(y), BATCH):
        part = slice(i, i + BATCH)
        try:
            pictures = sampler(
                model,
                noise[part],
                steps=args.steps,
                guidance=args.guidance,
                guidance_rescale=args.guidance_rescale,
                guidance_interval=args.guidance_interval,
                cond={"y": y[part]},
                uncond=None if null is None else {"y": null[part]},
                generator=generators[part],
                progress=not args.quiet,
            )
        except FloatingPointError as error:
            raise Refused(
                f"--guidance: the samples are not finite at {args.guidance}; take one nearer to 1 ({error})"
            ) from error
        done.append(pictures)
    return torch.cat(done)


def sheet(pictures: Tensor, classes: Sequence[int], title: str) -> Image.Image:
    """A labelled contact sheet: a line of pictures, or several, for each class.

    Args:
        pictures: [len(classes) · n, C, H, W] in [-1, 1], C = 1 (ink on paper) or 3 (RGB).
    """
    tiles = _tiles(pictures)
    n, size = len(tiles) // len(classes), tiles.shape[1]
    columns, lines = min(n, WIDE), -(-n // WIDE)
    small, big = ImageFont.load_default(13), ImageFont.load_default(22)
    label = 18 + math.ceil(max(big.getlength(str(c)) for c in classes))
    pitch, between = size + GAP, GAP  # a little air between the classes
    top = MARGIN + 30
    width = max(2 * MARGIN + label + columns * pitch - GAP, 2 * MARGIN + math.ceil(small.getlength(title)))
    height = top + len(classes) * (lines * pitch + between) - between - GAP + MARGIN
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN - 6), title, fill=FADED, font=small)
    for k, name in enumerate(classes):
        y0 = top + k * (lines * pitch + between)
        draw.text((MARGIN, y0 + size / 2), str(name), fill=FADED, font=big, anchor="lm")
        for j in range(n):
            place = (MARGIN + label + j % WIDE * pitch, y0 + j // WIDE * pitch)
            image.paste(Image.fromarray(tiles[k * n + j]), place)
    return image


def _tiles(pictures: Tensor) -> np.ndarray:
    """Pictures as uint8 [N, size, size, 3], small ones enlarged by a whole factor to CELL pixels or so."""
    ink = pictures.shape[1] == 1
    light = pictures.clamp(-1, 1)
    if ink:
        light = F.pad(light, (1, 1, 1, 1), value=-1.0)  # paper around strokes that end at the picture's edge
    factor = max(1, round(CELL / light.shape[-1]))
    light = F.interpolate(light, scale_factor=factor, mode="bicubic").clamp(-1, 1) / 2 + 0.5
    if ink:
        # A steeper tone curve after a smooth enlargement: strokes get an edge, and the faint noise of the ground is gone.
        t = ((light - 0.18) / 0.72).clamp(0, 1)
        t = t * t * (3 - 2 * t)
        ground, colour = (torch.tensor(c).view(3, 1, 1) for c in (GROUND, INK))
        light = (ground + (colour - ground) * t) / 255
    return (255 * light).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _evaluate(
    model: DiT | DiMR, about: dict[str, Any], sampler: Sampler | _Adaptive, classes: list[int], args: argparse.Namespace
) -> None:
    """Prints the judge's accuracy and the Fréchet distance, mean and spread over the seeds."""
    if "scikit-learn digits" not in str(about.get("data", "")) or model.sample_shape != (1, 8, 8):
        raise Refused(f"--evaluate: the judge knows scikit-learn's digits only; {args.model} was not trained on them")
    if sorted(set(classes)) != list(range(digits.CLASSES)) or len(classes) * args.per_class <= 64:
        raise Refused(
            "--evaluate: expected --classes 0-9 and more than 64 pictures a seed, or the distance means nothing; got "
            f"--classes {args.classes} and {len(classes)} × {args.per_class}"
        )
    try:
        judge = digits.Judge()
    except ImportError as error:
        raise Refused(f"--evaluate: {error}") from error
    labels = torch.tensor(classes).repeat_interleave(args.per_class)
    found = []
    for seed in range(args.seed, args.seed + args.seeds):
        if not args.quiet:
            print(f"seed {seed}", file=sys.stderr)
        pictures = sample(model, sampler, classes, argparse.Namespace(**{**vars(args), "seed": seed}))
        found.append((judge.accuracy(pictures, labels), judge.distance(pictures)))
    from rich.console import Console
    from rich.table import Table

    name = f"{args.model}{f' in {args.quantize}' if args.quantize else ''}"
    title = f"{name}: {args.solver}, {_steps(args)}, guidance {args.guidance:g}, {len(labels)} pictures a seed"
    ran = None if args.quiet else ", ".join(f"{op}: {running(op)}" for op in _ops(model))
    table = Table("", "read as meant", "Fréchet distance to the training images", title=title, caption=ran)
    for seed, (accuracy, distance) in enumerate(found, start=args.seed):
        table.add_row(f"seed {seed}", f"{100 * accuracy:.1f} %", f"{distance:.2f}")
    (a, b), (c, d) = (_spread(column) for column in zip(*found, strict=True))
    table.add_row("mean ± deviation", f"{100 * a:.1f} ± {100 * b:.1f} %", f"{c:.2f} ± {d:.2f}")
    table.add_row(f"{judge.held} real digits, held out", f"{100 * judge.real[0]:.1f} %", f"{judge.real[1]:.2f}")
    Console(highlight=False, width=110).print(table)


def _ops(model: DiT | DiMR) -> tuple[str, ...]:
    coded = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    of_four = [
        *(["linear_w4a8_lowrank"] if any(layer.bits == 4 for layer in coded) else []),
        *(["linear_w4a16"] if any(isinstance(layer, WeightOnlyLinear) for layer in model.modules()) else []),
    ]
    return (*(OPS_IN_CODES if coded else OPS)[type(model)], *of_four)


def _steps(args: argparse.Namespace) -> str:
    return "adaptive steps" if args.solver == ADAPTIVE else f"{args.steps} steps"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _model(name: str) -> tuple[DiT | DiMR, dict[str, Any]]:
    """The model of that name or file, and what its file says about it."""
    if name in BUNDLED:
        path = Path(str(resources.files("diffkernels") / "assets" / BUNDLED[name]))
    elif os.sep in name or Path(name).suffix or Path(name).exists():
        path = Path(name)
    else:
        raise Refused(f"--model: expected {', '.join(BUNDLED)} or a .safetensors file, got {name!r}")
    model = load(path)
    if not isinstance(model, DiT | DiMR) or model.sample_shape[0] not in (1, 3):
        raise Refused(f"--model: {name}: expected a DiT or DiMR of 1 or 3 channels: others, such as latents, can't be drawn")
    return model, describe(path).get("about", {})


class _Adaptive:
    """`dpm_adaptive`, called as a Sampler is; how many evaluations that takes is known afterwards."""

    spacing = None

    def __init__(self, **settings: Any) -> None:
        self.settings, self.evaluations = settings, 0

    def nfe(self, steps: int) -> int:
        return self.evaluations

    def __call__(self, model: Any, noise: Tensor, **call: Any) -> Tensor:
        known = {name: call[name] for name in ("guidance", "guidance_rescale", "cond", "uncond")}
        made = dpm_adaptive(model, noise, **known, **self.settings)
        self.evaluations = max(self.evaluations, made.nfe)
        return made.samples


def _sampler(args: argparse.Namespace, about: dict[str, Any]) -> Sampler | _Adaptive:
    prediction, schedule = about.get("prediction", "eps"), about.get("schedule", "linear")
    if prediction not in PREDICTIONS or schedule not in SCHEDULES:
        raise Refused(
            f"--model: {args.model}: expected a prediction among {', '.join(PREDICTIONS)} and a schedule among "
            f"{', '.join(SCHEDULES)}; got {prediction!r} and {schedule!r}"
        )
    options, settings = _options(args), {"threshold": args.threshold, "spacing": args.spacing, "final": args.final}
    if args.solver == ADAPTIVE:
        for name in ("spacing", "guidance_interval"):
            if getattr(args, name) is not None:
                raise Refused(f"--{name.replace('_', '-')}: {ADAPTIVE} has none, as it chooses its own steps")
        del settings["spacing"]
        return _Adaptive(schedule=SCHEDULES[schedule](), prediction=prediction, **settings, **options)
    return Sampler(args.solver, schedule=SCHEDULES[schedule](), prediction=prediction, **settings, **options)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The solver's options: numbers, true, false, or words."""
    solver = dpm_adaptive if args.solver == ADAPTIVE else SOLVERS[args.solver]
    parameters = inspect.signature(solver).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    if args.solver == ADAPTIVE:
        defaults = {name: defaults[name] for name in ADAPTIVE_OPTIONS}
    options: dict[str, Any] = {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals and value):
            raise Refused(f"--option: expected NAME=VALUE, got {text!r}")
        if name not in defaults:
            raise Refused(f"--option: {args.solver} has {', '.join(defaults) or 'none'}; got {name!r}")
        try:
            options[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            options[name] = {"true": True, "false": False}.get(value.lower(), value)
            if isinstance(options[name], str) and type(defaults[name]) in (int, float):
                raise Refused(f"--option: {name}: expected a number, got {value!r}") from None
    return options


class _Written:
    """A file that appears whole, under its name, when the block ends well, and otherwise not at all."""

    def __init__(self, name: str) -> None:
        self.path = Path(os.path.realpath(name))  # through a link, or the link itself would be replaced
        if self.path.suffix.lower() != ".png":
            raise Refused(f"--out: expected a .png file, got {name!r}")
        if self.path.exists() and not self.path.is_file():
            raise Refused(f"--out: {name} is there and no file")
        if not self.path.parent.is_dir():
            raise Refused(f"--out: {self.path.parent} is no directory")

    def __enter__(self) -> _Written:
        try:
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".partial")
        except OSError as error:
            raise Refused(f"--out: can't write to {self.path.parent}: {error.strerror}") from error
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(handle, 0o666 & ~mask)  # mkstemp's files are for their owner only
        os.close(handle)
        self.partial = Path(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.replace(self.partial, self.path)
        finally:
            self.partial.unlink(missing_ok=True)


def _tell(args: argparse.Namespace, model: DiT | DiMR, path: Path, nfe: int, ms: float, count: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = {
        "model": args.model,
        **({"quantize": args.recipe} if args.recipe else {}),
        "solver": f"{' '.join([args.solver, *args.option])}, {_steps(args)}, guidance {args.guidance:g}",
        "evaluations": f"{nfe}" + (", each of a doubled batch (guidance)" if args.guidance != 1 else ""),
        **{op: f"rung {running(op)}" for op in _ops(model)},
        "time": f"{ms:.1f} ms an image ({count} images)",
        "seed": str(args.seed),
        "written": str(path),
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, Text(value))  # Text: brackets in a path are no markup
    # As wide as the longest path, or it would be folded and could not be copied.
    Console(highlight=False, width=max(80, 32 + max(map(len, rows.values())))).print(table)
