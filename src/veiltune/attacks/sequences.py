"""Flat rows of several texts: to padded batches and back, scores over whole texts, and the contextless codebook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from veiltune._validate import in_range, positive_int
from veiltune.errors import InputError
from veiltune.models.split import BottomModel

_CODEBOOK_BATCH = 2048
_BOOTSTRAP_CELLS = 2**22


def check_lengths(lengths: Sequence[int], rows: int) -> None:
    """Refuses lengths that do not cut `rows` rows into texts of at least one token."""
    if any(length < 1 for length in lengths) or sum(lengths) != rows:
        raise InputError(
            f"lengths must be at least 1 each and sum to the number of rows, {rows}, got a sum of {sum(lengths)} "
            f"over {len(lengths)} texts"
        )


def pad_texts(
    rows: Shaped[Tensor, "N ..."], lengths: Sequence[int]
) -> tuple[Shaped[Tensor, "B T ..."], Bool[Tensor, "B T"]]:
    """Flat rows to a batch padded on the right with zeros, and its mask.

    >>> batch, mask = pad_texts(torch.tensor([1, 2, 3]), [1, 2])
    >>> batch.tolist(), mask.tolist()
    ([[1, 0], [2, 3]], [[True, False], [True, True]])

    Raises:
        InputError: If the lengths do not sum to N.
    """
    check_lengths(lengths, len(rows))
    sizes = torch.tensor(lengths, dtype=torch.long, device=rows.device)
    mask = torch.arange(max(lengths, default=0), device=rows.device) < sizes.unsqueeze(1)
    batch = rows.new_zeros((*mask.shape, *rows.shape[1:]))
    batch[mask] = rows
    return batch, mask


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Texts grouped so that neighbours in length go together and no padded batch exceeds `max_tokens`.

    >>> batches_by_length([3, 9, 4, 8], max_tokens=16)
    [[0, 2], [3], [1]]

    A text longer than `max_tokens` is a batch of its own.
    """
    positive_int(max_tokens=max_tokens)
    batches: list[list[int]] = []
    for text in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[text] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(text)
        else:
            batches.append([text])
    return batches


def rows_of(lengths: Sequence[int], texts: Sequence[int]) -> Int[Tensor, " rows"]:
    """The flat rows of some texts, text after text.

    >>> rows_of([2, 3, 1], [2, 0])
    tensor([5, 0, 1])
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in texts])


def rouge_l(guess: Int[Tensor, " N"], secret: Int[Tensor, " N"], lengths: Sequence[int]) -> float:
    """Mean ROUGE-L F1 over texts: how much of each text comes back in the right order.

    >>> rouge_l(torch.tensor([1, 2, 9, 4]), torch.tensor([1, 2, 3, 5]), [3, 1])  # 2 of 3 and 0 of 1
    0.3333333333333333

    Args:
        guess: One guess per token.
        secret: The true token ids, special tokens left out on both sides.
        lengths: Tokens of each text; texts of no token are left out of the mean.

    Raises:
        InputError: If the sizes disagree or there is no token.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"; on token ids, no stemming.
    """
    present = [length for length in lengths if length]
    check_lengths(present, len(secret))
    if len(guess) != len(secret) or not present:
        raise InputError(f"guess and secret must be of one size above 0, got {len(guess)} and {len(secret)}")
    pairs = zip(guess.split(present), secret.split(present), strict=True)
    shares = [_common_length(a.tolist(), b.tolist()) / len(b) for a, b in pairs]  # equal sizes: F1 is the share
    return sum(shares) / len(shares)


def _common_length(first: list[int], second: list[int]) -> int:
    """Length of the longest common subsequence; bit i of `row` is clear where prefix i + 1 gains a match."""
    places: dict[int, int] = {}
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(first) - row.bit_count()


def bootstrap_by_text(
    hits: Bool[Tensor, " N"], lengths: Sequence[int], seed: int, resamples: int = 1000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the share of hits, resampling whole texts.

    Guarantee:
        Tokens of one text are not independent; texts are taken to be. Approximate: too narrow for a few texts or
        shares near 0 or 1, so report the wider of it and the Clopper-Pearson interval.

    Args:
        hits: Whether each token was recovered.
        lengths: Tokens of each text (0 is allowed).
        seed: Of the resampling.
        resamples: How many.
        confidence: In (0, 1).

    Raises:
        InputError: If the lengths do not sum to N or there is no token.

    Source: Efron and Tibshirani 1993; for texts Koehn 2004.
    """
    present = [length for length in lengths if length]
    check_lengths(present, len(hits))
    if not present:
        raise InputError("bootstrap_by_text needs at least one token, got none")
    alpha = 1 - in_range(0.0, 1.0, confidence=confidence)
    sizes = torch.tensor(present, dtype=torch.float64)
    found = torch.stack([part.double().sum() for part in hits.cpu().split(present)])
    generator, shares = torch.Generator().manual_seed(seed), []
    at_once = max(1, _BOOTSTRAP_CELLS // len(present))
    for start in range(0, positive_int(resamples=resamples), at_once):
        count = min(at_once, resamples - start)
        drawn = torch.randint(len(present), (count, len(present)), generator=generator)
        shares.append(found[drawn].sum(dim=1) / sizes[drawn].sum(dim=1))
    low, high = torch.cat(shares).quantile(torch.tensor([alpha / 2, 1 - alpha / 2], dtype=torch.float64)).tolist()
    return low, high


@torch.no_grad()
def token_codebook(bottom: BottomModel, *, template: Sequence[int], position: int) -> Float[Tensor, "V H"]:
    """What each token of the vocabulary looks like at the cut, alone in a template.

    At cut 0 with word embeddings that is the embedding matrix and exact; above, context moves the vectors, so nearest
    neighbours in it are a floor.

    Args:
        bottom: The public bottom model; its mode is kept.
        template: Token ids of a text of one token, special tokens included, such as [CLS] a [SEP].
        position: Where in it the token stands.

    Raises:
        InputError: If the position is not in the template.
    """
    if not 0 <= position < len(template):
        raise InputError(f"position must be in [0, {len(template)}) (the template's length), got {position}")
    was_training = bottom.training
    bottom.train(False)
    rows = []
    for chunk in torch.arange(len(bottom.word_embeddings)).split(_CODEBOOK_BATCH):
        ids = torch.tensor(list(template)).repeat(len(chunk), 1)
        ids[:, position] = chunk
        ids = ids.to(bottom.word_embeddings.device)
        rows.append(bottom(ids, torch.ones_like(ids))[:, position].float())
    bottom.train(was_training)
    return torch.cat(rows)
