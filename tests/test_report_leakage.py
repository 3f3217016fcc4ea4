"""The page about language models: every figure of the record, its words, its escaping, what it refuses."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from pydantic import BaseModel

import report_runs
from leakage_records import (
    SAMPLES,
    bare,
    bound,
    defended,
    leakage,
    run,
    write_hostile_model,
    write_model,
    write_training,
)
from test_report_page import Page, rows_of, squeezed
from veiltune.audit.leakage import TprAtFpr
from veiltune.audit.record import Estimate, Rate
from veiltune.errors import InputError
from veiltune.report import leakage_plots, leakage_rows
from veiltune.report.figures import estimate_with_interval
from veiltune.report.leakage_figures import difference, found_rate, rate_parts, share_estimate
from veiltune.report.leakage_gaps import gaps
from veiltune.report.leakage_strengths import strengths
from veiltune.report.leakage_words import findings
from veiltune.report.page import write_report

Build = Callable[..., tuple[str, Page]]


@pytest.fixture
def drawn_page(tmp_path: Path) -> Build:
    """`drawn_page(*folders, **options)` writes the report and parses it."""

    def build(*folders: Path, **options: Any) -> tuple[str, Page]:
        write_report(folders, tmp_path / "report.html", **options)
        html = (tmp_path / "report.html").read_text()
        return html, Page(html)

    return build


def test_models_without_any_leak_prove_nothing(page: Build, tmp_path: Path) -> None:
    """And a guard that was audited with a model is among its defences."""
    one, two = write_model(tmp_path / "one", defended()), write_model(tmp_path / "two", leakage())
    guarded = write_model(tmp_path / "guarded", defended(guarded_by="protected strings, top-k 50"))
    for folder in (one, two, guarded):
        write_training(folder, 8.0, seconds=60.0)
    assert "Nothing to compare" in page(one, guarded)[1].text
    turned = write_model(tmp_path / "turned", leakage(0.2, 0.0))
    found = page(turned, guarded)[1].text
    assert "Nothing to compare" not in found and "told with the ranking turned round" in found
    proven = write_model(tmp_path / "proven", defended(audited_epsilon=bound(0.4, 8.0)))
    assert "Nothing to compare" not in page(proven, guarded)[1].text
    found = page(two, guarded)[1].text
    assert "Nothing to compare" not in found and "guard: protected strings, top-k 50" in found


@pytest.fixture
def page(drawn_page: Build, monkeypatch: pytest.MonkeyPatch) -> Build:
    """The same with empty drawings, which saves seconds."""
    for module in (leakage_plots, leakage_rows):
        monkeypatch.setattr(module, "draw", lambda *_, **__: (Markup("<svg></svg>"), Markup("<svg></svg>")))
    return drawn_page


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    """The drawn report on a leaking, a defended and a wrongly claimed model."""
    folder = tmp_path_factory.mktemp("three")
    folders = [
        write_model(folder / "undefended", leakage()),
        write_model(folder / "epsilon-8", defended()),
        write_model(folder / "wrong", leakage(0.7, 0.1, audited_epsilon=bound(4.2, 2.0))),
    ]
    write_report(folders, folder / "report.html")
    html = (folder / "report.html").read_text()
    return folder / "report.html", html, Page(html)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn report on a model in which everything is an attempt at markup, and on another one."""
    folder = tmp_path_factory.mktemp("hostile")
    write_report([write_hostile_model(folder), write_model(folder / "plain", bare())], folder / "report.html")
    return folder / "report.html"


def spaced(html: str) -> str:
    """All text, cells apart."""
    return squeezed(re.sub("<[^>]+>", " ", html[html.index("<body>") :]))


def parts(content: Any) -> Iterator[Any]:
    """The record's every part."""
    yield content
    if isinstance(content, BaseModel):
        for name in type(content).model_fields:
            yield from parts(getattr(content, name))
    elif isinstance(content, tuple):
        for item in content:
            yield from parts(item)


