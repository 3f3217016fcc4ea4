"""Tiny models of every family with random weights: 4 blocks, hidden size 32, 128 tokens, padding id 0 (RoBERTa 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

HIDDEN, BLOCKS, VOCAB, LABELS = 32, 4, 128, 3
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("gpt2", "llama", "qwen2", "qwen3", "mistral")
FAMILIES = ENCODERS + DECODERS

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = _SIZES | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
# Sliding and full attention alternate, so that a wrong slice of layer_types shows.
_SLIDING: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
_AUTO: dict[str, Any] = {
    "base": AutoModel,
    "classification": AutoModelForSequenceClassification,
    "causal": AutoModelForCausalLM,
}


def tiny_config(family: str) -> PreTrainedConfig:
    """A fresh configuration of the family."""
    match family:
        case "bert":
            return BertConfig(**_SIZES, pad_token_id=0)
        case "roberta":
            return RobertaConfig(**_SIZES, pad_token_id=1)
        case "distilbert":
            return DistilBertConfig(
                dim=HIDDEN, n_layers=BLOCKS, n_heads=4, hidden_dim=64, vocab_size=VOCAB, max_position_embeddings=64
            )
        case "gpt2":
            tokens: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
            return GPT2Config(n_embd=HIDDEN, n_layer=BLOCKS, n_head=4, vocab_size=VOCAB, n_positions=64, **tokens)
        case "llama":
            return LlamaConfig(**_GROUPED)
        case "mistral":
            return MistralConfig(**_GROUPED, sliding_window=3)
        case "qwen2":
            sizes = {name: value for name, value in _GROUPED.items() if name != "head_dim"}
            return Qwen2Config(**sizes, **_SLIDING)
        case "qwen3":
            return Qwen3Config(**_GROUPED, **_SLIDING)
    raise ValueError(f"no tiny {family}")


def tiny_model(family: str, task: str = "classification", *, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode; task is base, classification or causal."""
    return model_of(tiny_config(family), task, seed=seed)


def model_of(config: PreTrainedConfig, task: str = "classification", *, seed: int = 0) -> PreTrainedModel:
    """A model of one's own configuration. Every parameter is random, also those that usually begin at 0 or 1."""
    if task == "classification":
        config.num_labels = LABELS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = _AUTO[task].from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.train(False)
    return model


def tiny_batch(config: PreTrainedConfig, *, padding: str = "right", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three texts of 7, 4 and 1 tokens as (3, 7) ids and mask, padded on one side ("none": all 7 long)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row, length in enumerate((7, 4, 1)):
            mask[row, length:] = 0
        if padding == "left":
            mask = mask.flip(1)
    return ids.masked_fill(mask == 0, config.pad_token_id), mask
