"""What a leakage audit did not measure, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from veiltune.attacks.operating import FALSE_POSITIVES_NEEDED
from veiltune.report.figures import label_of
from veiltune.report.leakage_figures import attack_title, nominal, type_title
from veiltune.report.leakage_sources import ModelRun

FPRS = (0.1, 0.01, 0.001)

Gap = tuple[str, str]
"""(what, why)"""


def gaps(run: ModelRun) -> list[Gap]:
    """Everything that a reader may look for and not find."""
    rules: tuple[Callable[[ModelRun], Iterator[Gap]], ...] = (
        _membership, _rates, _extraction, _reconstruction, _canaries, _utility,
    )  # fmt: skip
    return list(dict.fromkeys(gap for rule in rules for gap in rule(run)))


def _membership(run: ModelRun) -> Iterator[Gap]:
    found = run.record.membership
    if found is None:
        yield "membership", "nobody's documents are known to be absent from the training text by a coin flip"
        return
    for attack in found.attacks:
        if attack.status != "done":
            failed = "failed: " if attack.status == "failed" else ""
            yield f"membership by {attack_title(attack.name)}", failed + (label_of(attack.reason, 300) or "no reason")


def _rates(run: ModelRun) -> Iterator[Gap]:
    found = run.record.membership
    if found is None:
        return
    for level, unit in (("person", "persons"), ("record", "documents")):
        given = {rate.fpr for attack in found.attacks if attack.level == level for rate in attack.tpr_at_fpr}
        for fpr in FPRS:
            if fpr not in given:
                yield (
                    f"true positive rate of {unit} at {nominal(fpr)} false positives",
                    f"it takes {round(FALSE_POSITIVES_NEEDED / fpr):,} {unit} that are not in the training text",
                )


def _extraction(run: ModelRun) -> Iterator[Gap]:
    extraction = run.record.extraction
    if extraction.excess_recall is None:
        yield "chance and excess recall", "nobody is known to be absent from the training text"
    if run.record.base is None:
        yield "what the base model gives away by the same questions", "no base model was named"
    if extraction.recall_at_100_errors is None:
        yield "recall at 100 errors", "there were fewer than 100 wrong guesses"
    if not extraction.discoverable:
        yield "extraction by sampling", "no value has a chance under the model that could be computed"


def _reconstruction(run: ModelRun) -> Iterator[Gap]:
    rows = run.record.extraction.reconstruction
    if not rows:
        yield "reconstruction among candidates", "there were no candidates"
    for row in rows:
        if row.top_10 is None:
            yield f"{type_title(row.type)} among the first ten candidates", "there were fewer than 20 candidates"


def _canaries(run: ModelRun) -> Iterator[Gap]:
    if not run.record.exposure:
        yield "exposure of inserted secrets", "the corpus has none with enough references"
    if run.record.audited_epsilon is None:
        yield "audited epsilon", "the corpus has no coin-flipped canaries"


def _utility(run: ModelRun) -> Iterator[Gap]:
    if run.record.perplexity is None:
        yield "perplexity", "the corpus has no validation text with and without personal data"
    elif run.record.perplexity.base_carrier is None:
        yield "perplexity of the base model", "no base model was named"
