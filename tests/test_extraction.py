"""A copy of the top: better with more queries, at chance where answers carry nothing."""

from __future__ import annotations

import inspect

import jaxtyping
import pytest
import torch
from torch import Tensor

from tiny import model_of, tiny_config
from veiltune.attacks.extraction import extract_top, score_fidelity
from veiltune.errors import InputError
from veiltune.models.split import split_model

HELD_OUT = 200


@pytest.fixture(scope="module")
def vendor() -> tuple[list[Tensor], Tensor]:
    """What a customer sends and gets back: vectors of random texts at a cut, and the logits of a random BERT top."""
    generator = torch.Generator().manual_seed(0)
    bottom, top = split_model(model_of(tiny_config("bert")), cut_layer=2)
    inputs, answers = [], []
    with torch.no_grad():
        for length in (5, 9, 14):
            ids = torch.randint(2, 128, (300, length), generator=generator)
            mask = torch.ones_like(ids)
            values = bottom(ids, mask)
            inputs += list(values)
            answers.append(top(values, mask))
    order = torch.randperm(900, generator=generator)
    logits = torch.cat(answers)[order]
    logits = (logits - logits.mean(dim=0)) / logits.std(dim=0)  # so that no class takes all
    return [inputs[i] for i in order], logits


def test_more_queries_more_fidelity(vendor: tuple[list[Tensor], Tensor]) -> None:
    inputs, logits = vendor
    held = logits[-HELD_OUT:]
    guesses = extract_top(inputs, logits[:-HELD_OUT], queries=[30, 700], held_out=HELD_OUT, seed=0)
    few, many = (score_fidelity(guesses[count], held) for count in (30, 700))
    majority = float(torch.bincount(held.argmax(-1)).max()) / HELD_OUT
    assert many.interval()[0] > majority
    assert many.success_rate > few.success_rate + 0.1


def test_answers_of_others_are_worth_nothing(vendor: tuple[list[Tensor], Tensor]) -> None:
    inputs, logits = vendor
    shuffled = logits[:-HELD_OUT][torch.randperm(700, generator=torch.Generator().manual_seed(1))]
    guesses = extract_top(inputs, shuffled, queries=[700], held_out=HELD_OUT, seed=0)
    held = logits[-HELD_OUT:]
    most = float(torch.bincount(held.argmax(-1)).max()) / HELD_OUT
    assert score_fidelity(guesses[700], held).interval()[0] <= most


def test_probabilities_and_logits_are_the_same_answers(vendor: tuple[list[Tensor], Tensor]) -> None:
    inputs, logits = vendor

    def guess(answers: Tensor) -> Tensor:
        return extract_top(inputs[:140], answers, queries=[100], held_out=40, seed=0)[100]

    assert float((guess(logits[:100]) == guess(logits[:100].softmax(-1))).float().mean()) > 0.95


def test_it_repeats_and_leaves_the_global_state(vendor: tuple[list[Tensor], Tensor]) -> None:
    inputs, logits = vendor
    state = torch.random.get_rng_state()
    runs = [extract_top(inputs[:90], logits[:50], queries=[20, 50], held_out=40, seed=0) for _ in range(2)]
    assert torch.equal(state, torch.random.get_rng_state())
    assert list(runs[0]) == [20, 50] and all(torch.equal(runs[0][n], runs[1][n]) for n in (20, 50))


def test_the_attack_is_not_given_what_it_guesses() -> None:
    assert set(inspect.signature(extract_top).parameters) == {"inputs", "answers", "queries", "held_out", "seed"}


def test_unusable_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    inputs, answers = [torch.ones(2, 3)] * 50, torch.zeros(40, 2)
    for count in (19, 41):
        with pytest.raises(InputError, match=rf"queries must be in \[20, 40\] \(the answers at hand\), got {count}"):
            extract_top(inputs, answers, queries=[count], held_out=10, seed=0)
    with pytest.raises(InputError, match=r"the 50 answered and 10 .* got 50"):
        extract_top(inputs, torch.zeros(50, 2), queries=[20], held_out=10, seed=0)
    with pytest.raises(InputError, match="at least one vector"):
        extract_top([torch.ones(0, 3)] * 50, answers, queries=[20], held_out=10, seed=0)
    with pytest.raises(InputError, match="guesses are for 3 texts, there are 40 answers"):
        score_fidelity(torch.zeros(3, dtype=torch.long), answers)
