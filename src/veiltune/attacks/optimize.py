"""Inversion by optimisation: the tokens whose own representations come closest to the released ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune._validate import positive, positive_int
from veiltune.attacks.sequences import batches_by_length, check_lengths, pad_texts, rows_of
from veiltune.errors import InputError
from veiltune.models.split import BottomModel

_BATCH_TOKENS = 1024
_HOT, _COLD = 1.0, 0.05  # temperatures of the softmax over candidates
_RESTART_NOISE = 1.0  # of the scores' spread

Objective = Callable[[Tensor, Tensor], Tensor]
"""Relaxed word embeddings (B, T, E) and mask (B, T) -> one loss a text (B,)."""


def invert_by_optimization(
    bottom: BottomModel,
    values: Float[Tensor, "N H"],
    lengths: Sequence[int],
    *,
    candidates: Int[Tensor, "N K"],
    initial_scores: Float[Tensor, "N K"] | None = None,
    log_prior: Float[Tensor, " V"] | None = None,
    sigma: float | None = None,
    fixed: Mapping[int, int] | None = None,
    steps: int = 200,
    restarts: int = 1,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> Int[Tensor, "N 1"]:
    """Guesses whole texts: runs mixtures of candidate tokens through the bottom and moves them towards the release.

    At every position the mixture is ``softmax(Z / T)`` over the candidates; Z is found by AdamW on
    ``||bottom(mixture) - values||^2`` while T falls from 1 to 0.05. Of all restarts, and the start itself, each text
    keeps the tokens whose own representations are nearest.

    Threat model:
        Honest-but-curious vendor: holds the bottom model, sees the releases, needs no text. Above cut 0 far stronger
        than nearest neighbours where there is little noise; under noise, trained inverters do better and cost less.
        Bounded by its candidates: a token that is not among them is not found. Costs `steps` forward and backward
        passes of the bottom over the texts for each restart.

    Args:
        bottom: The public bottom model; its weights are not changed.
        values: Released vectors of several texts, one after the other, special tokens included.
        lengths: Rows of each text.
        candidates: K token ids for each row, such as the nearest in `sequences.token_codebook` (by
            `inversion.rank_candidates`) or the best of a trained inverter.
        initial_scores: Where Z starts, best candidate highest; the candidates' order if not given.
        log_prior: Log-probability of each token id, weighed against the squared distance by `sigma`.
        sigma: Deviation of the noise per coordinate; needed with `log_prior`.
        fixed: Known tokens by position in each text, negative from its end, such as ``{0: cls, -1: sep}``.
        steps: Of AdamW for each restart.
        restarts: The first starts at the scores, the others at the scores plus noise.
        learning_rate: Of AdamW on Z.
        seed: Of the restarts.

    Raises:
        InputError: If sizes disagree or a number is out of range.

    Source: Song and Raghunathan 2020, arXiv:2004.00053 (white-box); SAP's attack above cut 0, arXiv:2312.15603.
    """
    check_lengths(lengths, len(values))
    _check_candidates(candidates, initial_scores, len(values))
    if (log_prior is None) != (sigma is None):
        raise InputError("give log_prior and sigma together: sigma weighs the distance against the prior")
    embeddings = bottom.word_embeddings.detach().float()
    scores = spread_scores(candidates) if initial_scores is None else initial_scores.float()
    candidates, scores = pin_tokens(candidates, scores, lengths, fixed or {})
    weight = 1 / values.float().square().mean() if sigma is None else 1 / positive(sigma=sigma) ** 2
    guesses = torch.empty(len(values), 1, dtype=torch.long, device=values.device)
    was_training = bottom.training
    bottom.train(False)
    for texts in batches_by_length(lengths, _BATCH_TOKENS):
        rows, sizes = rows_of(lengths, texts).to(values.device), [lengths[i] for i in texts]
        released = pad_texts(values[rows].float(), sizes)[0]

        def objective(mixed: Tensor, mask: Tensor, released: Tensor = released) -> Tensor:
            error = (bottom.from_embeddings(mixed, mask.long()).float() - released).square().sum(dim=-1)
            return (error * mask).sum(dim=1) * weight / 2

        guesses[rows, 0] = search_tokens(
            objective,
            embeddings,
            candidates[rows],
            scores[rows],
            sizes,
            log_prior=log_prior,
            steps=steps,
            restarts=restarts,
            learning_rate=learning_rate,
            seed=seed,
        )
    bottom.train(was_training)
    return guesses


def search_tokens(
    objective: Objective,
    embeddings: Float[Tensor, "V E"],
    candidates: Int[Tensor, "N K"],
    scores: Float[Tensor, "N K"],
    lengths: Sequence[int],
    *,
    steps: int,
    restarts: int,
    learning_rate: float,
    seed: int,
    log_prior: Float[Tensor, " V"] | None = None,
) -> Int[Tensor, " N"]:
    """Minimises an objective of each text over tokens by the annealed relaxation; see `invert_by_optimization`.

    Args:
        objective: Word embeddings (B, T, E), possibly mixed, and mask -> one loss a text; differentiable.
        embeddings: Public word embeddings.
        candidates: Token ids for each row; a row with one finite score is known.
        scores: Where to start; -inf rules a candidate out.
        lengths: Rows of each text.
        steps: Of AdamW for each restart.
        restarts: At least 1.
        learning_rate: Of AdamW.
        seed: Of the restarts.
        log_prior: Subtracted from the objective where given.
    """
    positive_int(steps=steps), positive_int(restarts=restarts), positive(learning_rate=learning_rate)
    ids, mask = pad_texts(candidates, lengths)
    start = pad_texts(scores, lengths)[0]
    generator = torch.Generator().manual_seed(seed)
    prior = None if log_prior is None else log_prior[ids]

    def loss(weights: Tensor) -> Tensor:
        total = objective((weights.unsqueeze(-2) @ embeddings[ids]).squeeze(-2), mask)
        return total if prior is None else total - ((weights * prior).sum(dim=-1) * mask).sum(dim=1)

    best = start.argmax(dim=-1)
    lowest = _loss_of_tokens(loss, best, ids)
    for number in range(restarts):
        noise = torch.randn(start.shape, generator=generator).to(start) * _RESTART_NOISE if number else 0.0
        found = _anneal(loss, start + noise, steps, learning_rate)
        reached = _loss_of_tokens(loss, found, ids)
        better = reached < lowest
        best, lowest = torch.where(better.unsqueeze(1), found, best), torch.where(better, reached, lowest)
    return ids.gather(2, best.unsqueeze(-1)).squeeze(-1)[mask]


def pin_tokens(
    candidates: Int[Tensor, "N K"], scores: Float[Tensor, "N K"], lengths: Sequence[int], fixed: Mapping[int, int]
) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Puts known tokens at their positions as the only candidate; positions outside a text are skipped."""
    candidates, scores, start = candidates.clone(), scores.clone(), 0
    for length in lengths:
        for position, token in fixed.items():
            if -length <= position < length:
                row = start + position % length
                candidates[row], scores[row] = token, -torch.inf
                scores[row, 0] = 0.0
        start += length
    return candidates, scores


