"""Noise for the attackers' own training: the law of the run's mechanism, drawn fast and from a seed.

It protects nothing, so it needs no CSPRNG, and a seed makes an audit repeatable. It shares no randomness with the run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from veiltune.privatize.mechanisms import DChi, Gaussian, Privatizer


def practice_noise(
    privatizer: Privatizer, *, views: int, seed: int, multipliers: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Returns a function that makes clean (N, H) vectors the mean of `views` fresh releases of them.

    Each call draws anew. For Gaussian noise the mean is drawn at once; for d_chi every view is drawn.

    Args:
        privatizer: The run's mechanism.
        views: Releases that the observed vectors are the mean of.
        seed: Of all draws.
        multipliers: Scale of eta for each of the rows, inf for no noise; a call with fewer rows means the first ones.
    """
    generator, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)

    def d_chi(mechanism: DChi, shape: tuple[int, int]) -> Tensor:
        direction = torch.randn(shape, generator=generator)
        radius = torch.from_numpy(numbers.gamma(mechanism.dim, 1 / mechanism.eta, size=shape[0])).float()
        length: Tensor = torch.linalg.vector_norm(direction, dim=1)
        return direction * (radius / length).unsqueeze(1)

    def release(values: Tensor) -> Tensor:
        shape = (len(values), values.shape[1])
        if isinstance(privatizer, DChi):
            noise = d_chi(privatizer, shape)
            for _ in range(views - 1):
                noise += d_chi(privatizer, shape)
            noise /= views
        elif isinstance(privatizer, Gaussian):
            noise = torch.randn(shape, generator=generator) * (privatizer.sigma / views**0.5)
        else:
            return values
        if multipliers is not None:
            noise /= multipliers[: len(values)].unsqueeze(1)
        return values + noise

    return release
