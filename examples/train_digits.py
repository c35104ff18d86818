"""Trains a small class-conditional DiT or DiMR on scikit-learn's handwritten digits, in minutes on two CPU cores.

    python examples/train_digits.py --model dimr --out digits_dimr.safetensors --evaluate
    diffkernels sample --model digits_dimr.safetensors

8×8 grey digits, scaled to [-1, 1]; noise prediction on DDPM's linear schedule of 1000 steps; labels dropped at random for
classifier-free guidance; the average of the weights is what is kept. Ctrl-C keeps what there is. `--evaluate` measures the
noise error on held-out digits and then is `diffkernels sample --evaluate`. All of it needs scikit-learn.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffkernels.cli import main as diffkernels
from diffkernels.digits import CLASSES, digits
from diffkernels.models import CheckpointError, DiMR, DiT, load, save
from diffkernels.models.dimr import multiscale_loss
from diffkernels.nn import TimeDependentParameter
from diffkernels.sampling import DiscreteVP

SCHEDULE = DiscreteVP.linear()  # DDPM's and DiT's: 1000 steps, beta from 1e-4 to 0.02
KEPT = torch.as_tensor(SCHEDULE.alphas_cumprod)
DIT = {"input_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10, "hidden_size": 64, "depth": 4, "num_heads": 4}
LOW = {"block_type": "TransformerBlock", "dim": 64, "hidden_dim": 128, "num_attention_heads": 4, "num_blocks": 3}
HIGH = {"block_type": "ConvNeXtBlock", "dim": 24, "hidden_dim": 48, "kernel_size": 5, "num_blocks": 1}
STAGES = [LOW | {"max_height": 4, "max_width": 4, "input_feature_ratio": 2}, HIGH | {"max_height": 8, "max_width": 8}]
STILL = 499  # the timestep at which tau is 0
DROPPED = 0.1  # of the labels


def build(name: str) -> DiT | DiMR:
    return DiT(**DIT, learn_sigma=False) if name == "dit" else DiMR(STAGES, channels=1, num_classes=11)


def noised(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x at random timesteps: (x_t, t, the noise)."""
    t = torch.randint(len(KEPT), (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    kept = KEPT[t].view(-1, 1, 1, 1)
    return (kept.sqrt() * x + (1 - kept).sqrt() * noise).float(), t, noise


def objective(model: DiT | DiMR, x_t: Tensor, t: Tensor, y: Tensor, noise: Tensor, draw: torch.Generator) -> Tensor:
    """The loss of a batch; labels are dropped, by the DiT itself, for the DiMR here."""
    if isinstance(model, DiT):
        return F.mse_loss(model(x_t, t, y), noise)
    y = torch.where(torch.rand(len(y), generator=draw) < DROPPED, model.null_class, y)
    return multiscale_loss(model.forward_stages(x_t, t, y), noise).mean()


@torch.no_grad()
def freeze(model: DiMR) -> None:
    """Fixes the time-dependent parameters at tau = 0, so that the file needs no word about it: any time gives the same."""
    for part in model.modules():
        if isinstance(part, TimeDependentParameter):
            value = part(torch.zeros(1))[0]
            part.param0.copy_(value)
            part.param1.copy_(value)


def train(
    name: str,
    steps: int,
    seed: int,
    still: bool = False,
    batch: int = 64,
    rate: float = 2e-3,
    decay: float = 0.9995,
) -> tuple[DiT | DiMR, dict[str, Any]]:
    """The averaged model and what is to be said of it. `still`: a DiMR that is always told the same time."""
    torch.manual_seed(seed)  # initialisation and label dropout
    draw = torch.Generator().manual_seed(seed)
    x, y, _, _ = digits()
    model, average = build(name), build(name).eval()
    average.load_state_dict(model.state_dict())

    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if "nodecay" not in n]},
        {"params": [p for n, p in named.items() if "nodecay" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    warmup = min(200, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: (k + 1) / warmup if k < warmup else 0.5 + 0.5 * math.cos(math.pi * (k - warmup) / max(1, steps - warmup)),
    )
    done, smooth, start = 0, 1.0, time.perf_counter()
    try:
        for step in (bar := tqdm(range(1, steps + 1), desc="train", unit="step")):
            pick = torch.randint(len(x), (batch,), generator=draw)
            x_t, t, noise = noised(x[pick], draw)
            loss = objective(model, x_t, torch.full_like(t, STILL) if still else t, y[pick], noise, draw)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                weight = 1 - min(decay, (1 + step) / (10 + step))  # a young average forgets its start sooner
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
            done = step
            smooth += 0.02 * (loss.item() - smooth)
            if done % 20 == 0:
                bar.set_postfix(loss=f"{smooth:.4f}")
    except KeyboardInterrupt:
        print(f"stopped after {done} steps", file=sys.stderr)
    if still:
        assert isinstance(average, DiMR)
        freeze(average)
    about = {
        "data": "scikit-learn digits, 8x8, scaled to [-1, 1]; 1500 of 1797 images",
        "prediction": "eps",
        "schedule": "linear",  # of which `diffkernels sample` knows that it is SCHEDULE
        "recipe": f"AdamW, rate {rate}, batch {batch}, EMA {decay}, label dropout {DROPPED}",
        "steps": done,
        "seed": seed,
        "frozen_tau": still,
        "seconds": round(time.perf_counter() - start),
    }
    return average, about


def evaluate(path: Path) -> int:
    """Prints the noise error on held-out digits, and what the judge makes of generated ones. Returns an exit code."""
    model = load(path)
    if not isinstance(model, DiT | DiMR) or (model.sample_shape, model.labels) != ((1, 8, 8), CLASSES):
        raise CheckpointError(f"{path}: expected a DiT or DiMR of 1 × 8 × 8 digits, got another model")
    _, _, held, y = digits()
    x_t, t, noise = noised(held.repeat(20, 1, 1, 1), torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = F.mse_loss(model(x_t, t, y.repeat(20))[:, :1], noise).item()
    print(f"held-out noise error {error:.4f}", flush=True)
    for guidance in ("1", "2"):
        code = diffkernels(["sample", "--model", str(path), "--evaluate", "--guidance", guidance])
        if code:
            return code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dit", "dimr"), default="dit", help="the architecture (default %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="training steps at batch 64 (default %(default)s)")
    parser.add_argument("--frozen-tau", action="store_true", help="a DiMR that does not know the time: what is it worth to it?")
    parser.add_argument("--out", type=Path, help="where the weights go (default digits_<model>.safetensors)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")
    parser.add_argument("--evaluate", action="store_true", help="measure what was trained")
    parser.add_argument("--load", type=Path, help="don't train: measure these weights")
    parser.add_argument(
        "--threads", type=int, default=1, help="in such small layers more wait for one another (default %(default)s)"
    )
    args = parser.parse_args(argv)
    for name in ("steps", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(args, name)}")
    if args.frozen_tau and (args.model != "dimr" or args.load):
        parser.error("--frozen-tau: expected the training of --model dimr, whose norms move with tau")
    torch.set_num_threads(args.threads)
    path = args.load or args.out or Path(f"digits_{args.model}.safetensors")
    try:
        if args.load is None:
            path.parent.mkdir(parents=True, exist_ok=True)  # before the minutes, not after
            model, about = train(args.model, args.steps, args.seed, args.frozen_tau)
            save(model, path, dtype=torch.float16, about=about)
            count = sum(p.numel() for p in model.parameters())
            print(f"{path}: {count} parameters, {about['steps']} steps in {about['seconds']} s, {path.stat().st_size} bytes")
        return evaluate(path) if args.evaluate or args.load else 0
    except KeyboardInterrupt:
        print("train_digits: stopped", file=sys.stderr)
        return 130
    except (ImportError, OSError, CheckpointError) as error:
        print(f"train_digits: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
