"""What a run means in plain words: which findings follow from its figures, by which rule.

A rule looks at intervals, not at points: "more than by guessing" needs an interval that lies above the guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

from veiltune.audit.record import Attack, Attribute
from veiltune.report.figures import (
    FEW,
    estimate_with_interval,
    figure,
    label_of,
    of_ten,
    percent,
    rate_with_interval,
    utility_interval,
)
from veiltune.report.finding import LEVELS, Finding
from veiltune.report.sources import Run

_MANY_UNSEEN = 0.1  # of the tokens
_NEARLY_SURE = 0.9  # AUC
_WEAK = 0.01  # of the tokens
_NEVER = ("repeated_noise", "replay")
_ONE_SCALE = "Give all tokens noise of one scale (privacy.cti = off)."
_CLEAN_FIRST = "Take personal data out of the text before it is released."
_ALONE = "Do not send these releases: train on the customer's side alone, which does as well and shows nothing."


def is_dominated(run: Run) -> bool | None:
    """Whether the customer does at least as well alone; None if that was not measured."""
    alone = run.summary.customer_alone_utility
    return None if alone is None else run.summary.utility <= alone


def best_of(attacks: Sequence[Attack]) -> Attack | None:
    """The strongest finished attack; None if none finished.

    The calibration half chooses where there is one. Where there is none, the reported figures do, so that the best of
    several attacks looks a little better than it is.
    """
    done = [attack for attack in attacks if attack.reported]
    chosen_fairly = [attack for attack in done if attack.calibration]
    return max(chosen_fairly or done, key=_success, default=None)


def _success(attack: Attack) -> float:
    rate = attack.calibration or attack.reported
    return rate.value if rate else 0.0


def failed_controls(run: Run) -> list[str]:
    """Descriptions of the controls that did not pass."""
    return [control.description for control in run.record.controls if not control.passed]


def headline(run: Run) -> str:
    """The verdict on a run in one line."""
    if failed_controls(run):
        return "not reliable: a control of the audit failed"
    parts = [f"vendor reads {of_ten(run.record.inversion.recovery.value)}"]
    if is_dominated(run):
        parts.append("dominated by sending nothing")
    if is_dominated(run) is None:
        parts.append("customer alone not measured")
    if run.record.labels.mode == "disclosed":
        parts.append("labels disclosed")
    return "; ".join(parts)


def findings(run: Run) -> list[Finding]:
    """Everything that follows from a run, the most serious first."""
    rules: tuple[Callable[[Run], Iterator[Finding]], ...] = (
        _audit_itself,
        _randomness,
        _text,
        _groups,
        _releases,
        _utility,
        _labels,
        _side_channels,
        _attributes,
        _extraction,
        _limits_of_the_audit,
    )
    found = [finding for rule in rules for finding in rule(run)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def actions(found: Sequence[Finding]) -> list[str]:
    """What to do, in the order of the findings, each once."""
    return list(dict.fromkeys(finding.action for finding in found if finding.action))


def _audit_itself(run: Run) -> Iterator[Finding]:
    for description in failed_controls(run):
        yield Finding(
            level="unreliable",
            text=f"A control of the audit failed ({description}). The figures of this run cannot be relied on.",
            action="Find out why the control failed and audit again; until then quote no figure of this run.",
        )
    if not run.record.controls:
        yield Finding(
            level="caution",
            text="The audit ran no control, so nothing shows that its attacks work at all.",
            action="Audit again with the controls switched on.",
        )


def _randomness(run: Run) -> Iterator[Finding]:
    if run.config.noise_seed is not None:
        yield Finding(
            level="leak",
            text="The noise came from a test seed in the configuration. Whoever knows the seed removes the noise.",
            action="Remove noise_seed from the configuration and tune again.",
        )


def _text(run: Run) -> Iterator[Finding]:
    inversion = run.record.inversion
    low, high = inversion.recovery.interval()
    title, share = label_of(run.title(inversion.strongest)), inversion.recovery.value
    chance = next((control.rate for control in run.record.controls if control.name == "shuffled"), None)
    if chance is not None and low <= chance.interval()[1]:
        yield Finding(
            level="held",
            text=f"The strongest attack tried ({title}) read {of_ten(share)}, no more than by chance. A better"
            " attack may come.",
        )
    elif high < FEW:
        yield Finding(
            level="held",
            text=f"The vendor can read fewer than 1 in 20 tokens with the strongest attack tried ({title}), yet more"
            " than nothing.",
        )
    else:
        yield Finding(
            level="leak",
            text=f"The vendor can read {of_ten(share)} (words and pieces of words) of the private text with the"
            f" strongest attack tried ({title}).",
            action=_less_readable(run),
        )


def _less_readable(run: Run) -> str:
    if is_dominated(run):
        return _ALONE
    if run.config.privacy.mechanism == "none":
        return "Add noise before the release (privacy.mechanism) and audit again."
    return "Treat the text as shown to the vendor, or raise the noise and audit again; compare with customer alone."


def _groups(run: Run) -> Iterator[Finding]:
    everything = run.record.inversion.recovery.interval()
    for group in run.record.inversion.groups:
        if group.name == "all":
            continue
        if group.rate is None:
            yield Finding(
                level="caution",
                text=f"Too few {group.name} tokens to tell how well they are protected; {group.needed:,} are needed.",
                action="Audit more texts." if group.name == "personal" else "",
            )
        elif group.rate.interval()[0] > everything[1]:
            yield Finding(
                level="leak",
                text=f"{group.name.capitalize()} tokens are read more often than the rest:"
                f" {of_ten(group.rate.value, f'{group.name} tokens')}.",
                action=_CLEAN_FIRST if group.name == "personal" else "",
            )
        elif group.name == "personal" and group.rate.interval()[1] >= FEW:
            yield Finding(
                level="leak",
                text=f"The vendor can read {of_ten(group.rate.value, 'personal tokens')} ({group.description}).",
                action=_CLEAN_FIRST,
            )


def _releases(run: Run) -> Iterator[Finding]:
    made = run.privacy.representations.get("max_releases_per_example")
    if isinstance(made, int) and made > 1:
        yield Finding(
            level="leak",
            text=f"Texts were released up to {made} times with fresh noise, which averages out.",
            action="Keep the bottom frozen, so that each text is released once.",
        )
    weak = run.privacy.representations.get("share_of_tokens_with_less_than_a_third_of_the_noise")
    if isinstance(weak, float) and weak >= _WEAK:
        text = f"{percent(weak)} of the tokens had less than a third of the noise asked for: their vectors are long."
        yield Finding(level="caution", text=text)
    points = sorted(run.record.inversion.repeated, key=lambda point: point.releases)
    if len(points) > 1 and points[-1].rate.interval()[0] > points[0].rate.interval()[1]:
        yield Finding(
            level="caution",
            text=f"Were the same texts released {points[-1].releases} times with fresh noise, an attacker would read"
            f" {percent(points[-1].rate.value)} of the tokens in place of {percent(points[0].rate.value)}.",
            action="Release each text once and replay the same bytes; never privatize it again in a new run.",
        )


def _utility(run: Run) -> Iterator[Finding]:
    summary, alone = run.summary, run.summary.customer_alone_utility
    if alone is None:
        yield Finding(
            level="caution",
            text="What the customer reaches alone was not measured, so nothing shows that sending anything paid.",
            action="Tune again with train.customer_alone = true.",
        )
    elif summary.utility <= alone:
        yield Finding(
            level="leak",
            text=f"Dominated: alone, sending nothing, the customer reaches {figure(alone)}; with the vendor only"
            f" {figure(summary.utility)}. What the releases show was given away for nothing.",
            action=_ALONE,
        )
    elif utility_interval(summary.utility, summary.eval_examples).low <= alone:
        yield Finding(
            level="caution",
            text=f"The vendor's gain over the customer alone ({figure(summary.utility)} against {figure(alone)}) may be"
            f" chance on {summary.eval_examples:,} evaluation examples.",
            action="Evaluate on more examples before relying on the gain.",
        )
    else:
        yield Finding(
            level="held",
            text=f"Sending paid: {figure(summary.utility)} with the vendor, {figure(alone)} by the customer alone.",
        )


def _labels(run: Run) -> Iterator[Finding]:
    labels, best = run.record.labels, best_of(run.record.labels.attacks)
    measured = (
        f" The best of {_number(labels.attacks)} read {percent(best.reported.value)} of them."
        if best and best.reported
        else ""
    )
    if labels.mode == "disclosed":
        yield Finding(
            level="leak",
            text=f"Labels are disclosed: the returned gradients reveal each one.{measured}",
            action="Set privacy.labels to randomized_response if the labels are private.",
        )
    elif best and best.reported and labels.bound is not None and best.reported.interval()[0] > labels.bound:
        yield Finding(
            level="leak",
            text=f"An attack read more labels ({rate_with_interval(best.reported)}) than the proven bound"
            f" {percent(labels.bound)} allows: either it learnt them from the text, or the protection is broken.",
            action="Compare with the customer's own accuracy; if the text does not explain it, report a defect.",
        )
    elif best is None:
        yield Finding(level="caution", text="Labels are randomised; no attack on them could be finished.")
    else:
        bound = "" if labels.bound is None else f" The bound is {percent(labels.bound)}"
        guess = f", a guess without any attack gets {percent(labels.majority)}." if bound else ""
        yield Finding(
            level="held",
            text="Labels are randomised, and no attack went past the bound by more than its interval."
            f"{measured}{bound}{guess}",
        )


def _number(attacks: Sequence[Attack]) -> str:
    count = sum(attack.reported is not None for attack in attacks)
    return "1 attack" if count == 1 else f"{count} attacks"


def _side_channels(run: Run) -> Iterator[Finding]:
    for attack in run.record.side_channels:
        found = _side_channel(run, attack)
        if found is not None:
            yield found
    if run.config.privacy.cti != "off":
        yield Finding(
            level="leak",
            text="Contributing tokens get less noise: the radius of the noise shows where they stand.",
            action=_ONE_SCALE,
        )
    if run.config.wire.pad_to == 0:
        yield Finding(level="note", text="The vendor sees the exact number of tokens of every text.")


def _side_channel(run: Run, attack: Attack) -> Finding | None:
    title, rate, auc = label_of(attack.title), attack.reported, attack.auc
    if attack.name in _NEVER:
        if rate is None or rate.successes == 0:
            return None
        text = f"{title}: found in {rate_with_interval(rate)} of the cases. This must never happen."
        return Finding(level="leak", text=text, action="Report a defect, and do not send releases of this run.")
    if attack.name == "length" and run.config.wire.pad_to == 0:
        return None  # said below
    if auc is not None and auc.low > 0.5:
        sure = "almost surely" if auc.low >= _NEARLY_SURE else "better than by chance"
        text = f"Side channel, {title}: it tells {sure} (AUC {estimate_with_interval(auc)})."
        if attack.reason:  # explained by the audit: not the channel that was looked for
            return Finding(level="note", text=f"{text} But {attack.reason}.")
        return Finding(level="leak", text=text, action=_ONE_SCALE if "radius" in attack.name else "")
    blind = _blind_guess(run, attack)
    if auc is None and rate is not None and rate.interval()[0] > blind:
        text = f"Side channel, {title}: right in {rate_with_interval(rate)} of the cases, a guess in {percent(blind)}."
        return Finding(level="leak", text=text, action=_ONE_SCALE if "radius" in attack.name else "")
    return None


def _blind_guess(run: Run, attack: Attack) -> float:
    """Success of a guess without looking at the releases; one half where the audit did not write it down."""
    if "labels" in attack.name:
        return run.record.labels.majority
    guess = attack.settings.get("blind_guess")
    return guess if isinstance(guess, float) else 0.5


def _attributes(run: Run) -> Iterator[Finding]:
    for attribute in run.record.attributes:
        name, guess = label_of(attribute.name), percent(attribute.majority.value)
        best = max(_telling(attribute), key=lambda attack: attack.auc.value if attack.auc else 0.0, default=None)
        if not any(attack.reported for attack in attribute.attacks):
            yield Finding(level="caution", text=f"No attack on the attribute {name} could be finished.")
        elif best and best.reported:
            yield Finding(
                level="leak",
                text=f"The releases tell the attribute {name}: {label_of(best.title)} is right in"
                f" {rate_with_interval(best.reported)}{_auc(best)}, a guess in {guess}{_ceiling(attribute)}.",
                action=f"Treat {name} as shown to the vendor.",
            )
        else:
            yield Finding(
                level="held",
                text=f"No attack told the attribute {name} better than a guess ({guess}){_ceiling(attribute)}.",
            )


def _telling(attribute: Attribute) -> list[Attack]:
    """Attacks that do better than a guess, with 95 % confidence in all of them together (Bonferroni).

    By the AUC; by the rate where there is none, or more than two classes, of which an AUC is about one. The lower ends
    are moved out as those of normal estimates.
    """
    judged = [(attack, attack.auc.value, attack.auc.low, 0.5) for attack in attribute.attacks if attack.auc]
    for attack in attribute.attacks:
        if attack.reported and (attack.auc is None or attribute.classes > 2):
            judged.append((attack, attack.reported.value, attack.reported.interval()[0], attribute.majority.value))
    normal = NormalDist()
    wider = normal.inv_cdf(0.025 / max(1, len(judged))) / normal.inv_cdf(0.025)
    return [attack for attack, value, low, guess in judged if value - wider * (value - low) > guess]


def _auc(attack: Attack) -> str:
    return "" if attack.auc is None else f" (AUC {estimate_with_interval(attack.auc)})"


def _ceiling(attribute: Attribute) -> str:
    clean = attribute.ceiling.reported
    return "" if clean is None else f"; the clean text itself allows {percent(clean.value)}"


def _extraction(run: Run) -> Iterator[Finding]:
    if run.record.extraction:
        most = max(run.record.extraction, key=lambda point: point.queries)
        yield Finding(
            level="note",
            text=f"For the vendor: a customer's copy of its top, made from {most.queries:,} queries, agrees with it in"
            f" {rate_with_interval(most.fidelity)} of new cases.",
        )


def _limits_of_the_audit(run: Run) -> Iterator[Finding]:
    record = run.record
    attributes = {f"the attribute {label_of(item.name)}": item.attacks for item in record.attributes}
    kinds = {"the text": record.inversion.attacks, "side channels": record.side_channels}
    for what, attacks in (kinds | {"the labels": record.labels.attacks} | attributes).items():
        failed = sum(attack.status == "failed" for attack in attacks)
        if failed:
            yield Finding(
                level="caution",
                text=f"{failed} of {len(attacks)} attacks on {what} failed to run; one of them might have been the"
                " strongest.",
                action="See the reasons in the table of attacks, and audit again.",
            )
    if run.record.sizes.unseen_token_share > _MANY_UNSEEN:
        yield Finding(
            level="caution",
            text=f"{percent(run.record.sizes.unseen_token_share)} of the attacked tokens never occur in the attacker's"
            " public text. A vendor with text closer to yours reads more.",
            action="Audit with public text of the same domain.",
        )
    if run.record.preset == "quick":
        yield Finding(
            level="caution",
            text="The preset quick trains its attackers briefly; stronger ones are in standard and full.",
            action="Audit with the preset standard before deciding.",
        )