def test_every_rate_and_estimate_of_the_record_appears(tmp_path: Path, page: Build) -> None:
    record = leakage()
    text = squeezed(page(write_model(tmp_path / "a", record))[1].text)
    excess = [row.excess for row in record.extraction.rates] + [record.extraction.excess_recall]
    assert record.membership is not None
    tpr = [rate.tpr for attack in record.membership.attacks for rate in attack.tpr_at_fpr]
    seen = 0
    for part in parts(record):
        if isinstance(part, Rate):
            forms = [found_rate(part), " ".join(rate_parts(part))]
        elif isinstance(part, Estimate):
            form = difference if part in excess else share_estimate if part in tpr else estimate_with_interval
            forms = [form(part)]
        else:
            continue
        seen += 1
        assert any(squeezed(form) in text for form in forms), forms
    assert seen > 150


def test_every_other_figure_appears(tmp_path: Path, page: Build) -> None:
    record = leakage()
    html, _ = page(write_model(tmp_path / "a", record))
    text, rows = spaced(html), rows_of(html)
    for shown in (
        "21.37", "24.86", "1843", "43.61",  # perplexities
        "audited epsilon at least 2.31 (95 % confidence, delta 1e-05)", "211 of 250 guesses", "4.62",
        "493 inserted", "like personal data 32 9.5 bits [8.9, 10.0] 0 of 20 9.97", "random tokens 32 10.0 bits",
        "10 errors: 0.6 to 1.5 %", "ab12ab12", "cd34cd34", "gpt2", "runs/train/model", "0.4.0", "64,123", "1,263",
        "345,678", "3,702", "350 + 350", "asked twice for 3 of the texts", "40 36.7 %",
    ):  # fmt: skip
        assert shown in text, shown
    assert "phone a guess is right in 1.0 % 100 50.0 % [33.8, 66.2] of 40 2.5 % [0.0, 13.2] of 40" in " ".join(rows)
    assert any(row.startswith("EZ-MIA strongest 0.950 [0.920, 0.980]") and row.endswith("0.954") for row in rows)
    assert "n-gram coverage does not apply: nothing was sampled" in rows
    (row,) = [row for row in rows if row.startswith("work address") and "n/a: nothing written" in row]
    assert "not asked" in row  # the base model samples nothing


def test_structure(three: tuple[Path, str, Page]) -> None:
    _, html, parsed = three
    levels = [level for level, _ in parsed.headings]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [words for level, words in parsed.headings if level == 2][:4] == [
        "The models beside each other",
        "A undefended",
        "B epsilon-8",
        "C wrong",
    ]
    ids = parsed.ids()
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    labelled = {value for _, attributes in parsed.tags if (value := attributes.get("aria-labelledby"))}
    assert used | labelled <= set(ids) and len(used) > 10
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("table") == tags.count("caption") > 20
    assert all("scope" in attributes for tag, attributes in parsed.tags if tag == "th")
    spoken = [attributes["aria-label"] or "" for _, attributes in parsed.tags if attributes.get("role") == "img"]
    assert len(spoken) == 2 * (2 + 3 * 6) and min(map(len, spoken)) > 30


