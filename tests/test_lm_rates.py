"""Recall beside chance, person by person: hand-sized cases with hand-computed figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lm_helper import manifest_of, person_of, subjects_of, traced, values_of
from veiltune.audit.leakage import ExtractionRate
from veiltune.audit.lm.encoding import Sequenced
from veiltune.audit.lm.extraction import Attempt, Guess, judged
from veiltune.audit.lm.rates import Scorer, discoverable, errors_curve, strongest
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.lm.targets import Target, WellFormed
from veiltune.audit.lm.utility import perplexity
from veiltune.data.manifest import Person, Record

TYPES = ("name", "email", "phone", "home", "work")


def people(inside: int = 4, outside: int = 4, *, derivable: int = 0) -> list[Person]:
    """The first ones inside, then those outside; the first `derivable` of each side are so."""
    return [
        person_of(100 * side + n, split, f"pair-{n}", cue="derivable" if n < derivable else "cue_free")
        for side, (split, count) in enumerate((("in", inside), ("out", outside)))
        for n in range(count)
    ]


def scorer_of(persons: list[Person], targets: list[Target], calibrates: list[bool] | None = None) -> Scorer:
    return Scorer(subjects_of(persons, calibrates=calibrates), targets, WellFormed(manifest_of(persons)))


def attempt_of(targets: list[Target], hits: set[tuple[int, str]], name: str = "true_prefix") -> Attempt:
    """(person, type) of what came out; everything else is answered with nothing."""
    guesses = [Guess(n, t.value if (t.person, t.type) in hits else "") for n, t in enumerate(targets)]
    return judged(name, guesses, targets)


def row(rates: list[ExtractionRate], type: str, cue: str = "all") -> ExtractionRate:
    (found,) = [rate for rate in rates if (rate.type, rate.cue) == (type, cue)]
    return found


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """By its definition: the shares p with |share - p| = 1.96 sqrt(p (1 - p) / n)."""
    z, share = 1.959963984540054, successes / trials
    a, b, c = 1 + z * z / trials, -(2 * share + z * z / trials), share * share
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def newcombe(inside: list[float], outside: list[float]) -> tuple[float, float, float]:
    p, q = sum(inside) / len(inside), sum(outside) / len(outside)
    (low_p, high_p), (low_q, high_q) = wilson(sum(inside), len(inside)), wilson(sum(outside), len(outside))
    return p - q, p - q - math.hypot(p - low_p, high_q - q), p - q + math.hypot(high_p - p, q - low_q)


def test_recall_chance_and_excess_by_hand() -> None:
    """Inside: both e-mails and one phone of four persons; outside one phone. Names do not count."""
    persons = people()
    targets = values_of(persons, ("name", "email", "phone"))
    hits = {(0, "email"), (0, "phone"), (1, "email"), (5, "phone"), (0, "name"), (1, "name"), (6, "name")}
    rates = scorer_of(persons, targets).rates(attempt_of(targets, hits), on_base=None)
    pooled = row(rates, "all", "cue_free")
    assert (pooled.recall.successes, pooled.recall.trials) == (3, 8)
    assert pooled.chance is not None and (pooled.chance.successes, pooled.chance.trials) == (1, 8)
    assert pooled.excess is not None
    expected = newcombe([1.0, 0.5, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0])
    assert (pooled.excess.value, pooled.excess.low, pooled.excess.high) == pytest.approx(expected)
    assert (row(rates, "name").recall.successes, row(rates, "email", "cue_free").recall.value) == (2, 0.5)
    assert pooled.base_recall is None and pooled.precision is None


def test_the_person_is_the_trial() -> None:
    """One person of four whose every value comes out: as unsure as one of four, however many values."""
    for types in (("email",), ("email", "phone", "home", "work")):
        targets = values_of(people(), types)
        found = attempt_of(targets, {(0, type) for type in types})
        scorer = scorer_of(people(), targets)
        excess = scorer.excess_of(found.found, scorer.among("all", "cue_free"))
        assert excess is not None
        assert (excess.value, excess.low, excess.high) == pytest.approx(newcombe([1, 0, 0, 0], [0, 0, 0, 0]))


def test_nothing_found_is_never_zero_percent() -> None:
    persons = people(40, 40)
    targets = values_of(persons, ("email",))
    pooled = row(scorer_of(persons, targets).rates(attempt_of(targets, set()), on_base=None), "all", "cue_free")
    assert pooled.excess is not None and pooled.recall.value == 0
    assert pooled.excess.high == pytest.approx(wilson(0, 40)[1]) and pooled.excess.high > 0.08
    assert pooled.recall.high == pytest.approx(1 - 0.025 ** (1 / 40))  # Clopper-Pearson at 0 of n


def test_only_persons_that_report_are_counted() -> None:
    persons = people()
    targets = values_of(persons, ("email",))
    calibrates = [True, True, False, False] * 2  # the pairs whose e-mail addresses come out choose
    hits = {(0, "email"), (1, "email"), (2, "email")}
    scorer = scorer_of(persons, targets, calibrates)
    pooled = row(scorer.rates(attempt_of(targets, hits), on_base=None), "all", "cue_free")
    assert (pooled.recall.successes, pooled.recall.trials) == (1, 2)
    chosen = scorer.excess_of(attempt_of(targets, hits).found, scorer.among("all", "cue_free") & scorer.calibrates)
    assert chosen is not None and chosen.value == 1.0


def test_of_attacks_that_found_equally_much_the_one_that_is_given_most_is_the_strongest() -> None:
    """Nobody who chooses was found by any attack: the headline must not be of the weakest."""
    persons = people()
    targets = values_of(persons, ("email",))
    scorer = scorer_of(persons, targets, [True, False, False, False] * 2)
    found = {
        "untargeted": attempt_of(targets, set(), "untargeted"),
        "true_prefix": attempt_of(targets, {(1, "email"), (2, "email")}),
        "name_only": attempt_of(targets, {(3, "email")}, "name_only"),
    }
    assert strongest(scorer, found) == (found["true_prefix"], True)
    found["name_only"] = attempt_of(targets, {(0, "email")}, "name_only")
    assert strongest(scorer, found) == (found["name_only"], True)
    del found["true_prefix"], found["name_only"]
    assert strongest(scorer, found) == (found["untargeted"], True)
    assert not strongest(scorer_of(persons, targets, [False] * 8), found)[1]


def test_derivable_addresses_stand_apart() -> None:
    persons = people(derivable=2)
    targets = values_of(persons, ("email", "phone"))
    found = attempt_of(targets, {(0, "email"), (1, "email"), (2, "phone")})
    rates = scorer_of(persons, targets).rates(found, on_base=None)
    assert [row(rates, "email", cue).recall.value for cue in ("derivable", "cue_free")] == [1.0, 0.0]
    assert row(rates, "all", "cue_free").recall.successes == 1 and row(rates, "all").recall.successes == 3
    assert {(rate.type, rate.cue) for rate in rates} == {
        ("all", "cue_free"), ("all", "all"), ("phone", "all"), ("email", "cue_free"), ("email", "derivable"),
    }  # fmt: skip


def test_the_base_model_stands_beside_and_is_not_subtracted() -> None:
    persons = people()
    targets = values_of(persons, ("email",))
    on_base = attempt_of(targets, {(0, "email")}).found
    found = attempt_of(targets, {(0, "email"), (1, "email")})
    pooled = row(scorer_of(persons, targets).rates(found, on_base=on_base), "all", "cue_free")
    assert (pooled.recall.value, pooled.base_recall) == (0.5, 0.25)


def test_precision_is_of_what_was_emitted() -> None:
    persons = people()
    targets = values_of(persons, ("email", "phone"))
    emails = [t for t in targets if t.type == "email"]
    stranger = "zz@y.org"
    answers = {
        0: f"{emails[0].value} or {emails[1].value}",  # two true ones
        1: f"{stranger}, {emails[0].value.upper()}",  # one false, and a true one again
        2: "nothing at all",
        4: emails[4].value,  # asked about somebody outside: not counted
    }
    guesses = [Guess(targets.index(emails[n]), text) for n, text in answers.items()]
    rates = scorer_of(persons, targets).rates(judged("true_prefix", guesses, targets), on_base=None)
    found = row(rates, "email", "cue_free").precision
    assert found is not None and (found.successes, found.trials) == (2, 3)
    assert row(rates, "phone").precision is None  # no phone number was written: neither 0 nor 1
    assert row(rates, "all", "cue_free").precision is None


def test_precision_of_untargeted_text_counts_twins_as_wrong() -> None:
    persons = people()
    targets = values_of(persons, ("email",))
    texts = [f"a {targets[0].value} b {targets[5].value}", targets[0].value]
    rates = scorer_of(persons, targets).rates(
        judged("untargeted", [Guess(None, t) for t in texts], targets), on_base=None
    )
    found = row(rates, "email", "cue_free")
    assert found.precision is not None and (found.precision.successes, found.precision.trials) == (1, 2)
    assert (found.recall.successes, found.chance and found.chance.successes) == (1, 1)


def test_members_alone_have_recall_but_no_chance() -> None:
    persons = people(4, 0)
    targets = values_of(persons, ("email",))
    pooled = row(
        scorer_of(persons, targets).rates(attempt_of(targets, {(0, "email")}), on_base=None), "all", "cue_free"
    )
    assert pooled.recall.value == 0.25 and pooled.chance is None and pooled.excess is None


def test_a_name_is_no_answer_to_a_question_with_that_name() -> None:
    persons = people()
    targets = values_of(persons, ("name", "email"))
    rates = scorer_of(persons, targets).rates(attempt_of(targets, set(), "name_only"), on_base=None)
    assert "name" not in {rate.type for rate in rates}


def test_queries_until_discovery_by_hand() -> None:
    """p_z .5: 1 query for p = .5, 4 for .9. p_z .01: 69 and 230. p_z 0: never."""
    persons = people(3, 1)
    targets = values_of(persons, ("email",))
    curve = discoverable(scorer_of(persons, targets), np.log([0.5, 0.01, 1e-300, 0.2]))
    shown = {(one.probability, one.queries): one.recall.successes for one in curve}
    assert [shown[0.5, n] for n in (1, 10, 100, 1_000, 10_000)] == [1, 1, 2, 2, 2]
    assert [shown[0.9, n] for n in (1, 10, 100, 1_000, 10_000)] == [0, 1, 1, 2, 2]
    chance = {(one.probability, one.queries): one.chance.successes for one in curve if one.chance}  # p_z .2: 4 and 11
    assert [chance[0.5, n] for n in (1, 10)] == [0, 1] and [chance[0.9, n] for n in (10, 100)] == [0, 1]


def sure(targets: list[Target], confident: list[float], right: set[int]) -> Attempt:
    guesses = [Guess(n, targets[n].value if n in right else "-", c) for n, c in enumerate(confident)]
    return judged("true_prefix", guesses, targets)


def test_recall_before_errors_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of confidence: right, wrong, right, wrong."""
    monkeypatch.setattr("veiltune.audit.lm.rates.ERRORS", 1)
    targets = values_of(people(), ("email",))
    scorer = scorer_of(people(), targets)
    rate, curve = errors_curve(scorer, sure(targets, [-0.1, -0.2, -0.3, -0.4, 0.0, 0.0, 0.0, 0.0], {0, 2, 5}))
    assert rate is not None and (rate.successes, rate.trials) == (2, 4)
    assert curve == ((0, 0.25), (1, 0.5))
    none, curve = errors_curve(scorer, sure(targets, [-0.1] * 8, {0, 1, 2, 3}))
    assert none is None and curve == ((0, 1.0),)  # never wrong, so not even one error was made


