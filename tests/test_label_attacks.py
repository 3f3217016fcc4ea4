"""Labels from gradients and clusters: exact where disclosed, never above the bound where protected."""

from __future__ import annotations

import itertools
import math

import jaxtyping
import pytest
import torch
from torch import Tensor

from tiny import LABELS, model_of, tiny_config
from veiltune.attacks.labels import (
    best_permutation,
    label_success_bound,
    labels_by_clustering,
    labels_by_direction,
    labels_by_norm,
    labels_from_output_gradients,
    score_labels,
)
from veiltune.errors import InputError
from veiltune.privatize.labels import corrected_cross_entropy, flip_matrix, randomize_labels

N = 1500


def output_gradients(labels: Tensor, num_classes: int, matrix: Tensor | None = None, scale: float = 2.0) -> Tensor:
    """What the customer returns: real autograd through its own loss, of a model that is right, wrong or unsure."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(len(labels), num_classes, generator=generator) * scale).requires_grad_()
    corrected_cross_entropy(logits, labels, matrix).mean().backward()
    assert logits.grad is not None
    return logits.grad


def drawn_labels(num_classes: int, count: int = N, seed: int = 0) -> Tensor:
    shares = torch.arange(1.0, num_classes + 1)
    return torch.multinomial(shares, count, replacement=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("num_classes", [2, 3, 6])
def test_plain_gradients_give_every_label_away(num_classes: int, scale: float) -> None:
    labels = drawn_labels(num_classes)
    gradients = output_gradients(labels, num_classes, scale=scale)
    found = labels_from_output_gradients(gradients)
    assert score_labels(found, labels, "output_gradients").success_rate == 1.0
    shuffled = labels[torch.randperm(N, generator=torch.Generator().manual_seed(2))]
    shares = torch.bincount(labels, minlength=num_classes).double() / N
    low, high = score_labels(found, shuffled, "control").interval(0.999)
    assert low < float(shares.square().sum()) < high
    assert not torch.equal(gradients.argmax(-1), labels)  # planted: the wrong end


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_classes", [2, 3, 6])
def test_under_randomised_response_only_the_answer_is_found(num_classes: int, epsilon: float) -> None:
    labels, matrix = drawn_labels(num_classes), flip_matrix(num_classes, epsilon)
    generator = torch.Generator().manual_seed(3)
    answers = randomize_labels(labels, num_classes=num_classes, epsilon=epsilon, generator=generator)
    gradients = output_gradients(answers, num_classes, matrix)
    found = labels_from_output_gradients(gradients)
    assert torch.equal(found, answers)
    shares = (torch.bincount(labels, minlength=num_classes) / N).tolist()
    bound = label_success_bound(shares, epsilon)
    result = score_labels(found, labels, "output_gradients")
    assert result.interval(0.999)[0] <= bound
    assert score_labels(found, answers, "answers").interval(0.999)[0] > bound  # planted: it does beat the bound


def test_any_flip_matrix_is_read_with_the_logits(generator: torch.Generator) -> None:
    matrix = torch.tensor([[0.5, 0.3, 0.2], [0.05, 0.9, 0.05], [0.1, 0.5, 0.4]])  # class 2 mostly answers 1
    answers = torch.randint(0, 3, (N,), generator=generator)
    logits = torch.randn(N, 3, generator=generator).requires_grad_()
    corrected_cross_entropy(logits, answers, matrix).sum().backward()
    assert logits.grad is not None
    probabilities = logits.detach().softmax(-1)
    found = labels_from_output_gradients(logits.grad * 0.01, probabilities=probabilities, flip_matrix=matrix)
    assert torch.equal(found, answers)
    assert not torch.equal(labels_from_output_gradients(logits.grad), answers)  # planted: the smallest entry


# --- gradients at a hidden state --------------------------------------------------------------------------------------


def hidden_gradients(labels: Tensor, num_classes: int, *, bias: Tensor | None = None, sure: float = 1.0) -> Tensor:
    """Of a random linear head, at random hidden states."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(len(labels), 64, generator=generator).requires_grad_()
    head = torch.randn(64, num_classes, generator=generator) * 0.1 * sure
    logits = hidden @ head + (0.0 if bias is None else bias)
    corrected_cross_entropy(logits, labels).sum().backward()
    assert hidden.grad is not None
    return hidden.grad


def two_halves(groups: Tensor, labels: Tensor, num_classes: int) -> float:
    half = len(labels) // 2
    names = best_permutation(groups[:half], labels[:half], num_classes)
    return score_labels(groups[half:], labels[half:], "grouped", permutation=names).success_rate


@pytest.mark.parametrize(("num_classes", "least"), [(2, 1.0), (3, 0.97), (6, 0.9)])
def test_directions_are_classes(num_classes: int, least: float) -> None:
    labels = drawn_labels(num_classes)
    groups = labels_by_direction(hidden_gradients(labels, num_classes), num_classes, seed=0)
    assert two_halves(groups, labels, num_classes) >= least
    shuffled = labels[torch.randperm(N, generator=torch.Generator().manual_seed(5))]
    assert two_halves(groups, shuffled, num_classes) < 0.6


def test_rare_classes_have_long_gradients() -> None:
    labels = (torch.rand(N, generator=torch.Generator().manual_seed(6)) < 0.1).long()
    prior = torch.tensor([math.log(9.0), 0.0])  # the model knows the shares and nothing else
    groups = labels_by_norm(hidden_gradients(labels, 2, bias=prior, sure=0.3), 2, seed=0)
    assert score_labels(groups, labels, "norm").success_rate > 0.97  # 1 is the longer: no names needed
    balanced = labels_by_norm(hidden_gradients(drawn_labels(2), 2), 2, seed=0)
    assert two_halves(balanced, drawn_labels(2), 2) < 0.8  # nothing to find


