"""The end of `veiltune audit MODEL`: what a black-box user could find out, in one screen."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.record import Estimate, Rate
from veiltune.report.figures import figure, outwards
from veiltune.terminal import console


def print_leakage(record: LeakageRecord, folder: Path) -> None:
    """Prints the figures that matter, each with its interval."""
    table = Table("", "", "95 % interval", title=f"leakage audit of {record.model}, {record.preset}")
    found, extraction = record.membership, record.extraction
    if found:
        table.add_row(
            "membership, AUC over persons", f"{figure(found.auc.value)} by {found.strongest}", _span(found.auc)
        )
        table.add_row("words alone, no model (99 %)", figure(found.blind.value), _span(found.blind))
    if extraction.excess_recall:
        table.add_row(
            "excess recall, cue-free data",
            f"{figure(extraction.excess_recall.value)} by {extraction.strongest}",
            _span(extraction.excess_recall),
        )
    table.add_row("recall of it", *_rate(extraction.recall))
    if extraction.chance:
        table.add_row("  of twins never trained on", *_rate(extraction.chance))
    for one in record.exposure:
        cap = f", {one.at_cap} of {one.canaries} at the cap" if one.at_cap else ""
        table.add_row(
            f"exposure, {one.family}, {one.repetitions} x",
            f"{one.median_bits:.1f} bits{cap}",
            " to ".join(outwards(one.low, one.high, 1)),
        )
    if record.perplexity:
        base = record.perplexity.base_carrier
        table.add_row(
            "perplexity, unseen prose", f"{record.perplexity.carrier:.2f}", "" if base is None else f"base {base:.2f}"
        )
    console.print(table)
    _print_bound(record)
    for note in record.notes:
        console.print(note, soft_wrap=True, markup=False)
    console.print(f"the whole of it: {folder / 'leakage.json'}; as a page: veiltune report {folder}", soft_wrap=True)


def _print_bound(record: LeakageRecord) -> None:
    bound = record.audited_epsilon
    if bound is None:
        return
    claim = "nothing is claimed" if bound.claimed_epsilon is None else f"claimed: {bound.claimed_epsilon:.3g}"
    console.print(
        f"audited epsilon at least {outwards(bound.epsilon, 0, 2)[0]} at {bound.confidence:.0%} confidence,"
        f" delta {bound.delta:g}; {claim} ({bound.canaries} canaries could show at most {bound.ceiling:.2f})",
        soft_wrap=True,
    )


def _span(estimate: Estimate) -> str:
    return " to ".join(outwards(estimate.low, estimate.high))


def _rate(rate: Rate) -> tuple[str, str]:
    shown = f"{rate.successes} of {rate.trials}" if rate.successes else f"none of {rate.trials}"
    return f"{figure(rate.value)} ({shown})" if rate.successes else shown, " to ".join(outwards(*rate.interval()))
