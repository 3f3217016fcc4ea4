"""The rank of a true value among others like it: right order, right company, ties against the attacker."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lm_helper import manifest_of, marked, person_of, subjects_of
from tiny_text import causal_tokenizer
from veiltune.audit.blackbox import BlackBox
from veiltune.audit.lm.encoding import Encoder
from veiltune.audit.lm.options import AuditSize
from veiltune.audit.lm.ranking import RANKED_TYPES, chosen_targets, ranks, reconstruction
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.lm.targets import Target, targets_of
from veiltune.data.manifest import Manifest, Person, Record

ENCODER = Encoder(causal_tokenizer(begins=True), context=64)
SIZE = AuditSize(generations=1, generated_tokens=1, contexts=2, candidates=9, ranked=3, population=1)


class Fond(BlackBox):
    """Whatever came before, gives the characters it is fond of thrice the chance of others."""

    name, vocabulary, context, digest = "fond", 128, 64, "0" * 64

    def __init__(self, characters: str = "") -> None:
        weights = np.ones(128)
        for token in ENCODER.prompt(characters)[1:]:
            weights[token] = 3.0
        self._vector = np.log(weights / weights.sum()).astype(np.float32)

    def next_token_log_probs(self, prefixes: Any) -> Any:
        return np.tile(self._vector, (len(prefixes), 1))


def corpus(inside: int = 6, others: int = 12) -> tuple[Manifest, Subjects, list[Target]]:
    """Phone numbers 212-555-NNNN: there are sevens in those of members 1 and above, in nobody else's."""
    persons: list[Person] = []
    for n in range(2 * inside + others):
        split = "in" if n < inside else "out" if n < 2 * inside else "pop"
        own = person_of(n, split, f"pair-{n % inside}" if split != "pop" else "")
        sevens = min(n, 3) if split == "in" else 0
        number = "7" * sevens + np.base_repr(n, 7).zfill(4)[sevens:]
        persons.append(replace(own, values=own.values | {"phone": f"212-555-{number}"}))
    kept = [person for person in persons if person.split != "pop"]
    records = tuple(
        Record(
            one.id,
            one.id,
            one.split,
            f"Call {one.values['phone']}",
            marked(f"Call {one.values['phone']}", {"phone": one.values["phone"]}),
        )
        for one in kept
    )
    bare = subjects_of(kept)
    subjects = replace(bare, records=records, owners=np.arange(len(kept)))
    texts = ENCODER.texts([record.text for record in records], [record.spans for record in records])
    return manifest_of(persons, records), subjects, targets_of(subjects, texts, contexts=1)


def ranked(target: BlackBox, base: BlackBox | None, chosen: list[int], **changes: Any) -> tuple[list[int], list[int]]:
    manifest, subjects, targets = corpus()
    settings: dict[str, Any] = {"candidates": 9, "seed": 0, "advance": lambda done: None} | changes
    found, sizes = ranks(target, base, ENCODER, manifest, subjects, targets, chosen, **settings)
    return found.tolist(), sizes.tolist()


def test_a_likelier_value_ranks_first() -> None:
    """Of members 1 to 4 the number has a seven, of nobody else."""
    assert ranked(Fond("7"), None, [1, 2, 3, 4]) == ([1, 1, 1, 1], [10, 10, 10, 10])


def test_what_the_public_model_knows_is_no_leak() -> None:
    """The same fondness in both: all differences are 0, and ties count against the attacker."""
    assert ranked(Fond("7"), Fond("7"), [1, 2]) == ([10, 10], [10, 10])
    assert ranked(Fond("7"), Fond(), [1, 2]) == ([1, 1], [10, 10])
    assert ranked(Fond(), None, [1]) == ([10], [10])


def test_candidates_are_others_like_it_who_are_not_in_the_text() -> None:
    manifest, subjects, targets = corpus()
    asked: list[list[str]] = []

    class Listening(Fond):
        def suffix_log_probs(self, prefix: Any, suffixes: Any) -> Any:
            asked.append([ENCODER.decode(ids) for ids in suffixes])
            assert ENCODER.decode(prefix) == "Call "
            return super().suffix_log_probs(prefix, suffixes)

    ranks(
        Listening("7"),
        None,
        ENCODER,
        manifest,
        subjects,
        targets,
        [2, 8],
        candidates=99,
        seed=0,
        advance=lambda _: None,
    )
    outside = {person.values["phone"] for person in manifest.persons if person.split != "in"}
    assert asked[0][0] == targets[2].value and set(asked[0][1:]) == outside
    assert asked[1][0] == targets[8].value and set(asked[1][1:]) == outside - {targets[8].value}


def test_company_is_drawn_from_the_seed() -> None:
    one, same, other = (ranked(Fond("0"), None, [0, 6, 7, 9], seed=seed, candidates=4)[0] for seed in (1, 1, 2))
    assert one == same and one != other


def test_somebody_without_company_has_no_rank() -> None:
    """A plain list of secrets without controls: nothing to rank among, and no crash."""
    manifest, subjects, targets = corpus()
    alone = replace(manifest, persons=tuple(person for person in manifest.persons if person.split == "in"))
    found, sizes = ranks(
        Fond(), None, ENCODER, alone, subjects, targets, [0, 1], candidates=9, seed=0, advance=lambda _: None
    )
    assert sizes.tolist() == [1, 1]
    assert reconstruction(subjects, targets, [0, 1], found, sizes) == ()


def test_figures_by_hand() -> None:
    _, subjects, targets = corpus()
    chosen = [0, 1, 2, 3, 6, 7]
    rows = reconstruction(subjects, targets, chosen, np.array([1, 1, 10, 30, 1, 12]), np.array([100] * 5 + [50]))
    (row,) = rows
    assert (row.type, row.candidates, row.median_rank) == ("phone", 50, 5.5)
    assert (row.top_1.successes, row.top_1.trials) == (2, 4) and row.top_10 is not None and row.top_10.successes == 3
    assert row.chance_top_1 is not None and (row.chance_top_1.successes, row.chance_top_1.trials) == (1, 2)
    (few,) = reconstruction(subjects, targets, [0, 1], np.array([1, 2]), np.array([19, 19]))
    assert few.top_10 is None and few.chance_top_1 is None


def test_so_many_of_each_side_and_no_derivable_ones() -> None:
    persons = [
        person_of(n, "in" if n < 8 else "out", f"pair-{n % 8}", cue="derivable" if n % 2 else "cue_free")
        for n in range(16)
    ]
    subjects = subjects_of(persons)
    targets = [
        Target(n, type, "", "", type == "email" and n % 2 == 1, ())
        for n in range(16)
        for type in ("name", *RANKED_TYPES)
    ]
    chosen = [targets[number] for number in chosen_targets(targets, subjects, SIZE, seed=0)]
    for type in RANKED_TYPES:
        sides = [bool(subjects.members[one.person]) for one in chosen if one.type == type]
        assert sides.count(True) == sides.count(False) == SIZE.ranked
    assert not any(one.derivable or one.type == "name" for one in chosen)
    assert len(set(chosen_targets(targets, subjects, SIZE, seed=0))) == len(chosen) == 4 * 2 * SIZE.ranked
