"""Perplexity on persons and documents that are in no training text: of plain prose, and of personal data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from veiltune.audit.leakage import Perplexity
from veiltune.audit.lm.encoding import Sequenced
from veiltune.audit.tracing import Traced
from veiltune.data.manifest import Record


def perplexity(
    records: Sequence[Record], texts: Sequence[Sequenced], target: Sequence[Traced], base: Sequence[Traced] | None
) -> Perplexity | None:
    """Of the validation records; None where there are no carriers or no personal data among them."""
    carriers = [number for number, record in enumerate(records) if not record.person]
    with_persons = [number for number, record in enumerate(records) if record.person]
    personal = [
        target[number].trace.log_probs[first - 1 : last - 1]
        for number in with_persons
        for first, last in filter(None, texts[number].ranges)
    ]
    if not carriers or not personal:
        return None
    return Perplexity(
        carrier=_of([target[number] for number in carriers]),
        personal=math.exp(-float(np.concatenate(personal).mean(dtype=np.float64))),
        all=_of(target),
        base_carrier=None if base is None else _of([base[number] for number in carriers]),
    )


def _of(traced: Sequence[Traced]) -> float:
    return math.exp(-float(np.concatenate([one.trace.log_probs for one in traced]).mean(dtype=np.float64)))
