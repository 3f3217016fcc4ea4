"""The model under audit, however it is given: a run folder, a model folder, a hub name or the address of an API."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veiltune.audit.blackbox import BlackBox
from veiltune.audit.guarded import GuardedModel
from veiltune.audit.http_api import open_api
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.local_model import LocalModel
from veiltune.config import TrainConfig, dump_toml, load_config
from veiltune.config.guard import GuardConfig
from veiltune.errors import InputError
from veiltune.guard.building import guard_of
from veiltune.models.finished import check_causal, fine_tuned, run_of
from veiltune.models.loading import BaseModel, load_base, load_tokenizer
from veiltune.runs import RunFolder


@dataclass(frozen=True)
class Claim:
    """What is claimed of a model: an accountant's upper bound."""

    epsilon: float
    delta: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to ask, and the public one to compare it with.

    Attributes:
        target: Under audit.
        base: What training started from; None if the adversary is not given it.
        tokenizer: Of both.
        base_name: In the user's words.
        claim: None if nothing is claimed.
        folder: Where leakage.json goes.
    """

    target: BlackBox
    base: BlackBox | None
    tokenizer: Any
    base_name: str | None
    claim: Claim | None
    folder: Path


def open_models(options: LeakageOptions, *, train_digest: str = "") -> Opened:
    """Loads or reaches the models.

    Args:
        options: Which.
        train_digest: SHA-256 of the training text that the manifest is of; "" if it does not say.

    Raises:
        InputError: If one (or the guard) cannot be had, one is no causal language model, was trained on another text
            than the manifest is of (where that can be seen), or the two do not share a tokenizer.
    """
    run = run_of(options.tokenizer if options.is_api else options.model)
    if run and train_digest:
        _check_same_corpus(run[1], train_digest)
    base_name = options.base or (run[1].model.name if run else "")
    base = _causal(load_base(base_name), options) if base_name else None
    if options.is_api:
        tokenizer = load_tokenizer(run[1].model.name if run else options.tokenizer)
        target: BlackBox = _api(options, tokenizer)
    else:
        loaded = fine_tuned(*run) if run else load_base(options.model)
        tokenizer = loaded.tokenizer
        target = _local(_causal(loaded, options), options)
        if options.guard is not None:
            target = _guarded(target, tokenizer, options.guard)
    if base is not None:
        _check_same_tokenizer(tokenizer, base.tokenizer)
    return Opened(
        target=target,
        base=None if base is None else _local(base, options),
        tokenizer=tokenizer,
        base_name=base_name or None,
        claim=_claim(options, run[0] if run else None),
        folder=_folder(options, run[0] if run and not options.is_api else None),
    )


def refuse_classifiers(options: LeakageOptions) -> None:
    """Refuses a run that made no language model, before anything else is asked of the user.

    Raises:
        InputError: With what the run has instead.
    """
    run = None if options.is_api else run_of(options.model)
    if run and run[1].model.task != "generation":
        raise InputError(
            f"{options.model} is a classifier, and this audit is of language models; what is claimed of it is in"
            f" {run[0].path / 'privacy.json'}"
        )


def _check_same_corpus(config: TrainConfig, train_digest: str) -> None:
    """A run knows the path of its table; a table that is gone or from the hub cannot be compared."""
    table = Path(config.data.train)
    if table.is_file() and hashlib.sha256(table.read_bytes()).hexdigest() != train_digest:
        raise InputError(
            f"the run was trained on {table}, and the manifest is of another text; name the manifest that"
            " `veiltune data synth` wrote beside the training text"
        )


def _causal(found: BaseModel, options: LeakageOptions) -> BaseModel:
    check_causal(found)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device must be 'cpu' on this machine, which has no CUDA device, got {options.device!r}")
    return found


def _local(found: BaseModel, options: LeakageOptions) -> LocalModel:
    return LocalModel(found.model, found.tokenizer, name=found.name, device=options.device, bf16=options.bf16)


def _api(options: LeakageOptions, tokenizer: Any) -> BlackBox:
    return open_api(options.model, model=options.api_model, tokenizer=tokenizer, key=options.key_variable or None)


def _guarded(box: BlackBox, tokenizer: Any, path: Path) -> BlackBox:
    """Its mark is of the settings and of the files that they name, since both make the guard."""
    config = load_config(GuardConfig, path)
    guard = guard_of(config, tokenizer, size=box.vocabulary)
    if guard is None:
        raise InputError(f"{path} asks for no guard: name protect.files, memfree.text or a [vector] setting")
    named = [*config.protect.files, config.memfree.text, config.vector.reference]
    parts = [dump_toml(config).encode(), *(Path(name).read_bytes() for name in named if name)]
    mark = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    return GuardedModel(box, guard, mark=mark, guarded_by=config.words())


def _check_same_tokenizer(one: Any, other: Any) -> None:
    if one.get_vocab() != other.get_vocab():
        raise InputError(
            "the model and its base have different tokenizers, so their answers cannot be compared; name the base that"
            " training started from as --base"
        )


def _claim(options: LeakageOptions, run: RunFolder | None) -> Claim | None:
    if options.claimed_epsilon is not None:
        return Claim(options.claimed_epsilon, 1e-5 if options.delta is None else options.delta, "example")
    if run is None:
        return None
    summary = run.read_json("summary.json")
    epsilon = float(summary["planned_epsilon"])  # with seeded noise, in tests, the claim is that of the plan
    return Claim(epsilon, float(summary["delta"]), str(summary["unit"])) if math.isfinite(epsilon) else None


def _folder(options: LeakageOptions, run: RunFolder | None) -> Path:
    if options.output is not None:
        return options.output
    if run is None:
        raise InputError("name a folder for leakage.json with --output; only a run folder has a place for it")
    return run.path
