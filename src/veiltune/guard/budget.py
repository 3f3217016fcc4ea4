"""What a limit on the number of queries protects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from veiltune._validate import positive_int
from veiltune.attacks.discovery import BUDGETS, queries_needed
from veiltune.errors import InputError


@dataclass(frozen=True)
class BudgetRow:
    """What comes out within a number of queries.

    Attributes:
        queries: The budget.
        by_sampling: Share of secrets that come out, with probability p, of someone who is given drawn text only.
        by_vectors: Share whose probability someone who is given whole vectors knows exactly: one query a token.
    """

    queries: int
    by_sampling: float
    by_vectors: float


def protection_table(
    log_probs: Any, tokens: Any, *, p: float = 0.5, budgets: Sequence[int] = BUDGETS
) -> tuple[BudgetRow, ...]:
    """What budgets protect: n* = ceil(log(1 - p) / log(1 - p_z)) draws against one query a token of the secret.

    Two secrets of three tokens, with probabilities 1/2 and 1/1000 of being drawn after their prefix. Ten whole vectors
    tell both exactly; ten draws give one:

    >>> for row in protection_table(np.log([0.5, 0.001]), [3, 3], budgets=(1, 10, 1000)):
    ...     print(row.queries, row.by_sampling, row.by_vectors)
    1 0.5 0.0
    10 0.5 1.0
    1000 1.0 1.0

    Guarantee:
        `by_sampling` is exact for independent draws after the secret's own prefix. A budget is worth that much only
        where answers are drawn text (or the likeliest few tokens): with whole vectors it protects next to nothing,
        since as many queries as the secret has tokens tell its probability, and a beam of a few times as many finds
        it. It holds for one key: who has many keys has as many budgets.

    Args:
        log_probs: (N,) of each secret under the sampling scheme, nats.
        tokens: (N,) lengths of the secrets.
        p: In (0, 1).
        budgets: Numbers of queries.

    Raises:
        InputError: As `queries_needed`, or if the lengths do not match.

    Source: (n, p)-discoverable extraction, Hayes et al. 2024, arXiv:2410.19482.
    """
    needed, lengths = queries_needed(log_probs, p), np.asarray(tokens)
    if lengths.shape != needed.shape or not len(needed) or not (lengths >= 1).all():
        raise InputError(f"tokens must be {len(needed)} lengths of at least 1, one a secret, got shape {lengths.shape}")
    return tuple(
        BudgetRow(positive_int(budget=budget), float((needed <= budget).mean()), float((lengths <= budget).mean()))
        for budget in budgets
    )
