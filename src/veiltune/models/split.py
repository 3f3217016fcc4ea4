"""Cuts a Hugging Face model into a bottom for the customer and a top for the vendor.

No forward pass is written here. A part is a structural copy of the model with a shortened list of blocks, in
which whatever lies beyond the cut was taken out or replaced by a pass-through, so Hugging Face's own forward
runs on both sides (``inputs_embeds`` carries the representations into the upper one). The U-shape is the same
cut made twice:

    input_ids -> BottomModel -> representations -> TopModel -> logits
    input_ids -> BottomModel -> representations -> TrunkModel -> hidden states -> HeadModel -> logits
"""

from __future__ import annotations

from typing import Self, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from veiltune._validate import one_of
from veiltune.errors import InputError, UnsupportedModelError
from veiltune.models.families import Family, family_of
from veiltune.models.surgery import (
    CLASSES_BY_TASK,
    Task,
    at_last_token,
    backbone_of,
    blocks_of,
    build,
    carve,
    end_after_blocks,
    keep_words_only,
    own_weights,
    replace,
    skip_embeddings,
    task_of,
    untie,
)


def split_model(
    model: PreTrainedModel,
    *,
    cut_layer: int,
    cut_embeddings: str = "word",
    share_weights: bool = False,
) -> tuple[BottomModel, TopModel]:
    """Splits a base model, sequence classifier or causal LM after `cut_layer` blocks.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2, vocab_size=10)
    >>> model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    >>> bottom, top = split_model(model, cut_layer=1)
    >>> ids, mask = torch.tensor([[3, 1, 4, 1], [5, 9, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    >>> bottom(ids, mask).shape
    torch.Size([2, 4, 8])
    >>> torch.equal(top(bottom(ids, mask), mask), model(ids, mask).logits)
    True

    Guarantee:
        In eval mode, on the same device and dtype, ``top(bottom(ids, mask), mask)`` equals the model's output
        bit for bit, with padding on either side. One rule differs: a sequence classifier of a decoder family
        reads the last position that `attention_mask` calls real, where Hugging Face looks for the last id
        that is not the padding id; the two agree unless a text ends in that id. Says nothing about privacy:
        without a mechanism, representations give the text away at any depth.

    Args:
        model: A family of `families.FAMILIES`; left unchanged.
        cut_layer: Blocks kept by the customer, in [0, number of blocks].
        cut_embeddings: Matters for ``cut_layer=0`` only. "word": the bottom holds the word embeddings alone
            and the top adds positions, types and norm. "block": the bottom holds all that comes before the
            first block.
        share_weights: Let the parts' (distinct) parameters use the model's storage instead of owning a copy,
            so that many tops cost the memory of one. Then an in-place change in one is seen by all: train
            only what `adapters.attach_peft` made private.

    Returns:
        ``bottom(input_ids (B, T), attention_mask (B, T)) -> (B, T, H)`` and
        ``top(representations (B, T, H), attention_mask (B, T)) -> logits``, which for a base model are the
        last hidden states (B, T, H). Weights tied across the cut exist in both and are named in
        ``top.untied``.

    Raises:
        UnsupportedModelError: For a family without a row, or a model with another kind of head.
        InputError: If cut_layer or cut_embeddings is out of range.

    Source: Gupta and Raskar 2018, arXiv:1810.06060; vendor and customer: Shen et al. 2023, arXiv:2312.15603.
    """
    task_of(model)
    blocks = int(model.config.num_hidden_layers)
    if isinstance(cut_layer, bool) or not isinstance(cut_layer, int) or not 0 <= cut_layer <= blocks:
        raise InputError(f"cut_layer must be a whole number in [0, {blocks}] (the model's blocks), got {cut_layer!r}")
    one_of(("word", "block"), cut_embeddings=cut_embeddings)
    bottom = BottomModel(carve(backbone_of(model), 0, cut_layer), cut_layer=cut_layer, cut_embeddings=cut_embeddings)
    top = TopModel(carve(model, cut_layer, blocks), first_block=cut_layer, takes_words=bottom.releases_words)
    held_below = {parameter.data_ptr() for parameter in bottom.parameters()}
    top.untied = tuple(name for name, parameter in top.model.named_parameters() if parameter.data_ptr() in held_below)
    if not share_weights:
        own_weights(bottom)
        own_weights(top)
    return bottom, top


