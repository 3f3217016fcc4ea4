"""What inserted secrets tell: their exposure by repetitions, and the one-run lower bound of epsilon."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from veiltune.attacks.canary import exposure_bits
from veiltune.attacks.intervals import median_interval
from veiltune.audit.epsilon import FEWEST_CANARIES, audited_epsilon
from veiltune.audit.leakage import Exposure, OneRunBound
from veiltune.audit.lm.encoding import Sequenced
from veiltune.audit.lm.opening import Claim
from veiltune.audit.lm.traces import secret_log_prob
from veiltune.audit.tracing import Traced
from veiltune.data.manifest import Canary, Span
from veiltune.errors import InputError

DEFAULT_DELTA = 1e-5
_FEWEST_REFERENCES = 20

Scores = NDArray[np.float64]


def canary_text(canary: Canary) -> tuple[str, tuple[Span, ...]]:
    """The line of the training text, and where in it the secret stands."""
    text = canary.prefix + canary.secret
    return text, (Span("secret", len(canary.prefix), len(text)),)


def canary_scores(texts: Sequence[Sequenced], target: Sequence[Traced], base: Sequence[Traced] | None) -> Scores:
    """Log-probability of each secret given its prefix, above that under the public model where there is one.

    Raises:
        InputError: As `secret_places`.
    """
    places = secret_places(texts)
    scores: Scores = np.array([secret_log_prob(one, place) for one, place in zip(target, places, strict=True)])
    if base is not None:
        scores -= [secret_log_prob(one, place) for one, place in zip(base, places, strict=True)]
    return scores


def secret_places(texts: Sequence[Sequenced]) -> list[tuple[int, int]]:
    """Where each canary's secret stands among its tokens.

    Raises:
        InputError: If a secret was cut off by the model's context.
    """
    places = [place for text in texts if (place := text.ranges[0]) is not None]
    if len(places) < len(texts):
        raise InputError("a canary does not fit into the model's context; audit with a model that holds it")
    return places


def exposures(canaries: Sequence[Canary], scores: Scores) -> tuple[Exposure, ...]:
    """By family and repetitions, against the family's references."""
    found = []
    for family in sorted({canary.family for canary in canaries}):
        references = _chosen(canaries, scores, family=family, purpose="reference")
        counts = {c.repetitions for c in canaries if c.family == family and c.purpose == "exposure"}
        if len(references) < _FEWEST_REFERENCES:
            continue
        for count in sorted(counts):
            own = _chosen(canaries, scores, family=family, purpose="exposure", repetitions=count)
            bits = exposure_bits(own, references)
            middle, low, high = median_interval([one.bits for one in bits])
            found.append(
                Exposure(
                    family=family,
                    repetitions=count,
                    canaries=len(own),
                    median_bits=middle,
                    low=low,
                    high=high,
                    at_cap=sum(one.at_least for one in bits),
                    cap_bits=math.log2(len(references) + 1),
                )
            )
    return tuple(found)


def one_run_bound(canaries: Sequence[Canary], scores: Scores, *, claim: Claim | None, seed: int) -> OneRunBound | None:
    """From the coin-flipped canaries, each inserted once or not at all.

    Scores of each family are first put on one scale by its references, which are known not to be included: so the
    guesses never depend on the coins.

    Returns:
        None if the corpus has fewer than 32 such canaries.
    """
    flipped = np.array([canary.purpose == "epsilon" for canary in canaries], dtype=np.bool_)
    if flipped.sum() < FEWEST_CANARIES:
        return None
    included = np.array([canary.included for canary in canaries], dtype=np.bool_)[flipped]
    delta = claim.delta if claim else DEFAULT_DELTA
    found = audited_epsilon(_standardised(canaries, scores)[flipped], included, delta=delta, seed=seed)
    claimed = claim.epsilon if claim else None
    return OneRunBound(
        epsilon=found.epsilon,
        confidence=found.confidence,
        delta=delta,
        canaries=found.canaries,
        included=found.included,
        guesses=found.guesses,
        correct=found.correct,
        ceiling=found.ceiling,
        claimed_epsilon=claimed,
        claimed_unit=claim.unit if claim else None,
        exceeds_claim=claimed is not None and found.epsilon > claimed,
    )


def _standardised(canaries: Sequence[Canary], scores: Scores) -> Scores:
    families = np.array([canary.family for canary in canaries])
    result = scores.astype(np.float64)
    for family in np.unique(families):
        references = _chosen(canaries, scores, family=str(family), purpose="reference")
        if len(references) >= _FEWEST_REFERENCES:
            spread = float(references.std()) or 1.0
            result[families == family] = (scores[families == family] - references.mean()) / spread
    return result


def _chosen(
    canaries: Sequence[Canary], scores: Scores, *, family: str, purpose: str, repetitions: int | None = None
) -> Scores:
    kept = [
        canary.family == family and canary.purpose == purpose and repetitions in (None, canary.repetitions)
        for canary in canaries
    ]
    return scores[np.array(kept, dtype=np.bool_)]
