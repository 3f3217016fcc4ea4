from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

import tiny
from veiltune.errors import InputError, UnsupportedModelError
from veiltune.models.split import BottomModel, HeadModel, TopModel, split_head, split_model
from veiltune.models.surgery import carve

CASES = [
    (family, task)
    for family in tiny.FAMILIES
    for task in ("base", "classification", "causal")
    if task != "causal" or family in tiny.DECODERS
]
CUTS = [(0, "word"), *((cut, "block") for cut in range(tiny.BLOCKS + 1))]


def output_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    output = model(input_ids=ids, attention_mask=mask)
    result: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return result


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("family", "task"), CASES)
@torch.no_grad()
def test_split_equals_the_model_bit_for_bit_at_every_cut(family: str, task: str, padding: str) -> None:
    model = tiny.tiny_model(family, task)
    before, config = copied(model), model.config.to_dict()
    ids, mask = tiny.tiny_batch(model.config, padding=padding)
    expected = output_of(model, ids, mask)
    assert torch.isfinite(expected).all()
    for cut_layer, cut_embeddings in CUTS:
        bottom, top = split_model(model, cut_layer=cut_layer, cut_embeddings=cut_embeddings)
        representations = bottom(ids, mask)
        assert representations.shape == (*ids.shape, tiny.HIDDEN)
        assert torch.equal(top(representations, mask), expected), (cut_layer, cut_embeddings)
        assert torch.equal(top(representations, mask.bool()), expected)
        assert (bottom.cut_layer, len(bottom.blocks)) == (cut_layer, cut_layer)
        assert (top.first_block, len(top.blocks)) == (cut_layer, tiny.BLOCKS - cut_layer)
    assert same(before, model.state_dict())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "task"), [case for case in CASES if case[1] != "base"])
@torch.no_grad()
def test_trunk_and_head_compose_to_the_top(family: str, task: str, padding: str) -> None:
    model = tiny.tiny_model(family, task)
    ids, mask = tiny.tiny_batch(model.config, padding=padding)
    for cut_layer, cut_embeddings in CUTS:
        bottom, top = split_model(model, cut_layer=cut_layer, cut_embeddings=cut_embeddings)
        trunk, head = split_head(top)
        hidden = trunk(bottom(ids, mask), mask)
        assert hidden.shape == ((3, 7, tiny.HIDDEN) if task == "causal" else (3, tiny.HIDDEN))
        torch.testing.assert_close(head(hidden), output_of(model, ids, mask))
        assert trunk.first_block == cut_layer
        shared = {path for path, _ in trunk.named_parameters()} & {path for path, _ in head.named_parameters()}
        assert not shared


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_match_the_unsplit_model(family: str) -> None:
    model = tiny.tiny_model(family)
    ids, mask = tiny.tiny_batch(model.config)
    bottom, top = split_model(model, cut_layer=2)
    output_of(model, ids, mask).square().sum().backward()  # type: ignore[no-untyped-call]
    top(bottom(ids, mask), mask).square().sum().backward()
    expected = dict(model.named_parameters())
    prefix, path = model.base_model_prefix, bottom.family.blocks
    compared = 0
    for name, parameter in top.model.named_parameters():
        before, _, after = name.partition(f"{path}.")
        number, _, rest = after.partition(".")
        whole = f"{before}{path}.{int(number) + 2}.{rest}" if number.isdigit() else name
        torch.testing.assert_close(parameter.grad, expected[whole].grad)
        compared += 1
    for name, parameter in bottom.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"{prefix}.{name}"].grad)
        compared += 1
    assert compared > 20


def test_parts_own_their_weights() -> None:
    model = tiny.tiny_model("gpt2", "causal")
    bottom, top = split_model(model, cut_layer=2)
    storages = [{p.data_ptr() for p in module.parameters()} for module in (model, bottom, top)]
    assert not storages[0] & storages[1] and not storages[1] & storages[2] and not storages[0] & storages[2]


def test_shared_weights_use_the_models_storage_through_parameters_of_their_own() -> None:
    model = tiny.tiny_model("llama")
    bottom, top = split_model(model, cut_layer=2, share_weights=True)
    storage = {p.data_ptr() for p in model.parameters()}
    for part in (bottom, top):
        assert {p.data_ptr() for p in part.parameters()} <= storage
        part.requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_are_named_and_no_longer_tied() -> None:
    model = tiny.tiny_model("gpt2", "causal")
    bottom, top = split_model(model, cut_layer=0)
    assert top.untied == ("lm_head.weight",)
    assert top.config.tie_word_embeddings is False
    head = top.model.get_parameter("lm_head.weight")
    assert torch.equal(head, bottom.word_embeddings)
    assert head.data_ptr() != bottom.word_embeddings.data_ptr()
    assert split_model(tiny.tiny_model("llama", "causal"), cut_layer=1)[1].untied == ()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_word_cut_discloses_the_word_embeddings_alone(family: str) -> None:
    model = tiny.tiny_model(family)
    bottom, top = split_model(model, cut_layer=0, cut_embeddings="word")
    assert [p.shape for p in bottom.parameters()] == [(tiny.VOCAB, tiny.HIDDEN)]
    assert torch.equal(
        bottom.word_embeddings, model.base_model.get_parameter(f"{bottom.family.word_embeddings}.weight")
    )
    assert not any(torch.equal(p, bottom.word_embeddings) for p in top.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("cut_layer", "cut_embeddings"), [(0, "word"), (0, "block"), (3, "word")])
