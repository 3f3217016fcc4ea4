"""Model extraction: a curious customer rebuilds the vendor's top model from the answers it gets anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune.attacks.pooling import fit_attention_classifier, predict_log_probabilities
from veiltune.attacks.result import AttackResult
from veiltune.errors import InputError

MIN_QUERIES = 20  # below, there is nothing to choose the epoch on
_INNER_EVERY = 6  # each sixth query chooses the epoch


def extract_top(
    inputs: Sequence[Tensor],
    answers: Float[Tensor, "M C"],
    *,
    queries: Sequence[int],
    held_out: int,
    seed: int,
) -> Mapping[int, Int[Tensor, " held_out"]]:
    """Trains a small copy of the top on the first N inputs and answers, and guesses the answers to the last inputs.

    The copy weighs tokens by attention, adds them up and classifies the sum; it is trained on the answers'
    probabilities, which tell more than their largest class (knowledge distillation).

    >>> generator = torch.Generator().manual_seed(0)
    >>> inputs = [torch.randn(4, 3, generator=generator) for _ in range(50)]
    >>> answers = 5.0 * torch.stack([text.mean(dim=0) for text in inputs])  # a very small vendor
    >>> guesses = extract_top(inputs, answers[:30], queries=[30], held_out=20, seed=0)
    >>> guesses[30].shape
    torch.Size([20])

    Threat model:
        Curious customer (T2): chooses texts, knows what it sent, sees the vendor's logits or probabilities for them;
        not the weights, the depth or the gradients inside. Each query is an ordinary prediction. A small student, so
        its fidelity is a floor of what can be rebuilt; a copy of the public base model as student would start higher.
        Costs seconds to a minute for thousands of queries.

    Args:
        inputs: (T, H) vectors that the customer sent, for each text: those that were asked, then those held out.
        answers: Logits or probabilities (if rows are so) of the inputs but the last `held_out`.
        queries: Each N to try; the first N inputs are used, so that more queries contain fewer.
        held_out: Texts at the end whose answers are guessed.
        seed: Of initialisation and order.

    Returns:
        By N, the guessed argmax of the vendor's answer to each held-out text.

    Raises:
        InputError: If the counts do not add up, or an N is below 20 or above the number of answers.

    Source: Tramer et al. 2016, arXiv:1609.02943; for language models Krishna et al. 2020, arXiv:1910.12366; training
        on soft answers: Hinton et al. 2015, arXiv:1503.02531.
    """
    if held_out < 1 or len(inputs) != len(answers) + held_out:
        raise InputError(
            f"inputs must be the {len(answers)} answered and {held_out} (at least 1) held-out texts, got {len(inputs)}"
        )
    for count in queries:
        if not MIN_QUERIES <= count <= len(answers):
            raise InputError(f"queries must be in [{MIN_QUERIES}, {len(answers)}] (the answers at hand), got {count}")
    targets = _probabilities(answers)
    guesses = {}
    for count in queries:
        held_in = torch.arange(count) % _INNER_EVERY != 0
        student = fit_attention_classifier(inputs[:count], targets[:count], held_in=held_in, seed=seed)
        guesses[count] = predict_log_probabilities(student, inputs[-held_out:]).argmax(dim=-1)
    return guesses


def score_fidelity(
    guesses: Int[Tensor, " held_out"], answers: Float[Tensor, "held_out C"], *, name: str = "extraction"
) -> AttackResult:
    """Counts held-out texts for which the copy answers as the vendor does, right or wrong.

    Args:
        guesses: As `extract_top` returned them for one N.
        answers: The vendor's logits or probabilities for the held-out texts.
        name: Of the attack.

    Raises:
        InputError: If the counts differ or there is no text.
    """
    if len(guesses) != len(answers):
        raise InputError(f"guesses are for {len(guesses)} texts, there are {len(answers)} answers")
    return AttackResult(name=name, successes=int((guesses == answers.argmax(dim=-1)).sum()), trials=len(answers))


def _probabilities(answers: Tensor) -> Tensor:
    values = answers.float()
    are_probabilities = bool((values >= 0).all()) and bool(((values.sum(dim=-1) - 1.0).abs() < 1e-2).all())
    return values / values.sum(dim=-1, keepdim=True) if are_probabilities else values.softmax(dim=-1)
