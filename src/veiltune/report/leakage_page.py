"""The page about audited language models: what is claimed, what was found, and what was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

import veiltune
from veiltune.audit.leakage import ExtractionRate, MembershipAttack
from veiltune.report import leakage_figures, leakage_plots, leakage_rows, leakage_words
from veiltune.report.figures import label_of, model_label
from veiltune.report.finding import Finding
from veiltune.report.leakage_gaps import FPRS, Gap, gaps
from veiltune.report.leakage_lifecycle import lifecycle
from veiltune.report.leakage_sources import LeakedSample, ModelRun
from veiltune.report.leakage_strengths import Strength, strengths
from veiltune.report.plots import Plot

_LONGEST = 400  # characters of a sample's text


def render_leakage(runs: Sequence[ModelRun], environment: Environment) -> str:
    """The page about these models as HTML.

    Args:
        runs: One or more.
        environment: With the filters of every report; those of this page are added.
    """
    environment.filters |= {
        "found_rate": leakage_figures.found_rate,
        "found_share": leakage_figures.found_share,
        "difference": leakage_figures.difference,
        "difference_parts": leakage_figures.difference_parts,
        "rate_parts": leakage_figures.rate_parts,
        "nominal": leakage_figures.nominal,
        "attack_title": leakage_figures.attack_title,
        "type_title": leakage_figures.type_title,
        "model_headline": leakage_words.headline,
        "one_line": _one_line,
        "written": _written,
    }
    environment.globals |= {"rate_cell": leakage_plots.rate_cell}
    pages = [ModelPage(run) for run in runs]
    several = len(runs) > 1
    return environment.get_template("leakage.html").render(
        pages=pages,
        version=veiltune.__version__,
        compared=_compared(runs) if several else [],
        lifecycle=lifecycle(runs) if several else [],
        nothing_leaks=several and not any(map(leakage_words.leaks, runs)),
        doubts=_doubts(runs) if several else [],
        same_persons=len({run.record.manifest_digest for run in runs}) == 1,
        wrong=[page for page in pages if leakage_words.breaks_claim(page.run)],
        unsound=[page for page in pages if leakage_words.is_blind_unsound(page.run)],
        shows_text=any(run.samples for run in runs),
    )


@dataclass(frozen=True)
class ModelPage:
    """What the templates say about one model."""

    run: ModelRun

    @property
    def id(self) -> str:
        """Anchor of the model's section."""
        return f"model-{self.run.letter.lower()}"

    @cached_property
    def findings(self) -> list[Finding]:
        """The most serious first."""
        return leakage_words.findings(self.run)

    @cached_property
    def strengths(self) -> list[Strength]:
        """Claimed, audited, empirical."""
        return strengths(self.run)

    @cached_property
    def gaps(self) -> list[Gap]:
        """What was not measured, and why."""
        return gaps(self.run)

    @cached_property
    def plots(self) -> dict[str, Plot | None]:
        """By place on the page; None where the record has nothing to draw."""
        record, key = self.run.record, self.id
        found, extraction = record.membership, record.extraction
        return {
            "types": leakage_rows.plot_types(extraction, f"{key}-t"),
            "discoverable": leakage_plots.plot_discoverable(extraction.discoverable, f"{key}-d"),
            "errors": leakage_plots.plot_errors(extraction, f"{key}-e"),
            "roc": leakage_plots.plot_roc(found, f"{key}-r") if found else None,
            "repetitions": leakage_plots.plot_repetitions(found, f"{key}-n") if found else None,
            "exposure": leakage_plots.plot_exposure(record.exposure, f"{key}-x"),
        }

    @property
    def rates(self) -> list[tuple[str, list[ExtractionRate]]]:
        """Extraction rates by attack, the strongest first."""
        chosen = self.run.record.extraction.strongest
        rows = sorted(self.run.record.extraction.rates, key=lambda row: row.attack != chosen)
        return [(name, list(group)) for name, group in groupby(rows, key=lambda row: row.attack)]

    @property
    def levels(self) -> list[tuple[str, str, str, list[MembershipAttack], list[float]]]:
        """Of persons and of documents: unit, in the singular, strongest attack, attacks, and rates that they have."""
        found = self.run.record.membership
        if found is None:
            return []
        levels = []
        for level, unit, name in (
            ("person", "persons", found.strongest),
            ("record", "documents", found.strongest_record),
        ):
            attacks = [attack for attack in found.attacks if attack.level == level]
            attacks.sort(key=lambda attack: -(attack.auc.value if attack.auc else -1.0))
            given = {rate.fpr for attack in attacks for rate in attack.tpr_at_fpr}
            levels.append((unit, level, name, attacks, [fpr for fpr in FPRS if fpr in given]))
        return levels

    @property
    def details(self) -> list[tuple[str, str]]:
        """What it takes to audit the same again."""
        record = self.run.record
        sizes = record.sizes
        return [
            ("model", model_label(record.model, 200)),
            ("digest of the model", label_of(record.model_digest, 80)),
            ("base model", model_label(record.base, 200) if record.base else "none was named"),
            ("digest of the manifest", label_of(record.manifest_digest, 80)),
            ("answers", "whole next-token vectors" if record.full_vectors else "the likeliest tokens only"),
            ("preset", label_of(record.preset)),
            ("seed", str(record.seed)),
            ("Veiltune", label_of(record.veiltune)),
            ("written", label_of(record.created[:16].replace("T", " ") + " UTC")),
            ("time", f"{record.seconds:,.0f} s"),
            ("persons in the training text", f"{sizes.persons_in:,}"),
            ("twins and others outside", f"{sizes.persons_out:,}"),
            ("pairs that chose the attacks", f"{sizes.calibration_pairs:,}"),
            ("documents", f"{sizes.records:,}"),
            ("tokens", f"{sizes.tokens:,}"),
            ("documents cut by the context", f"{sizes.context_cut:,}"),
            ("tokens sampled from nothing", f"{record.extraction.generated_tokens:,}"),
        ]


def _compared(runs: Sequence[ModelRun]) -> list[Plot]:
    """The headline figures of several models."""
    drawn = (leakage_rows.plot_excess(runs, "all-e"), leakage_rows.plot_auc(runs, "all-a"))
    return [plot for plot in drawn if plot]


def _doubts(runs: Sequence[ModelRun]) -> list[str]:
    """Why figures of these models may not be comparable."""
    differing: dict[str, set[Any]] = {
        "audited with different corpora or coin flips": {run.record.manifest_digest for run in runs},
        "audited with different presets": {run.record.preset for run in runs},
        "audited with different seeds, so that other persons chose and reported": {run.record.seed for run in runs},
        "compared with different base models": {run.record.base for run in runs},
        "asked through different interfaces": {run.record.full_vectors for run in runs},
        "audited by different versions": {run.record.veiltune for run in runs},
    }
    return [doubt for doubt, values in differing.items() if len(values) > 1]


def _one_line(text: str) -> str:
    """A sample's text with spaces for line breaks."""
    return label_of(" ".join(text.split()), _LONGEST)


def _written(sample: LeakedSample) -> Markup:
    """What the model wrote, the true value in it marked where it stands letter by letter; everything escaped."""
    shown, value = _one_line(sample.written), _one_line(sample.true)
    if not sample.found or not value or value not in shown:
        return Markup("{}").format(shown)
    before, _, after = shown.partition(value)
    return Markup("{}<mark>{}</mark>{}").format(before, value, after)
