"""Finished runs of `veiltune train` as models: the base with what was trained put back on."""

from __future__ import annotations

from pathlib import Path

import torch

from veiltune.config import TrainConfig, load_config
from veiltune.errors import InputError
from veiltune.models.adapters import load_adapter
from veiltune.models.loading import BaseModel, load_base, weights_digest
from veiltune.runs import RunFolder


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


def fine_tuned(run: RunFolder, config: TrainConfig) -> BaseModel:
    """The run's model in float32, with its adapter attached (and trainable), its tokenizer and a digest of its weights.

    Raises:
        InputError: If the base or the adapter cannot be had.
    """
    base = load_base(config.model.name)
    base.model.to(dtype=torch.float32)  # type: ignore[call-arg]  # transformers wraps `to`
    load_adapter(base.model, run.path / "adapter")
    digest = weights_digest(base.model.state_dict())
    return BaseModel(model=base.model, tokenizer=base.tokenizer, name=str(run.path), digest=digest)


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
