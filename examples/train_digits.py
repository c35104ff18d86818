"""Trains a small class-conditional DiT or DiMR on scikit-learn's handwritten digits, in minutes on two CPU cores.

    python examples/train_digits.py --out digits_dit.safetensors --evaluate
    diffkernels sample --model digits_dit.safetensors

8×8 grey digits, scaled to [-1, 1]; noise prediction on DDPM's linear schedule of 1000 steps; labels dropped at random for
classifier-free guidance; the average of the weights is what is kept. Ctrl-C keeps what there is. `--evaluate` shows the
generated digits to a classifier that has seen only real ones (needs scikit-learn, as the training does). On a busy
machine OMP_NUM_THREADS=1 is faster: threads that wait for each other in such small layers gain nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffkernels.digits import Judge, digits
from diffkernels.models import CheckpointError, DiMR, DiT, load, save
from diffkernels.models.dimr import multiscale_loss
from diffkernels.sampling import DiscreteVP, Sampler

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


def train(
    name: str,
    steps: int,
    seed: int,
    still: bool = False,
    batch: int = 64,
    rate: float = 2e-3,
    decay: float = 0.9995,
) -> tuple[DiT | DiMR, dict[str, Any]]:
    """The averaged model and what is to be said of it. `still`: the model is told the same time always."""
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
        for done in (bar := tqdm(range(1, steps + 1), desc="train", unit="step")):
            pick = torch.randint(len(x), (batch,), generator=draw)
            x_t, t, noise = noised(x[pick], draw)
            loss = objective(model, x_t, torch.full_like(t, STILL) if still else t, y[pick], noise, draw)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                weight = 1 - min(decay, (1 + done) / (10 + done))  # a young average forgets its start sooner
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
            smooth += 0.02 * (loss.item() - smooth)
            if done % 20 == 0:
                bar.set_postfix(loss=f"{smooth:.4f}")
    except KeyboardInterrupt:
        print(f"stopped after {done} steps", file=sys.stderr)
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


def evaluate(model: DiT | DiMR, still: bool, per_class: int = 100) -> None:
    """Prints the held-out noise error, how the judge reads the generated digits, and how near they lie to the real ones."""
    sampler = Sampler("ddim", schedule=SCHEDULE, prediction="eps")
    _, _, held, held_y = digits()
    judge = Judge()

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, torch.full_like(t, STILL) if still else t, y)

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x_t, t, noise = noised(held.repeat(20, 1, 1, 1), draw)
        error = F.mse_loss(predict(x_t, t, held_y.repeat(20)), noise).item()
    print(f"held-out noise error {error:.4f}")
    print(f"real digits, held out: {100 * judge.real[0]:.1f} % read as meant, Fréchet distance {judge.real[1]:.2f}")
    labels = torch.arange(10).repeat_interleave(per_class)
    for guidance in (1.0, 2.0):
        made = sampler(
            predict,
            torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(1)),
            steps=25,
            guidance=guidance,
            cond={"y": labels},
            uncond={"y": torch.full_like(labels, model.null_class)},
        )
        right = (judge.read(made) == labels).view(10, per_class).float().mean(1)
        each = "  ".join(f"{k}: {100 * v:.0f}" for k, v in enumerate(right.tolist()))
        print(f"DDIM, 25 steps, guidance {guidance}: {100 * right.mean():.1f} % read as meant ({each})")
        print(f"  Fréchet distance {judge.distance(made):.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="training steps at batch 64 (default %(default)s)")
    parser.add_argument("--model", choices=("dit", "dimr"), default="dit", help="the architecture (default %(default)s)")
    parser.add_argument(
        "--frozen-tau", action="store_true", help="a DiMR that is always told the same time: what do its norms get from time?"
    )
    parser.add_argument("--out", type=Path, help="where the weights go (default digits_<model>.safetensors)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")
    parser.add_argument("--evaluate", action="store_true", help="judge the digits that the model makes")
    parser.add_argument("--load", type=Path, help="don't train: evaluate these weights")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected 1 or more, got {args.steps}")
    if args.frozen_tau and args.model != "dimr":
        parser.error("--frozen-tau: expected --model dimr, whose norms move with tau")
    if args.load is not None:
        try:
            model = load(args.load)
        except (OSError, CheckpointError) as error:
            parser.error(f"--load: {error}")
        if not isinstance(model, DiT | DiMR):
            parser.error(f"--load: {args.load}: expected a DiT or a DiMR, got {type(model).__name__}")
        evaluate(model, args.frozen_tau)
        return 0
    args.out = args.out or Path(f"digits_{args.model}.safetensors")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # before the minutes, not after
    model, about = train(args.model, args.steps, args.seed, args.frozen_tau)
    save(model, args.out, dtype=torch.float16, about=about)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {count} parameters, {about['steps']} steps in {about['seconds']} s, {args.out.stat().st_size} bytes")
    if args.evaluate:
        evaluate(model, args.frozen_tau)
    return 0


if __name__ == "__main__":
    sys.exit(main())
