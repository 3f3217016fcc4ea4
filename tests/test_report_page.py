"""The file: its order, its escaping, what it refuses."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import stat
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from report_runs import inversion, rate, record, write_hostile_run, write_run, write_sample
from veiltune.audit.record import Bound, FrequencyBin
from veiltune.errors import InputError
from veiltune.report import plots
from veiltune.report.page import write_report
from veiltune.report.sources import labels_of, letter_of
from veiltune.runs import RunFolder

VOID = {"meta", "link", "br", "use", "path", "rect"}


class Page(HTMLParser):
    """Headings, tags and ids of a page; fails on a tag that is closed where none is open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"{tag} at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
            if re.fullmatch(r"h\d", self.open[-1]) or (len(self.open) > 1 and re.fullmatch(r"h\d", self.open[-2])):
                level, words = self.headings[-1]
                self.headings[-1] = (level, " ".join(f"{words} {data}".split()))

    def ids(self) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get("id"))]


@pytest.fixture
def drawn_page(tmp_path: Path) -> Callable[..., tuple[str, Page]]:
    """`drawn_page(*runs, **options)` writes the report and parses it."""

    def build(*runs: Path, **options: Any) -> tuple[str, Page]:
        write_report(runs, tmp_path / "report.html", **options)
        html = (tmp_path / "report.html").read_text()
        return html, Page(html)

    return build