def test_bottom_is_rebuilt_from_its_own_config_and_from_the_whole_one(
    family: str, cut_layer: int, cut_embeddings: str
) -> None:
    model = tiny.tiny_model(family)
    bottom, _ = split_model(model, cut_layer=cut_layer, cut_embeddings=cut_embeddings)
    ids, mask = tiny.tiny_batch(model.config)
    state = torch.random.get_rng_state()
    for config in (bottom.config, model.config):
        rebuilt = BottomModel.from_config(config, cut_layer=cut_layer, cut_embeddings=cut_embeddings)
        rebuilt.load_state_dict(bottom.state_dict(), strict=True)
        assert torch.equal(rebuilt(ids, mask), bottom(ids, mask))
        assert not rebuilt.training
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("family", "task"), [case for case in CASES if case[1] != "base"])
def test_head_is_rebuilt_from_its_config(family: str, task: str) -> None:
    _, top = split_model(tiny.tiny_model(family, task), cut_layer=2)
    _, head = split_head(top)
    rebuilt = HeadModel.from_config(head.config)
    rebuilt.load_state_dict(head.state_dict(), strict=True)
    hidden = torch.randn(2, 3, tiny.HIDDEN) if task == "causal" else torch.randn(2, tiny.HIDDEN)
    assert torch.equal(rebuilt(hidden), head(hidden))


def test_a_head_config_must_name_its_class() -> None:
    with pytest.raises(UnsupportedModelError, match=r"must name BertForSequenceClassification or .*, got BertModel"):
        bottom, _ = split_model(tiny.tiny_model("bert"), cut_layer=1)
        HeadModel.from_config(bottom.config)


def test_blocks_keep_what_depends_on_their_number() -> None:
    config = tiny.tiny_config("gpt2")
    config.scale_attn_by_inverse_layer_idx = True
    model = tiny.model_of(config)
    ids, mask = tiny.tiny_batch(config)
    bottom, top = split_model(model, cut_layer=2)
    assert torch.equal(top(bottom(ids, mask), mask), output_of(model, ids, mask))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_representations_meet_no_second_embedding_dropout(family: str) -> None:
    config = tiny.tiny_config(family)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = tiny.model_of(config)
    embedding_dropout = model.base_model.get_submodule("embeddings.dropout" if family == "bert" else "drop")
    assert isinstance(embedding_dropout, nn.Dropout)
    embedding_dropout.p = 0.9
    ids, mask = tiny.tiny_batch(config)
    bottom, top = split_model(model, cut_layer=1)
    representations = bottom(ids, mask)
    assert torch.equal(top.train()(representations, mask), top.eval()(representations, mask))
    assert not torch.equal(bottom.train()(ids, mask), representations)


def test_bfloat16_is_bit_for_bit_too() -> None:
    config = tiny.tiny_config("gpt2")
    config.dtype = torch.bfloat16
    model = tiny.model_of(config, "causal")
    ids, mask = tiny.tiny_batch(model.config)
    bottom, top = split_model(model, cut_layer=2)
    output = top(bottom(ids, mask), mask)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, output_of(model, ids, mask))


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_embedding_a_representation_twice_would_be_noticed(family: str) -> None:
    """The planted fault: a top that adds positions to representations that have them."""
    model = tiny.tiny_model(family)
    ids, mask = tiny.tiny_batch(model.config)
    bottom, _ = split_model(model, cut_layer=1)
    wrong = TopModel(carve(copy.deepcopy(model), 1, tiny.BLOCKS), first_block=1, takes_words=True)
    assert not torch.allclose(wrong(bottom(ids, mask), mask), output_of(model, ids, mask))


@pytest.mark.parametrize("cut_layer", [-1, 5, 1.0, True])
def test_cut_out_of_range_is_refused(cut_layer: int) -> None:
    with pytest.raises(InputError, match=r"cut_layer must be a whole number in \[0, 4\] \(the model's blocks\), got"):
        split_model(tiny.tiny_model("bert"), cut_layer=cut_layer)


def test_unknown_kind_of_cut_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'word'"):
        split_model(tiny.tiny_model("bert"), cut_layer=0, cut_embeddings="words")


def test_other_heads_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM cannot be split; load the base model"):
        split_model(BertForMaskedLM(BertConfig(num_hidden_layers=1, vocab_size=9)), cut_layer=1)
    _, top = split_model(tiny.tiny_model("bert", "base"), cut_layer=1)
    with pytest.raises(UnsupportedModelError, match="has no head to split off"):
        split_head(top)
