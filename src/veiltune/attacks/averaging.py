"""Averaging: several fresh releases of the same texts wear the noise off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from veiltune._validate import positive, positive_int
from veiltune.errors import InputError


def average_views(views: Sequence[Float[Tensor, "N H"]]) -> Float[Tensor, "N H"]:
    """The mean of several releases of the same rows, to be inverted by any attack.

    >>> average_views([torch.tensor([[1.0, 3.0]]), torch.tensor([[3.0, 5.0]])])
    tensor([[2., 4.]])

    Threat model:
        Honest-but-curious vendor who receives the same texts several times with fresh noise (every epoch, on every
        retry) and can tell which rows belong together, by order, job or length. Strong: ten views undo most of what
        one view protects. Useless where each text is released once and replayed byte for byte. Costs nothing.

    Args:
        views: Releases of the same rows in the same order; the noise independent between them.

    Raises:
        InputError: If there is no view or they differ in shape.

    Source: repeated queries, Dwork and Roth 2014, section 3.5; for R views the noise's deviation falls by sqrt(R).
    """
    if not views or any(view.shape != views[0].shape for view in views):
        shapes = sorted({tuple(view.shape) for view in views})
        raise InputError(f"views must be one or more releases of one shape, got {len(views)} of shapes {shapes}")
    total = torch.zeros_like(views[0], dtype=torch.float64)
    for view in views:
        total += view
    return (total / len(views)).float()


def averaged_eta(eta: float, num_views: int) -> float:
    """Strength of one release whose noise has the power of the average's: eta * sqrt(R).

    >>> averaged_eta(50.0, 4)
    100.0

    Exact for Gaussian noise. The average of d_chi noise is no d_chi noise: at the widths of language models it is
    near Gaussian, of this power.

    Args:
        eta: Of each release, 1 / distance.
        num_views: R.
    """
    return positive(eta=eta) * math.sqrt(positive_int(num_views=num_views))
