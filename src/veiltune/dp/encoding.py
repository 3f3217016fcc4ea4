"""Texts to token ids and labels, one example a row of the table, and examples to padded batches.

The form of a prompted example, the same in training and in generation (`prompt_ids` makes its first half for both)::

    [bos]  prompt  separator | target  eos
                     no loss | loss

`bos` is there only where the tokenizer itself begins texts with it (Llama does, GPT-2 and SmolLM2 do not). The parts
are tokenized apart, so that no token spans the border and a prompt at generation is the very beginning of the
example. Without prompts (plain language modelling) there is no separator and the form is ``[bos] target eos``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from veiltune._validate import one_of, positive_int
from veiltune.data.prompts import Prompted
from veiltune.dp.masking import NO_LOSS as NO_LOSS
from veiltune.dp.masking import without_spans
from veiltune.errors import DataError, InputError

SEPARATOR = "\n"
PROMPT_RULE = (
    "the prompt keeps its end and the target its beginning; each is sure of half of the length and may use what the "
    "other leaves"
)
TEXT_RULE = "the text keeps its beginning"


@dataclass(frozen=True, repr=False)
class Encoded:
    """An example of a causal language model; its repr shows lengths only.

    Attributes:
        input_ids: Of length T.
        labels: Of length T: the same ids where there is loss, -100 elsewhere and always at the first position, which
            nothing predicts. So the positions that are not -100 are exactly the ones that count.
    """

    input_ids: list[int]
    labels: list[int]

    def __repr__(self) -> str:
        return f"Encoded({len(self.input_ids)} tokens, {sum(label != NO_LOSS for label in self.labels)} with loss)"


@dataclass(frozen=True, repr=False)
class Classified:
    """An example of a classifier; its repr shows the length only.

    Attributes:
        input_ids: Special tokens included.
        label: Its class.
    """

    input_ids: list[int]
    label: int

    def __repr__(self) -> str:
        return f"Classified({len(self.input_ids)} tokens)"


Example = TypeVar("Example", Encoded, Classified)


@dataclass(frozen=True, repr=False)
class EncodedSet(Generic[Example]):
    """The examples of a table, and what was cut.

    >>> EncodedSet([Classified([1, 2, 3], 0)], cut=1, max_length=3, rule=TEXT_RULE)
    EncodedSet(1 examples; 1 were longer than 3 tokens and were cut: the text keeps its beginning)

    Attributes:
        examples: One a row, in row order.
        cut: How many were longer than `max_length`.
        max_length: In tokens, special ones included.
        rule: How they were cut, in words.
    """

    examples: list[Example]
    cut: int
    max_length: int
    rule: str

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} examples; {self.note()})"

    def note(self) -> str:
        """What a run says aloud about long examples."""
        if not self.cut:
            return f"none was longer than {self.max_length} tokens"
        return f"{self.cut} were longer than {self.max_length} tokens and were cut: {self.rule}"


def encode_prompted(
    tokenizer: Any,
    prompted: Prompted,
    *,
    max_length: int,
    loss_on: Literal["target", "all"] = "target",
    separator: str = SEPARATOR,
    without_loss: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> EncodedSet[Encoded]:
    r"""Encodes prompts and targets in the form that this module's docstring shows.

    =======================================  ============================================================
    example                                  becomes
    =======================================  ============================================================
    fits into max_length                     whole
    longer, target at most half              the prompt loses its beginning (bos and separator stay)
    longer, prompt part at most half         the target loses its end, eos with it
    longer, both above half                  both, to a half each
    no prompt, longer                        the text loses its end; the rest of the row is not used
    target without a token                   refused
    =======================================  ============================================================

    A long text is one example, not several: splitting it would multiply what one row can do to the gradient.

    Args:
        tokenizer: A Hugging Face tokenizer with an end-of-text token. Names of special tokens in a text count as these
            tokens, as elsewhere in Hugging Face.
        prompted: The rows.
        max_length: Longest example, in tokens.
        loss_on: "target": the target and eos. "all": every token but the first, for which nothing predicts.
        separator: Between prompt and target; a newline by default, or the name of a special token: LoRA and Yu et al.
            trained GPT-2 with ``<|endoftext|>``.
        without_loss: Of each target, pairs of characters (first, one past the last) whose tokens have no loss.

    Raises:
        DataError: If a target has no tokens; names its row.
        InputError: If the tokenizer has no end-of-text token, max_length is too small for the form, or the tokenizer
            cannot say which characters a token has (only fast ones can).

    Source: the form without bos, with loss on the target: Hu et al. 2021, arXiv:2106.09685; arXiv:2110.06500.
    """
    one_of(("target", "all"), loss_on=loss_on)
    eos = _special(tokenizer, "eos_token_id", "marks the end of a target")
    start = _start(tokenizer)
    with_prompts = any(prompted.prompts)
    frame = len(start) + (len(_ids(tokenizer, [separator])[0]) if with_prompts else 0)
    _check_room(max_length, frame=frame, least=2)
    heads = prompt_ids(tokenizer, prompted.prompts, separator=separator)
    targets = _ids(tokenizer, prompted.targets)
    wanted = targets if without_loss is None else _labels(tokenizer, prompted.targets, targets, without_loss)
    examples: list[Encoded] = []
    cut = 0
    for row, (head, target, own) in enumerate(zip(heads, targets, wanted, strict=True), start=1):
        if not target:
            raise DataError(f"the target of row {row} has no tokens; fill it or remove the row")
        target = [*target, eos]
        cut += len(head) + len(target) > max_length
        head = _keep_end(head, max(max_length // 2, max_length - len(target)), fixed=len(start))
        target, own = target[: max_length - len(head)], [*own, eos][: max_length - len(head)]
        labels = [NO_LOSS] * len(head) + own if loss_on == "target" else head + own
        examples.append(Encoded(head + target, [NO_LOSS, *labels[1:]]))
    return EncodedSet(examples, cut, max_length, PROMPT_RULE if with_prompts else TEXT_RULE)


def prompt_ids(
    tokenizer: Any, prompts: Sequence[str], *, separator: str = SEPARATOR, max_length: int | None = None
) -> list[list[int]]:
    """The ids that stand before the target of each prompt, in training and in generation.

    Args:
        tokenizer: As in `encode_prompted`.
        prompts: An empty one is no prompt: it has no separator.
        separator: As in `encode_prompted`.
        max_length: A longer one loses the beginning of its prompt, as in `encode_prompted`; None to keep all.

    Returns:
        One list a prompt; empty for an empty prompt where the tokenizer begins texts with nothing.
    """
    start, end = _start(tokenizer), _ids(tokenizer, [separator])[0]
    distinct = list(dict.fromkeys(prompts))
    encoded = dict(zip(distinct, _ids(tokenizer, distinct), strict=True))
    heads = [start + encoded[prompt] + (end if prompt else []) for prompt in prompts]
    if max_length is None:
        return heads
    _check_room(max_length, frame=len(start) + len(end), least=1, halves=False)
    return [_keep_end(head, max_length, fixed=len(start)) for head in heads]


def encode_texts_with_labels(
    tokenizer: Any, texts: Sequence[str], classes: Sequence[int], *, max_length: int
) -> EncodedSet[Classified]:
    """Encodes texts for a classifier as the tokenizer does it, special tokens included, cut at their end.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: One a row.
        classes: One a row, as `LabelSet.encode` gives them.
        max_length: Longest example, in tokens.

    Raises:
        DataError: If the lengths differ or a text has no tokens; names its row.
        InputError: If max_length leaves no room beside the special tokens.
    """
    special = tokenizer.num_special_tokens_to_add()
    if positive_int(max_length=max_length) <= special:
        raise InputError(
            f"max_length must leave room beside the {special} tokens that the tokenizer adds, got {max_length}"
        )
    if len(texts) != len(classes):
        raise DataError(f"classes must be one a text, got {len(classes)} for {len(texts)} texts")
    kept = _ids(tokenizer, texts, add_special_tokens=True, truncation=True, max_length=max_length)
    for row, ids in enumerate(kept, start=1):
        if not ids:
            raise DataError(f"the text of row {row} has no tokens; fill it or remove the row")
    full = [text for text, ids in zip(texts, kept, strict=True) if len(ids) >= max_length]
    cut = sum(len(ids) > max_length for ids in _ids(tokenizer, full, add_special_tokens=True))
    examples = [Classified(ids, int(label)) for ids, label in zip(kept, classes, strict=True)]
    return EncodedSet(examples, cut, max_length, TEXT_RULE)


def collate(
    examples: Sequence[Encoded] | Sequence[Classified],
    *,
    pad_id: int,
    padding_side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """Pads examples to the longest of them, as ``model(**batch)`` takes them.

    >>> batch = collate([Encoded([5, 6, 7], [-100, 6, 7]), Encoded([8, 9], [-100, 9])], pad_id=0, padding_side="left")
    >>> {name: values.tolist()[1] for name, values in batch.items()}
    {'input_ids': [0, 8, 9], 'attention_mask': [0, 1, 1], 'labels': [-100, -100, 9], 'position_ids': [0, 0, 1]}

    Args:
        examples: At least one, all of one kind.
        pad_id: Stands on padding; any id of the vocabulary, for it is masked.
        padding_side: "left" adds the position ids that make padding harmless to a decoder. Encoders count positions
            in their own way: pad them on the right.

    Returns:
        int64 tensors: ``input_ids``, ``attention_mask`` (B, T); ``labels`` (B, T) with -100 on padding, or (B,) of a
        classifier; with left padding ``position_ids`` (B, T), 0 on padding.

    Raises:
        InputError: If there is no example (an empty Poisson batch has nothing to run) or the side is unknown.
    """
    one_of(("right", "left"), padding_side=padding_side)
    if not isinstance(pad_id, int):
        raise InputError(f"pad_id must be a token id, got {pad_id!r}; where the tokenizer has none, 0 will do")
    if not examples:
        raise InputError("collate needs at least one example; skip the model on an empty batch")
    batch = {
        "input_ids": _pad([example.input_ids for example in examples], pad_id, padding_side),
        "attention_mask": _pad([[1] * len(example.input_ids) for example in examples], 0, padding_side),
    }
    labels = [example.labels if isinstance(example, Encoded) else example.label for example in examples]
    sequences = [row for row in labels if isinstance(row, list)]
    batch["labels"] = _pad(sequences, NO_LOSS, padding_side) if sequences else torch.tensor(labels)
    if padding_side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return batch


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    padded = [[*more, *row] if side == "left" else [*row, *more] for row, more in zip(rows, fill, strict=True)]
    return torch.tensor(padded)


def _ids(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False, **limits: Any) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: no remark on texts beyond the model's length, which are cut and counted here
    return [
        list(ids)
        for ids in tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False, **limits)["input_ids"]
    ]


def _labels(
    tokenizer: Any,
    texts: Sequence[str],
    ids: Sequence[list[int]],
    spans: Sequence[Sequence[tuple[int, int]]],
) -> list[list[int]]:
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("the tokenizer cannot say which characters a token has; use a fast one, or no mask_personal")
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return [
        without_spans(row, offsets, own)
        for row, offsets, own in zip(ids, encoded["offset_mapping"], spans, strict=True)
    ]


def _special(tokenizer: Any, name: str, purpose: str) -> int:
    token = getattr(tokenizer, name, None)
    if token is None:
        raise InputError(f"the tokenizer has no {name}, which {purpose}; use that of a causal language model")
    return int(token)


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: the bos token, or nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    begun = _ids(tokenizer, ["a"], add_special_tokens=True)[0][:1]
    return begun if begun == [bos] else []


def _check_room(max_length: int, *, frame: int, least: int, halves: bool = True) -> None:
    """Refuses a length that has no room for the parts of the form that are never cut."""
    needed = max(least, 2 * frame if halves else frame)
    if positive_int(max_length=max_length) < needed:
        raise InputError(
            f"max_length must be at least {needed} for this tokenizer and separator, got {max_length}; raise it"
        )


def _keep_end(head: list[int], room: int, *, fixed: int) -> list[int]:
    """At most `room` ids: the first `fixed` and the last ones."""
    if len(head) <= room:
        return head
    return head[:fixed] + head[len(head) - (room - fixed) :]