def spread_scores(candidates: Int[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """Scores that only tell the candidates' order: from 1 for the first down to 0."""
    return torch.linspace(1, 0, candidates.shape[1], device=candidates.device).expand(candidates.shape)


def _anneal(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, learning_rate: float) -> Tensor:
    """(B, T) index of the candidate that wins at each position."""
    possible = torch.isfinite(start)
    logits = start.masked_fill(~possible, 0.0).requires_grad_()
    optimizer = torch.optim.AdamW([logits], lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        temperature = _HOT * (_COLD / _HOT) ** (step / max(1, steps - 1))
        weights = torch.softmax((logits / temperature).masked_fill(~possible, -torch.inf), dim=-1)
        (logits.grad,) = torch.autograd.grad(loss(weights).sum(), [logits])
        optimizer.step()
    return logits.detach().masked_fill(~possible, -torch.inf).argmax(dim=-1)


@torch.no_grad()
def _loss_of_tokens(loss: Callable[[Tensor], Tensor], chosen: Tensor, ids: Tensor) -> Tensor:
    return loss(torch.nn.functional.one_hot(chosen, ids.shape[-1]).float())


def _check_candidates(candidates: Tensor, scores: Tensor | None, rows: int) -> None:
    if len(candidates) != rows or (scores is not None and scores.shape != candidates.shape):
        raise InputError(
            f"candidates and initial_scores must have one row for each of the {rows} vectors, got shapes "
            f"{tuple(candidates.shape)} and {None if scores is None else tuple(scores.shape)}"
        )
