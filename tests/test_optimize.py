"""Optimisation finds texts from the bottom alone, stays inside its candidates and is never worse than its start."""

from __future__ import annotations

import itertools

import jaxtyping
import pytest
import torch
from torch import Tensor

from tiny import FAMILIES, VOCAB, tiny_batch, tiny_config, tiny_model
from veiltune.attacks.inversion import rank_candidates
from veiltune.attacks.optimize import invert_by_optimization, pin_tokens
from veiltune.attacks.sequences import token_codebook
from veiltune.errors import InputError
from veiltune.models.split import BottomModel, split_model

LENGTHS = [9, 5, 7]


@pytest.fixture(scope="module")
def bottom() -> BottomModel:
    return split_model(tiny_model("bert", "base"), cut_layer=2)[0]


@torch.no_grad()
def released(bottom: BottomModel, ids: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([bottom(part.unsqueeze(0), torch.ones(1, len(part)))[0] for part in ids.split(lengths)])


def texts(seed: int) -> Tensor:
    return torch.randint(2, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_equal_tokens_in(family: str, padding: str) -> None:
    for cut_layer, cut_embeddings in ((0, "word"), (0, "block"), (2, "word")):
        model = tiny_model(family, "base")
        bottom, _ = split_model(model, cut_layer=cut_layer, cut_embeddings=cut_embeddings)
        ids, mask = tiny_batch(tiny_config(family), padding=padding)
        embeddings = bottom.word_embeddings[ids].detach().requires_grad_()
        values = bottom.from_embeddings(embeddings, mask)
        real = mask.bool()
        torch.testing.assert_close(values[real], bottom(ids, mask)[real])
        values[real].square().sum().backward()
        assert embeddings.grad is not None and float(embeddings.grad[real].abs().min(dim=0).values.max()) > 0


def test_recovers_texts_where_nearest_neighbours_fail(bottom: BottomModel) -> None:
    secret = texts(0)
    values = released(bottom, secret, LENGTHS)
    candidates, scores = rank_candidates(values, token_codebook(bottom, template=[1, 5, 1], position=1), top_k=VOCAB)
    guesses = invert_by_optimization(bottom, values, LENGTHS, candidates=candidates, initial_scores=scores, steps=200)
    nearest = float((candidates[:, 0] == secret).float().mean())
    assert float((guesses[:, 0] == secret).float().mean()) > max(0.95, nearest + 0.2)


def test_finds_the_minimum_of_brute_force(bottom: BottomModel) -> None:
    """Three positions, three candidates each, heavy noise: the text whose representation is nearest of all 27."""
    generator, hits = torch.Generator().manual_seed(1), 0
    for _ in range(8):
        candidates = torch.randint(2, VOCAB, (3, 3), generator=generator)
        values = released(bottom, candidates[:, 0], [3])
        values += 0.7 * torch.randn(values.shape, generator=generator)
        every = torch.tensor([list(ids) for ids in itertools.product(*candidates.tolist())])
        with torch.no_grad():
            errors = (bottom(every, torch.ones_like(every)) - values).square().sum((1, 2))
        guess = invert_by_optimization(bottom, values, [3], candidates=candidates.flip(1), restarts=3, steps=60)
        hits += torch.equal(guess[:, 0], every[errors.argmin()])
    assert hits >= 7


def test_never_worse_than_its_start_and_inside_the_candidates(bottom: BottomModel) -> None:
    secret = texts(2)
    values = released(bottom, secret, LENGTHS) + torch.randn(
        sum(LENGTHS), 32, generator=torch.Generator().manual_seed(3)
    )
    candidates, scores = rank_candidates(values, token_codebook(bottom, template=[1, 5, 1], position=1), top_k=8)
    guesses = invert_by_optimization(bottom, values, LENGTHS, candidates=candidates, initial_scores=scores, steps=5)
    assert bool((guesses == candidates).any(dim=1).all())

    def errors(ids: Tensor) -> Tensor:
        return torch.stack([part.square().sum() for part in (released(bottom, ids, LENGTHS) - values).split(LENGTHS)])

    assert bool((errors(guesses[:, 0]) <= errors(candidates[:, 0]) + 1e-3).all())


def test_known_tokens_are_kept_and_a_prior_breaks_ties(bottom: BottomModel) -> None:
    values = torch.zeros(sum(LENGTHS), 32)
    candidates = torch.arange(20).expand(sum(LENGTHS), 20)
    prior = torch.full((VOCAB,), -10.0)
    prior[7] = -0.1
    arguments = {"candidates": candidates, "fixed": {0: 99, -1: 98}, "log_prior": prior, "steps": 60}
    guesses = invert_by_optimization(bottom, values, LENGTHS, sigma=100.0, **arguments)[:, 0]
    for part in guesses.split(LENGTHS):
        assert part[0] == 99 and part[-1] == 98
        assert bool((part[1:-1] == 7).all())
    sharp = invert_by_optimization(bottom, values, LENGTHS, sigma=0.01, **arguments)[:, 0]
    assert not all(bool((part[1:-1] == 7).all()) for part in sharp.split(LENGTHS))


def test_one_text_does_not_depend_on_the_others_nor_on_global_randomness(bottom: BottomModel) -> None:
    secret = texts(4)
    values, before = released(bottom, secret, LENGTHS), torch.random.get_rng_state()
    candidates = torch.randint(2, VOCAB, (sum(LENGTHS), 6), generator=torch.Generator().manual_seed(5))
    candidates[:, 3] = secret
    together = invert_by_optimization(bottom, values, LENGTHS, candidates=candidates, steps=40)
    alone = invert_by_optimization(bottom, values[9:14], [5], candidates=candidates[9:14], steps=40)
    assert torch.equal(together[9:14], alone)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in bottom.parameters())


def test_codebook_is_what_the_bottom_says_of_each_token_alone(bottom: BottomModel) -> None:
    code = token_codebook(bottom, template=[1, 5, 9], position=1)
    with torch.no_grad():
        slow = torch.stack([bottom(torch.tensor([[1, v, 9]]), torch.ones(1, 3))[0, 1] for v in range(VOCAB)])
    torch.testing.assert_close(code, slow)
    words = split_model(tiny_model("bert", "base"), cut_layer=0)[0]
    torch.testing.assert_close(token_codebook(words, template=[1, 5, 9], position=1), words.word_embeddings.detach())


def test_pinning_follows_each_text() -> None:
    ids, scores = pin_tokens(torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2), [2, 1], {0: 5, -2: 6})
    assert ids[:, 0].tolist() == [6, 0, 5]
    assert torch.isfinite(scores).tolist() == [[True, False], [True, True], [True, False]]


def test_unusable_arguments_are_refused(bottom: BottomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    values, candidates = torch.zeros(4, 32), torch.zeros(4, 2, dtype=torch.long)
    with pytest.raises(InputError, match="sum to the number of rows, 4"):
        invert_by_optimization(bottom, values, [3], candidates=candidates)
    with pytest.raises(InputError, match="one row for each of the 4 vectors"):
        invert_by_optimization(bottom, values, [4], candidates=candidates[:3])
    with pytest.raises(InputError, match="log_prior and sigma together"):
        invert_by_optimization(bottom, values, [4], candidates=candidates, sigma=1.0)
    with pytest.raises(InputError, match="steps must be a whole number of at least 1"):
        invert_by_optimization(bottom, values, [4], candidates=candidates, steps=0)
    with pytest.raises(InputError, match="position must be in"):
        token_codebook(bottom, template=[1], position=1)