def split_head(top: TopModel) -> tuple[TrunkModel, HeadModel]:
    """Splits the head off a top, for the U-shape in which the customer keeps it.

    Guarantee:
        In eval mode ``head(trunk(representations, mask))`` equals ``top(representations, mask)`` up to
        rounding: a classifier's head then sees one position instead of T, and matrix kernels round
        differently for other shapes.

    Args:
        top: A classifier or causal LM; left unchanged. Both parts use its storage.

    Returns:
        ``trunk(representations (B, T, H), attention_mask (B, T)) -> hidden``, before final norm, pooler and
        head: for a classifier the pooled position (B, H), for a causal LM every position (B, T, H).
        ``head(hidden) -> logits``.

    Raises:
        UnsupportedModelError: If the top ends without a head.
    """
    if top.task == "base":
        raise UnsupportedModelError(
            f"{type(top.model).__name__} has no head to split off; load a classifier or a causal LM"
        )
    blocks = len(top.blocks)
    trunk = TrunkModel(
        carve(backbone_of(top.model), 0, blocks),
        first_block=top.first_block,
        takes_words=top.takes_words,
        task=top.task,
    )
    head = HeadModel(carve(top.model, blocks, blocks), first_block=top.first_block + blocks)
    return trunk, head


class ModelPart(nn.Module):
    """Consecutive blocks of a Hugging Face model, in a trimmed copy of it.

    Attributes:
        model: The trimmed copy, of the original's class; PEFT attaches here.
        first_block: Number of its first block in the whole model.
        family: Where the parts of `model` are.
    """

    def __init__(self, model: PreTrainedModel, *, first_block: int) -> None:
        super().__init__()
        self.model = model
        self.training = model.training  # a part begins in the mode of its model
        self.first_block = first_block
        self.family: Family = family_of(model.config)

    @property
    def config(self) -> PreTrainedConfig:
        """The part's own configuration; it counts the part's blocks only."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """H, the width of a representation."""
        return int(self.config.hidden_size)

    @property
    def blocks(self) -> nn.ModuleList:
        """The part's blocks."""
        return blocks_of(self.model)


