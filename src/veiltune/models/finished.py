"""Finished runs of `veiltune train` as models: the base with what was trained put back on."""

from __future__ import annotations

from pathlib import Path

import torch

from veiltune.config import TrainConfig, load_config
from veiltune.errors import InputError
from veiltune.models.adapters import load_adapter
from veiltune.models.loading import BaseModel, classifier_model, load_base, name_classes, pad_id_of, weights_digest
from veiltune.models.merging import merged_model
from veiltune.runs import RunFolder, new_folder, storage_errors


def run_of(name: str | Path) -> tuple[RunFolder, TrainConfig] | None:
    """A finished run, if the name is the folder of one; None if it is something else.

    Raises:
        InputError: If the run is not finished, or its configuration is not one of `veiltune train`.
    """
    run = RunFolder(name)
    if not run.config_path.is_file():
        return None
    config = load_config(TrainConfig, run.config_path)
    if not (run.path / "summary.json").is_file():
        raise InputError(f"{run.path} holds a run that is not finished; the same `veiltune train` goes on with it")
    return run, config


def load_run(folder: str | Path) -> BaseModel:
    """Loads what a finished `veiltune train` made, to go on with in Python.

    Args:
        folder: Of the run.

    Returns:
        The model in float32 and eval mode with its adapter attached (`merged_model` makes a plain one of it; a
        classifier's ``config.id2label`` has the classes), its tokenizer, and a digest of its weights.

    Raises:
        InputError: If it is not the folder of a finished run, or the base or the adapter cannot be had.
    """
    run = run_of(folder)
    if run is None:
        raise InputError(f"{folder} is not the folder of a finished `veiltune train`: it has no config.toml")
    return fine_tuned(*run)


def fine_tuned(run: RunFolder, config: TrainConfig) -> BaseModel:
    """A finished run as `run_of` gives it, loaded; see `load_run`.

    Raises:
        InputError: If the base or the adapter cannot be had, or the base has changed since.
    """
    base = load_base(config.model.name)
    base.model.to(dtype=torch.float32)  # type: ignore[call-arg]  # transformers wraps `to`
    summary = run.read_json("summary.json")
    if base.digest != summary["model_digest"]:
        raise InputError(f"the base model {config.model.name!r} is not the one that {run.path} began with; restore it")
    model, classes = base.model, summary["labels"]
    if classes:
        model = classifier_model(base, num_labels=len(classes), seed=0)
        name_classes(model, classes, pad_id=pad_id_of(base))
    load_adapter(model, run.path / "adapter")
    digest = weights_digest(model.state_dict())
    return BaseModel(model=model, tokenizer=base.tokenizer, name=str(run.path), digest=digest)


def merge_run(folder: str | Path, output: Path) -> None:
    """Writes a finished run as a plain Hugging Face checkpoint with its tokenizer; nothing new is given away by it.

    Args:
        folder: Of the run.
        output: A new folder; there whole, or not at all.

    Raises:
        InputError: If `output` exists, the run is none or not finished, or its method adds layers that a plain model
            does not have.
        StorageError: If it cannot be written.
    """
    if output.exists():
        raise InputError(f"{output} exists; name a new folder for the merged model")
    found = load_run(folder)
    plain = merged_model(found.model)
    with storage_errors(output), new_folder(output) as part:
        plain.save_pretrained(part)
        found.tokenizer.save_pretrained(part)


def check_causal(found: BaseModel) -> None:
    """Refuses a model that gives no next-token vectors, or one with another model's tokenizer.

    Raises:
        InputError: With the name.
    """
    if not hasattr(found.model, "lm_head"):
        raise InputError(f"{found.name!r} is no causal language model: it gives no next-token vectors")
    if len(found.tokenizer) > found.model.config.vocab_size:
        raise InputError(
            f"{found.name!r} has {found.model.config.vocab_size} tokens, its tokenizer {len(found.tokenizer)}; they do"
            " not belong together"
        )
