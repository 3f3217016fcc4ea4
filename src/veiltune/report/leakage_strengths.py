"""Three things that are easily confused: what is claimed, what was audited, what attacks achieved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from veiltune.report.figures import estimate_with_interval, label_of
from veiltune.report.leakage_figures import attack_title, audited, claimed, difference, found_rate
from veiltune.report.leakage_sources import ModelRun


@dataclass(frozen=True, kw_only=True)
class Strength:
    """One of the three things that are easily confused: claimed, audited, empirical.

    Attributes:
        word: Which.
        value: With what it holds for.
        meaning: What it says and what not.
    """

    word: str
    value: str
    meaning: str


def strengths(run: ModelRun) -> list[Strength]:
    """Claimed, audited and empirical, each in its own words: never a bare epsilon."""
    return [_claimed_strength(run), _audited_strength(run), _empirical_strength(run)]


def _claimed_strength(run: ModelRun) -> Strength:
    bound, training = run.record.audited_epsilon, run.training
    value = claimed(bound) if bound else ""
    if not value and training is not None and training.planned_epsilon < math.inf:
        value = (
            f"claimed epsilon {training.planned_epsilon:.3g} (delta {training.delta:g}, one"
            f" {label_of(training.unit, 40)}), not set against any canary"
        )
    if not value:
        return Strength(word="claimed", value="nothing is claimed", meaning="No accountant limits what may leak.")
    return Strength(
        word="claimed",
        value=value,
        meaning="An upper bound of an accountant. It holds against every attack, if the training did what it says.",
    )


def _audited_strength(run: ModelRun) -> Strength:
    bound = run.record.audited_epsilon
    if bound is None:
        return Strength(word="audited", value="not measured", meaning="The corpus has no coin-flipped canaries.")
    return Strength(
        word="audited",
        value=f"audited epsilon {audited(bound)}",
        meaning=f"A lower bound: {bound.correct:,} of {bound.guesses:,} guesses about {bound.canaries:,} coin-flipped"
        f" canaries ({bound.included:,} inserted) were right. A perfect attack on them would have certified at least"
        f" {bound.ceiling:.2f}, so a small bound shows no privacy.",
    )


def _empirical_strength(run: ModelRun) -> Strength:
    found, extraction = run.record.membership, run.record.extraction
    parts, title = [], attack_title(extraction.strongest)
    if extraction.excess_recall:
        parts.append(f"excess recall {difference(extraction.excess_recall)} by {title}")
    else:
        parts.append(f"recall {found_rate(extraction.recall)} by {title}, not compared with chance")
    if found:
        parts.append(f"membership AUC {estimate_with_interval(found.auc)} by {attack_title(found.strongest)}")
    return Strength(
        word="empirical",
        value="; ".join(parts),
        meaning="The success of the strongest attack that was tried. It proves nothing of attacks that were not.",
    )
