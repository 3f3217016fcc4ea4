"""The model that is served: a finished training run, a model folder, a bundled model or a hub name."""

from __future__ import annotations

from veiltune.models.finished import check_causal, fine_tuned, run_of
from veiltune.models.loading import BaseModel, load_base


def open_model(name: str) -> BaseModel:
    """Loads a causal language model and its tokenizer.

    Args:
        name: Folder of a finished `veiltune train`, or as in `load_base`.

    Raises:
        InputError: If there is none, it is not finished, gives no next-token vectors, or its tokenizer does not fit.
    """
    run = run_of(name)
    found = fine_tuned(*run) if run else load_base(name)
    check_causal(found)
    return found
