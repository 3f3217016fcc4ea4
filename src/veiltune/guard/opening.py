"""The model that is served: a finished training run, a model folder, a bundled model or a hub name."""

from __future__ import annotations

import torch

from veiltune.config import TrainConfig, load_config
from veiltune.errors import InputError
from veiltune.models.adapters import load_adapter
from veiltune.models.loading import BaseModel, load_base, weights_digest
from veiltune.runs import RunFolder


def open_model(name: str) -> BaseModel:
    """Loads a causal language model and its tokenizer.

    Args:
        name: Folder of a finished `veiltune train`, or as in `load_base`.

    Raises:
        InputError: If there is none, it is not finished, gives no next-token vectors, or its tokenizer does not fit.
    """
    run = RunFolder(name)
    found = _fine_tuned(run) if run.config_path.is_file() else load_base(name)
    if not hasattr(found.model, "lm_head"):
        raise InputError(f"{name!r} is no causal language model: it gives no next-token vectors")
    if len(found.tokenizer) > found.model.config.vocab_size:
        raise InputError(
            f"{name!r} has {found.model.config.vocab_size} tokens, its tokenizer {len(found.tokenizer)}; they do not"
            " belong together"
        )
    return found


def _fine_tuned(run: RunFolder) -> BaseModel:
    config = load_config(TrainConfig, run.config_path)
    if not (run.path / "summary.json").is_file():
        raise InputError(f"{run.path} holds a run that is not finished; the same `veiltune train` goes on with it")
    base = load_base(config.model.name)
    base.model.to(dtype=torch.float32)  # type: ignore[call-arg]  # transformers wraps `to`
    load_adapter(base.model, run.path / "adapter")
    digest = weights_digest(base.model.state_dict())
    return BaseModel(model=base.model, tokenizer=base.tokenizer, name=str(run.path), digest=digest)