def test_the_file_stands_alone(three: tuple[Path, str, Page]) -> None:
    _, html, parsed = three
    assert not re.search(r"https?:|//|@import|url\((?!#)", html.replace("<!doctype html>", ""))
    assert not {"script", "iframe", "img", "object", "form"} & {tag for tag, _ in parsed.tags}
    (policy,) = [a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_the_same_folders_give_the_same_bytes(tmp_path: Path, drawn_page: Build) -> None:
    folder = write_model(tmp_path / "a", bare())
    assert drawn_page(folder)[0] == drawn_page(folder)[0]


def test_a_broken_claim_is_said_loudly_and_first(three: tuple[Path, str, Page], tmp_path: Path, page: Build) -> None:
    _, html, _ = three
    assert html.index("More leaks than is claimed") < html.index("The models beside each other")
    first = findings(run(leakage(0.7, 0.1, audited_epsilon=bound(4.2, 2.0))))[0]
    assert first.text == (
        "The audited epsilon is at least 4.20 (95\xa0% confidence, delta 1e-05), above the claimed epsilon 2"
        " (delta 1e-05, one person): the implementation or the claim is wrong."
    )
    html, parsed = page(write_model(tmp_path / "good", leakage(audited_epsilon=bound(2.31, 8.0))))
    assert 'class="alarm"' not in html and "claim is wrong" not in parsed.text
    assert "does not contradict the claimed epsilon 8 (delta 1e-05, one person)" in squeezed(parsed.text)


def test_an_epsilon_is_never_bare(three: tuple[Path, str, Page]) -> None:
    found = re.findall(r"(\S+) epsilon(?: is)?(?: at least)? \d", spaced(three[1]).lower())
    assert len(found) > 10 and set(found) <= {"claimed", "audited"}
    assert {"claimed", "audited", "empirical"} <= {row.split(" ")[0] for row in rows_of(three[1])}


def test_nothing_found_is_an_upper_limit_and_never_0_percent(tmp_path: Path, page: Build) -> None:
    _, parsed = page(write_model(tmp_path / "a", defended()))
    text = squeezed(parsed.text)
    assert "none of 421, at most 0.9 %" in text or "none of 421, at most 0.9 %" in text.replace("\xa0", " ")
    assert not re.search(r"(?<![\d.,-])0(?:\.0)?\s%", text)


def test_what_was_not_measured_is_said_with_its_reason(tmp_path: Path, page: Build) -> None:
    missing = dict(gaps(run(bare())))
    assert set(missing) > {
        "membership",
        "chance and excess recall",
        "recall at 100 errors",
        "extraction by sampling",
        "reconstruction among candidates",
        "exposure of inserted secrets",
        "audited epsilon",
        "perplexity",
    }
    missing = dict(gaps(run(leakage())))
    assert missing["membership by n-gram coverage"] == "nothing was sampled"
    name = "true positive rate of persons at 0.1\xa0% false positives"
    assert missing[name] == "it takes 10,000 persons that are not in the training text"
    assert "audited epsilon" not in missing and "membership" not in missing
    text = squeezed(page(write_model(tmp_path / "a", bare()))[1].text)
    assert "no coin-flipped canaries" in text and "recall 20.0 % [16.2, 24.1] by true prefix, not compared" in text


def test_text_is_shown_only_where_it_is_wanted(tmp_path: Path, page: Build) -> None:
    folder = write_model(tmp_path / "a", leakage())
    html, parsed = page(folder)
    assert "<mark>(313) 555-0199</mark> before noon" in html
    assert "fvso0isy@mail.test" in parsed.text and "name-only question, e-mail: not found" in squeezed(parsed.text)
    assert "This page shows personal data" in parsed.text
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o600
    html, parsed = page(folder, with_text=False)
    for sample in SAMPLES:
        assert sample["true"] not in html and sample["prompt"].strip() not in html and sample["written"] not in html
    assert "No samples are shown. They were left out on request." in squeezed(parsed.text)
    assert "This page shows personal data" not in parsed.text
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) & 0o044 == 0o044


def test_samples_are_on_one_line(tmp_path: Path, page: Build) -> None:
    sample = {"attack": "true_prefix", "type": "home", "prompt": "Mr X\nHome:", "found": True}
    sample |= {"written": " 1 Elm\nRoad, Y\n", "true": "1 Elm Road"}
    html, _ = page(write_model(tmp_path / "a", defended(), samples=[sample]))
    assert "Mr X Home:" in html and "<bdi><mark>1 Elm Road</mark>, Y</bdi>" in html


@pytest.mark.parametrize("samples", [None, []])
def test_a_folder_without_samples_says_so(tmp_path: Path, page: Build, samples: Any) -> None:
    _, parsed = page(write_model(tmp_path / "a", defended(), samples=samples))
    assert "No samples are shown. The audit kept none." in squeezed(parsed.text)


def test_everything_that_others_wrote_is_escaped(hostile: Path) -> None:
    html = hostile.read_text()
    parsed = Page(html)
    assert "\u202e" not in html
    assert "<script" not in html.lower() and "onload=x" in parsed.text
    assert "49" not in squeezed(parsed.text).split() and "{{ 7*7 }}" in parsed.text
    assert not any("onload" in attributes for _, attributes in parsed.tags)
    assert parsed.text.count("alert(") > 15 and "alert(3)" in parsed.text


