"""The blind baseline: can the words alone, without any model, tell members from non-members?

Eight published sets of members and non-members can be told apart that way (arXiv:2406.16201); a membership figure on
such a set measures the texts and not the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from veiltune.attacks.membership import by_person
from veiltune.attacks.ranking import roc_auc
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.record import Estimate
from veiltune.errors import DataError

CONFIDENCE = 0.99  # at 95 % one sound corpus in twenty would be stopped


def blind_baseline(subjects: Subjects, *, seed: int) -> Estimate:
    """AUC over persons of a bag of words, trained on one half of the pairs and asked about the other.

    Cross-validation would use more of the texts, but what one fold teaches another teaches back: its scores depend on
    each other, and the interval misses one half in too many sound corpora.

    Args:
        subjects: With both sides.
        seed: Of the halves.

    Returns:
        The AUC with its interval at 99 %.
    """
    texts = np.array([record.text for record in subjects.records], dtype=object)
    truth = subjects.members[subjects.owners]
    teaches = _half(subjects.clusters, seed)[subjects.owners]
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000)
    model = LogisticRegression(C=10.0, max_iter=500).fit(words.fit_transform(texts[teaches]), truth[teaches])
    scores = model.decision_function(words.transform(texts[~teaches]))
    of_persons, kept = by_person(scores, subjects.owners[~teaches].tolist())
    owners = np.asarray(kept, dtype=np.int64)
    clusters = [subjects.clusters[owner] for owner in owners.tolist()]
    value, low, high = roc_auc(of_persons, subjects.members[owners], groups=clusters, confidence=CONFIDENCE)
    return Estimate(value=value, low=low, high=high)


def check_blind(blind: Estimate) -> None:
    """Stops an audit whose answer the texts already give.

    Raises:
        DataError: If the interval does not include one half.
    """
    if not blind.low <= 0.5 <= blind.high:
        raise DataError(
            f"words alone, without the model, tell members from non-members (AUC {blind.value:.3f}, 99 %:"
            f" {blind.low:.3f} to {blind.high:.3f}), so no attack on the model could be judged; a coin flip must say"
            " who is in the training text, as `veiltune data synth` does"
        )


def _half(clusters: Sequence[str], seed: int) -> NDArray[np.bool_]:
    distinct = sorted(set(clusters))
    order = np.random.default_rng(seed).permutation(len(distinct))
    chosen = {distinct[number] for number in order[: len(distinct) // 2]}
    return np.array([cluster in chosen for cluster in clusters], dtype=np.bool_)
