"""MNIST-1D, the same numbers as the package ``mnist1d`` generates, without its dependencies.

References:
    Greydanus and Kobak, 2024, https://arxiv.org/abs/2011.14439; https://github.com/greydanus/mnist1d
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

_TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_PADDING = (36, 60)
_LENGTH = 40


@dataclass(frozen=True)
class Split:
    x: Tensor
    y: Tensor


def mnist1d(num_samples: int = 5000, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Return signals of shape (samples, 40) and digits, in the order of the package: training set, then test set."""
    random = np.random.RandomState(seed)
    templates = np.asarray(_TEMPLATES, dtype=float)
    templates -= templates.mean(1, keepdims=True)
    templates /= templates.std(1, keepdims=True)
    templates -= templates[:, :1]
    each = num_samples // len(templates)
    x = np.stack([_sample(template / 6.0, random) for template in templates for _ in range(each)])
    order = random.permutation(len(x))
    x = x[order]
    return (x - x.mean()) / x.std(), np.repeat(np.arange(len(templates)), each)[order]


def splits(*sizes: int, seed: int = 42) -> list[Split]:
    """Return disjoint sets of the given sizes."""
    x, y = mnist1d(sum(sizes), seed)
    tensors = torch.from_numpy(x).float(), torch.from_numpy(y).long()
    return [Split(*pair) for pair in zip(*(tensor.split(sizes) for tensor in tensors), strict=True)]


def _sample(template: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    low, high = _PADDING
    padding = low + int(random.rand() * (high - low + 1))
    x = _resampled(np.concatenate([template + 1e-8, np.zeros(padding)]), len(template) + high)
    x *= 1 + 0.4 * (random.rand() - 0.5)
    shift = random.choice(48)
    x = np.concatenate([x[-shift:], x[:-shift]])
    signal = x != 0
    x = signal * x + (1 - signal) * gaussian_filter(0.25 * random.randn(*x.shape), 2)
    x = x + 0.02 * random.randn(*x.shape)
    x = x - 0.75 * (random.rand() - 0.5) * np.linspace(-0.5, 0.5, len(x))
    return _resampled(x, _LENGTH)


def _resampled(x: np.ndarray, length: int) -> np.ndarray:
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(x)), x)
