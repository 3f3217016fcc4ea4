from __future__ import annotations

import pytest
from torch import nn
from transformers import BertConfig, T5Config

import tiny
from veiltune.errors import UnsupportedModelError
from veiltune.models.families import FAMILIES, family_of


def test_every_row_has_a_tiny_model() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_path_of_a_row_exists(name: str) -> None:
    model = tiny.tiny_model(name)
    family = family_of(model.config)
    backbone = model.base_model
    in_backbone = (
        family.word_embeddings,
        family.embeddings_block,
        family.position_embeddings,
        family.embedding_dropout,
        family.final_norm,
    )
    for path in filter(None, in_backbone):
        assert isinstance(backbone.get_submodule(path), nn.Module)
    if family.pooler:
        assert hasattr(backbone, family.pooler)
    blocks = backbone.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == tiny.BLOCKS
    first = blocks[0]
    for path in (family.attention_output, family.ffn_output):
        assert first.get_parameter(f"{path}.weight").numel()
    for path in family.task_head:
        assert next(iter(model.get_submodule(path).parameters())).numel()
    names = {path.rpartition(".")[2] for path, _ in first.named_modules()}
    assert set(family.lora_targets) <= names


def test_task_head_is_all_that_a_fresh_classifier_adds_to_the_base() -> None:
    for name in tiny.FAMILIES:
        model = tiny.tiny_model(name)
        added = {path for path, _ in model.named_parameters() if not path.startswith(f"{model.base_model_prefix}.")}
        head = family_of(model.config).task_head
        assert all(any(path.startswith(f"{root}.") for root in head) for path in added), name


def test_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"no split table for model_type 't5'; supported: bert, .*mistral; "
    ):
        family_of(T5Config())


def test_encoder_configured_as_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="set is_decoder=False"):
        family_of(BertConfig(is_decoder=True))
