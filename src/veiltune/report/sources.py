"""What a report reads: the files of run folders, checked, each run with a label and a letter of its own."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from veiltune.audit.record import FORMAT, Attack, AttackRecord
from veiltune.config import TuneConfig, load_config
from veiltune.errors import InputError
from veiltune.runs import RunFolder, storage_errors

SAMPLE = Path("private", "audit", "sample.json")


class FileContent(BaseModel):
    """A file that a report reads: what it does not know in it is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)


class Summary(FileContent):
    """The part of summary.json that a report shows."""

    utility: float
    utility_metric: str = "accuracy"
    customer_alone_utility: float | None = None
    """None: not measured"""
    dominated: bool | None = None
    eval_examples: int = Field(ge=1)
    releases: int | None = None
    seconds: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None


class Privacy(FileContent):
    """privacy.json: statements in words, with the numbers they need beside them."""

    representations: dict[str, Any]
    labels: dict[str, Any]
    contributing_tokens: dict[str, Any] = {}
    lengths: str = ""
    randomness: str = ""
    adversary: str = ""


class SampleText(FileContent):
    """One text, token by token."""

    tokens: tuple[str, ...]
    recovered: tuple[bool, ...]
    special: tuple[bool, ...]
    personal: tuple[bool, ...]

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if len({len(self.tokens), len(self.recovered), len(self.special), len(self.personal)}) != 1:
            raise ValueError("has lists of different length")
        return self


class Sample(FileContent):
    """private/audit/sample.json: texts that show what the strongest attack read."""

    texts: tuple[SampleText, ...]
    attack: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One audited run.

    Attributes:
        label: Name of the folder, with as many parents as it takes to tell it from the other runs.
        letter: A short name for plots: A, B, ..., Z, A2, ...
        config: As resolved when the run was made.
        summary: Utility and cost.
        privacy: What was claimed.
        record: What the audit measured.
        sample: Texts token by token; None where there are none or none are wanted.
        sample_note: Why there is no sample.
    """

    label: str
    letter: str
    config: TuneConfig
    summary: Summary
    privacy: Privacy
    record: AttackRecord
    sample: Sample | None
    sample_note: str

    def attack(self, name: str) -> Attack | None:
        """The inversion attack of that name."""
        return next((attack for attack in self.record.inversion.attacks if attack.name == name), None)

    def title(self, name: str) -> str:
        """An inversion attack's title for people, or the name itself where the record has none."""
        found = self.attack(name)
        return found.title if found else name


def load_runs(paths: Sequence[Path], *, with_text: bool = True) -> list[Run]:
    """Reads run folders.

    Args:
        paths: One or more folders that `veiltune tune` wrote and `veiltune audit` has attacked.
        with_text: Whether to read the sample of texts.

    Raises:
        InputError: If none or one twice is given, one is no run folder, was not audited, or a file is malformed.
        StorageError: If a file cannot be read.
    """
    return [
        _load_run(path, label=label, letter=letter, with_text=with_text) for path, label, letter in named_folders(paths)
    ]


def named_folders(paths: Sequence[Path]) -> list[tuple[Path, str, str]]:
    """Each folder with its label and letter.

    Raises:
        InputError: If none is given, or one twice.
    """
    if not paths:
        raise InputError("runs must name at least one run folder, got none")
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise InputError(f"run {paths[index]} is given twice; name each run once")
    labels = labels_of(resolved)
    return [(path, labels[index], letter_of(index)) for index, path in enumerate(paths)]


def labels_of(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of different paths that tell them apart, at least their last part.

    >>> labels_of([Path("/a/run"), Path("/b/run"), Path("/b/other")])
    ['a/run', 'b/run', 'other']
    """
    labels = []
    for path in paths:
        others = [other.parts for other in paths if other != path]
        length = 1
        while length < len(path.parts) and any(other[-length:] == path.parts[-length:] for other in others):
            length += 1
        labels.append("/".join(path.parts[-length:]))
    return labels


def letter_of(index: int) -> str:
    """A, B, ..., Z, A2, B2, ...

    >>> letter_of(0), letter_of(25), letter_of(26)
    ('A', 'Z', 'A2')
    """
    turn, place = divmod(index, 26)
    return string.ascii_uppercase[place] + (str(turn + 1) if turn else "")


def _load_run(path: Path, *, label: str, letter: str, with_text: bool) -> Run:
    run = RunFolder(path)
    if not run.config_path.is_file():
        raise InputError(
            f"{path} is not a run folder: it has no config.toml; name a folder that `veiltune tune` wrote, or one with"
            " a leakage.json"
        )
    with storage_errors(path):
        if not (path / "attacks.json").exists():
            raise InputError(f"{path} has no attacks.json; run `veiltune audit {path}` first")
        sample, note = _read_sample(run) if with_text else (None, "It was left out on request.")
        return Run(
            label=label,
            letter=letter,
            config=load_config(TuneConfig, run.config_path),
            summary=checked(Summary, run, "summary.json"),
            privacy=checked(Privacy, run, "privacy.json"),
            record=_read_record(run),
            sample=sample,
            sample_note=note,
        )


def _read_record(run: RunFolder) -> AttackRecord:
    content = run.read_json("attacks.json")
    format = content.get("format") if isinstance(content, dict) else None
    if format != FORMAT:
        raise InputError(
            f"{run.path / 'attacks.json'} must be of format {FORMAT}, got {format!r}; "
            f"run `veiltune audit {run.path}` again with this version"
        )
    return validated(AttackRecord, content, run, "attacks.json", f"run `veiltune audit {run.path}` again")


def _read_sample(run: RunFolder) -> tuple[Sample | None, str]:
    if not (run.path / SAMPLE).exists():
        return None, "The audit kept none."
    sample = checked(Sample, run, str(SAMPLE), f"run `veiltune audit {run.path}` again")
    return (sample, "") if sample.texts else (None, "The audit kept none.")


Content = TypeVar("Content", bound=BaseModel)


def checked(cls: type[Content], run: RunFolder, name: str, remedy: str = "it was changed after the run") -> Content:
    """Reads a JSON file of a folder.

    Raises:
        InputError: If it is missing, no JSON or malformed.
    """
    return validated(cls, run.read_json(name), run, name, remedy)


def validated(cls: type[Content], content: Any, run: RunFolder, name: str, remedy: str) -> Content:
    """What a JSON file holds, checked.

    Raises:
        InputError: With the key that is wrong, never its value: it may be text.
    """
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        known = [str(part) for part in first["loc"]]
        where = ".".join(known) or "the whole"
        raise InputError(f"{run.path / name} is malformed at {where} ({first['type']}); {remedy}") from None
