"""Bidirectional inversion: releases from below and gradients from above, read together.

When a run's bottom trains, or a causal head stays with the customer, gradients cross the wire beside the releases.
The attack takes a first guess from the releases (a trained inverter), refines it until the gradients that it would
cause match those observed, and ends with `optimize.invert_by_optimization`.

What that adds depends on what the gradient knows. For a causal LM the labels are the text, so the gradient at the
hidden state before the LM head gives the text back however noisy the release is. For a classifier the gradient at the
cut is a function of the released (noisy) vector and the label alone: it says nothing of the text that the release did
not say, and matching it is no gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune._validate import in_range
from veiltune.attacks.optimize import invert_by_optimization, pin_tokens, search_tokens, spread_scores
from veiltune.attacks.sequences import check_lengths
from veiltune.errors import InputError
from veiltune.models.split import BottomModel

_SQUARED_SHARE = 0.85  # of the TAG loss; the rest is the L1 part

GradientOf = Callable[[Tensor], Tensor]
"""Soft tokens of one text (T, V), rows summing to 1 -> the gradient that they would cause, differentiable in them."""


def match_gradients(
    gradient_of: Sequence[GradientOf],
    observed: Sequence[Tensor],
    lengths: Sequence[int],
    *,
    candidates: Int[Tensor, "N K"],
    vocab_size: int,
    initial_scores: Float[Tensor, "N K"] | None = None,
    fixed: Mapping[int, int] | None = None,
    steps: int = 200,
    restarts: int = 1,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> Int[Tensor, "N 1"]:
    """Guesses the tokens of each text whose gradients are those that crossed the wire.

    Minimises 0.85 ||g - g*||^2 + 0.15 ||g - g*||_1, both relative to the observed gradient's size, over tokens by the
    annealed relaxation of `invert_by_optimization`. Where `gradient_of` does not depend on the tokens, the guess is
    the start's: the best of `initial_scores`.

    Threat model:
        Honest-but-curious vendor who sees, beside the releases, gradients that the customer computed, and knows the
        function that made them (the head is public or known closely). Complete where the labels are the text.
        Costs `steps` gradients of gradients for each restart.

    Args:
        gradient_of: For each text, soft tokens (T, V) -> gradient; see `causal_head_gradient` for one.
        observed: For each text, the gradient that crossed, of the same shape.
        lengths: Rows of each text.
        candidates: K token ids for each row of the texts, one after the other.
        vocab_size: V.
        initial_scores: Where to start, such as a trained inverter's log-scores; the candidates' order if not given.
        fixed: Known tokens by position, see `invert_by_optimization`.
        steps: Of AdamW for each restart.
        restarts: The first starts at the scores, the others at the scores plus noise.
        learning_rate: Of AdamW.
        seed: Of the restarts.

    Raises:
        InputError: If sizes disagree or a number is out of range.

    Source: the TAG loss of Deng et al. 2021, arXiv:2103.06819, in BiSR, arXiv:2409.00960.
    """
    check_lengths(lengths, len(candidates))
    if not len(gradient_of) == len(observed) == len(lengths):
        raise InputError(
            f"gradient_of, observed and lengths must have one entry a text, got {len(gradient_of)}, {len(observed)} "
            f"and {len(lengths)}"
        )
    scores = spread_scores(candidates) if initial_scores is None else initial_scores.float()
    candidates, scores = pin_tokens(candidates, scores, lengths, fixed or {})
    guesses, sizes = [], list(lengths)
    for gradient, target, ids, start in zip(
        gradient_of, observed, candidates.split(sizes), scores.split(sizes), strict=True
    ):
        present, places = ids.unique(return_inverse=True)  # a text has few candidates, the vocabulary many
        found = search_tokens(
            _matching(gradient, target, present, vocab_size),
            torch.eye(len(present), device=ids.device),
            places,
            start,
            [len(ids)],
            steps=steps,
            restarts=restarts,
            learning_rate=learning_rate,
            seed=seed,
        )
        guesses.append(present[found])
    return torch.cat(guesses).unsqueeze(1) if guesses else candidates[:, :1]


def causal_head_gradient(
    head: Callable[[Tensor], Tensor], hidden: Float[Tensor, "T H"], *, scale: float = 1.0
) -> GradientOf:
    """The gradient at the hidden states before a causal LM's head, as a function of the text that is its label.

    The vendor computed the hidden states himself (the U-shape) and knows the head: public weights, or close to them.

    Args:
        head: Hidden states (1, T, H) -> logits (1, T, V).
        hidden: What the vendor sent for one text.
        scale: Of the customer's loss: 1 for the mean over the text's T - 1 predictions.
    """
    in_range(0.0, 1e12, scale=scale)

    def gradient(tokens: Tensor) -> Tensor:
        states = hidden.detach().float().requires_grad_()
        with torch.enable_grad():
            log_probs = head(states.unsqueeze(0))[0].float().log_softmax(dim=-1)
            loss = -(tokens[1:] * log_probs[:-1]).sum() / max(1, len(tokens) - 1) * scale
            (result,) = torch.autograd.grad(loss, states, create_graph=tokens.requires_grad)
        return result

    return gradient


def invert_bidirectionally(
    bottom: BottomModel,
    values: Float[Tensor, "N H"],
    lengths: Sequence[int],
    gradient_of: Sequence[GradientOf],
    observed: Sequence[Tensor],
    *,
    candidates: Int[Tensor, "N K"],
    initial_scores: Float[Tensor, "N K"],
    log_prior: Float[Tensor, " V"] | None = None,
    sigma: float | None = None,
    trust_gradients: float = 10.0,
    fixed: Mapping[int, int] | None = None,
    steps: int = 200,
    restarts: int = 1,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> Int[Tensor, "N 1"]:
    """Learned start, then gradients, then the forward pass: the three steps of BiSR.

    Threat model:
        As `match_gradients`, with a trained inverter for the start. For classifiers it is `invert_by_optimization`
        with another start. Costs both of them.

    Args:
        bottom: The public bottom model.
        values: Released vectors of several texts, special tokens included.
        lengths: Rows of each text.
        gradient_of: See `match_gradients`.
        observed: See `match_gradients`.
        candidates: The trained inverter's best for each row.
        initial_scores: Its log-scores.
        log_prior: See `invert_by_optimization`.
        sigma: See `invert_by_optimization`.
        trust_gradients: Added to the scores of the tokens that the gradients chose.
        fixed: Known tokens by position.
        steps: Of each of the two searches.
        restarts: Of each.
        learning_rate: Of each.
        seed: Of both.

    Source: Chen et al. 2024, arXiv:2409.00960; an implementation of the idea, not of its code.
    """
    search = {"fixed": fixed, "steps": steps, "restarts": restarts, "learning_rate": learning_rate, "seed": seed}
    chosen = match_gradients(
        gradient_of,
        observed,
        lengths,
        candidates=candidates,
        vocab_size=len(bottom.word_embeddings),
        initial_scores=initial_scores,
        **search,  # type: ignore[arg-type]
    )
    return invert_by_optimization(
        bottom,
        values,
        lengths,
        candidates=candidates,
        initial_scores=initial_scores + trust_gradients * (candidates == chosen),
        log_prior=log_prior,
        sigma=sigma,
        **search,  # type: ignore[arg-type]
    )


def _matching(
    gradient_of: GradientOf, observed: Tensor, present: Tensor, vocab_size: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The TAG loss of one text as an objective of `search_tokens` over the tokens that are present."""
    target = observed.detach().float()
    squared, absolute = target.square().sum().clamp(min=1e-30), target.abs().sum().clamp(min=1e-30)

    def objective(tokens: Tensor, mask: Tensor) -> Tensor:
        with torch.enable_grad():  # a gradient is taken even where the search only compares
            every = tokens.new_zeros(tokens.shape[1], vocab_size).index_copy(1, present, tokens[0])
            error = gradient_of(every) - target
        near = _SQUARED_SHARE * error.square().sum() / squared + (1 - _SQUARED_SHARE) * error.abs().sum() / absolute
        return near.reshape(1) * len(tokens[0]) + 0.0 * tokens.sum()  # also where the gradient ignores the tokens

    return objective
