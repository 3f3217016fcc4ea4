"""What a report on language models reads: leakage.json, the claim of the training run, and samples of what came out."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from veiltune.audit.leakage import FORMAT, LeakageRecord
from veiltune.errors import InputError
from veiltune.report.sources import FileContent, checked, named_folders, validated
from veiltune.runs import RunFolder, storage_errors

LEAKAGE = "leakage.json"
SAMPLES = Path("private", "leakage", "samples.json")


class LeakedSample(FileContent):
    """One answer of the model to a question about someone in its training text."""

    attack: str
    type: str
    prompt: str
    written: str
    true: str
    found: bool


class _Samples(FileContent):
    samples: tuple[LeakedSample, ...]


class TrainingClaim(FileContent):
    """The part of privacy.json that `veiltune train` wrote and a report shows."""

    model_config = ConfigDict(allow_inf_nan=True)  # "inf": nothing is claimed

    planned_epsilon: float = Field(ge=0)
    delta: float = Field(ge=0, lt=1)
    unit: str
    statement: dict[str, str]


class Training(FileContent):
    """The part of summary.json that `veiltune train` wrote and a report shows."""

    method: str
    seconds: float
    steps: int
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int | None = None
    defences: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """One audited language model.

    Attributes:
        label: Name of the folder, with as many parents as it takes to tell it from the others.
        letter: A short name for plots: A, B, ..., Z, A2, ...
        record: What the audit measured.
        training: What the training run in the same folder claims; None where there is none, or it claims something
            else than what was audited.
        training_note: Why it is not shown, where there is one.
        made: How the model of the same folder was trained; None where nothing says so.
        samples: Answers of the model; none where there are none or none are wanted.
        sample_note: Why there are none.
    """

    label: str
    letter: str
    record: LeakageRecord
    training: TrainingClaim | None
    training_note: str
    made: Training | None
    samples: tuple[LeakedSample, ...]
    sample_note: str


def are_language_models(paths: Sequence[Path]) -> bool:
    """Whether these folders are of language models; False for anything else, such as split runs.

    Raises:
        InputError: If some are and some are not, or a folder has audits of both kinds.
        StorageError: If a folder cannot be read.
    """
    kinds = [_is_language_model(path) for path in paths]
    if len(set(kinds)) > 1:
        own, other = paths[kinds.index(True)], paths[kinds.index(False)]
        raise InputError(f"{own} is of a language model and {other} is not; a page is of one kind, so write two pages")
    return kinds == [True] * len(kinds) and bool(kinds)


def load_models(paths: Sequence[Path], *, with_text: bool = True) -> list[ModelRun]:
    """Reads folders with a leakage.json.

    Args:
        paths: One or more.
        with_text: Whether to read the samples of what the model wrote.

    Raises:
        InputError: If none or one twice is given, one was not audited, or a file is malformed or of a newer format.
        StorageError: If a file cannot be read.
    """
    return [
        _load_model(RunFolder(path), label=label, letter=letter, with_text=with_text)
        for path, label, letter in named_folders(paths)
    ]


def _is_language_model(path: Path) -> bool:
    with storage_errors(path):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; name the folder that holds it")
        if (path / LEAKAGE).exists():
            if (path / "attacks.json").exists():
                raise InputError(
                    f"{path} has a {LEAKAGE} beside the attacks.json of a split run; move it to a folder of its own"
                )
            return True
        return _was_trained(path / "config.toml")


def _was_trained(config: Path) -> bool:
    """Whether the file is of `veiltune train`: it has no vendor."""
    tree = _tree(config)
    return "train" in tree and "vendor" not in tree


def _tree(config: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config.read_text()) if config.is_file() else {}
    except ValueError:
        return {}  # whoever reads it as a configuration says what is wrong


def _load_model(run: RunFolder, *, label: str, letter: str, with_text: bool) -> ModelRun:
    with storage_errors(run.path):
        if not (run.path / LEAKAGE).exists():
            model = _tree(run.config_path).get("model")
            if isinstance(model, dict) and model.get("task") == "classification":
                raise InputError(
                    f"{run.path} is a classifier; the report shows audits of split runs and language models"
                )
            raise InputError(f"{run.path} has no {LEAKAGE}; run `veiltune audit {run.path} --manifest FILE` first")
        record = _read_record(run)
        samples, note = _read_samples(run) if with_text else ((), "They were left out on request.")
        training, training_note = _read_claim(run, record)
        return ModelRun(
            label=label,
            letter=letter,
            record=record,
            training=training,
            training_note=training_note,
            made=_read_training(run),
            samples=samples,
            sample_note=note,
        )


def _read_record(run: RunFolder) -> LeakageRecord:
    content, path = run.read_json(LEAKAGE), run.path / LEAKAGE
    format = content.get("format") if isinstance(content, dict) else None
    if isinstance(format, int) and format > FORMAT:
        raise InputError(f"{path} is of format {format}, this version reads up to {FORMAT}; install a newer Veiltune")
    if format != FORMAT:
        raise InputError(f"{path} must be of format {FORMAT}; audit the model again with this version")
    record = validated(LeakageRecord, content, run, LEAKAGE, "audit the model again")
    if not _is_finite(record.model_dump()):
        raise InputError(f"{path} has a number that is not finite; audit the model again")
    return record


def _is_finite(content: Any) -> bool:
    if isinstance(content, dict):
        return all(map(_is_finite, content.values()))
    if isinstance(content, list | tuple):
        return all(map(_is_finite, content))
    return not isinstance(content, float) or math.isfinite(content)


def _read_samples(run: RunFolder) -> tuple[tuple[LeakedSample, ...], str]:
    if not (run.path / SAMPLES).exists():
        return (), "The audit kept none."
    content = {"samples": run.read_json(str(SAMPLES))}
    samples = validated(_Samples, content, run, str(SAMPLES), "audit the model again").samples
    return (samples, "") if samples else ((), "The audit kept none.")


def _read_training(run: RunFolder) -> Training | None:
    if not (run.path / "summary.json").exists() or not _was_trained(run.config_path):
        return None
    return checked(Training, run, "summary.json")


def _read_claim(run: RunFolder, record: LeakageRecord) -> tuple[TrainingClaim | None, str]:
    """Of the training run in the folder; the audit may be of another model, or of another claim about it."""
    if not (run.path / "privacy.json").exists() or not _was_trained(run.config_path):
        return None, ""
    claim = checked(TrainingClaim, run, "privacy.json")
    bound = record.audited_epsilon
    audited = math.inf if bound is None or bound.claimed_epsilon is None else bound.claimed_epsilon
    if bound is not None and audited != claim.planned_epsilon:
        return None, "The privacy.json of this folder states another claim than the one that was audited."
    return claim, ""