def test_a_real_head_shows_its_labels_in_hidden_gradients() -> None:
    """A BERT with pooler and classifier at the customer: the gradient at its hidden states, summed over tokens."""
    model = model_of(tiny_config("bert"))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, 128, (240, 9), generator=generator)
    labels = torch.randint(0, LABELS, (240,), generator=generator)
    seen: list[Tensor] = []

    def keep(module: object, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = model.bert.encoder.layer[-1].register_forward_hook(keep)
    corrected_cross_entropy(model(ids).logits, labels).sum().backward()
    handle.remove()
    assert seen[0].grad is not None
    groups = labels_by_direction(seen[0].grad.sum(dim=1), LABELS, seed=0)
    assert two_halves(groups, labels, LABELS) > 0.9


def test_hidden_gradients_of_answers_stay_below_the_bound() -> None:
    labels, epsilon = drawn_labels(2), 1.0
    generator = torch.Generator().manual_seed(8)
    answers = randomize_labels(labels, num_classes=2, epsilon=epsilon, generator=generator)
    groups = labels_by_direction(hidden_gradients(answers, 2), 2, seed=0)
    half = N // 2
    names = best_permutation(groups[:half], labels[:half], 2)
    result = score_labels(groups[half:], labels[half:], "direction", permutation=names)
    shares = (torch.bincount(labels, minlength=2) / N).tolist()
    assert result.interval(0.999)[0] <= label_success_bound(shares, epsilon)


def test_clusters_find_classes_that_training_pulled_apart(generator: torch.Generator) -> None:
    labels = drawn_labels(3)
    centres = torch.randn(3, 20, generator=generator)
    apart = centres[labels] + 0.3 * torch.randn(N, 20, generator=generator)
    assert two_halves(labels_by_clustering(apart, 3, seed=0), labels, 3) > 0.99
    blurred = torch.randn(N, 20, generator=generator)
    assert two_halves(labels_by_clustering(blurred, 3, seed=0), labels, 3) < 0.5
    assert labels_by_clustering(torch.zeros(5, 2), 3, seed=0).unique().numel() == 1  # all alike: no warning, one group


# --- names and the bound ----------------------------------------------------------------------------------------------


def test_best_permutation_equals_trying_all(generator: torch.Generator) -> None:
    for _ in range(30):
        groups, labels = torch.randint(0, 4, (2, 25), generator=generator)
        names = best_permutation(groups, labels, 4)
        assert sorted(names.tolist()) == [0, 1, 2, 3]
        best = max(int((torch.tensor(p)[groups] == labels).sum()) for p in itertools.permutations(range(4)))
        assert int((names[groups] == labels).sum()) == best


@pytest.mark.parametrize("num_classes", [2, 3, 6])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
def test_bound_for_equal_shares(num_classes: int, epsilon: float) -> None:
    expected = math.exp(epsilon) / (math.exp(epsilon) + num_classes - 1)
    assert label_success_bound([1 / num_classes] * num_classes, epsilon) == pytest.approx(expected)


def test_bound_is_what_the_best_guess_reaches() -> None:
    """Every rule from answer to guess is tried on the real flips; the best one reaches the bound, none passes it."""
    shares, epsilon, count = [0.6, 0.25, 0.15], 1.2, 60_000
    labels = torch.multinomial(torch.tensor(shares), count, True, generator=torch.Generator().manual_seed(9))
    answers = randomize_labels(labels, num_classes=3, epsilon=epsilon, generator=torch.Generator().manual_seed(10))
    rules = [torch.tensor(rule) for rule in itertools.product(range(3), repeat=3)]
    best = max((score_labels(rule[answers], labels, "rule") for rule in rules), key=lambda r: r.successes)
    low, high = best.interval(0.999)
    assert low <= label_success_bound(shares, epsilon) <= high
    assert not low <= label_success_bound(shares, epsilon * 1.2) <= high  # planted
    assert label_success_bound(shares, epsilon) == pytest.approx(
        sum(max(s * float(flip_matrix(3, epsilon)[y, a]) for y, s in enumerate(shares)) for a in range(3))
    )


def test_bound_for_a_large_epsilon_is_certainty() -> None:
    assert label_success_bound([0.3, 0.7], 900.0) == 1.0


def test_unusable_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids = torch.zeros(4, dtype=torch.long)
    with pytest.raises(InputError, match="needed together"):
        labels_from_output_gradients(torch.zeros(2, 2), flip_matrix=torch.eye(2))
    with pytest.raises(InputError, match=r"probabilities have shape \(1, 2\)"):
        labels_from_output_gradients(torch.zeros(2, 2), probabilities=torch.ones(1, 2), flip_matrix=torch.eye(2))
    with pytest.raises(InputError, match="3 groups need at least as many examples, got 2"):
        labels_by_clustering(torch.zeros(2, 2), 3, seed=0)
    with pytest.raises(InputError, match="groups are for 4 examples, there are 3 labels"):
        best_permutation(ids, ids[:3], 2)
    with pytest.raises(InputError, match=r"must be in \[0, 1\]"):
        best_permutation(ids, ids + 2, 2)
    with pytest.raises(InputError, match="guesses are for 4 examples, the secret has 3"):
        score_labels(ids, ids[:3], "x")
    for shares in ([1.0], [0.5, 0.6], [-0.5, 1.5]):
        with pytest.raises(InputError, match="shares must be at least two numbers that add up to 1"):
            label_success_bound(shares, 1.0)