@pytest.fixture
def page(drawn_page: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Page]]:
    """The same with empty drawings, which saves a second a run."""
    monkeypatch.setattr(plots, "draw", lambda *_, **__: (Markup("<svg></svg>"), Markup("<svg></svg>")))
    return drawn_page  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The drawn report of two runs."""
    folder = tmp_path_factory.mktemp("both")
    runs = [write_run(folder / "a", record(0.8)), write_run(folder / "b", record(0.5))]
    write_report(runs, folder / "report.html")
    html = (folder / "report.html").read_text()
    return html, Page(html)


def squeezed(text: str) -> str:
    return " ".join(text.split())


def rows_of(html: str) -> list[str]:
    """The rows of all tables as text."""
    return [squeezed(re.sub("<[^>]+>", " ", row)) for row in re.findall(r"<tr.*?</tr>", html, re.S)]


def test_claimed_measured_meant_in_this_order_for_each_run(both: tuple[str, Page]) -> None:
    _, parsed = both
    main = [words for level, words in parsed.headings if level == 3]
    assert main == ["What was claimed", "What was measured", "What it means"] * 2
    assert [words for level, words in parsed.headings if level == 2][:3] == ["The runs beside each other", "A a", "B b"]


def test_headings_have_one_first_level_and_no_gaps(both: tuple[str, Page]) -> None:
    _, parsed = both
    levels = [level for level, _ in parsed.headings]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_ids_are_unique_and_links_lead_somewhere(both: tuple[str, Page]) -> None:
    html, parsed = both
    ids = parsed.ids()
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    labelled = {value for _, attributes in parsed.tags if (value := attributes.get("aria-labelledby"))}
    assert used | labelled <= set(ids)
    assert len(used) > 10


def test_tables_have_captions_and_scopes(both: tuple[str, Page]) -> None:
    _, parsed = both
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("table") == tags.count("caption") > 8
    assert all("scope" in attributes for tag, attributes in parsed.tags if tag == "th")


def test_ordinary_figures_come_through(both: tuple[str, Page]) -> None:
    html, parsed = both
    assert "\N{REPLACEMENT CHARACTER}" not in html
    assert "80.0\N{NO-BREAK SPACE}% [77.7, 82.5]" in parsed.text


def test_the_file_stands_alone(both: tuple[str, Page]) -> None:
    html, parsed = both
    assert not re.search(r"https?:|//|@import|url\((?!#)", html.replace("<!doctype html>", ""))
    assert not {"script", "iframe", "img", "object", "form"} & {tag for tag, _ in parsed.tags}
    (policy,) = [a["content"] for t, a in parsed.tags if t == "meta" and a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_the_same_runs_give_the_same_bytes(tmp_path: Path, drawn_page: Any) -> None:
    run = write_run(tmp_path / "a", record(0.8))
    assert drawn_page(run)[0] == drawn_page(run)[0]


def test_utility_always_stands_beside_customer_alone(tmp_path: Path, page: Any) -> None:
    _, parsed = page(
        write_run(tmp_path / "good", record(0.8), utility=0.9),
        write_run(tmp_path / "bad", record(0.5), utility=0.646),
        write_run(tmp_path / "unknown", record(0.5), utility=0.646, alone=None),
    )
    text = squeezed(parsed.text)
    assert text.count("Customer alone, nothing sent") == 3
    assert "0.850 the run is dominated" in text
    assert "0.850 the run is better" in text
    assert "Customer alone, nothing sent not measured" in text
    assert "customer alone not measured" in text


def test_failed_attacks_are_failed_and_never_zero(tmp_path: Path, drawn_page: Any) -> None:
    html, parsed = drawn_page(write_run(tmp_path / "a", record(0.8)))
    rows = rows_of(html)
    (row,) = [row for row in rows if "gradient" in row and "released vectors failed" in row]
    assert row == "token selection by gradient released vectors failed : ran out of its 600 s"
    assert "failed to run" in parsed.text  # in the plot
    (row,) = [row for row in rows if row.startswith("strength of the noise")]
    assert row.endswith("eta found 49.73, eta true 50: the strength of a mechanism is no secret")
    assert [row for row in rows if "BiSR" in row] == [
        "bidirectional (BiSR) gradients at the cut does not apply: the bottom is frozen, so no gradient comes back"
    ]


def test_an_epsilon_is_never_bare(tmp_path: Path, page: Any) -> None:
    html, _ = page(write_run(tmp_path / "a", record(0.8)))
    (row,) = [row for row in re.findall(r"<tr.*?</tr>", html, re.S) if "Labels, randomised response" in row]
    assert "<b>3</b> epsilon" in row and "replace-one" in row
    assert "claimed epsilon 3 for one example" in squeezed(html)


def test_a_bound_without_value_proves_nothing(tmp_path: Path, page: Any) -> None:
    nothing = Bound(name="none", title="representations", value=None, unit="", statement="no noise")
    html, _ = page(write_run(tmp_path / "a", record(0.8, bounds=(nothing,))))
    assert "representations nothing proven no noise" in rows_of(html)


def test_a_failed_control_is_said_loudly_and_first(tmp_path: Path, page: Any) -> None:
    broken = tuple(c.model_copy(update={"passed": c.name != "shuffled"}) for c in record(0.8).controls)
    good = write_run(tmp_path / "good", record(0.8))
    html, parsed = page(good, write_run(tmp_path / "bad", record(0.8, controls=broken)))
    assert html.index("Do not rely on these figures") < html.index("The runs beside each other")
    assert "FAILED" in parsed.text and "the figures of this run cannot be relied on" in parsed.text
    html, _ = page(good)
    assert 'class="alarm"' not in html and "FAILED" not in html


def test_groups_with_too_few_tokens_say_how_many_are_needed(tmp_path: Path, page: Any) -> None:
    _, parsed = page(write_run(tmp_path / "a", record(0.8)))
    assert "too few tokens to say; 300 are needed" in squeezed(parsed.text)


def test_text_is_shown_only_where_it_is_wanted(tmp_path: Path, page: Any) -> None:
    run = write_run(tmp_path / "a", record(0.8))
    html, parsed = page(run)
    assert "<mark>jan" not in html and "<mark>ine</mark>" in html  # every third is not read
    assert "10 of 15 tokens read, 4 of 7 personal ones" in parsed.text
    assert "This page shows private text" in parsed.text
    assert stat.S_IMODE((tmp_path / "report.html").stat().st_mode) == 0o600
    html, parsed = page(run, with_text=False)
    assert "ine</mark>" not in html and "arrived" not in html
    assert "No sample of texts is shown. It was left out on request." in squeezed(parsed.text)
    assert "This page shows private text" not in parsed.text


def test_a_run_without_a_sample_says_so(tmp_path: Path, page: Any) -> None:
    _, parsed = page(write_run(tmp_path / "a", record(0.8), sample=False))
    assert "No sample of texts is shown. The audit kept none." in squeezed(parsed.text)


@pytest.mark.parametrize(
    "tokens", [("Ġmy", "Ġna", "me", "Ġis"), ("my", "na", "##me", "is"), ("▁my", "▁na", "me", "▁is")]
)
def test_pieces_are_joined_to_words(tmp_path: Path, page: Any, tokens: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "a", record(0.8), sample=False)
    write_sample(RunFolder(run), (" ".join(tokens),))
    html, _ = page(run)
    (item,) = re.findall(r"<li><p>(.*?)</p>", html, re.S)
    assert squeezed(re.sub("<[^>]+>", "", item)) == "my name is"


def test_everything_that_others_wrote_is_escaped(tmp_path: Path, drawn_page: Any) -> None:
    html, parsed = drawn_page(write_hostile_run(tmp_path), write_run(tmp_path / "other", record(0.5)))
    assert "\u202e" not in html
    assert "<script" not in html.lower() and "onload=x" in parsed.text
    assert "49" not in squeezed(parsed.text).split() and "{{ 7*7 }}" in parsed.text
    assert not any("onload" in attributes for _, attributes in parsed.tags)
    assert parsed.text.count("alert(") > 15


def test_hostile_names_do_not_reach_a_plots_markup(tmp_path: Path) -> None:
    drawn = plots.plot_frequency([FrequencyBin(label="</text></svg><b>\"'--> $\\frac{$", rate=rate(0.4))], "k")
    assert drawn is not None
    parsed = Page(str(drawn.wide))
    assert "b" not in {tag for tag, _ in parsed.tags}
    assert "</text></svg><b>\"'--> $\\frac{$" in parsed.text


@pytest.mark.parametrize("name", ["名前", "اسم", "\x00\x07", "😀" * 50])
def test_names_in_any_script(tmp_path: Path, drawn_page: Any, name: str) -> None:
    attributes = tuple(item.model_copy(update={"name": name}) for item in record(0.5).attributes)
    html, _ = drawn_page(write_run(tmp_path / "a", record(0.8, attributes=attributes)))
    assert "\x00" not in html


def test_runs_of_one_name_are_told_apart(tmp_path: Path, page: Any) -> None:
    runs = [write_run(tmp_path / parent / "run", record(0.8)) for parent in ("one", "two")]
    _, parsed = page(*runs)
    assert [words for level, words in parsed.headings if level == 2][1:3] == ["A one/run", "B two/run"]
    assert labels_of([Path("/run"), Path("/a/run")]) == ["//run", "a/run"]
    assert len({letter_of(index) for index in range(100)}) == 100


def test_runs_that_cannot_be_compared_are_said_to_be_so(tmp_path: Path, page: Any) -> None:
    first = write_run(tmp_path / "a", record(0.8))
    _, parsed = page(first, write_run(tmp_path / "b", record(0.5, preset="quick")))
    assert "The runs were audited with different presets." in squeezed(parsed.text)
    _, parsed = page(first, write_run(tmp_path / "c", record(0.5)))
    assert "Compare with care" not in parsed.text


def test_a_record_with_nothing_but_the_minimum(tmp_path: Path, page: Any) -> None:
    bare = inversion(0.5).model_copy(update={"groups": (), "by_frequency": (), "repeated": (), "attacks": ()})
    empty = {"controls": (), "side_channels": (), "attributes": (), "extraction": (), "bounds": (), "notes": ()}
    _, parsed = page(write_run(tmp_path / "a", record(0.5, inversion=bare, **empty)))
    assert "None was tested." in parsed.text and "None was named, so none was attacked." in parsed.text


def test_the_figures_of_a_plot_stand_in_its_table(tmp_path: Path) -> None:
    drawn = plots.plot_attacks(inversion(0.8).attacks, "learned_sequence", "k")
    assert drawn is not None
    assert drawn.rows[0][0] == "learned transformer inverter (strongest)"
    assert drawn.rows[-1][1] == "failed to run"
    assert drawn.rows[0][1].startswith("80.0") and "80.0" in Page(str(drawn.wide)).text
    assert len([row for row in drawn.rows if "BiSR" in row[0]]) == 0


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a run": (lambda run: (run / "config.toml").unlink(), "is not a run folder: it has no config.toml; name"),
    "not audited": (lambda run: (run / "attacks.json").unlink(), r"has no attacks.json; run `veiltune audit .*` first"),
    "not finished": (lambda run: (run / "summary.json").unlink(), "has no summary.json"),
    "no JSON": (lambda run: (run / "attacks.json").write_text("{"), "is not JSON"),
    "no object": (lambda run: (run / "attacks.json").write_text("[]"), "must be of format 1, got None"),
    "malformed": (
        lambda run: change(run / "attacks.json", seconds=-1),
        r"is malformed at seconds \(greater_than_equal\)",
    ),
    "format": (
        lambda run: change(run / "attacks.json", format=7),
        "must be of format 1, got 7; run .* again with this",
    ),
    "summary": (lambda run: change(run / "summary.json", utility="nan"), "summary.json is malformed at utility"),
    "privacy": (lambda run: change(run / "privacy.json", labels=3), "privacy.json is malformed at labels"),
    "sample": (lambda run: change(run / "private/audit/sample.json", texts="SECRET"), "is malformed at texts"),
    "lengths": (
        lambda run: change(
            run / "private/audit/sample.json",
            texts=[{"tokens": ["SECRET"], "recovered": [], "special": [], "personal": []}],
        ),
        r"is malformed at texts.0 \(value_error\)",
    ),
}


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_without_text_and_write_nothing(tmp_path: Path, case: str) -> None:
    spoil, message = REFUSALS[case]
    run = write_run(tmp_path / "run", record(0.8))
    spoil(run)
    with pytest.raises(InputError, match=message) as refused:
        write_report([run], tmp_path / "report.html")
    assert "\n" not in str(refused.value) and "SECRET" not in str(refused.value)
    assert not (tmp_path / "report.html").exists()


def test_a_malformed_sample_is_not_read_where_text_is_not_wanted(tmp_path: Path, page: Any) -> None:
    run = write_run(tmp_path / "run", record(0.8))
    change(run / "private/audit/sample.json", texts="SECRET")
    assert "SECRET" not in page(run, with_text=False)[0]


def test_refused_arguments(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record(0.8))
    with pytest.raises(InputError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(InputError, match="is given twice"):
        write_report([run, run / ".." / "run"], tmp_path / "report.html")
    with pytest.raises(InputError, match="is a folder; name a file"):
        write_report([run], tmp_path)
    with pytest.raises(InputError, match="lies in a folder that does not exist"):
        write_report([run], tmp_path / "none" / "report.html")


@pytest.mark.parametrize("kind", ["unreadable", "pipe", "long"])
def test_an_output_that_cannot_be_read_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output = write_run(tmp_path / "run", record(0.8)), tmp_path / "report.html"
    if kind == "long":
        output = tmp_path / ("x" * 300)
        message = "cannot be read: File name too long"
    elif kind == "pipe":
        os.mkfifo(output)
        message = "exists and is not an HTML page"
    else:
        output.touch()
        opened = Path.open

        def refuse(path: Path, *arguments: Any, **options: Any) -> Any:  # root may read every file
            if path == output:
                raise PermissionError(errno.EACCES, "Permission denied")
            return opened(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", refuse)
        message = "cannot be read: Permission denied; name another file"
    with pytest.raises(InputError, match=message):
        write_report([run], output)


def test_templates_ship_with_the_package() -> None:
    names = {item.name for item in files("veiltune.report").joinpath("templates").iterdir()}
    assert {"page.html", "run.html", "style.css"} <= names
