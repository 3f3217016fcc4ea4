"""Gradients give a causal LM's text away however noisy the release; a classifier's add nothing."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from torch import Tensor

from tiny import HIDDEN, VOCAB, tiny_model
from veiltune.attacks.bidirectional import causal_head_gradient, invert_bidirectionally, match_gradients
from veiltune.attacks.inversion import rank_candidates
from veiltune.attacks.sequences import token_codebook
from veiltune.errors import InputError
from veiltune.models.split import BottomModel, HeadModel, TrunkModel, split_head, split_model

LENGTHS = [8, 6]


def u_shape(family: str, task: str) -> tuple[BottomModel, TrunkModel, HeadModel]:
    bottom, top = split_model(tiny_model(family, task), cut_layer=1)
    return bottom, *split_head(top)


def texts() -> Tensor:
    return torch.randint(2, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def noisy_releases(bottom: BottomModel, ids: Tensor, noise: float) -> Tensor:
    clean = torch.cat([bottom(part.unsqueeze(0), torch.ones(1, len(part)))[0] for part in ids.split(LENGTHS)])
    return clean + noise * clean.std() * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))


def first_guess(bottom: BottomModel, values: Tensor) -> tuple[Tensor, Tensor]:
    return rank_candidates(values, token_codebook(bottom, template=[1, 5, 1], position=1), top_k=VOCAB, sigma=10.0)


def share(guesses: Tensor, secret: Tensor) -> float:
    return float((guesses[:, 0] == secret).float().mean())


def test_a_causal_heads_gradient_is_the_text() -> None:
    bottom, trunk, head = u_shape("gpt2", "causal")
    secret = texts()
    values = noisy_releases(bottom, secret, noise=10.0)
    functions, observed = [], []
    for release, ids in zip(values.split(LENGTHS), secret.split(LENGTHS), strict=True):
        hidden = trunk(release.unsqueeze(0), torch.ones(1, len(ids))).detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(head(hidden)[0, :-1], ids[1:])  # at the customer
        observed.append(torch.autograd.grad(loss, hidden)[0][0])
        functions.append(causal_head_gradient(head, hidden.detach()[0]))
    candidates, scores = first_guess(bottom, values)
    known = torch.ones(len(secret), dtype=torch.bool)
    known[[0, LENGTHS[0]]] = False  # nothing predicts a text's first token
    guesses = match_gradients(
        functions, observed, LENGTHS, candidates=candidates, vocab_size=VOCAB, initial_scores=scores, steps=80
    )
    assert share(candidates[known], secret[known]) < 0.3
    assert share(guesses[known], secret[known]) > 0.95
    both = invert_bidirectionally(
        bottom,
        values,
        LENGTHS,
        functions,
        observed,
        candidates=candidates,
        initial_scores=scores,
        steps=30,
        sigma=50.0,
        log_prior=torch.zeros(VOCAB),
    )
    assert share(both[known], secret[known]) > 0.9  # the release alone gives fewer than 0.3 of them
    mixed_up = match_gradients(  # planted: gradients of other texts
        functions,
        [-gradient for gradient in observed],
        LENGTHS,
        candidates=candidates,
        vocab_size=VOCAB,
        initial_scores=scores,
        steps=20,
    )
    assert share(mixed_up[known], secret[known]) < 0.5


def test_the_gradient_function_is_the_customers() -> None:
    _, trunk, head = u_shape("llama", "causal")
    ids = torch.randint(2, VOCAB, (7,), generator=torch.Generator().manual_seed(2))
    hidden = trunk(torch.randn(1, 7, HIDDEN, generator=torch.Generator().manual_seed(3)), torch.ones(1, 7)).detach()
    states = hidden.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(head(states)[0, :-1], ids[1:], reduction="sum")
    tokens = torch.nn.functional.one_hot(ids, VOCAB).float()
    ours = causal_head_gradient(head, hidden[0], scale=6.0)(tokens)
    torch.testing.assert_close(ours, torch.autograd.grad(loss, states)[0][0])


def test_a_classifiers_gradient_adds_nothing() -> None:
    """It is a function of the release and the label: whatever the text, it is the same, so the guess is the start's."""
    bottom, trunk, head = u_shape("bert", "classification")
    secret, label = texts()[: LENGTHS[0]], torch.tensor([1])
    values = noisy_releases(bottom, texts(), noise=1.0)[: LENGTHS[0]]

    def gradient(tokens: Tensor) -> Tensor:
        """At the cut, from the released vectors that crossed; the text itself does not enter."""
        release = values.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(head(trunk(release.unsqueeze(0), torch.ones(1, len(tokens)))), label)
        return torch.autograd.grad(loss, release)[0]

    observed = gradient(torch.nn.functional.one_hot(secret, VOCAB).float())
    candidates, scores = first_guess(bottom, values)
    guesses = match_gradients(
        [gradient], [observed], [LENGTHS[0]], candidates=candidates, vocab_size=VOCAB, initial_scores=scores, steps=20
    )
    assert torch.equal(guesses, candidates[:, :1])
    assert share(guesses, secret) < 1.0


def test_unusable_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    candidates = torch.zeros(4, 2, dtype=torch.long)
    with pytest.raises(InputError, match="one entry a text, got 0, 1 and 1"):
        match_gradients([], [torch.zeros(1)], [4], candidates=candidates, vocab_size=5)
    with pytest.raises(InputError, match="sum to the number of rows, 4"):
        match_gradients([], [], [3], candidates=candidates, vocab_size=5)
    with pytest.raises(InputError, match="scale must be in"):
        causal_head_gradient(lambda x: x, torch.zeros(2, 2), scale=-1.0)
