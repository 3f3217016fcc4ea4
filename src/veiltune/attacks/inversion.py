"""Embedding inversion: from released vectors back to tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.result import AttackResult
from veiltune.errors import InputError

_BLOCK = 2**24  # distances held at a time


def invert_by_nearest_embedding(
    representations: Float[Tensor, "tokens hidden"],
    vocabulary: Float[Tensor, "vocab hidden"],
    *,
    top_k: int = 1,
) -> Int[Tensor, "tokens top_k"]:
    """Guesses each token as the vocabulary entries nearest to its representation in L2.

    >>> vocabulary = torch.eye(4)
    >>> secret = torch.tensor([2, 0, 3])
    >>> guesses = invert_by_nearest_embedding(vocabulary[secret], vocabulary)
    >>> guesses.squeeze(-1)
    tensor([2, 0, 3])
    >>> print(score_token_recovery(guesses, secret))
    embedding_inversion: 1.00 [0.29, 1.00] n=3

    Threat model:
        Honest-but-curious vendor: knows the vocabulary matrix, sees representations, no auxiliary text. A weak attack
        at deeper cuts and under noise: its success is a floor of what leaks, not a bound.

    Args:
        representations: What the vendor received, padding removed.
        vocabulary: One row a token id: the public embedding matrix or, above it, each token's vector at the cut.
        top_k: Guesses per token, best first; in [1, vocab].

    Returns:
        Token ids, nearest first.

    Raises:
        InputError: If top_k is out of range or the widths differ.

    Source: Song and Raghunathan 2020, arXiv:2004.00053; as used for d_chi-privacy in arXiv:2104.07504.
    """
    if not 1 <= top_k <= len(vocabulary):
        raise InputError(f"top_k must be in [1, {len(vocabulary)}] (the vocabulary size), got {top_k}")
    if representations.shape[-1] != vocabulary.shape[-1]:
        raise InputError(
            f"representations have width {representations.shape[-1]}, the vocabulary {vocabulary.shape[-1]}"
        )
    table = vocabulary.float()
    half_squares = table.square().sum(dim=-1) / 2
    blocks = representations.float().split(max(1, _BLOCK // len(table)))
    # ||y - v||^2 = ||y||^2 - 2 (y.v - ||v||^2 / 2): the nearest maximises the bracket
    guesses = [(block @ table.T - half_squares).topk(top_k, dim=-1).indices for block in blocks]
    return torch.cat(guesses) if guesses else torch.zeros(0, top_k, dtype=torch.long)


def score_token_recovery(
    guesses: Int[Tensor, "tokens top_k"], secret: Int[Tensor, " tokens"], *, name: str = "embedding_inversion"
) -> AttackResult:
    """Counts tokens that are among their guesses.

    Args:
        guesses: As the attack returned them.
        secret: The true token ids, special tokens left out: they are no secret.
        name: Of the attack, for the report.

    Raises:
        InputError: If the lengths differ or there is no token.
    """
    if len(guesses) != len(secret):
        raise InputError(f"guesses are for {len(guesses)} tokens, the secret has {len(secret)}")
    hits = (guesses == secret.unsqueeze(-1)).any(dim=-1)
    return AttackResult(name=name, successes=int(hits.sum()), trials=len(secret))