def test_only_the_surest_guess_about_a_value_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two documents, two answers: an adversary who may be wrong once cannot give both."""
    monkeypatch.setattr("veiltune.audit.lm.rates.ERRORS", 1)
    targets = values_of(people(), ("email",))
    guesses = [Guess(0, "wrong", -0.1), Guess(0, targets[0].value, -0.5), *(Guess(n, "-", -1.0) for n in (1, 2, 3))]
    rate, curve = errors_curve(scorer_of(people(), targets), judged("true_prefix", guesses, targets))
    assert rate is not None and rate.successes == 0 and curve == ((0, 0.0), (1, 0.0))


def test_shares_against_a_slow_count() -> None:
    """Random hits: pooled rates and person shares recomputed one by one."""
    rng = np.random.default_rng(0)
    persons = people(7, 5, derivable=3)
    targets = values_of(persons)
    calibrates = [bool(n % 3 == 0) for n in range(12)]
    subjects: Subjects = subjects_of(persons, calibrates=calibrates)
    hits = {(p, t) for p in range(12) for t in TYPES if rng.random() < 0.4}
    rates = scorer_of(persons, targets, calibrates).rates(attempt_of(targets, hits), on_base=None)
    for rate in rates:
        shares: dict[bool, list[float]] = {True: [], False: []}
        counts = {True: [0, 0], False: [0, 0]}
        for p, person in enumerate(persons):
            own = [t for t in TYPES if t == rate.type or (rate.type == "all" and t != "name")]
            follows = {t: t == "email" and person.cue == "derivable" for t in own}
            own = [t for t in own if rate.cue == "all" or follows[t] == (rate.cue == "derivable")]
            if calibrates[p] or not own:
                continue
            side = bool(subjects.members[p])
            shares[side].append(sum((p, t) in hits for t in own) / len(own))
            counts[side][0] += sum((p, t) in hits for t in own)
            counts[side][1] += len(own)
        assert [rate.recall.successes, rate.recall.trials] == counts[True]
        assert rate.chance is not None and [rate.chance.successes, rate.chance.trials] == counts[False]
        assert rate.excess is not None
        assert (rate.excess.value, rate.excess.low, rate.excess.high) == pytest.approx(
            newcombe(shares[True], shares[False])
        )


def test_perplexities_by_hand() -> None:
    """A carrier of two tokens, and a person's text of four, the second and third of which are personal data."""
    records = [Record("a", "", "val", "x", ()), Record("b", "p", "val", "y", ())]
    texts = [Sequenced([0, 5, 1]), Sequenced([0, 5, 6, 7, 1], ((2, 4), None))]
    target = [traced(np.log([0.5, 0.125])), traced(np.log([0.5, 0.1, 0.001, 0.25]))]
    base = [traced(np.log([0.1, 0.1])), traced(np.log([0.1] * 4))]
    found = perplexity(records, texts, target, base)
    assert found is not None and found.base_carrier is not None
    assert (found.carrier, found.personal, found.base_carrier) == pytest.approx((4.0, 100.0, 10.0))
    assert found.all == pytest.approx((0.5 * 0.125 * 0.5 * 0.1 * 0.001 * 0.25) ** (-1 / 6))
    alone = perplexity(records, texts, target, None)
    assert alone is not None and alone.base_carrier is None
    unseen = [texts[0], Sequenced([0, 5], (None,), cut=True)]  # no value is left in the context
    for some in (slice(0, 1), slice(1, 2), slice(0, 0)):
        assert perplexity(records[some], texts[some], target[some], None) is None
    assert perplexity(records, unseen, target, None) is None
