"""What a run of private training needs before its first step: a model with what trains in it, and encoded rows."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from veiltune.config import TrainConfig
from veiltune.data.prompts import Prompted
from veiltune.data.tables import LabelSet
from veiltune.dp.data import Labelled, TrainingTables
from veiltune.dp.data_stage import Spans, personal_spans
from veiltune.dp.encoding import EncodedSet, collate, encode_prompted, encode_texts_with_labels
from veiltune.dp.engine import Collate
from veiltune.dp.losses import LossFn, causal_lm_losses, classification_losses
from veiltune.dp.masking import goldfish
from veiltune.errors import InputError, UnsupportedModelError
from veiltune.models.adapters import attach_peft
from veiltune.models.dropout import dropout_rates
from veiltune.models.families import family_of, longest_sequence
from veiltune.models.loading import BaseModel, classifier_model, load_base, name_classes, pad_id_of, settings_digest

_LEAST_PROMPT = 2  # tokens


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model and examples that fit each other.

    Attributes:
        model: On the run's device, in float32, the method attached, in train mode without dropout.
        tokenizer: Its tokenizer.
        digest: Of the base model's weights.
        train: Encoded training rows.
        eval: Encoded evaluation rows.
        loss: Of the task.
        collate: Of the task.
        notes: What was done to rows and to long examples, a line each.
    """

    model: PreTrainedModel
    tokenizer: Any
    digest: str
    train: Sequence[Any]
    eval: Sequence[Any]
    loss: LossFn
    collate: Collate
    notes: list[str]

    def fingerprint(self, key: bytes) -> str:
        """Of weights, configuration and what the tokenizer made of the training rows; tells nothing without the key."""
        total = hmac.new(key, f"{self.digest} {settings_digest(self.model)}".encode(), hashlib.sha256)
        for example in self.train:
            total.update(json.dumps(asdict(example)).encode() + b"\n")
        return total.hexdigest()


def prepare(config: TrainConfig, tables: TrainingTables, *, key: bytes, notes: Sequence[str] = ()) -> Prepared:
    """Loads the model, attaches the method and encodes both tables; training rows with the loss that defences leave.

    Args:
        config: The run.
        tables: After the data stage.
        key: Of the run; goldfish gaps derive from it.
        notes: What the data stage did.

    Raises:
        InputError: If the model cannot be loaded, an option does not fit it, or a row has no tokens.
        UnsupportedModelError: If the model is not of a kind that does the task.
    """
    base = load_base(config.model.name)
    if config.model.task == "generation" and not family_of(base.model.config).causal:
        raise UnsupportedModelError(
            f"{config.model.name!r} is an encoder, which cannot continue a text; name a causal model, e.g. 'smollm2'"
        )
    _check_room(config, base, tables)
    encoded = {
        "training": encoded_training_rows(config, base, tables, key=key),
        "evaluation": _encoded(config, base, tables.eval, tables.labels, None),
    }
    model = _model(config, base, tables.labels)
    return Prepared(
        model=model,
        tokenizer=base.tokenizer,
        digest=base.digest,
        train=encoded["training"].examples,
        eval=encoded["evaluation"].examples,
        loss=classification_losses if config.model.task == "classification" else causal_lm_losses,
        collate=partial(collate, pad_id=pad_id_of(base)),
        notes=[*notes, *(f"{name} table: {len(rows)} examples; {rows.note()}" for name, rows in encoded.items())],
    )


def _check_room(config: TrainConfig, base: BaseModel, tables: TrainingTables) -> None:
    """Before anything is spent: whether the texts of the evaluation fit after a prompt."""
    longest, new = longest_sequence(base.model.config), config.evaluation.max_new_tokens
    generates = isinstance(tables.eval, Prompted) and any(tables.eval.prompts)
    if generates and new > longest - _LEAST_PROMPT:
        raise InputError(
            f"evaluation.max_new_tokens must be at most {longest - _LEAST_PROMPT}, since {config.model.name!r} takes "
            f"{longest} tokens, prompt included, got {new}; lower it"
        )


def encoded_training_rows(
    config: TrainConfig, base: BaseModel, tables: TrainingTables, *, key: bytes
) -> EncodedSet[Any]:
    """The training rows with the loss that the defences leave: none on personal data, none in goldfish gaps.

    Args:
        config: The run.
        base: Its tokenizer and the longest text of its model are used.
        tables: After the data stage.
        key: Of the run.

    Raises:
        InputError: If a row has no tokens, or an optional package is missing.
    """
    encoded = _encoded(config, base, tables.train, tables.labels, _without_loss(config, tables))
    return replace(encoded, examples=_with_gaps(config, encoded.examples, key))


def remove_dropout(model: nn.Module) -> None:
    """Sets every dropout rate inside a model to 0, those that are plain numbers of attention modules too.

    >>> layer = nn.Sequential(nn.Dropout(0.5))
    >>> remove_dropout(layer)
    >>> layer[0].p
    0.0
    """
    for module, name in dropout_rates(model):
        setattr(module, name, 0.0)


def _encoded(
    config: TrainConfig,
    base: BaseModel,
    rows: Labelled | Prompted,
    labels: LabelSet | None,
    without_loss: list[Spans] | None,
) -> EncodedSet[Any]:
    max_length = min(config.data.max_length, longest_sequence(base.model.config))
    if isinstance(rows, Labelled):
        assert labels is not None
        classes = labels.encode(rows.labels)
        return encode_texts_with_labels(base.tokenizer, rows.texts, classes, max_length=max_length)
    data = config.data
    return encode_prompted(
        base.tokenizer,
        rows,
        max_length=max_length,
        loss_on=data.loss_on,
        separator=data.separator,
        without_loss=without_loss,
    )


def _without_loss(config: TrainConfig, tables: TrainingTables) -> list[Spans] | None:
    if not config.settled_defences().mask_personal or isinstance(tables.train, Labelled):
        return None
    return personal_spans(tables.train.targets, private=not config.privacy.disabled)


def _with_gaps(config: TrainConfig, examples: list[Any], key: bytes) -> list[Any]:
    one_in, context = config.defences.goldfish, config.defences.goldfish_context
    if not one_in:
        return examples
    secret = hashlib.sha256(b"goldfish" + key).digest()
    return [
        replace(one, labels=goldfish(one.input_ids, one.labels, one_in=one_in, context=context, key=secret))
        for one in examples
    ]


def _model(config: TrainConfig, base: BaseModel, labels: LabelSet | None) -> PreTrainedModel:
    train = config.train
    model = base.model
    model.to(dtype=torch.float32)  # type: ignore[call-arg]  # transformers wraps `to`
    if labels is not None:
        model = classifier_model(base, num_labels=len(labels), seed=train.seed)
        name_classes(model, labels.names, pad_id=pad_id_of(base))
    model.to(train.device)  # type: ignore[arg-type]
    attach_peft(
        model,
        method=train.method,
        seed=train.seed,
        rank=train.rank,
        alpha=train.alpha,
        adapter_size=train.adapter_size,
        targets=train.targets,
        phm_dim=train.phm_dim,
        pooler=train.pooler,
    )
    remove_dropout(model)
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model
