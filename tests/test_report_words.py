"""Each rule fires where it should, and does not where it should not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from report_runs import attack, inversion, ranked, rate, record, statement, write_run
from veiltune.attacks.result import AttackResult
from veiltune.audit.record import Attack, AttackRecord, Attribute, Control, Estimate, Group, Rate, RepeatedRelease
from veiltune.report.figures import (
    estimate_with_interval,
    label_of,
    of_ten,
    percent,
    rate_with_interval,
    utility_interval,
)
from veiltune.report.finding import LEVELS
from veiltune.report.sources import Run, load_runs
from veiltune.report.words import actions, best_of, findings, headline, is_dominated


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    """`make(record, **run)`: a loaded run."""
    count = itertools.count()

    def build(attacks: AttackRecord, **run: Any) -> Run:
        return load_runs([write_run(tmp_path / f"run-{next(count)}", attacks, **run)])[0]

    return build


def level_of(run: Run, part: str) -> str | None:
    """Level of the one finding that contains these words."""
    found = [finding.level for finding in findings(run) if part in finding.text]
    assert len(found) <= 1
    return found[0] if found else None


def controls(*, positive: bool = True, shuffled: bool = True, chance: float = 0.03) -> tuple[Control, ...]:
    read, guessed = rate(0.99, by_text=False), rate(chance, by_text=False)
    return (
        Control(name="positive", description="reads", attack="x", rate=read, expected=0.9, passed=positive),
        Control(name="shuffled", description="mixed", attack="x", rate=guessed, expected=chance, passed=shuffled),
    )


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.8, "about 8 of 10 tokens"), (0.25, "about 3 of 10 tokens"), (0.992, "practically all tokens")],
)
def test_how_much_the_vendor_reads(make: Any, share: float, words: str) -> None:
    run = make(record(share))
    assert words in findings(run)[0].text
    assert headline(run).startswith(f"vendor reads {words}")
    assert level_of(run, "The vendor can read") == "leak"


@pytest.mark.parametrize(("share", "chance", "level"), [(0.04, 0.04, "held"), (0.2, 0.2, "held"), (0.2, 0.04, None)])
def test_what_chance_gives_is_no_leak(make: Any, share: float, chance: float, level: str | None) -> None:
    assert level_of(make(record(share, controls=controls(chance=chance))), "no more than by chance") == level


def test_below_one_in_twenty_but_above_chance(make: Any) -> None:
    run = make(record(0.02, controls=controls(chance=0.0)))
    assert level_of(run, "yet more than nothing") == "held"


def test_an_interval_that_reaches_one_in_twenty_is_a_leak(make: Any) -> None:
    assert level_of(make(record(0.045, controls=controls(chance=0.0))), "The vendor can read") == "leak"


@pytest.mark.parametrize("failed", ["positive", "shuffled"])
def test_a_failed_control_comes_first(make: Any, failed: str) -> None:
    run = make(record(0.8, controls=controls(**{failed: False})))
    assert findings(run)[0].level == "unreliable"
    assert headline(run).startswith("not reliable")
    assert "quote no figure" in actions(findings(run))[0]


def test_no_control_is_a_caution(make: Any) -> None:
    assert level_of(make(record(0.8, controls=())), "ran no control") == "caution"


@pytest.mark.parametrize(
    ("utility", "alone", "dominated", "level", "words"),
    [
        (0.646, 0.85, True, "leak", "Dominated"),
        (0.85, 0.85, True, "leak", "Dominated"),
        (0.861, 0.85, False, "caution", "may be chance"),
        (0.95, 0.85, False, "held", "Sending paid"),
        (0.95, None, None, "caution", "was not measured"),
    ],
)
def test_utility_beside_customer_alone(
    make: Any, utility: float, alone: float | None, dominated: bool | None, level: str, words: str
) -> None:
    run = make(record(0.5), utility=utility, alone=alone)
    assert is_dominated(run) is dominated
    assert level_of(run, words) == level
    assert ("dominated" in headline(run)) is (dominated is True)
    assert ("not measured" in headline(run)) is (dominated is None)


def test_who_is_dominated_is_told_once_to_stay_alone(make: Any) -> None:
    todo = actions(findings(make(record(0.8), utility=0.6)))
    assert sum("Do not send" in action for action in todo) == 1


def test_disclosed_labels(make: Any) -> None:
    run = make(record(0.5, disclosed=True))
    assert level_of(run, "Labels are disclosed") == "leak"
    assert "labels disclosed" in headline(run)


@pytest.mark.parametrize(("share", "level"), [(0.951, "held"), (0.96, "held"), (0.99, "leak")])
def test_labels_against_their_bound(make: Any, share: float, level: str) -> None:
    best = attack("best", "best", share, trials=1000, calibration=None)
    labels = record(0.5).labels.model_copy(update={"attacks": (attack("weak", "weak", 0.6, calibration=None), best)})
    run = make(record(0.5, labels=labels))
    assert {f.level for f in findings(run) if "abel" in f.text} == {level}


def test_labels_that_nobody_attacked_are_not_called_safe(make: Any) -> None:
    labels = record(0.5).labels.model_copy(update={"attacks": (attack("a", "a", None),)})
    assert level_of(make(record(0.5, labels=labels)), "no attack on them could be finished") == "caution"


@pytest.mark.parametrize(("auc", "words"), [(0.97, "almost surely"), (0.6, "better than by chance"), (0.51, None)])
def test_side_channels(make: Any, auc: float, words: str | None) -> None:
    run = make(record(0.5, side_channels=(ranked("radius", "radius", 0.5, auc),)))
    (found,) = [f.text for f in findings(run) if "Side channel" in f.text] or [None]
    assert found is None if words is None else words in str(found)


def test_a_side_channel_that_the_audit_explains_is_a_note(make: Any) -> None:
    explained = ranked("radius", "radius", 0.5, 0.97).model_copy(update={"reason": "noise is shared"})
    assert level_of(make(record(0.5, side_channels=(explained,))), "noise is shared") == "note"


@pytest.mark.parametrize(("name", "share", "level"), [("replay", 0.0, None), ("repeated_noise", 0.01, "leak")])
def test_what_must_never_happen(make: Any, name: str, share: float, level: str | None) -> None:
    run = make(record(0.5, side_channels=(attack(name, name, share, trials=200),)))
    assert level_of(run, "must never happen") == level


@pytest.mark.parametrize(("share", "level"), [(0.75, None), (0.95, "leak")])
def test_labels_by_radius_are_compared_with_guessing(make: Any, share: float, level: str | None) -> None:
    labels = record(0.5).labels.model_copy(update={"majority": 0.75})
    channel = attack("radius_labels", "labels by radius", share, trials=400)
    assert level_of(make(record(0.5, labels=labels, side_channels=(channel,))), "Side channel") == level


@pytest.mark.parametrize(("pad_to", "level"), [(0, None), (16, "leak")])
def test_lengths_that_are_read_through_padding(make: Any, pad_to: int, level: str | None) -> None:
    run = make(record(0.5, side_channels=(attack("length", "length", 1.0, trials=200),)), wire={"pad_to": pad_to})
    assert level_of(run, "Side channel") == level


@pytest.mark.parametrize(("share", "level"), [(0.45, "leak"), (0.1, None)])
def test_lengths_behind_padding_are_compared_with_a_blind_guess(make: Any, share: float, level: str | None) -> None:
    channel = attack("length", "length", share, trials=1000, settings={"pad_to": 64, "blind_guess": 0.1})
    assert level_of(make(record(0.5, side_channels=(channel,)), wire={"pad_to": 64}), "a guess in 10.0") == level


@pytest.mark.parametrize(("cti", "level"), [("off", None), ("budget", "leak"), ("top", "leak")])
def test_contributing_tokens_are_told_by_their_radius(make: Any, cti: str, level: str | None) -> None:
    run = make(record(0.5), mechanism={"mechanism": "d_chi", "noise_to_norm": 0.7, "cti": cti})
    assert level_of(run, "Contributing tokens get less noise") == level


@pytest.mark.parametrize(("pad_to", "level"), [(0, "note"), (16, None)])
def test_exact_lengths_are_noted(make: Any, pad_to: int, level: str | None) -> None:
    assert level_of(make(record(0.5), wire={"pad_to": pad_to}), "exact number of tokens") == level


@pytest.mark.parametrize(("auc", "share", "level"), [(0.69, 0.63, "leak"), (0.51, 0.9, "held"), (None, 0.9, "leak")])
def test_attributes_by_auc_and_without_one_by_rate(make: Any, auc: float | None, share: float, level: str) -> None:
    ranking = {} if auc is None else {"auc": Estimate(value=auc, low=auc - 0.03, high=auc + 0.03)}
    attribute = Attribute(
        name="sex",
        classes=2,
        split="person",
        majority=rate(0.55, 600),
        ceiling=ranked("bag", "bag", 0.68, 0.74),
        attacks=(attack("a", "a", share, trials=600, calibration=None, **ranking),),
    )
    assert {f.level for f in findings(make(record(0.5, attributes=(attribute,)))) if "sex" in f.text} == {level}


def attribute_of(*attacks: Attack, classes: int = 2) -> Attribute:
    ceiling = ranked("bag", "bag", 0.9, 0.9)
    return Attribute(
        name="sex", classes=classes, split="person", majority=rate(0.9, 600), ceiling=ceiling, attacks=attacks
    )


def test_the_attack_that_tells_an_attribute_need_not_be_right_most_often(make: Any) -> None:
    attacks = ranked("logistic", "logistic", 0.9, 0.51), ranked("attention", "pooler", 0.898, 0.91)
    run = make(record(0.5, attributes=(attribute_of(*attacks),)))
    (found,) = [f for f in findings(run) if "sex" in f.text]
    assert found.level == "leak" and "pooler" in found.text and "0.910" in found.text


@pytest.mark.parametrize(("count", "level"), [(1, "leak"), (3, "held")])
def test_the_more_attacks_are_tried_the_surer_one_must_be(make: Any, count: int, level: str) -> None:
    lucky = ranked("lucky", "lucky", 0.9, 0.534)  # 0.504 to 0.564
    attribute = attribute_of(lucky, *[ranked("blind", "blind", 0.9, 0.5)] * (count - 1))
    assert {f.level for f in findings(make(record(0.5, attributes=(attribute,)))) if "sex" in f.text} == {level}


def test_of_more_than_two_classes_the_rate_counts_too(make: Any) -> None:
    attribute = attribute_of(ranked("a", "a", 0.97, 0.51), classes=3)
    assert {f.level for f in findings(make(record(0.5, attributes=(attribute,)))) if "sex" in f.text} == {"leak"}


def test_repeated_releases(make: Any) -> None:
    assert level_of(make(record(0.5)), "released 20 times") == "caution"


def test_repeated_releases_that_add_nothing(make: Any) -> None:
    flat = tuple(RepeatedRelease(releases=n, attack="x", rate=rate(0.5)) for n in (1, 10))
    changed = inversion(0.5).model_copy(update={"repeated": flat})
    assert level_of(make(record(0.5, inversion=changed)), "with fresh noise, an attacker") is None


def test_an_unfrozen_bottom_released_again(make: Any) -> None:
    said = statement()
    said["representations"]["max_releases_per_example"] = 3
    assert level_of(make(record(0.5), privacy=said), "up to 3 times") == "leak"


@pytest.mark.parametrize(("share", "level"), [(0.2, "caution"), (0.0, None), (None, None)])
def test_tokens_that_the_noise_hides_less(make: Any, share: float | None, level: str | None) -> None:
    said = statement()
    said["representations"]["share_of_tokens_with_less_than_a_third_of_the_noise"] = share
    assert level_of(make(record(0.5), privacy=said), "20.0\xa0% of the tokens had less than a third") == level


@pytest.mark.parametrize(
    ("name", "share", "trials", "words"),
    [
        ("personal", 0.4, 800, "about 4 of 10 personal tokens"),
        ("personal", 0.9, 800, "read more often than the rest"),
        ("rare", 0.9, 800, "read more often than the rest"),
        ("rare", 0.4, 800, None),
    ],
)
def test_groups(make: Any, name: Any, share: float, trials: int, words: str | None) -> None:
    group = Group(name=name, description="", attack="nearest", rate=rate(share, trials))
    changed = inversion(0.5).model_copy(update={"groups": (group,)})
    found = [f.text for f in findings(make(record(0.5, inversion=changed))) if f"{name} tokens" in f.text]
    assert (words is None and not found) or (words is not None and words in found[0])


def test_too_few_tokens_of_a_group(make: Any) -> None:
    assert level_of(make(record(0.5)), "Too few personal tokens to tell how well they are protected; 300") == "caution"


def test_limits_of_the_audit(make: Any) -> None:
    sizes = record(0.5).sizes.model_copy(update={"unseen_token_share": 0.3})
    run = make(record(0.5, sizes=sizes, preset="quick"))
    assert level_of(run, "1 of 7 attacks on the text failed") == "caution"
    assert level_of(run, "never occur in the attacker's public text") == "caution"
    assert level_of(run, "preset quick") == "caution"


def test_attacks_that_failed_are_counted_wherever_they_are(make: Any) -> None:
    failed, done = attack("a", "a", None), attack("b", "b", 0.5, calibration=None)
    labels = record(0.5).labels.model_copy(update={"attacks": (failed, done)})
    run = make(
        record(0.5, side_channels=(failed, failed), labels=labels, attributes=(attribute_of(failed, done, done),))
    )
    assert level_of(run, "2 of 2 attacks on side channels failed") == "caution"
    assert level_of(run, "1 of 2 attacks on the labels failed") == "caution"
    assert level_of(run, "1 of 3 attacks on the attribute sex failed") == "caution"


def test_a_test_seed_protects_nothing(make: Any) -> None:
    assert level_of(make(record(0.5), noise_seed=3), "test seed") == "leak"
    assert level_of(make(record(0.5)), "test seed") is None


def test_findings_are_sorted_by_weight_and_actions_are_told_once(make: Any) -> None:
    found = findings(make(record(0.8, disclosed=True, cti=True), utility=0.5))
    ranks = [LEVELS.index(finding.level) for finding in found]
    assert ranks == sorted(ranks)
    assert len(actions(found)) == len(set(actions(found)))


def test_the_calibration_half_chooses() -> None:
    lucky = attack("lucky", "lucky", 0.9, calibration=rate(0.1))
    better = attack("better", "better", 0.5)
    unchosen = attack("unchosen", "unchosen", 0.95, calibration=None)
    chosen = best_of([lucky, better, attack("failed", "failed", None), unchosen])
    assert chosen is not None and chosen.name == "better"
    assert best_of([attack("failed", "failed", None)]) is None


def test_an_interval_is_at_each_end_the_wider() -> None:
    figures = Rate(successes=5, trials=10, value=0.5, low=0.2, high=0.7, by_text=(0.3, 0.8))
    assert figures.interval() == (0.2, 0.8)
    assert figures.model_copy(update={"by_text": None}).interval() == (0.2, 0.7)


def test_utility_has_the_exact_interval() -> None:
    found = utility_interval(0.5, 10)
    assert (round(found.low, 4), round(found.high, 4)) == (0.1871, 0.8129)


def test_percent_never_hides_what_is_not_nothing() -> None:
    assert [percent(share) for share in (0.0, 1e-9, 1 - 1e-9, 1.0)] == [
        text.replace(" %", "\N{NO-BREAK SPACE}%") for text in ("0 %", "< 0.1 %", "> 99.9 %", "100 %")
    ]
    assert of_ten(1e-9) == "fewer than 1 in 20 tokens"
    assert label_of("a\u202eb") == "a\N{REPLACEMENT CHARACTER}b"


def test_an_interval_is_rounded_outwards_and_nearly_all_is_not_all() -> None:
    found = Rate.of(AttackResult(name="", successes=3, trials=40_000))
    assert rate_with_interval(found) == "< 0.1\N{NO-BREAK SPACE}% [0.0, 0.1]"
    rest = Estimate(value=1 - found.value, low=1 - found.high, high=1 - found.low)
    assert estimate_with_interval(rest) == "> 0.999 [0.999, 1.000]"
    assert estimate_with_interval(Estimate(value=0.29, low=0.2896, high=0.2904)) == "0.290 [0.289, 0.291]"
    assert estimate_with_interval(Estimate(value=0.0, low=0.0, high=0.0004)) == "0.000 [0.000, 0.001]"
