"""Reconstruction: the rank of a true value among others of its type, given the true text before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from veiltune.attacks.discovery import rank_of_truth
from veiltune.attacks.result import AttackResult
from veiltune.audit.blackbox import BlackBox
from veiltune.audit.leakage import Reconstruction
from veiltune.audit.lm.encoding import Encoder
from veiltune.audit.lm.options import AuditSize
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.lm.targets import Target
from veiltune.audit.record import Rate
from veiltune.data.manifest import Manifest

RANKED_TYPES = ("email", "phone", "home", "work")
_FOR_TOP_10 = 20

Advance = Callable[[int], None]


def chosen_targets(targets: Sequence[Target], subjects: Subjects, size: AuditSize, *, seed: int) -> list[int]:
    """Cue-free values of so many persons of each side, by type."""
    order = np.random.default_rng(seed).permutation(len(targets)).tolist()
    chosen: list[int] = []
    for type in RANKED_TYPES:
        for side in (True, False):
            of_type = [
                number
                for number in order
                if targets[number].type == type
                and not targets[number].derivable
                and bool(subjects.members[targets[number].person]) == side
            ]
            chosen += of_type[: size.ranked]
    return chosen


def ranks(
    target_box: BlackBox,
    base_box: BlackBox | None,
    encoder: Encoder,
    manifest: Manifest,
    subjects: Subjects,
    targets: Sequence[Target],
    chosen: Sequence[int],
    *,
    candidates: int,
    seed: int,
    advance: Advance,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rank of each chosen value by log-probability, above that under the public model where there is one.

    Returns:
        (chosen,) ranks from 1, and (chosen,) how many values it was ranked among, itself included.

    Source: Lukas et al. 2023, arXiv:2302.00539 (inference game), without dropping what the base model knows;
        calibration by a reference as in arXiv:2502.12658.
    """
    found, sizes = [], []
    for done, number in enumerate(chosen, start=1):
        target = targets[number]
        others = _others(manifest, subjects, target, candidates, seed=seed + number)
        sizes.append(1 + len(others))
        if not others:
            found.append(1)
            continue
        place = target.places[0]
        before = subjects.records[place.record].text[: place.start]
        scores = _scores(target_box, encoder, before, [target.value, *others])
        if base_box is not None:
            scores = scores - _scores(base_box, encoder, before, [target.value, *others])
        found.append(int(rank_of_truth(scores[:1], [scores[1:]])[0]))
        advance(done)
    return np.array(found, dtype=np.int64), np.array(sizes, dtype=np.int64)


def reconstruction(
    subjects: Subjects,
    targets: Sequence[Target],
    chosen: Sequence[int],
    found: NDArray[np.int64],
    sizes: NDArray[np.int64],
) -> tuple[Reconstruction, ...]:
    """By type: how often the true value of a member is first, and of a twin."""
    inside = np.array([bool(subjects.members[targets[number].person]) for number in chosen], dtype=np.bool_)
    types = np.array([targets[number].type for number in chosen])
    rows = []
    for type in RANKED_TYPES:
        own, other = (found[(types == type) & side] for side in (inside, ~inside))
        if not len(own) or sizes[types == type].min() < 2:
            continue
        fewest = int(sizes[types == type].min())
        rows.append(
            Reconstruction(
                type=type,
                candidates=fewest,
                top_1=_rate(own <= 1),
                top_10=_rate(own <= 10) if fewest >= _FOR_TOP_10 else None,
                chance_top_1=_rate(other <= 1) if len(other) else None,
                median_rank=float(np.median(own)),
            )
        )
    return tuple(rows)


def _others(manifest: Manifest, subjects: Subjects, target: Target, count: int, *, seed: int) -> list[str]:
    """Values of the same type and form of persons who are not in the training text, the target's own not among them."""
    owner = subjects.persons[target.person]
    pool = [
        person.values[target.type]
        for person in manifest.persons
        if person.split != "in"
        and person.id != owner.id
        and person.locale == owner.locale
        and target.type in person.values
        and (target.type != "email" or person.cue == owner.cue)
    ]
    order = np.random.default_rng(seed).permutation(len(pool))[:count]
    return [pool[index] for index in order]


def _scores(box: BlackBox, encoder: Encoder, before: str, values: Sequence[str]) -> NDArray[np.float64]:
    """Log-probability of each value after the text before it, grouped by how the border is tokenized."""
    parts = [encoder.split(before + value, len(before)) for value in values]
    scores = np.zeros(len(values))
    for head in {tuple(head) for head, _ in parts}:
        rows = [row for row, (own, _) in enumerate(parts) if tuple(own) == head]
        longest = max(len(parts[row][1]) for row in rows)
        kept = list(head)[-(box.context - longest) :]
        scores[rows] = box.suffix_log_probs(kept, [parts[row][1] for row in rows])
    return scores


def _rate(hits: NDArray[np.bool_]) -> Rate:
    return Rate.of(AttackResult(name="reconstruction", successes=int(hits.sum()), trials=len(hits)))
