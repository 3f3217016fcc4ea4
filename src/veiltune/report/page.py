"""Run folders to one HTML file that stands alone: what was claimed, what was measured, what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import veiltune
from veiltune.errors import InputError
from veiltune.report import figures, plots, words
from veiltune.report.finding import Finding
from veiltune.report.leakage_page import render_leakage
from veiltune.report.leakage_sources import are_language_models, load_models
from veiltune.report.plots import Plot
from veiltune.report.sources import Run, SampleText, load_runs
from veiltune.runs import atomic_write_bytes

_TITLES = {
    "num_releases": "releases of one text",
    "composed_eta": "composed eta (1 / distance)",
    "eta": "eta (1 / distance)",
    "noise_to_norm": "noise / norm",
    "snr_db": "signal to noise (dB)",
    "reference_norm": "norm of a clean vector",
    "cut_layer": "blocks at the customer",
    "cut_embeddings": "embeddings cut at",
    "tokens": "tokens released",
    "examples_released": "examples released",
    "releases": "releases in all",
    "max_releases_per_example": "most releases of one example",
    "claimed_label_epsilon": "claimed epsilon of one label",
    "keep_probability": "chance that a label stays as it is",
    "bottom": "bottom model",
}


def write_report(runs: Sequence[Path], output: Path, *, with_text: bool = True) -> None:
    """Writes one HTML file about audited runs or language models; it needs no network, no script and no other file.

    The same folders give the same bytes. A page that shows texts is readable by its owner only (0600).

    Args:
        runs: Run folders, each with an attacks.json, or folders of language models, each with a leakage.json; several
            are also compared.
        output: The file; an HTML file that is there is replaced.
        with_text: Whether to show the sample of private texts, where the audit kept one.

    Raises:
        InputError: If a run cannot be reported on, they are of both kinds, or the output is a folder, lies in none or
            is no HTML file.
        StorageError: If a file cannot be read or written; an older report is intact.
    """
    output = Path(output)
    _check_output(output)
    folders = [Path(run) for run in runs]
    if are_language_models(folders):
        models = load_models(folders, with_text=with_text)
        shows_text, html = any(model.samples for model in models), render_leakage(models, _environment())
    else:
        loaded = load_runs(folders, with_text=with_text)
        shows_text, html = any(run.sample for run in loaded), render(loaded)
    atomic_write_bytes(output, html.encode(), mode=0o600 if shows_text else 0o644)


def render(runs: Sequence[Run]) -> str:
    """The page about these runs as HTML."""
    pages = [RunPage(run) for run in runs]
    return (
        _environment()
        .get_template("page.html")
        .render(
            pages=pages,
            version=veiltune.__version__,
            tradeoff=plots.plot_tradeoff(runs, "all") if len(runs) > 1 else None,
            doubts=_doubts_of_comparison(runs) if len(runs) > 1 else [],
            unreliable=[page for page in pages if words.failed_controls(page.run)],
            shows_text=any(run.sample for run in runs),
        )
    )


@dataclass(frozen=True)
class RunPage:
    """What the templates say about one run."""

    run: Run

    @property
    def id(self) -> str:
        """Anchor of the run's section."""
        return f"run-{self.run.letter.lower()}"

    @cached_property
    def findings(self) -> list[Finding]:
        """The most serious first."""
        return words.findings(self.run)

    @cached_property
    def plots(self) -> dict[str, Plot | None]:
        """By place on the page; None where the record has nothing to draw."""
        record, key = self.run.record.inversion, self.id
        titles = {attack.name: attack.title for attack in record.attacks}
        return {
            "tradeoff": plots.plot_tradeoff([self.run], f"{key}-t"),
            "attacks": plots.plot_attacks(record.attacks, record.strongest, f"{key}-a"),
            "frequency": plots.plot_frequency(record.by_frequency, f"{key}-f"),
            "repeated": plots.plot_repeated(record.repeated, titles, f"{key}-r"),
        }

    @cached_property
    def rocs(self) -> list[Plot]:
        """One for each attribute that has curves."""
        drawn = (plots.plot_roc(item, f"{self.id}-c{i}") for i, item in enumerate(self.run.record.attributes))
        return [plot for plot in drawn if plot]

    @property
    def values_in_statement(self) -> list[str]:
        """The numbers that the statement about representations names, such as "composed_eta = 50"."""
        content = self.run.privacy.representations
        statement = str(content.get("statement", ""))
        return [f"{name} = {_shown(value)}" for name, value in content.items() if "_" in name and name in statement]

    @property
    def claims(self) -> list[tuple[str, str]]:
        """Names and values of privacy.json's numbers, in its order."""
        return [*_flat(self.run.privacy.representations), *_flat(self.run.privacy.labels)]


