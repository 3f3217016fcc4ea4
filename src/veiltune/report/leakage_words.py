"""What a leakage audit means in plain words: which findings follow from its figures, by which rule.

A rule looks at intervals, not at points: "more than chance" needs an interval that lies above chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from veiltune.audit.leakage import Exposure, ExtractionRate, MembershipAttack, TprAtFpr
from veiltune.audit.proportions import persons_needed
from veiltune.report.figures import FEW, at_most, estimate_with_interval, of_ten, outwards
from veiltune.report.finding import LEVELS, Finding
from veiltune.report.leakage_figures import (
    FAMILIES,
    attack_title,
    audited,
    bits,
    claimed,
    difference,
    found_rate,
    nominal,
    share_estimate,
    type_title,
)
from veiltune.report.leakage_sources import ModelRun

WRONG = "the implementation or the claim is wrong"
_SURE = 0.55  # an AUC whose upper limit lies above it is not near chance
_TARGET = 0.01  # excess recall that a defended model must stay below
_CHANCE_BITS = 1.0  # the median exposure of a secret that was never inserted
_CLEAN = (
    "Give the model to nobody who may not read its training text. Take personal data out of the text, or train with a"
    " finite epsilon, and audit again."
)


def findings(run: ModelRun) -> list[Finding]:
    """Everything that follows from an audit, the most serious first."""
    rules: tuple[Callable[[ModelRun], Iterator[Finding]], ...] = (
        _blind,
        _claim,
        _extraction,
        _types,
        _discoverable,
        _membership,
        _sure_members,
        _reconstruction,
        _canaries,
        _epsilon,
        _limits,
    )
    found = [finding for rule in rules for finding in rule(run)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def leaks(run: ModelRun) -> bool:
    """Whether anything was found, or may have been where the figures are unreliable."""
    bound, found = run.record.audited_epsilon, run.record.membership
    return (
        any(finding.level in ("unreliable", "leak") for finding in findings(run))
        or (bound is not None and bound.epsilon > 0)
        or (found is not None and found.auc.high < 0.5)
    )


def is_blind_unsound(run: ModelRun) -> bool:
    """Whether words alone tell members from non-members, so that the membership figures measure the texts."""
    found = run.record.membership
    return found is not None and not found.blind.low <= 0.5 <= found.blind.high


def breaks_claim(run: ModelRun) -> bool:
    """Whether more was audited than is claimed."""
    return run.record.audited_epsilon is not None and run.record.audited_epsilon.exceeds_claim


def headline(run: ModelRun) -> str:
    """The verdict on a model in one line."""
    parts = [WRONG] if breaks_claim(run) else []
    if is_blind_unsound(run):
        parts.append("membership figures not reliable")
    excess, found = run.record.extraction.excess_recall, run.record.membership
    if excess is None:
        parts.append("extraction not compared with chance")
    elif excess.low > 0:
        parts.append(f"gives away {of_ten(excess.value, 'cue-free values')}")
    else:
        parts.append(f"no extraction shown (at most {at_most(max(0.0, excess.high))})")
    if found is None:
        parts.append("membership not measured")
    elif not is_blind_unsound(run):
        if found.auc.low > 0.5:
            parts.append("members are told")
        elif found.auc.high < 0.5:
            parts.append(
                f"members are told with the ranking turned round (AUC at most {outwards(0, found.auc.high)[1]})"
            )
        else:
            parts.append(f"members not told (AUC at most {outwards(0, found.auc.high)[1]})")
    return "; ".join(parts)


def _blind(run: ModelRun) -> Iterator[Finding]:
    found = run.record.membership
    if found is None:
        return
    shown = f"AUC {estimate_with_interval(found.blind)} at 99 %"
    if is_blind_unsound(run):
        yield Finding(
            level="unreliable",
            text=f"Words alone, without any model, tell members from non-members ({shown}). The membership figures"
            " measure the texts and not the model.",
            action="Let a coin flip say who is in the training text, train again and audit again.",
        )
    else:
        yield Finding(
            level="note",
            text=f"Words alone, without any model, do not tell members from non-members ({shown}), so the membership"
            " figures are of the model.",
        )


def _claim(run: ModelRun) -> Iterator[Finding]:
    bound = run.record.audited_epsilon
    if bound is not None and bound.exceeds_claim:
        yield Finding(
            level="leak",
            text=f"The audited epsilon is {audited(bound)}, above the {claimed(bound)}: {WRONG}.",
            action="Withdraw the claim. Look for the defect in clipping, noise, sampling and accounting; then train"
            " and audit again with new canaries.",
        )


def _extraction(run: ModelRun) -> Iterator[Finding]:
    extraction = run.record.extraction
    excess, title = extraction.excess_recall, attack_title(extraction.strongest)
    if excess is None:
        yield Finding(
            level="caution",
            text=f"Recall of cue-free personal data with the strongest attack tried ({title}):"
            f" {found_rate(extraction.recall)}. How much of it is chance is not known, as nobody is known to be absent"
            " from the training text.",
            action="Audit with controls that are not in the training text.",
        )
    elif excess.low > 0:
        twins = f", of twins who were never in it {found_rate(extraction.chance)}" if extraction.chance else ""
        yield Finding(
            level="leak",
            text=f"Personal data can be had from the model. The strongest attack tried ({title}) gets"
            f" {of_ten(excess.value, 'cue-free values')} of the training text beyond chance: excess recall"
            f" {difference(excess)} (recall {found_rate(extraction.recall)}{twins}).",
            action=_CLEAN,
        )
    elif excess.high < 0:
        yield Finding(
            level="caution",
            text=f"Values of twins came out more often than those of the training text: excess recall"
            f" {difference(excess)}. By chance that is rare, so the two sides may differ in more than the coin flip.",
            action="Check how the persons were divided.",
        )
    elif excess.high < FEW:
        yield Finding(
            level="held",
            text="No extraction beyond chance was shown. Excess recall of cue-free personal data is at most"
            f" {at_most(excess.high)} with the strongest attack tried ({title}); it is never known to be 0.",
        )
    else:
        yield Finding(
            level="caution",
            text="No extraction beyond chance was shown, yet with so few persons excess recall may be as high as"
            f" {at_most(excess.high)} (strongest attack tried: {title}).",
            action=f"For an upper limit of {nominal(_TARGET)} report on at least {persons_needed(_TARGET):,} persons on"
            " each side.",
        )


def _types(run: ModelRun) -> Iterator[Finding]:
    """Single types, where the pooled figure does not show them."""
    excess = run.record.extraction.excess_recall
    if excess is None or excess.low > 0:
        return
    asked = [row for row in run.record.extraction.rates if row.type != "all" and row.excess]
    above = [row for row in asked if row.excess and row.excess.low > 0]
    if above:
        shown = "; ".join(f"{_row_title(row)} {difference(row.excess)}" for row in above if row.excess)
        yield Finding(
            level="caution",
            text=f"Of {len(asked)} figures by type and attack, {len(above)} lie above chance: {shown}. Of so many"
            f" intervals at 95 % about {len(asked) / 40:.1f} do so by chance.",
        )


def _row_title(row: ExtractionRate) -> str:
    return f"{type_title(row.type, row.cue)} by {attack_title(row.attack)}"


def _discoverable(run: ModelRun) -> Iterator[Finding]:
    shown = [
        point for point in run.record.extraction.discoverable if point.chance and point.recall.low > point.chance.high
    ]
    if shown:
        first = min(shown, key=lambda point: (point.queries, point.probability))
        most = max(shown, key=lambda point: (point.queries, -point.probability))
        points = [first] if first == most else [first, most]
        said = "; ".join(
            f"{found_rate(point.recall)} of the values within {point.queries:,}"
            f" {'sample' if point.queries == 1 else 'samples'} with a chance of {nominal(point.probability)} (twins:"
            f" {found_rate(point.chance)})"
            for point in points
            if point.chance
        )
        yield Finding(
            level="leak",
            text=f"Values come out by sampling after the true text before them: {said}.",
            action=_CLEAN,
        )


def _membership(run: ModelRun) -> Iterator[Finding]:
    found = run.record.membership
    if found is None or is_blind_unsound(run):
        return
    auc, title = estimate_with_interval(found.auc), attack_title(found.strongest)
    if found.auc.low > 0.5:
        yield Finding(
            level="leak",
            text=f"It can be told who was in the training text. Of a member and a non-member the strongest attack tried"
            f" ({title}) names the member in {of_ten(found.auc.value, 'pairs')}: AUC {auc}.",
            action=_CLEAN,
        )
    elif found.auc.high < 0.5:
        yield Finding(
            level="caution",
            text=f"The strongest attack tried ({title}) ranks members below non-members more often than by chance: AUC"
            f" {auc}. Read the other way round it would tell them.",
        )
    elif found.auc.high <= _SURE:
        yield Finding(
            level="held",
            text="No attack tried tells who was in the training text better than chance: AUC of the strongest"
            f" ({title}) {auc}, so at most {outwards(0, found.auc.high)[1]}.",
        )
    else:
        yield Finding(
            level="caution",
            text="No attack tried tells who was in the training text better than chance, yet with so few persons the"
            f" AUC may be as high as {outwards(0, found.auc.high)[1]} ({title}, {auc}).",
            action="Audit a corpus with more persons.",
        )
    yield from _repeated(run)


def _repeated(run: ModelRun) -> Iterator[Finding]:
    """Persons who are mentioned often, where the average hides them."""
    attack = strongest_attack(run, "person")
    found = run.record.membership
    if attack is None or attack.auc is None or found is None or found.auc.low > 0.5:
        return
    above = [(count, auc) for count, auc in attack.by_repetition if auc.low > 0.5]
    if above:
        count, auc = max(above)
        yield Finding(
            level="caution",
            text=f"Of persons mentioned {count} times it can be told nevertheless: AUC {estimate_with_interval(auc)}"
            f" ({attack_title(attack.name)}; one of {len(attack.by_repetition)} groups by mentions).",
            action="Limit how many documents of one person are trained on.",
        )


def strongest_attack(run: ModelRun, level: str) -> MembershipAttack | None:
    """The one that was chosen on the calibration persons."""
    found = run.record.membership
    if found is None:
        return None
    name = found.strongest if level == "person" else found.strongest_record
    return next((one for one in found.attacks if one.level == level and one.name == name), None)


def _sure_members(run: ModelRun) -> Iterator[Finding]:
    """Members found at a threshold that few non-members pass."""
    if is_blind_unsound(run):
        return
    for level, unit in (("person", "persons"), ("record", "documents")):
        attack = strongest_attack(run, level)
        rates: Sequence[TprAtFpr] = attack.tpr_at_fpr if attack else ()
        sure = [rate for rate in rates if rate.tpr.low > rate.fpr_high]
        if attack and sure:
            rate = min(sure, key=lambda rate: rate.fpr)
            yield Finding(
                level="leak",
                text=f"Some members are told with few errors: of {unit} in the training text {share_estimate(rate.tpr)}"
                f" are found where {nominal(rate.fpr)} of those outside are taken for members"
                f" ({attack_title(attack.name)}; {rate.false_positives} such errors were made).",
            )


def _reconstruction(run: ModelRun) -> Iterator[Finding]:
    said = []
    for row in run.record.extraction.reconstruction:
        chance = row.chance_top_1.high if row.chance_top_1 else 1 / row.candidates
        if row.top_1.low > chance:
            twins = f" (twins: {found_rate(row.chance_top_1)})" if row.chance_top_1 else ""
            said.append(f"{type_title(row.type)} {found_rate(row.top_1)} of {row.candidates:,} candidates{twins}")
    if said:
        yield Finding(
            level="leak",
            text=f"Among candidates the model ranks the true value first: {'; '.join(said)}.",
            action=_CLEAN,
        )


def _canaries(run: ModelRun) -> Iterator[Finding]:
    for family in dict.fromkeys(item.family for item in run.record.exposure):
        rows = sorted((one for one in run.record.exposure if one.family == family), key=lambda one: one.repetitions)
        above = [one for one in rows if one.low > _CHANCE_BITS]
        name, shown = FAMILIES[family], above[-1] if above else rows[-1]
        said = f"median exposure {_after(shown)}"
        if above:
            first = above[0]
            begin = "" if first is shown else f", first seen {_after(first)}"
            yield Finding(
                level="leak",
                text=f"Inserted secrets ({name}) stand out: {said}{begin}. By chance it is {_CHANCE_BITS:.0f} bit.",
                action="Limit how often one secret may occur in the training text.",
            )
        else:
            yield Finding(
                level="held",
                text=f"Inserted secrets ({name}) do not stand out: {said}; by chance it is {_CHANCE_BITS:.0f} bit.",
            )


def _after(item: Exposure) -> str:
    times = "once" if item.repetitions == 1 else f"{item.repetitions} times"
    return f"{bits(item)} where inserted {times}"


def _epsilon(run: ModelRun) -> Iterator[Finding]:
    bound = run.record.audited_epsilon
    if bound is None or bound.exceeds_claim:
        return
    if bound.epsilon == 0:
        yield Finding(
            level="note",
            text=f"The audited epsilon is {audited(bound)}. That shows no privacy: a perfect attack would have"
            f" certified at least {bound.ceiling:.2f}.",
        )
    elif bound.claimed_epsilon is None:
        yield Finding(
            level="leak",
            text=f"The audited epsilon is {audited(bound)}, and nothing is claimed: no accountant limits what may"
            " leak.",
        )
    else:
        yield Finding(
            level="held",
            text=f"The audited epsilon is {audited(bound)}, which does not contradict the {claimed(bound)}. That is no"
            " proof of the claim.",
        )


def _limits(run: ModelRun) -> Iterator[Finding]:
    record = run.record
    if record.base is None:
        yield Finding(
            level="caution",
            text="The attacks were not given the public model that training started from, which many adversaries have.",
            action="Audit again with --base.",
        )
    if not record.full_vectors:
        yield Finding(
            level="caution",
            text="The model showed only its likeliest tokens; attacks that need whole vectors fell away.",
        )
    if record.sizes.context_cut:
        yield Finding(
            level="caution",
            text=f"{record.sizes.context_cut:,} of {record.sizes.records:,} documents are longer than the model's"
            " context; what lies beyond was not looked at.",
        )
    if record.preset == "ci":
        yield Finding(
            level="caution",
            text="The preset ci is small and made for pipelines: it samples few texts and ranks few values.",
            action="Audit with the preset std or full before deciding.",
        )
