"""What `split` does to a copy of a Hugging Face model: shorten its blocks, take parts out, let inputs pass through."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from veiltune.errors import UnsupportedModelError
from veiltune.models.families import Family, family_of

Task = Literal["base", "classification", "causal"]

#: Hugging Face's own tables from configuration class to model class.
CLASSES_BY_TASK: Mapping[Task, Any] = {
    "base": MODEL_MAPPING,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING,
}


def aliased_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copies a model's structure; the new, distinct parameters use the old ones' storage."""
    aliases = {id(old): nn.Parameter(old.detach(), requires_grad=old.requires_grad) for old in model.parameters()}
    return copy.deepcopy(model, cast("dict[int, object]", aliases))


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; of a base model, itself."""
    return cast(PreTrainedModel, model.base_model)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's blocks."""
    return cast(nn.ModuleList, backbone_of(model).get_submodule(family_of(model.config).blocks))


def carve(model: PreTrainedModel, start: int, stop: int) -> PreTrainedModel:
    """An aliased copy with blocks start..stop-1 only; its configurations say so."""
    part = aliased_copy(model)
    replace(backbone_of(part), family_of(part.config).blocks, blocks_of(part)[start:stop])
    configs = {id(config): config for module in part.modules() if (config := getattr(module, "config", None))}
    for config in configs.values():
        limit_blocks(config, start, stop)
    part.config.architectures = [type(part).__name__]
    return part


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig, start: int, stop: int) -> PreTrainedModel:
    """A randomly initialised model of the class with stop - start blocks, in eval mode; global randomness is kept."""
    config = copy.deepcopy(config)
    limit_blocks(config, start, stop)
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    model.train(False)
    return model


def limit_blocks(config: PreTrainedConfig, start: int, stop: int) -> None:
    """Makes a configuration count blocks start..stop-1 only."""
    config.num_hidden_layers = stop - start
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[start:stop]
    config.use_cache = False  # a part never generates; a cache would only cost memory


def task_of(model: PreTrainedModel) -> Task:
    """The kind of head on a model, or the refusal."""
    family = family_of(model.config)
    for task, classes in CLASSES_BY_TASK.items():
        if classes.get(type(model.config), None) is type(model) and (task != "causal" or family.causal):
            return task
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be split; load the base model, ...ForSequenceClassification or ...ForCausalLM"
    )


class _PassThrough(nn.Module):
    """Stands where an embeddings block was: its input is past it already."""

    word_embeddings = None  # asked for by get_input_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor | None:
        return inputs_embeds


class _NoPositions(nn.Module):
    """Stands where a position embedding was: adds zero, as positions are in the input already."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


def skip_embeddings(backbone: PreTrainedModel, family: Family) -> None:
    """Lets ``inputs_embeds`` reach the first block as they are."""
    if family.embeddings_block:
        replace(backbone, family.embeddings_block, _PassThrough())
        return
    replace(backbone, family.word_embeddings, None)
    if family.position_embeddings:
        replace(backbone, family.position_embeddings, _NoPositions())
    if family.embedding_dropout:
        replace(backbone, family.embedding_dropout, nn.Identity())


def end_after_blocks(backbone: PreTrainedModel, family: Family) -> None:
    """Makes the last block's output the last hidden state."""
    if family.final_norm:
        replace(backbone, family.final_norm, nn.Identity())
    if family.pooler:
        replace(backbone, family.pooler, None)


def keep_words_only(backbone: PreTrainedModel, family: Family) -> None:
    """Takes out every parameter but the word embeddings."""
    for path, module in list(backbone.named_modules()):
        if path != family.word_embeddings and next(module.parameters(recurse=False), None) is not None:
            replace(backbone, path, None)


def replace(root: nn.Module, path: str, module: nn.Module | None) -> None:
    """Puts another module, or none, at a path."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def untie(model: PreTrainedModel) -> None:
    """Tells Hugging Face that no weight is tied any more: the word embeddings are on the other side."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def own_weights(part: nn.Module) -> None:
    """Copies every parameter into storage of its own."""
    for parameter in part.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def at_last_token(values: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, ...) values at the last real position of each row: (B, ...)."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (positions * attention_mask.long()).argmax(dim=1)
    return values[torch.arange(len(values), device=values.device), last.to(values.device)]