def _flat(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            rows += _flat(value)
        elif name not in ("statement", "mode", "unit", "metric", "mechanism", "replay"):
            rows.append((_TITLES.get(name, name.replace("_", " ")), _shown(value)))
    return rows


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _doubts_of_comparison(runs: Sequence[Run]) -> list[str]:
    """Why figures of these runs may not be comparable."""
    differing: dict[str, set[Any]] = {
        "audited with different presets": {run.record.preset for run in runs},
        "attacked with different public text": {run.record.public_source for run in runs},
        "tuned on different tables": {(run.config.data.train, run.config.data.eval) for run in runs},
        "measured by different utility metrics": {run.summary.utility_metric for run in runs},
    }
    return [doubt for doubt, values in differing.items() if len(values) > 1]


def _words_of(text: SampleText) -> list[list[dict[str, Any]]]:
    """The tokens of a text, special ones left out, joined to the words that a reader sees.

    >>> text = SampleText(tokens=("[CLS]", "re", "##ad"), recovered=(True, True, False), special=(True, False, False),
    ...     personal=(False, False, False))
    >>> _words_of(text)
    [[{'personal': False, 'pieces': [{'text': 're', 'recovered': True}, {'text': 'ad', 'recovered': False}]}]]

    Returns:
        Per word its parts, personal and other; per part its tokens.
    """
    joined: list[list[dict[str, Any]]] = []
    byte_level = any(token.startswith(("\u0120", "\u2581")) for token in text.tokens)
    for token, recovered, special, personal in _marks(text):
        if special:
            continue
        begins = token.startswith(("\u0120", "\u2581")) if byte_level else not token.startswith("##")
        shown = token.lstrip("\u0120\u2581") if byte_level else token.removeprefix("##")
        if begins or not joined:
            joined.append([])
        if not joined[-1] or joined[-1][-1]["personal"] != personal:
            joined[-1].append({"personal": personal, "pieces": []})
        joined[-1][-1]["pieces"].append({"text": figures.label_of(shown), "recovered": recovered})
    return joined


def _marks(text: SampleText) -> Iterator[tuple[str, bool, bool, bool]]:
    """Token, recovered, special, personal."""
    return zip(text.tokens, text.recovered, text.special, text.personal, strict=True)


def _tally(text: SampleText) -> str:
    """How many of a text's tokens were recovered, for those who do not see the marks."""
    marks = [(recovered, personal) for _, recovered, special, personal in _marks(text) if not special]
    tally = f"{sum(recovered for recovered, _ in marks)} of {len(marks)} tokens read"
    personal = [recovered for recovered, is_personal in marks if is_personal]
    return tally + (f", {sum(personal)} of {len(personal)} personal ones" if personal else "")


def _check_output(output: Path) -> None:
    try:
        if output.is_dir():
            raise InputError(f"output {output} is a folder; name a file, such as {output / 'report.html'}")
        if not output.absolute().parent.is_dir():
            raise InputError(f"output {output} lies in a folder that does not exist; make it first")
        if output.exists() and not _is_page(output):
            raise InputError(f"output {output} exists and is not an HTML page; name another file")
    except OSError as error:
        raise InputError(f"output {output} cannot be read: {error.strerror}; name another file") from None


def _is_page(path: Path) -> bool:
    if not path.is_file():  # such as a pipe, which would be waited for
        return False
    with path.open("rb") as file:
        return file.read(9).lower() == b"<!doctype"


def _printable(value: object) -> object:
    """Text of others without control characters, such as those that turn the direction of what follows."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return figures.printable(value)
    return value


def _environment() -> Environment:
    """Every value is escaped and printable: names, labels and texts come from others."""
    environment = Environment(
        loader=PackageLoader("veiltune.report"),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": figures.percent,
        "rate": figures.rate_with_interval,
        "estimate": figures.estimate_with_interval,
        "figure": figures.figure,
        "limits": figures.limits,
        "label": figures.label_of,
        "model_label": figures.model_label,
        "headline": words.headline,
        "actions": words.actions,
        "dominated": words.is_dominated,
        "failed_controls": words.failed_controls,
        "words": _words_of,
        "tally": _tally,
        "shown": _shown,
    }
    environment.globals |= {"utility_interval": figures.utility_interval}
    return environment
