"""Who is compared with whom: twins stay together, and words alone must not tell one side from the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lm_helper import manifest_of, person_of, subjects_of, write_short_manifest
from veiltune.audit.lm.blind import blind_baseline, check_blind
from veiltune.audit.lm.subjects import CALIBRATION_SHARE, LEAST_PAIRS, Subjects
from veiltune.audit.record import Estimate
from veiltune.data.manifest import Manifest, Record
from veiltune.errors import DataError, InputError


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_short_manifest(tmp_path_factory.mktemp("people") / "manifest.jsonl", pairs=60)


def test_both_sides_and_nobody_else(manifest: Manifest) -> None:
    subjects = Subjects.of(manifest, seed=0)
    assert {person.split for person in subjects.persons} == {"in", "out"} and len(subjects.persons) == 120
    assert [person.split == "in" for person in subjects.persons] == subjects.members.tolist()
    assert all(
        subjects.persons[owner].id == r.person for r, owner in zip(subjects.records, subjects.owners, strict=True)
    )
    assert len(subjects.records) == sum(person.repetitions for person in subjects.persons)
    assert repr(subjects) == "Subjects(60 in, 60 out, 180 records)"
    subjects.require_enough()


def test_twins_choose_or_report_together(manifest: Manifest) -> None:
    subjects = Subjects.of(manifest, seed=3)
    chosen = {c for c, kept in zip(subjects.clusters, subjects.calibration, strict=True) if kept}
    rest = {c for c, kept in zip(subjects.clusters, subjects.calibration, strict=True) if not kept}
    assert chosen.isdisjoint(rest) and len(chosen) == round(CALIBRATION_SHARE * 60)
    assert (subjects.calibration & subjects.members).sum() == (subjects.calibration & ~subjects.members).sum()


def test_the_seed_alone_decides_who_chooses(manifest: Manifest) -> None:
    one, same, other = (Subjects.of(manifest, seed=seed).calibration.tolist() for seed in (1, 1, 2))
    assert one == same != other
    turned = replace(manifest, persons=manifest.persons[::-1])  # order of the file
    assert Subjects.of(turned, seed=1).calibration.tolist() == one[::-1]


def test_too_few_persons_say_how_many() -> None:
    few = [person_of(2 * n + k, side, f"pair-{n}") for n in range(39) for k, side in enumerate(("in", "out"))]
    with pytest.raises(InputError, match=f"at least {LEAST_PAIRS} pairs of persons, those that are judged are 39"):
        Subjects.of(manifest_of(few), seed=0).require_enough()
    Subjects.of(manifest_of(few), seed=0).require_enough(membership=False)
    with pytest.raises(InputError, match="no person in the training text"):
        Subjects.of(manifest_of(few[1::2]), seed=0).require_enough()
    alone = Subjects.of(manifest_of(few[::2]), seed=0)  # nobody is known to be absent: no membership, but extraction
    alone.require_enough()
    assert not alone.has_both_sides and subjects_of(few).has_both_sides


def noise_subjects(pairs: int, seed: int) -> Subjects:
    """Records of random words, twins alike but for one word of their own: a sound corpus."""
    rng = np.random.default_rng(seed)
    persons, records = [], []
    for pair in range(pairs):
        words = " ".join(f"w{n}" for n in rng.integers(40, size=8))
        for split in rng.permutation(["in", "out"]).tolist():
            one = person_of(len(persons), split, f"pair-{pair}")
            persons.append(one)
            records.append(Record(one.id, one.id, split, f"{words} own{rng.integers(12)}", ()))
    bare = subjects_of(persons)
    return replace(bare, records=tuple(records), owners=np.arange(len(records)))


def planted(subjects: Subjects, cue: str, share: float = 1.0) -> Subjects:
    """The same, where members' records have a word more."""
    rng = np.random.default_rng(0)
    records = [
        replace(record, text=f"{record.text} {cue}") if record.split == "in" and rng.random() < share else record
        for record in subjects.records
    ]
    return replace(subjects, records=tuple(records))


def test_a_sound_corpus_passes(manifest: Manifest) -> None:
    for seed in range(4):
        blind = blind_baseline(Subjects.of(manifest, seed=seed), seed=seed)
        assert blind.low <= 0.5 <= blind.high
        check_blind(blind)


def test_sound_corpora_are_rarely_stopped() -> None:
    """At 99 % one in a hundred is; of 100 five and more would be a sign (p < .004)."""
    stopped = 0
    for seed in range(100):
        blind = blind_baseline(noise_subjects(60, seed), seed=seed)
        stopped += not blind.low <= 0.5 <= blind.high
    assert stopped <= 4


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_planted_cue_stops_the_audit(share: float) -> None:
    blind = blind_baseline(planted(noise_subjects(100, 1), "confidential", share), seed=0)
    assert blind.low > 0.5
    with pytest.raises(DataError, match="words alone, without the model, tell members from non-members") as refusal:
        check_blind(blind)
    assert "veiltune data synth" in str(refusal.value) and "confidential" not in str(refusal.value)


def test_the_cue_is_learnt_on_some_pairs_and_found_on_others() -> None:
    """A word that each member has alone is no cue: nothing that is learnt of one pair holds of another."""
    subjects = noise_subjects(60, 2)
    own = [replace(r, text=f"{r.text} secret{n}") if r.split == "in" else r for n, r in enumerate(subjects.records)]
    check_blind(blind_baseline(replace(subjects, records=tuple(own)), seed=0))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.49), (0.51, 0.8)])
def test_below_one_half_is_as_telling_as_above(low: float, high: float) -> None:
    with pytest.raises(DataError, match="words alone"):
        check_blind(Estimate(value=(low + high) / 2, low=low, high=high))
    check_blind(Estimate(value=0.5, low=low, high=1 - low) if low < 0.5 else Estimate(value=0.5, low=0.2, high=high))
