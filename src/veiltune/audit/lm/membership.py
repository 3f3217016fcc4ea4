"""Membership inference by every attack there is, the strongest chosen on some persons and reported on the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from veiltune.attacks import membership as attacks
from veiltune.attacks.operating import FALSE_POSITIVES_NEEDED, tpr_at_fpr
from veiltune.attacks.ranking import MIN_PER_CLASS, roc_auc, roc_curve
from veiltune.audit.leakage import Level, Membership, MembershipAttack, TprAtFpr
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.record import Estimate
from veiltune.audit.tracing import Traced
from veiltune.errors import InputError

FPRS = (0.1, 0.01, 0.001)
Scores = NDArray[np.float64]
_ROC_POINTS = 101


@dataclass(frozen=True, kw_only=True, repr=False)
class Evidence:
    """What the adversary asked about the records.

    Attributes:
        target: The records under the model.
        lowered: The records in lower case under the model.
        base: The records under the public model; None if there is none.
        population_target: Records that are surely not members, under the model.
        population_base: The same under the public model.
        texts: Of the records.
        tokens: Of the records.
        generations: Sampled from the model.
    """

    target: Sequence[Traced]
    lowered: Sequence[Traced]
    base: Sequence[Traced] | None
    population_target: Sequence[Traced]
    population_base: Sequence[Traced] | None
    texts: Sequence[str]
    tokens: Sequence[Sequence[int]]
    generations: Sequence[Sequence[int]] = field(default=())


def record_scores(evidence: Evidence) -> dict[str, Scores | InputError]:
    """Each attack's score of each record, or why it does not apply."""
    target, lowered = _traces(evidence.target), _traces(evidence.lowered)
    base, population = evidence.base, _traces(evidence.population_target)

    def with_base(attack: Callable[[attacks.Traces], Scores]) -> Scores:
        if base is None:
            raise InputError("needs the public model that training started from (--base)")
        return attack(_traces(base))

    def rmia(reference: attacks.Traces) -> Scores:
        return attacks.rmia(target, reference, population, _traces(evidence.population_base or ()))

    makers: dict[str, Callable[[], Scores]] = {
        "loss": lambda: attacks.loss(target),
        "reference": lambda: with_base(lambda reference: attacks.reference(target, reference)),
        "zlib": lambda: attacks.zlib(target, attacks.zlib_bytes(evidence.texts)),
        "lowercase": lambda: attacks.lowercase(target, lowered),
        "min_k": lambda: attacks.min_k(target),
        "min_k_plus_plus": lambda: attacks.min_k_plus_plus(target),
        "rmia": lambda: with_base(rmia),
        "ez": lambda: with_base(lambda reference: attacks.ez(target, reference)),
        "ngram_coverage": lambda: attacks.ngram_coverage(
            evidence.tokens, [evidence.generations] * len(evidence.tokens)
        ),
    }
    return {name: _tried(maker) for name, maker in makers.items()}


def membership(evidence: Evidence, subjects: Subjects, *, blind: Estimate, seed: int) -> Membership:
    """Runs and judges all attacks.

    Args:
        evidence: About `subjects.records`, in their order.
        subjects: With both sides.
        blind: Of words alone.
        seed: Of random ties and bootstraps.
    """
    found: list[MembershipAttack] = []
    for name, scores in record_scores(evidence).items():
        for level in ("record", "person"):
            found.append(_judged(name, level, scores, subjects, seed))
    person, record = (strongest(found, level) for level in ("person", "record"))
    assert person.auc is not None
    reported = ~subjects.calibration
    return Membership(
        strongest=person.name,
        auc=person.auc,
        strongest_record=record.name,
        blind=blind,
        persons_in=int((subjects.members & reported).sum()),
        persons_out=int((~subjects.members & reported).sum()),
        attacks=tuple(found),
    )


def strongest(found: Sequence[MembershipAttack], level: Level) -> MembershipAttack:
    """The attack with the highest AUC on the calibration persons; ties go to the first."""
    done = [attack for attack in found if attack.level == level and attack.calibration_auc is not None]
    return max(done, key=lambda attack: attack.calibration_auc or 0.0)


def _judged(name: str, level: Level, scores: Scores | InputError, subjects: Subjects, seed: int) -> MembershipAttack:
    if isinstance(scores, InputError):
        return MembershipAttack(name=name, level=level, status="not_applicable", reason=str(scores))
    owners = subjects.owners
    if level == "person":
        scores, kept = attacks.by_person(scores, owners.tolist())
        owners = np.asarray(kept, dtype=np.int64)
    members, calibrates = subjects.members[owners], subjects.calibration[owners]
    clusters = np.array([subjects.clusters[owner] for owner in owners])
    chosen, _, _ = _auc(scores[calibrates], members[calibrates], clusters[calibrates])
    reports = ~calibrates
    scores, members, clusters, owners = scores[reports], members[reports], clusters[reports], owners[reports]
    value, low, high = _auc(scores, members, clusters)
    return MembershipAttack(
        name=name,
        level=level,
        status="done",
        calibration_auc=chosen,
        auc=Estimate(value=value, low=low, high=high),
        tpr_at_fpr=_rates(scores, members, owners if level == "record" else None, seed),
        roc=roc_curve(scores, members, _ROC_POINTS),
        by_repetition=_by_repetition(scores, members, clusters, owners, subjects),
    )


def _rates(
    scores: Scores, members: NDArray[np.bool_], groups: NDArray[np.int64] | None, seed: int
) -> tuple[TprAtFpr, ...]:
    """At each rate that the number of non-members can bear."""
    rates = []
    for fpr in FPRS:
        if (~members).sum() * fpr >= FALSE_POSITIVES_NEEDED:
            found = tpr_at_fpr(scores, members, fpr=fpr, seed=seed, groups=None if groups is None else groups.tolist())
            rates.append(
                TprAtFpr(
                    fpr=fpr,
                    tpr=Estimate(value=found.tpr, low=found.low, high=found.high),
                    false_positives=found.false_positives,
                    fpr_low=found.fpr_low,
                    fpr_high=found.fpr_high,
                )
            )
    return tuple(rates)


def _by_repetition(
    scores: Scores,
    members: NDArray[np.bool_],
    clusters: NDArray[np.str_],
    owners: NDArray[np.int64],
    subjects: Subjects,
) -> tuple[tuple[int, Estimate], ...]:
    """Twins have the same number of records, so each class has both sides."""
    repetitions = np.array([subjects.persons[owner].repetitions for owner in owners])
    found = []
    for count in np.unique(repetitions).tolist():
        among = repetitions == count
        sides = [len(np.unique(clusters[among & side])) for side in (members, ~members)]
        if min(sides) >= MIN_PER_CLASS:
            value, low, high = _auc(scores[among], members[among], clusters[among])
            found.append((int(count), Estimate(value=value, low=low, high=high)))
    return tuple(found)


def _auc(scores: Scores, members: NDArray[np.bool_], clusters: NDArray[np.str_]) -> tuple[float, float, float]:
    return roc_auc(scores, members, groups=clusters.tolist())


def _traces(found: Sequence[Traced]) -> list[attacks.TokenTrace]:
    return [one.trace for one in found]


def _tried(maker: Callable[[], Scores]) -> Scores | InputError:
    try:
        return maker()
    except InputError as error:
        return error
