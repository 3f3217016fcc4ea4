"""The commands over texts: `data synth` makes them, `data scrub` and `data dedupe` clean them before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

data_app = typer.Typer(no_args_is_help=True, help="Text to train on and to look for, and what to take out of it.")

Files = Annotated[list[Path], typer.Argument(help="Texts: .jsonl, .csv, .tsv or .txt, UTF-8; never changed.")]
Output = Annotated[Path, typer.Argument(help="New or empty folder; the files keep their names.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts; of a .txt, each line is one.")]
PersonColumn = Annotated[str, typer.Option(help="Column that tells persons apart.")]
Processes = Annotated[int, typer.Option(help="0: one a core, fewer for small files.")]


@data_app.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="New or empty folder to write to.")],
    preset: Annotated[str, typer.Option(help="ci, std or full; the options below override it.")] = "std",
    persons: Annotated[
        int | None, typer.Option(help="Persons in the training text; each has a twin who is not.")
    ] = None,
    population: Annotated[int | None, typer.Option(help="Persons of population.jsonl.")] = None,
    validation: Annotated[int | None, typer.Option(help="Persons of validation.jsonl.")] = None,
    canaries: Annotated[int | None, typer.Option(help="Canaries whose inclusion a coin decides.")] = None,
    canary_family: Annotated[
        str | None,
        typer.Option(help="Of these: random (letters), or token (give tokens.txt to the tokenizer)."),
    ] = None,
    exposure_canaries: Annotated[
        int | None, typer.Option(help="Canaries for each family and number of insertions.")
    ] = None,
    references: Annotated[int | None, typer.Option(help="Secrets of each family that are never inserted.")] = None,
    carrier_share: Annotated[float | None, typer.Option(help="Least share of words without personal data.")] = None,
    locale: Annotated[list[str] | None, typer.Option(help="en_US or zh_CN. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and options give the same bytes.")] = 0,
) -> None:
    """Write a corpus with known secrets, none of a real person, and the answer key for `veiltune audit`."""
    from dataclasses import replace

    from veiltune._validate import one_of
    from veiltune.data.synth import PRESETS, synthesise

    given: dict[str, Any] = {
        "persons": persons,
        "population": population,
        "validation": validation,
        "canaries": canaries,
        "canary_family": canary_family,
        "exposure_canaries": exposure_canaries,
        "references": references,
        "carrier_share": carrier_share,
        "locales": tuple(locale) if locale else None,
    }
    chosen = PRESETS[one_of(PRESETS, preset=preset)]
    options = replace(chosen, seed=seed, **{name: value for name, value in given.items() if value is not None})
    summary = synthesise(folder, options)
    train = summary.documents["train"]
    typer.echo(
        f"{folder}: {sum(train.values()):,} documents to train on ({summary.carrier_share:.0%} of the words without"
        f" personal data, {summary.canary_share:.1%} in canaries), {summary.persons['in']} persons in it and"
        f" {summary.persons['out']} twins who are not"
    )
    typer.echo(f"answer key, keep it from whoever trains: {summary.manifest} (SHA-256 {summary.digest[:12]}...)")


@data_app.command()
def scrub(
    files: Files,
    output: Output,
    text_column: TextColumn = "text",
    person_column: PersonColumn = "",
    mode: Annotated[
        str, typer.Option(help="pseudonym (the same surrogate for the same value), mask ([EMAIL]) or remove.")
    ] = "pseudonym",
    types: Annotated[
        str,
        typer.Option(help="With commas; email,phone,name,address,iban,card,us_ssn,zh_id,ip if not given; also url."),
    ] = "",
    detector: Annotated[
        str, typer.Option(help="patterns, presidio (no e-mail address under a reserved domain such as .test) or both.")
    ] = "patterns",
    ner: Annotated[str, typer.Option(help="Installed spaCy model, or its folder, that finds persons and places.")] = "",
    known: Annotated[
        Path | None, typer.Option(help="Table of values to look for besides: type, value; also person.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="Secret bytes, at least 16, for the same surrogates in several runs.")
    ] = None,
    propagate: Annotated[bool, typer.Option(help="Look for every value that was found in all of the texts.")] = True,
    contexts: Annotated[
        int, typer.Option(help="Sampled contexts a type in scrub.json, words in small letters only.")
    ] = 3,
    max_values: Annotated[int, typer.Option(help="Most distinct values, some 4 KB of memory each.")] = 200_000,
    processes: Processes = 0,
) -> None:
    """Take personal data out of texts: find it, look for it everywhere, replace it; scrub.json counts what was done.

    The same command over the same folder goes on where an interrupted one stopped.
    """
    from veiltune.data.detect import DEFAULT_TYPES, DetectorOptions
    from veiltune.data.scrub import ScrubOptions
    from veiltune.data.scrub import scrub as run_scrub

    chosen = tuple(type.strip() for type in types.split(",")) if types else DEFAULT_TYPES
    options = ScrubOptions(
        text_column=text_column,
        person_column=person_column,
        mode=mode,
        detection=DetectorOptions(types=chosen, detector=detector, ner=ner),
        known=known,
        key_file=key_file,
        propagate=propagate,
        contexts=contexts,
        max_values=max_values,
        processes=processes,
    )
    with _bar() as progress:
        summary = run_scrub(files, output, options, progress=progress)
    replaced = ", ".join(f"{count:,} of type {type}" for type, count in sorted(summary.replaced.items()))
    typer.echo(
        f"{output}: {summary.touched:,} of {summary.records:,} records changed; replaced {replaced or 'nothing'}"
    )
    if "name" in chosen and not ner:
        typer.echo("names were found by the words around them only; --ner finds others, --known those of your lists")
    others = [name for name in summary.other_columns if name != person_column]
    if others:
        typer.echo(f"not looked at and copied as they are: columns {', '.join(map(repr, others[:20]))}")
    typer.echo(f"{summary.report} counts them; what no detector finds is still there, so audit the trained model")


@data_app.command()
def dedupe(
    files: Files,
    output: Output,
    text_column: TextColumn = "text",
    person_column: PersonColumn = "",
    threshold: Annotated[
        float, typer.Option(help="Share of five-word runs in common from which on texts are near-duplicates; 1: none.")
    ] = 0.8,
    max_records: Annotated[
        int, typer.Option(help="Records that stay of a person, the first so many (with --person-column); 0: all.")
    ] = 0,
    processes: Processes = 0,
) -> None:
    """Take duplicates and near-duplicates out of texts, also across files; the first occurrence stays.

    The same command over the same folder goes on where an interrupted one stopped.
    """
    from veiltune.data.dedupe import DedupeOptions
    from veiltune.data.dedupe import dedupe as run_dedupe

    options = DedupeOptions(
        text_column=text_column,
        person_column=person_column,
        threshold=threshold,
        max_records=max_records,
        processes=processes,
    )
    with _bar() as progress:
        summary = run_dedupe(files, output, options, progress=progress)
    typer.echo(
        f"{output}: {summary.kept:,} of {summary.records:,} records stay; dropped {summary.exact:,} exact and"
        f" {summary.near:,} near-duplicates, and {summary.capped:,} above the most of a person"
    )


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a phase on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<9}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        phases: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in phases:
                phases[phase] = bars.add_task(phase, total=total)
            bars.update(phases[phase], completed=done)

        yield progress
