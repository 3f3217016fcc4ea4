"""Embedding inversion: from released vectors back to tokens, each token by itself."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from veiltune._validate import positive, positive_int
from veiltune.attacks.result import AttackResult
from veiltune.errors import InputError

_BLOCK = 2**24  # scores held at a time (64 MB)


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
        at deeper cuts and under noise: its success is a floor of what leaks, not a bound. Costs one matrix product.

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
    return rank_candidates(representations, vocabulary, top_k=top_k)[0]


def invert_by_map(
    representations: Float[Tensor, "tokens hidden"],
    vocabulary: Float[Tensor, "vocab hidden"],
    *,
    log_prior: Float[Tensor, " vocab"],
    eta: float | None = None,
    sigma: float | None = None,
    top_k: int = 1,
) -> Int[Tensor, "tokens top_k"]:
    """Guesses the tokens most probable given the representation: nearness weighed against how common a token is.

    >>> vocabulary, seen = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.6]])
    >>> invert_by_map(seen, vocabulary, log_prior=torch.tensor([0.9, 0.1]).log(), eta=2.0)
    tensor([[0]])
    >>> invert_by_map(seen, vocabulary, log_prior=torch.tensor([0.9, 0.1]).log(), eta=20.0)
    tensor([[1]])

    Threat model:
        Honest-but-curious vendor: knows the vocabulary matrix, the mechanism and its strength (both are public), and
        how often each token occurs in public text. Where the vocabulary matrix is exact (cut 0) no attack that looks
        at one token alone does better on average over that prior. Above cut 0 the matrix is an approximation and
        trained inverters do better. Costs one matrix product.

    Args:
        representations: What the vendor received, padding removed.
        vocabulary: As in `invert_by_nearest_embedding`.
        log_prior: Log-probability of each token id, see `unigram_log_prior`.
        eta: Strength of d_chi noise, 1 / distance.
        sigma: Standard deviation of Gaussian noise per coordinate. Exactly one of the two.
        top_k: Guesses per token, best first; in [1, vocab].

    Returns:
        Token ids, most probable first.

    Raises:
        InputError: If not exactly one strength is given, or a shape or number is out of range.

    Source: the Bayes decision rule on the likelihoods of Feyisetan et al. 2020, arXiv:1910.08902.
    """
    if (eta is None) == (sigma is None):
        raise InputError("give exactly one of eta (d_chi noise) and sigma (Gaussian noise)")
    return rank_candidates(representations, vocabulary, log_prior=log_prior, eta=eta, sigma=sigma, top_k=top_k)[0]


@torch.no_grad()
def rank_candidates(
    representations: Float[Tensor, "tokens hidden"],
    vocabulary: Float[Tensor, "vocab hidden"],
    *,
    top_k: int,
    log_prior: Float[Tensor, " vocab"] | None = None,
    eta: float | None = None,
    sigma: float | None = None,
    multipliers: Float[Tensor, " vocab"] | None = None,
) -> tuple[Int[Tensor, "tokens top_k"], Float[Tensor, "tokens top_k"]]:
    """The best candidates of each token and their scores, for attacks that go on from there.

    Memory: blocks of 64 MB and the result, whatever the number of tokens.

    Args:
        representations: What the vendor received, padding removed.
        vocabulary: One row a token id.
        top_k: Candidates per token; in [1, vocab].
        log_prior: Added to the log-likelihood; none for a flat prior.
        eta: For d_chi noise the log-likelihood is -eta ||y - v||.
        sigma: For Gaussian noise it is -||y - v||^2 / (2 sigma^2). Without either sigma is 1.
        multipliers: By which each token raises eta, or lowers sigma, > 0 and finite; none for one scale.

    Returns:
        Token ids, best first, and log-likelihood plus log-prior up to a constant of the mechanism.

    Raises:
        InputError: If a shape or number is out of range.
    """
    _check(representations, vocabulary, log_prior, top_k)
    if eta is not None and sigma is not None:
        raise InputError("give at most one of eta and sigma")
    scale = positive(eta=eta) if eta is not None else 1 / positive(sigma=1.0 if sigma is None else sigma) ** 2
    whole = eta is not None or multipliers is not None  # distances; else what ranks as they do
    table = vocabulary.float()
    half_squares = table.square().sum(dim=-1) / 2
    rows = max(1, _BLOCK // len(table))
    buffer = table.new_empty(min(rows, max(1, len(representations))), len(table))
    ids = torch.empty(len(representations), top_k, dtype=torch.long, device=table.device)
    scores = table.new_empty(len(representations), top_k)
    for start in range(0, len(representations), rows):
        block = representations[start : start + rows].float()
        # y.v - ||v||^2 / 2 = (||y||^2 - ||y - v||^2) / 2 is largest for the nearest
        product = torch.addmm(half_squares, block, table.T, beta=-1, out=buffer[: len(block)])
        if whole:
            square = product.mul_(-2).add_(block.square().sum(dim=-1, keepdim=True)).clamp_(min=0)
            product = square.mul_(-scale / 2) if eta is None else square.sqrt_().mul_(-scale)
            if multipliers is not None:
                product.mul_(multipliers.square() if eta is None else multipliers)
                product.add_(multipliers.log(), alpha=table.shape[1])
        elif log_prior is not None:
            product.mul_(scale)
        if log_prior is not None:
            product.add_(log_prior)
        best = best_columns(product, top_k)
        if not whole:
            rest = block.square().sum(dim=-1, keepdim=True) * (-scale / 2)
            best = best[0] * (1.0 if log_prior is not None else scale) + rest, best[1]
        scores[start : start + rows], ids[start : start + rows] = best
    return ids, scores


def unigram_log_prior(
    token_ids: Int[Tensor, " tokens"], vocab_size: int, smoothing: float = 0.1
) -> Float[Tensor, " {vocab_size}"]:
    """Log-probability of each token id by its count in public text.

    >>> unigram_log_prior(torch.tensor([0, 0, 2]), 3, smoothing=1.0).exp()
    tensor([0.5000, 0.1667, 0.3333])

    Args:
        token_ids: Of public text.
        vocab_size: V.
        smoothing: Added to every count, > 0, so that no token is ruled out.

    Raises:
        InputError: If smoothing is not positive or an id is not in [0, vocab_size).
    """
    positive(smoothing=smoothing)
    check_token_ids(token_ids, positive_int(vocab_size=vocab_size))
    counts = torch.bincount(token_ids, minlength=vocab_size).double() + smoothing
    return (counts / counts.sum()).log().float()


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Refuses ids that the vocabulary does not have; the message does not name them."""
    if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size:
        raise InputError(f"token_ids must be in [0, {vocab_size}), some are not; was the tokenizer another model's?")


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
    return AttackResult(name=name, successes=int(token_hits(guesses, secret).sum()), trials=len(secret))