def test_models_are_compared_with_care(tmp_path: Path, page: Build) -> None:
    first = write_model(tmp_path / "a", leakage())
    html, parsed = page(first, write_model(tmp_path / "b", defended(preset="ci", manifest_digest="00" * 32)))
    text = squeezed(parsed.text)
    assert "audited with different corpora or coin flips; audited with different presets." in text
    assert "The models were asked about different persons." in text
    assert "A a 55.0 % [50.7, 59.3]" in rows_of(html) and "B b none seen [-0.9, 0.9]" in rows_of(html)
    assert "A a 0.950 [0.920, 0.980]" in rows_of(html)
    _, parsed = page(first, write_model(tmp_path / "c", defended()))
    assert "Compare with care" not in parsed.text
    assert "so paired differences cannot be given" in squeezed(parsed.text)


def test_the_claim_of_the_training_run_is_shown_where_it_is_the_audited_one(tmp_path: Path, page: Build) -> None:
    folder = write_model(tmp_path / "a", defended())
    write_training(folder, 8.0)
    assert "Gaussian, noise_multiplier 1.7332" in page(folder)[1].text
    write_training(folder, 3.0)
    text = page(folder)[1].text
    assert "noise_multiplier" not in text and "states another claim than the one that was audited" in text
    unflipped = write_model(tmp_path / "b", defended(audited_epsilon=None))
    write_training(unflipped, 3.0)
    claim = strengths_of(unflipped)[0]
    assert claim == "claimed epsilon 3 (delta 1e-05, one person), not set against any canary"
    write_training(unflipped, "inf")
    assert strengths_of(unflipped)[0] == "nothing is claimed"


def test_precision_over_all_types_counts_every_value_that_was_written() -> None:
    found = leakage(excess=0.5).extraction
    rows = [row.precision for row in found.rates if (row.attack, row.cue) == (found.strongest, "all") and row.precision]
    assert len(rows) == 4  # name, phone, home, work; e-mail stands under its cues here
    whole = found.overall_precision
    assert whole is not None
    assert (whole.successes, whole.trials) == (sum(row.successes for row in rows), 4 * 97)
    assert whole.low < whole.value < whole.high
    silent = found.model_copy(update={"strongest": "nothing of that name"})
    assert silent.overall_precision is None


def test_the_life_cycle_says_what_was_done_and_what_it_cost(tmp_path: Path, page: Build) -> None:
    open_, closed = write_model(tmp_path / "a", leakage()), write_model(tmp_path / "b", defended())
    assert "The life cycle" not in page(open_, closed)[1].text
    write_training(open_, "inf", method="full", defences={"preset": "none"})
    write_training(closed, 8.0, defences={"preset": "dp<b>"}, peak_memory_bytes=3 * 2**20)
    html, _ = page(open_, closed)
    rows = [row for row in rows_of(html) if "60 steps" in row]
    assert "A a none; full, 1.00% of the parameters 90 s for 60 steps, memory not known" in rows[0]
    assert "B b dp&lt;b&gt;; lora, 1.00% of the parameters 90 s for 60 steps, 3 MB" in rows[1]
    assert "AUC 0.950 [0.920, 0.980]" in rows[0] and "of A" in rows[1] and "55.0 %" in rows[0]
    _, parsed = page(closed)
    assert "The life cycle" not in parsed.text


def test_nothing_found_at_few_false_alarms_has_its_limit(tmp_path: Path, page: Build) -> None:
    found = leakage().membership
    assert found is not None
    none = Estimate(value=0.0, low=0.0, high=0.013)
    rate = TprAtFpr(fpr=0.01, tpr=none, false_positives=10, fpr_low=0.005, fpr_high=0.018)
    attacks = tuple(attack.model_copy(update={"tpr_at_fpr": (rate,)}) for attack in found.attacks)
    record = leakage().model_copy(update={"membership": found.model_copy(update={"attacks": attacks})})
    folder = write_model(tmp_path / "a", record)
    write_training(folder, 8.0, method="lora")
    (row,) = [row for row in rows_of(page(folder, write_model(tmp_path / "b", leakage()))[0]) if "60 steps" in row]
    assert "found at 1 % false alarms: none, at most 1.3 %" in row


