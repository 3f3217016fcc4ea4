"""Where each Hugging Face model family keeps its parts: one row a family.

Every path is a dotted module name. `split`, `adapters` and `loading` read this table and know no family by
name, so a new family is a new row (and a line in ``tests/tiny.py``, which runs it through every test).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from veiltune.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """The map of one family.

    Attributes:
        causal: Decoder (True) or bidirectional encoder (False).
        pools: The position whose hidden state a sequence classifier reads: the first, or the last real token.
        blocks: The list of blocks, in the backbone.
        word_embeddings: The (V, H) embedding, in the backbone.
        embeddings_block: The module from word embeddings to the first block's input, in the backbone; None
            where the backbone's own forward pass does that.
        position_embeddings: Where there is no embeddings block: the learned positions that forward adds, if
            any.
        embedding_dropout: Where there is no embeddings block: the dropout after them, if any.
        positions_from_mask: Position ids count the real tokens from the padding id on (else they count from
            0).
        final_norm: The norm after the last block, in the backbone, if any.
        pooler: The pooler, in the backbone, if any.
        task_head: What a fine-tuned sequence classifier trains in full, in the classification model.
        attention_output: The projection that ends the attention, in a block (a Houlsby adapter follows it).
        ffn_output: The projection that ends the feed-forward part, in a block (likewise).
        lora_targets: Projections that LoRA adapts by default, in a block.
    """

    causal: bool
    pools: Literal["first", "last"]
    blocks: str
    word_embeddings: str
    embeddings_block: str | None = None
    position_embeddings: str | None = None
    embedding_dropout: str | None = None
    positions_from_mask: bool = False
    final_norm: str | None = None
    pooler: str | None = None
    task_head: tuple[str, ...]
    attention_output: str
    ffn_output: str
    lora_targets: tuple[str, ...]


_BERT = Family(
    causal=False,
    pools="first",
    blocks="encoder.layer",
    word_embeddings="embeddings.word_embeddings",
    embeddings_block="embeddings",
    pooler="pooler",
    task_head=("bert.pooler", "classifier"),
    attention_output="attention.output.dense",
    ffn_output="output.dense",
    lora_targets=("query", "value"),
)
_ROBERTA = Family(
    causal=False,
    pools="first",
    blocks="encoder.layer",
    word_embeddings="embeddings.word_embeddings",
    embeddings_block="embeddings",
    positions_from_mask=True,
    pooler="pooler",
    task_head=("classifier",),
    attention_output="attention.output.dense",
    ffn_output="output.dense",
    lora_targets=("query", "value"),
)
_DISTILBERT = Family(
    causal=False,
    pools="first",
    blocks="transformer.layer",
    word_embeddings="embeddings.word_embeddings",
    embeddings_block="embeddings",
    task_head=("pre_classifier", "classifier"),
    attention_output="attention.out_lin",
    ffn_output="ffn.lin2",
    lora_targets=("q_lin", "v_lin"),
)
_GPT2 = Family(
    causal=True,
    pools="last",
    blocks="h",
    word_embeddings="wte",
    position_embeddings="wpe",
    embedding_dropout="drop",
    final_norm="ln_f",
    task_head=("score",),
    attention_output="attn.c_proj",
    ffn_output="mlp.c_proj",
    lora_targets=("c_attn",),
)
_LLAMA = Family(
    causal=True,
    pools="last",
    blocks="layers",
    word_embeddings="embed_tokens",
    final_norm="norm",
    task_head=("score",),
    attention_output="self_attn.o_proj",
    ffn_output="mlp.down_proj",
    lora_targets=("q_proj", "v_proj"),
)

#: Families by ``config.model_type``. Qwen and Mistral keep their parts where Llama does.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": _BERT,
        "roberta": _ROBERTA,
        "distilbert": _DISTILBERT,
        "gpt2": _GPT2,
        "llama": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "mistral": _LLAMA,
    }
)


def family_of(config: PreTrainedConfig) -> Family:
    """Looks up the row of a model's configuration.

    Args:
        config: Any Hugging Face configuration; only ``model_type`` and ``is_decoder`` are read.

    Raises:
        UnsupportedModelError: If the family has no row, or an encoder was configured as a decoder.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"no split table for model_type {config.model_type!r}; supported: {', '.join(FAMILIES)}; "
            "use one of these or add a row to veiltune.models.families"
        )
    if not family.causal and getattr(config, "is_decoder", False):
        raise UnsupportedModelError(f"{config.model_type} with is_decoder=True is not supported; set is_decoder=False")
    return family


def longest_sequence(config: PreTrainedConfig) -> int:
    """How many tokens a model has positions for.

    >>> from transformers import RobertaConfig
    >>> longest_sequence(RobertaConfig(max_position_embeddings=514, pad_token_id=1))
    512
    """
    unused = (config.pad_token_id or 0) + 1 if family_of(config).positions_from_mask else 0
    return int(config.max_position_embeddings) - unused