def token_hits(guesses: Int[Tensor, "tokens top_k"], secret: Int[Tensor, " tokens"]) -> Bool[Tensor, " tokens"]:
    """Which tokens are among their guesses.

    Raises:
        InputError: If the lengths differ.
    """
    if len(guesses) != len(secret):
        raise InputError(f"guesses are for {len(guesses)} tokens, the secret has {len(secret)}")
    return (guesses == secret.unsqueeze(-1)).any(dim=-1)


def best_columns(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` largest entries of each row and their columns, largest first."""
    if top_k == 1:
        values, indices = scores.max(dim=-1, keepdim=True)  # twice as fast as topk(1)
        return values, indices
    values, indices = scores.topk(top_k, dim=-1)
    return values, indices


def _check(representations: Tensor, vocabulary: Tensor, log_prior: Tensor | None, top_k: int) -> None:
    if not 1 <= top_k <= len(vocabulary):
        raise InputError(f"top_k must be in [1, {len(vocabulary)}] (the vocabulary size), got {top_k}")
    if representations.shape[-1] != vocabulary.shape[-1]:
        raise InputError(
            f"representations have width {representations.shape[-1]}, the vocabulary {vocabulary.shape[-1]}"
        )
    if log_prior is not None and log_prior.shape != vocabulary.shape[:1]:
        raise InputError(f"log_prior must have {len(vocabulary)} entries, one a token id, got {len(log_prior)}")
