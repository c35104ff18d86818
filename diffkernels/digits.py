"""Scikit-learn's handwritten digits, which the bundled models draw, and a judge of what was drawn.

The judge is a classifier that has seen only real digits, and the Fréchet distance between the pixels of two sets of pictures.
Needs scikit-learn: `pip install 'diffkernels[train]'`.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRAINED_ON = 1500  # of 1797; the rest is held out
CLASSES = 10


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1500, 1, 8, 8] in [-1, 1] and labels [1500], then the 297 held out.

    Raises:
        ImportError: without scikit-learn; the text says how to install it.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'diffkernels[train]'") from error
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(data.images).float() / 8 - 1).unsqueeze(1)[order]
    y = torch.from_numpy(data.target).long()[order]
    return x[:TRAINED_ON], y[:TRAINED_ON], x[TRAINED_ON:], y[TRAINED_ON:]


def frechet(a: Tensor, b: Tensor) -> float:
    """The squared Fréchet distance of two sets of vectors, [N, D] and [M, D], each taken for a Gaussian, in float64.

    |mean_a - mean_b|² + tr(A + B - 2 (A B)^½), with the covariances A and B (Dowson & Landau 1982).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


class Judge:
    """Reads pictures [N, 1, 8, 8] in [-1, 1]; `real` is what it makes of the `held` held-out digits: (accuracy, distance).

    A distance shrinks as its set grows: compare sets of about one size.
    """

    def __init__(self) -> None:
        self.x, y, held, held_y = digits()  # first: it says how to install scikit-learn
        from sklearn.svm import SVC

        self._svc = SVC(gamma=1e-3, C=10).fit(_features(self.x), y.numpy())
        self.held = len(held)
        self.real = self.accuracy(held, held_y), self.distance(held)

    def read(self, pictures: Tensor) -> Tensor:
        """The labels that it sees, [N]."""
        return torch.from_numpy(self._svc.predict(_features(pictures)))

    def accuracy(self, pictures: Tensor, labels: Tensor) -> float:
        """Which part of the pictures is read as meant, 0 to 1."""
        return (self.read(pictures) == labels).double().mean().item()

    def distance(self, pictures: Tensor) -> float:
        """The Fréchet distance to the training images, on pixels."""
        return frechet(pictures.clamp(-1, 1).flatten(1), self.x.flatten(1))


def _features(pictures: Tensor):  # type: ignore[no-untyped-def]
    return (pictures.flatten(1).clamp(-1, 1) * 8 + 8).numpy()
