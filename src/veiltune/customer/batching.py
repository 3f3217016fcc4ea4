"""Token ids to batches: length-sorted within windows, the same for the same seed, whoever asks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veiltune.csprng import SecureGenerator
from veiltune.errors import DataError

WINDOW_BATCHES = 50


def encode_texts(tokenizer: Any, texts: Sequence[str], *, max_length: int, pad_to: int = 0) -> list[list[int]]:
    """Token ids of each text, special tokens included, cut at `max_length`.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: What to encode.
        max_length: Longest sequence kept, in tokens.
        pad_to: Round every length up to a multiple of this with padding tokens, which are then treated as real ones
            (noised, sent, attended to), so that lengths tell less. 0 for exact lengths.
    """
    encoded: list[list[int]] = [
        list(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    ]
    if any(not ids for ids in encoded):
        raise DataError("a text has no tokens; remove empty texts")
    if pad_to:
        if tokenizer.pad_token_id is None:
            raise DataError("wire.pad_to needs a tokenizer with a padding token; set pad_to = 0")
        encoded = [ids + [tokenizer.pad_token_id] * (padded_length(len(ids), pad_to) - len(ids)) for ids in encoded]
    return encoded


def padded_length(length: int, pad_to: int) -> int:
    """`length` rounded up to a multiple of `pad_to`; itself for 0.

    >>> padded_length(500, 16), padded_length(512, 16), padded_length(7, 0)
    (512, 512, 7)
    """
    return -(-length // pad_to) * pad_to if pad_to else length


def pad_ids(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sequences -> (B, T) ids padded on the right with 0, and the (B, T) mask that hides the padding."""
    rows = [torch.tensor(list(ids)) for ids in token_ids]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return padded, mask.long()


def secret_order(secret: bytes, count: int) -> list[int]:
    """A permutation of `count` examples, drawn from a run's secret.

    Guarantee:
        Batches that are drawn over the examples in this order tell whoever lacks the secret nothing of their places in
        the table, of labels, authors or dates by which it is sorted. Their lengths remain what they are.

    Args:
        secret: The run's 32 bytes.
        count: Examples.
    """
    return [int(i) for i in SecureGenerator(secret).derive("order").uniform((count,)).argsort()]


def epoch_batches(
    lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int, order: Sequence[int] | None = None
) -> list[list[int]]:
    """The batches of an epoch: every example once, neighbours in length together, shuffled by (seed, epoch).

    Args:
        lengths: Tokens of each example.
        batch_size: Examples of a batch; the last may have fewer.
        seed: Which the vendor knows.
        epoch: Counted from 0.
        order: What is shuffled, a permutation of the examples: a `secret_order` where the vendor sees the batches. None
            for the table's own.

    >>> epoch_batches([3, 9, 4, 8], batch_size=2, seed=0, epoch=0)
    [[1, 3], [2, 0]]
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)) if order is None else order)
    rng.shuffle(order)
    window = batch_size * WINDOW_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        chunk = sorted(order[start : start + window], key=lambda i: -lengths[i])
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return batches


def micro_batches(batch: Sequence[int], count: int) -> list[list[int]]:
    """Cuts a batch in at most `count` nearly equal parts, none empty.

    >>> micro_batches([5, 6, 7], 2)
    [[5, 6], [7]]
    """
    size, extra = divmod(len(batch), min(count, len(batch)))
    parts, start = [], 0
    for i in range(min(count, len(batch))):
        stop = start + size + (i < extra)
        parts.append(list(batch[start:stop]))
        start = stop
    return parts


def learning_rate_at(step: int, *, total: int, warmup_fraction: float, peak: float) -> float:
    """Linear warm-up from 0, then linear decay to 0, as in SAP's family of experiments.

    >>> [round(learning_rate_at(s, total=4, warmup_fraction=0.25, peak=1.0), 2) for s in range(4)]
    [1.0, 1.0, 0.67, 0.33]
    """
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)
