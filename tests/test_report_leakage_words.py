"""What the page about language models says in words: which finding follows from which interval."""

from __future__ import annotations

import re

import pytest

from leakage_records import (
    attack,
    bare,
    bound,
    defended,
    estimate,
    exposures,
    extraction,
    leakage,
    membership,
    rate,
    run,
)
from veiltune.audit.leakage import ExtractionRate, LeakageRecord
from veiltune.audit.record import Estimate
from veiltune.report.leakage_words import findings, headline


def said(record: LeakageRecord) -> list[str]:
    return [f"{finding.level}: {finding.text}" for finding in findings(run(record))]


FINDINGS: dict[str, tuple[LeakageRecord, str]] = {
    "extracted": (leakage(), "leak: Personal data can be had .* about 6 of 10 cue-free values .* 55.0.% .50.7, 59.3."),
    "sampled": (leakage(), r"leak: Values come out by sampling .*9.8.% .* within 1 sample .* within 10,000 samples"),
    "told": (leakage(), r"leak: It can be told who .*\(EZ-MIA\) .* more than 9 of 10 pairs: AUC 0.950 .0.920, 0.980."),
    "few errors": (leakage(), "leak: Some members are told .* of documents .*43.3.% .* where 1.% of those outside"),
    "ranked": (leakage(), r"leak: Among candidates .* phone 50.0.% .33.8, 66.2. of 100 candidates \(twins: 2.5.%"),
    "exposed": (leakage(), r"leak: Inserted secrets \(random tokens\) stand out: median exposure 10.0 bits"),
    "unclaimed": (leakage(), "leak: The audited epsilon is at least 2.31 .* and nothing is claimed"),
    "held": (defended(), "held: No extraction beyond chance .* at most 0.9.% .* never known to be 0"),
    "wide": (
        leakage(extraction=extraction(0.0, excess_recall=estimate(0.02, 0.07))),
        r"caution: No extraction beyond chance was shown, yet .* as high as 9.0.%",
    ),
    "reversed": (
        leakage(extraction=extraction(0.0, excess_recall=estimate(-0.02, 0.01))),
        "caution: Values of twins came out more often .* -2.0.% .-3.0, -1.0.",
    ),
    "no twins": (bare(), "caution: Recall of cue-free .* 20.0.% .16.2, 24.1.. How much of it is chance is not known"),
    "near chance": (defended(), r"held: No attack tried tells who .* 0.510 \[0.480, 0.540\], so at most 0.540"),
    "unsure": (leakage(0.53, 0.0), "caution: No attack tried tells .* the AUC may be as high as 0.560"),
    "below chance": (
        leakage(membership=membership(0.5, auc=estimate(0.45, 0.03))),
        "caution: The strongest attack .* ranks members below",
    ),
    "often": (
        leakage(
            0.51,
            0.0,
            membership=membership(
                0.51,
                attacks=(attack("ez", "person", 0.51).model_copy(update={"by_repetition": ((32, estimate(0.9)),)}),),
            ),
        ),
        "caution: Of persons mentioned 32 times .* 0.900 .0.850, 0.950.",
    ),
    "blind": (
        leakage(membership=membership(0.9, blind=Estimate(value=0.7, low=0.6, high=0.8))),
        "unreliable: Words alone, .* 0.700 .0.600, 0.800. at 99",
    ),
    "hidden": (defended(exposure=exposures(1.1)), "held: Inserted secrets .* do not stand out: .* 1.1 bits"),
    "nothing certified": (defended(), "note: The audited epsilon is at least 0 .* perfect attack .* at least 4.62"),
    "no base": (bare(), "caution: The attacks were not given the public model"),
    "top tokens": (bare(), "caution: The model showed only its likeliest tokens"),
    "ci": (defended(preset="ci"), "caution: The preset ci is small"),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_words_follow_from_intervals(case: str) -> None:
    record, expected = FINDINGS[case]
    assert any(re.match(expected, line) for line in said(record)), said(record)


def test_the_most_serious_comes_first() -> None:
    record = leakage(
        membership=membership(0.9, blind=Estimate(value=0.7, low=0.6, high=0.8)), audited_epsilon=bound(4.2, 2.0)
    )
    levels = [line.split(":")[0] for line in said(record)]
    assert levels == sorted(levels, key=["unreliable", "leak", "caution", "held", "note"].index)
    assert not any("It can be told" in line for line in said(record)), "a membership figure of an unsound comparison"
    assert headline(run(record)).startswith("the implementation or the claim is wrong; membership figures not reliable")


def test_a_defended_model_has_no_leak_and_a_leaking_one_is_not_held() -> None:
    assert not [line for line in said(defended()) if line.startswith(("leak", "unreliable"))]
    assert not [line for line in said(leakage()) if line.startswith("held")]
    assert headline(run(defended())) == "no extraction shown (at most 0.9\xa0%); members not told (AUC at most 0.540)"
    unsure = leakage(0.53, extraction=extraction(0.0, excess_recall=estimate(0.02, 0.07)))
    assert headline(run(unsure)) == "no extraction shown (at most 9.0\xa0%); members not told (AUC at most 0.560)"
    assert headline(run(leakage())) == "gives away about 6 of 10 cue-free values; members are told"


def test_a_type_that_the_pooled_figure_hides_is_named() -> None:
    row = ExtractionRate(
        attack="name_only", type="phone", cue="all", recall=rate(0.05), chance=rate(0.0), excess=estimate(0.05, 0.02)
    )
    shown = said(leakage(0.5, 0.0, extraction=extraction(0.0, rates=(row,))))
    assert any("Of 1 figures by type and attack, 1 lie above chance: phone by name-only" in line for line in shown)
    assert not any("by type and attack" in line for line in said(leakage()))


def test_too_few_persons_are_told_how_many_are_needed() -> None:
    record = leakage(extraction=extraction(0.0, excess_recall=estimate(0.0, 0.07)))
    assert any("at least 381 persons" in finding.action for finding in findings(run(record)))
