"""Losses that make a model forget rows: gradient ascent, and negative preference optimisation (NPO)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veiltune._validate import one_of
from veiltune.errors import InputError

METHODS = ("npo", "ascent")


def forgetting_losses(log_probs: Tensor, *, method: str, reference: Tensor | None = None, beta: float = 0.1) -> Tensor:
    """One loss a row to forget; minimising it lowers the row's probability.

    "ascent" is the log-probability itself, whose gradient never ends. "npo" is ``2 / beta * log(1 + r ** beta)`` with
    ``r`` the row's probability over that under the model before: its gradient fades once the row is unlikely.

    >>> forgetting_losses(torch.tensor([-3.0]), method="npo", reference=torch.tensor([-3.0]), beta=1.0)
    tensor([1.3863])

    Guarantee:
        None. The row becomes less likely as it stands; a paraphrase, a relearning attack or the difference from the
        model before may still show it, and rows of others may become more likely (arXiv:2502.15680): audit again.

    Args:
        log_probs: (B,) of whole rows, with a gradient; for "ascent" better the mean of a row's tokens.
        method: See above.
        reference: (B,) the same of the model before; for "npo".
        beta: Of "npo": above 0; near 0 it is gradient ascent up to a constant.

    Returns:
        (B,).

    Raises:
        InputError: If the method is unknown, or "npo" has no reference or a beta that is not above 0.

    Source: NPO: Zhang et al. 2024, arXiv:2404.05868. Ascent: Jang et al. 2022, arXiv:2210.01504.
    """
    one_of(METHODS, method=method)
    if method == "ascent":
        return log_probs
    if reference is None or not (math.isfinite(beta) and beta > 0):
        raise InputError(f"npo needs reference log-probabilities and a beta above 0, got beta {beta}")
    return 2.0 / beta * torch.nn.functional.softplus(beta * (log_probs - reference))
