"""Trains a small class-conditional DiT on scikit-learn's handwritten digits, in minutes on two CPU cores.

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

from diffkernels.models import CheckpointError, DiT, load, save
from diffkernels.sampling import DiscreteVP, Sampler

SCHEDULE = DiscreteVP.linear()  # DDPM's and DiT's: 1000 steps, beta from 1e-4 to 0.02
KEPT = torch.as_tensor(SCHEDULE.alphas_cumprod)
TRAINED_ON = 1500  # of 1797; the rest is held out


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1500, 1, 8, 8] in [-1, 1] and labels [1500], then the 297 held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(data.images).float() / 8 - 1).unsqueeze(1)[order]
    y = torch.from_numpy(data.target).long()[order]
    return x[:TRAINED_ON], y[:TRAINED_ON], x[TRAINED_ON:], y[TRAINED_ON:]


def noised(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x at random timesteps: (x_t, t, the noise)."""
    t = torch.randint(len(KEPT), (len(x),), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    kept = KEPT[t].view(-1, 1, 1, 1)
    return (kept.sqrt() * x + (1 - kept).sqrt() * noise).float(), t, noise


def train(steps: int, seed: int, batch: int = 64, rate: float = 2e-3, decay: float = 0.9995) -> tuple[DiT, dict[str, Any]]:
    """The averaged model and what is to be said of it."""
    torch.manual_seed(seed)  # initialisation and label dropout
    draw = torch.Generator().manual_seed(seed)
    x, y, _, _ = digits()
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10}
    model = DiT(**sizes, hidden_size=64, depth=4, num_heads=4, learn_sigma=False)
    average = DiT(**model.config).eval()
    average.load_state_dict(model.state_dict())

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
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
            loss = F.mse_loss(model(x_t, t, y[pick]), noise)
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
        "recipe": f"AdamW, rate {rate}, batch {batch}, EMA {decay}, label dropout {model.config['class_dropout_prob']}",
        "steps": done,
        "seed": seed,
        "seconds": round(time.perf_counter() - start),
    }
    return average, about


def evaluate(model: DiT, per_class: int = 100) -> None:
    """Prints how a classifier of real digits reads the generated ones, and how near they lie to the training images."""
    from sklearn.svm import SVC

    sampler = Sampler("ddim", schedule=SCHEDULE, prediction="eps")
    x, y, held, held_y = digits()
    judge = SVC(gamma=1e-3, C=10).fit((x.flatten(1) * 8 + 8).numpy(), y.numpy())

    def read(images: Tensor) -> Tensor:
        return torch.from_numpy(judge.predict((images.flatten(1).clamp(-1, 1) * 8 + 8).numpy()))

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        x_t, t, noise = noised(held.repeat(20, 1, 1, 1), draw)
        error = F.mse_loss(model(x_t, t, held_y.repeat(20)), noise).item()
    print(
        f"held-out noise error {error:.4f}; the judge reads {100 * (read(held) == held_y).float().mean():.1f} % of real digits"
    )
    nearest = torch.cdist(held.flatten(1), x.flatten(1)).amin(1).median()
    labels = torch.arange(10).repeat_interleave(per_class)
    for guidance in (1.0, 2.0):
        made = sampler(
            model,
            torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(1)),
            steps=25,
            guidance=guidance,
            cond={"y": labels},
            uncond={"y": torch.full_like(labels, model.null_class)},
        )
        right = (read(made) == labels).view(10, per_class).float().mean(1)
        near = torch.cdist(made.flatten(1), x.flatten(1)).amin(1).median() / nearest
        each = "  ".join(f"{k}: {100 * v:.0f}" for k, v in enumerate(right.tolist()))
        print(f"DDIM, 25 steps, guidance {guidance}: {100 * right.mean():.1f} % read as meant ({each})")
        print(f"  distance to the nearest training image: {near:.2f} of what real held-out digits have")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="training steps at batch 64 (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("digits_dit.safetensors"), help="where the weights go")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and noise")
    parser.add_argument("--evaluate", action="store_true", help="judge the digits that the model makes")
    parser.add_argument("--load", type=Path, help="don't train: evaluate these weights")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected 1 or more, got {args.steps}")
    if args.load is not None:
        try:
            model = load(args.load)
        except (OSError, CheckpointError) as error:
            parser.error(f"--load: {error}")
        evaluate(model)
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)  # before the minutes, not after
    model, about = train(args.steps, args.seed)
    save(model, args.out, dtype=torch.float16, about=about)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {count} parameters, {about['steps']} steps in {about['seconds']} s, {args.out.stat().st_size} bytes")
    if args.evaluate:
        evaluate(load(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
