"""The life-cycle table: what each model was protected with, what that cost, and what is left to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veiltune.audit.lm.gates import tpr_at_one_percent
from veiltune.report.figures import estimate_with_interval, label_of
from veiltune.report.leakage_figures import difference, found_rate, share_estimate
from veiltune.report.leakage_sources import ModelRun, Training

_NONE = "not known"


@dataclass(frozen=True)
class LifecycleRow:
    """One model.

    Attributes:
        run: The model.
        defences: Preset, what trained, and the guard that was audited with the model.
        cost: Time and memory of training.
        perplexity: Of prose, and over that of the first model.
        membership: AUC, and true positives at 1 % false ones.
        recall: Of the strongest extraction.
        precision: The same.
        excess: Recall above chance, cue-free.
    """

    run: ModelRun
    defences: str
    cost: str
    perplexity: str
    membership: str
    recall: str
    precision: str
    excess: str


def lifecycle(runs: Sequence[ModelRun]) -> list[LifecycleRow]:
    """One row a model, in the order given; empty where no folder says how its model was trained."""
    return [_row(run, runs[0]) for run in runs] if any(run.made for run in runs) else []


def _row(run: ModelRun, first: ModelRun) -> LifecycleRow:
    extraction = run.record.extraction
    excess, precision = extraction.excess_recall, extraction.overall_precision
    return LifecycleRow(
        run=run,
        defences=_defences(run),
        cost=_cost(run.made),
        perplexity=_perplexity(run, first),
        membership=_membership(run),
        recall=found_rate(extraction.recall),
        precision=found_rate(precision) if precision else "nothing well-formed",
        excess=difference(excess) if excess else "not measured",
    )


def _defences(run: ModelRun) -> str:
    guard = f"guard: {label_of(run.record.guarded_by, 120)}" if run.record.guarded_by else ""
    made = run.made
    if made is None:
        return f"training {_NONE}; {guard}" if guard else _NONE
    share = made.trainable_parameters / max(1, made.total_parameters)
    preset = label_of(str(made.defences.get("preset", "none")), 20)
    return "; ".join(filter(None, [f"{preset}; {label_of(made.method, 20)}, {share:.2%} of the parameters", guard]))


def _cost(made: Training | None) -> str:
    if made is None:
        return _NONE
    memory = "memory not known" if made.peak_memory_bytes is None else f"{made.peak_memory_bytes / 2**20:,.0f} MB"
    return f"{made.seconds:,.0f} s for {made.steps:,} steps, {memory}"


def _perplexity(run: ModelRun, first: ModelRun) -> str:
    own, other = run.record.perplexity, first.record.perplexity
    if own is None:
        return "not measured"
    if run is first or other is None:
        return f"{own.carrier:.4g}"
    return f"{own.carrier:.4g}, {own.carrier / other.carrier:.3f} of {first.letter}"


def _membership(run: ModelRun) -> str:
    found = run.record.membership
    if found is None:
        return "not measured"
    at_one = tpr_at_one_percent(run.record)
    rate = "" if at_one is None else f"; found at 1 % false alarms: {share_estimate(at_one)}"
    return f"AUC {estimate_with_interval(found.auc)}{rate}"