def strengths_of(folder: Path) -> list[str]:
    from veiltune.report.leakage_sources import load_models

    return [strength.value for strength in strengths(load_models([folder])[0])]


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: (folder / "leakage.json").unlink(), "is not a run folder: it has no config.toml; name"),
    "not audited": (
        lambda folder: (write_training(folder, 8.0), (folder / "leakage.json").unlink()),
        r"has no leakage.json; run `veiltune audit .* --manifest FILE` first",
    ),
    "a classifier": (
        lambda folder: (
            write_training(folder, 8.0),
            (folder / "leakage.json").unlink(),
            (folder / "config.toml").write_text('[model]\ntask = "classification"\n[train]\n'),
        ),
        "is a classifier; the report shows audits of split runs and language models",
    ),
    "no folder": (lambda folder: shutil.rmtree(folder), "is not a run folder"),
    "a file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("SECRET")),
        "is a file; name the folder that holds it",
    ),
    "no JSON": (lambda folder: (folder / "leakage.json").write_text("{"), "is not JSON"),
    "no object": (lambda folder: (folder / "leakage.json").write_text("[]"), "must be of format 1; audit the model"),
    "newer": (
        lambda folder: change(folder, format=2),
        "is of format 2, this version reads up to 1; install a newer Veiltune",
    ),
    "older": (lambda folder: change(folder, format=0), "must be of format 1; audit the model again"),
    "odd": (lambda folder: change(folder, format="SECRET"), "must be of format 1; audit the model again"),
    "malformed": (lambda folder: change(folder, seconds=-1), r"is malformed at seconds \(greater_than_equal\); audit"),
    "unknown": (lambda folder: change(folder, SECRET=1), "is malformed at"),
    "infinite": (
        lambda folder: (folder / "leakage.json").write_text(
            re.sub(r'"carrier": [\d.]+', '"carrier": 1e999', (folder / "leakage.json").read_text())
        ),
        "has a number that is not finite",
    ),
    "both kinds": (lambda folder: (folder / "attacks.json").write_text("{}"), "beside the attacks.json of a split run"),
    "samples": (
        lambda folder: (folder / "private/leakage/samples.json").write_text('[{"written": "SECRET"}]'),
        r"samples.json is malformed at samples.0.attack \(missing\)",
    ),
    "privacy": (
        lambda folder: (write_training(folder, 8.0), (folder / "privacy.json").write_text('{"unit": "SECRET"}')),
        "privacy.json is malformed at planned_epsilon",
    ),
}


def change(folder: Path, **fields: Any) -> None:
    path = folder / "leakage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_without_text_and_write_nothing(tmp_path: Path, case: str) -> None:
    spoil, message = REFUSALS[case]
    folder = write_model(tmp_path / "model", defended())
    spoil(folder)
    with pytest.raises(InputError, match=message) as refused:
        write_report([folder], tmp_path / "report.html")
    assert "\n" not in str(refused.value)
    assert "SECRET" not in str(refused.value) or case == "unknown"  # a key, which is no text
    assert not (tmp_path / "report.html").exists()


def test_split_runs_and_language_models_are_not_mixed(tmp_path: Path) -> None:
    split = report_runs.write_run(tmp_path / "split", report_runs.record(0.8))
    model = write_model(tmp_path / "model", defended())
    for folders in ([split, model], [model, split]):
        with pytest.raises(InputError, match=r"model is of a language model and .*split is not; .* write two pages"):
            write_report(folders, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_model_is_named_once(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", defended())
    with pytest.raises(InputError, match="is given twice"):
        write_report([model, model / ".." / "model"], tmp_path / "report.html")


def test_malformed_samples_are_not_read_where_text_is_not_wanted(tmp_path: Path, page: Build) -> None:
    folder = write_model(tmp_path / "model", defended(), samples={"written": "SECRET"})
    assert "SECRET" not in page(folder, with_text=False)[0]
