"""Who is looked for: the persons on both sides of the coin flip, their records, and which of them choose the attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veiltune.data.manifest import Manifest, Person, Record
from veiltune.errors import InputError

CALIBRATION_SHARE = 0.3
LEAST_PAIRS = 40  # below, neither part says anything: an AUC's interval would be wider than +-.2

Flags = NDArray[np.bool_]


@dataclass(frozen=True, repr=False)
class Subjects:
    """Persons in the training text and their twins who are not.

    Attributes:
        persons: Both sides.
        members: (persons,) whether the training text has them.
        clusters: Of each person: its pair, since twins share templates; or itself.
        calibration: (persons,) who chooses the strongest attack; the others report it. Twins stay together.
        records: Of these persons.
        owners: (records,) index of each record's person.
    """

    persons: tuple[Person, ...]
    members: Flags
    clusters: tuple[str, ...]
    calibration: Flags
    records: tuple[Record, ...]
    owners: NDArray[np.int64]

    def __repr__(self) -> str:
        return f"Subjects({int(self.members.sum())} in, {int((~self.members).sum())} out, {len(self.records)} records)"

    @classmethod
    def of(cls, manifest: Manifest, *, seed: int) -> Subjects:
        """From a manifest; the calibration part is drawn from the seed."""
        persons = tuple(person for person in manifest.persons if person.split in ("in", "out"))
        clusters = tuple(person.pair or person.id for person in persons)
        index = {person.id: number for number, person in enumerate(persons)}
        records = tuple(record for record in manifest.records if record.person in index)
        return cls(
            persons=persons,
            members=np.array([person.split == "in" for person in persons], dtype=np.bool_),
            clusters=clusters,
            calibration=_calibration(clusters, seed),
            records=records,
            owners=np.array([index[record.person] for record in records], dtype=np.int64),
        )

    @property
    def has_both_sides(self) -> bool:
        """Whether there is anyone who is known not to be in the training text."""
        return bool(self.members.any() and not self.members.all())

    def require_enough(self, *, membership: bool = True) -> None:
        """Refuses a corpus that is too small for any interval.

        Args:
            membership: Whether members are to be told from non-members.

        Raises:
            InputError: With the number that is needed.
        """
        inside, pairs = int(self.members.sum()), len(set(self.clusters))
        if inside < 1:
            raise InputError("the manifest has no person in the training text, so nothing can be looked for")
        if membership and self.has_both_sides and pairs < LEAST_PAIRS:
            raise InputError(
                f"a membership audit needs at least {LEAST_PAIRS} pairs of persons, those that are judged are {pairs}"
            )


def _calibration(clusters: Sequence[str], seed: int) -> Flags:
    distinct = sorted(set(clusters))
    count = round(CALIBRATION_SHARE * len(distinct))
    chosen = {distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:count]}
    return np.array([cluster in chosen for cluster in clusters], dtype=np.bool_)