class BottomModel(ModelPart):
    """The customer's part: embeddings and the first `cut_layer` blocks.

    Attributes:
        cut_layer: Blocks in it.
        cut_embeddings: As given to `split_model`.
        releases_words: It holds, and releases, word embeddings alone.
    """

    def __init__(self, backbone: PreTrainedModel, *, cut_layer: int, cut_embeddings: str) -> None:
        """Trims a backbone of exactly `cut_layer` blocks in place; callers want `split_model` or `from_config`."""
        super().__init__(backbone, first_block=0)
        self.cut_layer = cut_layer
        self.cut_embeddings: str = cut_embeddings
        self.releases_words = cut_layer == 0 and cut_embeddings == "word"
        end_after_blocks(backbone, self.family)
        if self.releases_words:
            keep_words_only(backbone, self.family)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, *, cut_layer: int, cut_embeddings: str = "word") -> Self:
        """Rebuilds the module with random weights, for a state dict to be loaded into.

        Args:
            config: The whole model's configuration, or a bottom's own; left unchanged.
            cut_layer: As in `split_model`, at most the blocks that `config` counts.
            cut_embeddings: As in `split_model`.
        """
        family_of(config)
        backbone = build(CLASSES_BY_TASK["base"][type(config)], config, 0, cut_layer)
        return cls(backbone, cut_layer=cut_layer, cut_embeddings=cut_embeddings)

    @property
    def word_embeddings(self) -> Float[Tensor, "V H"]:
        """The embedding matrix, one row a token id."""
        return cast(Tensor, self._embedding.weight)

    @property
    def _embedding(self) -> nn.Module:
        return self.model.get_submodule(self.family.word_embeddings)

    def forward(self, input_ids: Int[Tensor, "B T"], attention_mask: Shaped[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        """Token ids to representations; those of padding are meaningless."""
        if self.releases_words:
            return cast(Tensor, self._embedding(input_ids))
        return cast(Tensor, self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)

    def from_embeddings(
        self, embeddings: Float[Tensor, "B T H"], attention_mask: Shaped[Tensor, "B T"]
    ) -> Float[Tensor, "B T H"]:
        """Word embeddings, or mixtures of them, to representations; differentiable in them.

        Guarantee:
            For ``word_embeddings[input_ids]`` equal to ``forward(input_ids, attention_mask)`` in eval mode, if no real
            token has the padding id.
        """
        if self.releases_words:
            return embeddings
        inputs = {"inputs_embeds": embeddings, "attention_mask": attention_mask}
        if self.family.positions_from_mask:
            inputs["position_ids"] = _positions_from(attention_mask, self.config)
        return cast(Tensor, self.model(**inputs).last_hidden_state)


def _positions_from(attention_mask: Tensor, config: PreTrainedConfig) -> Tensor:
    """Positions that count the real tokens from the padding id on."""
    real = attention_mask.long()
    return real.cumsum(dim=1) * real + int(config.pad_token_id or 0)


class _UpperPart(ModelPart):
    """A part that takes representations."""

    def __init__(self, model: PreTrainedModel, *, first_block: int, takes_words: bool) -> None:
        """Trims the model in place; callers want `split_model` or `split_head`."""
        super().__init__(model, first_block=first_block)
        self.takes_words = takes_words
        if takes_words:
            replace(backbone_of(model), self.family.word_embeddings, None)
        else:
            skip_embeddings(backbone_of(model), self.family)
        untie(model)

    def _inputs(self, representations: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        inputs = {"inputs_embeds": representations, "attention_mask": attention_mask}
        if self.takes_words and self.family.positions_from_mask:
            inputs["position_ids"] = _positions_from(attention_mask, self.config)
        return inputs


class TopModel(_UpperPart):
    """The vendor's part: the blocks from `first_block` on and the head.

    Attributes:
        task: What the head does.
        takes_words: The representations are word embeddings alone.
        untied: Weights of `model` that were tied to the bottom's and are now a value of their own.
    """

    def __init__(self, model: PreTrainedModel, *, first_block: int, takes_words: bool = False) -> None:
        """Trims the model in place; callers want `split_model`."""
        super().__init__(model, first_block=first_block, takes_words=takes_words)
        self.task = task_of(model)
        self.untied: tuple[str, ...] = ()

    def forward(
        self, representations: Float[Tensor, "B T H"], attention_mask: Shaped[Tensor, "B T"]
    ) -> Float[Tensor, "B ..."]:
        """Representations to logits: (B, C) of a classifier, (B, T, V) of a causal LM; (B, T, H) of a base model."""
        inputs = self._inputs(representations, attention_mask)
        if self.task == "classification" and self.family.pools == "last":
            # HF finds the last token by its id. Ids never reach this side, so the mask says where it is.
            hidden = backbone_of(self.model)(**inputs).last_hidden_state
            return at_last_token(self.model.get_submodule(self.family.task_head[-1])(hidden), attention_mask)
        output = self.model(**inputs)
        return cast(Tensor, output.last_hidden_state if self.task == "base" else output.logits)


class TrunkModel(_UpperPart):
    """The vendor's part of the U-shape: blocks only.

    Attributes:
        task: What the head that was split off does.
        takes_words: The representations are word embeddings alone.
    """

    def __init__(self, backbone: PreTrainedModel, *, first_block: int, takes_words: bool, task: Task) -> None:
        """Trims the backbone in place; callers want `split_head`."""
        super().__init__(backbone, first_block=first_block, takes_words=takes_words)
        self.task = task
        end_after_blocks(backbone, self.family)

    def forward(
        self, representations: Float[Tensor, "B T H"], attention_mask: Shaped[Tensor, "B T"]
    ) -> Float[Tensor, "B *T H"]:
        """Representations to hidden states: (B, H) at the pooled position, or (B, T, H) for a causal LM."""
        hidden: Tensor = self.model(**self._inputs(representations, attention_mask)).last_hidden_state
        if self.task == "causal":
            return hidden
        return hidden[:, 0] if self.family.pools == "first" else at_last_token(hidden, attention_mask)


class HeadModel(TopModel):
    """The customer's part of the U-shape: final norm, pooler and head. It is a top without blocks."""

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> Self:
        """Rebuilds the module with random weights, for a state dict to be loaded into.

        Args:
            config: A head's own configuration (it names the model class in ``architectures``); left
                unchanged.

        Raises:
            UnsupportedModelError: If the class is neither a classifier nor a causal LM of a supported family.
        """
        family_of(config)
        wanted = (config.architectures or ["nothing"])[0]
        found = [CLASSES_BY_TASK[task].get(type(config), None) for task in ("classification", "causal")]
        classes = {model_class.__name__: model_class for model_class in found if model_class}
        if wanted not in classes:
            raise UnsupportedModelError(f"a head's config.architectures must name {' or '.join(classes)}, got {wanted}")
        return cls(build(classes[wanted], config, 0, 0), first_block=0)

    def forward(self, hidden: Float[Tensor, "B *T H"]) -> Float[Tensor, "B ..."]:  # type: ignore[override]
        """Hidden states to logits: (B, H) to (B, C) of a classifier, (B, T, H) to (B, T, V) of a causal LM."""
        tokens = hidden if self.task == "causal" else hidden.unsqueeze(1)  # (B, T, H)
        return super().forward(tokens, torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device))
