"""Attributes are found where they show, not where they do not, and never on persons that were trained on."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from torch import Tensor

from veiltune.attacks.attribute import (
    KINDS,
    attribute_auc,
    bag_of_words_ceiling,
    infer_attribute,
    majority_guess,
    score_attribute,
    split_by_person,
)
from veiltune.attacks.ranking import roc_auc
from veiltune.errors import InputError

HIDDEN = 16


def population(
    shown: float, *, own_style: float = 0.5, num_classes: int = 2, people: int = 60, each: int = 8
) -> tuple[list[Tensor], Tensor, list[int]]:
    """Texts of people: a person's attribute shifts some of its tokens; each person also has a style of its own."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(num_classes, HIDDEN, generator=generator)
    texts, labels, persons = [], [], []
    for person in range(people):
        label, style = person % num_classes, torch.randn(HIDDEN, generator=generator)
        for _ in range(each):
            length = int(torch.randint(3, 9, (1,), generator=generator))
            tokens = torch.randn(length, HIDDEN, generator=generator) + own_style * style
            texts.append(tokens + shown * directions[label])
            labels.append(label)
            persons.append(person)
    return texts, torch.tensor(labels), persons


def attack(
    kind: str, texts: list[Tensor], labels: Tensor, persons: list[int], num_classes: int = 2
) -> tuple[Tensor, Tensor]:
    """Scores and test mask."""
    test = split_by_person(persons, seed=3)
    train_texts, test_texts = (
        [t for t, is_test in zip(texts, test, strict=True) if is_test == side] for side in (False, True)
    )
    scores = infer_attribute(
        train_texts,
        labels[~test],
        test_texts,
        kind=kind,
        num_classes=num_classes,
        seed=0,
        persons=[p for p, is_test in zip(persons, test, strict=True) if not is_test],
    )
    return scores, test


@pytest.mark.parametrize("kind", KINDS)
def test_an_attribute_that_shows_is_found(kind: str) -> None:
    texts, labels, persons = population(1.0)
    scores, test = attack(kind, texts, labels, persons)
    assert scores.shape == (int(test.sum()), 2)
    assert torch.allclose(scores.sum(dim=-1), torch.ones(len(scores)), atol=1e-5)
    assert score_attribute(scores, labels[test], kind).success_rate > 0.9
    owners = [p for p, is_test in zip(persons, test, strict=True) if is_test]
    auc, low, _ = attribute_auc(scores, labels[test], persons=owners)[1]
    assert auc > 0.95 and low > 0.65  # 15 persons of each class: the exact end is wide
    assert attribute_auc(scores, labels[test])[1][1] > low  # planted: texts of one person taken as independent


@pytest.mark.parametrize("kind", KINDS)
def test_an_attribute_that_does_not_show_is_not_found(kind: str) -> None:
    """People differ, so an attack that saw them in training would do well: only the split by person keeps it honest."""
    texts, labels, persons = population(0.0, own_style=2.0, each=12)
    scores, test = attack(kind, texts, labels, persons)
    owners = [p for p, is_test in zip(persons, test, strict=True) if is_test]
    _, low, high = attribute_auc(scores, labels[test], persons=owners)[1]
    assert low <= 0.5 <= high
    leaky_scores, leaky_test = attack(kind, texts, labels, list(range(len(texts))))  # planted: split by text
    assert attribute_auc(leaky_scores, labels[leaky_test])[1][1] > 0.55


def test_three_classes_and_one_that_was_not_seen() -> None:
    texts, labels, persons = population(1.5, num_classes=3)
    scores, test = attack("logistic", texts, labels, persons, num_classes=4)
    assert bool((scores[:, 3] == 0).all())
    assert score_attribute(scores, labels[test], "x").success_rate > 0.9
    assert sorted(attribute_auc(scores, labels[test])) == [0, 1, 2]
    flat = roc_auc(scores[:, 2], labels[test] == 2)
    assert attribute_auc(scores, labels[test])[2] == flat


def test_it_repeats_and_leaves_the_global_state() -> None:
    texts, labels, persons = population(0.5, people=20)
    for kind in KINDS:
        state = torch.random.get_rng_state()
        first, _ = attack(kind, texts, labels, persons)
        assert torch.equal(state, torch.random.get_rng_state())
        torch.rand(3)
        assert torch.equal(first, attack(kind, texts, labels, persons)[0])


def test_nobody_is_on_both_sides() -> None:
    persons = [f"p{i % 37}" for i in range(400)]
    for share, count in ((0.5, 18), (0.2, 7), (0.001, 1), (0.999, 36)):
        test = split_by_person(persons, seed=1, share=share)
        sides = [{p for p, t in zip(persons, test.tolist(), strict=True) if t == side} for side in (True, False)]
        assert not sides[0] & sides[1]
        assert len(sides[0]) == count
    assert not torch.equal(split_by_person(persons, seed=1), split_by_person(persons, seed=2))


def test_words_are_a_ceiling() -> None:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 60, (600, 8), generator=generator)
    labels = (words < 6).any(dim=1).long()  # a class is whether some of six words occur
    texts = [" ".join(f"word{w}" for w in row) for row in words.tolist()]
    scores = bag_of_words_ceiling(texts[:400], labels[:400], texts[400:], num_classes=2)
    assert score_attribute(scores, labels[400:], "words").success_rate > 0.9
    shuffled = labels[torch.randperm(600, generator=generator)]
    scores = bag_of_words_ceiling(texts[:400], shuffled[:400], texts[400:], num_classes=2)
    _, low, high = attribute_auc(scores, shuffled[400:])[1]
    assert low <= 0.5 <= high


def test_majority_is_the_training_sides() -> None:
    labels = torch.tensor([2, 2, 0, 1])
    guesses = majority_guess(labels, 5)
    assert guesses.tolist() == [2] * 5
    scores = torch.nn.functional.one_hot(guesses, 3).float()
    assert score_attribute(scores, torch.tensor([2, 2, 0, 1, 2]), "majority").successes == 3


def test_unusable_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    texts, labels, _ = population(1.0, people=10, each=2)

    def run(texts: list[Tensor] = texts, labels: Tensor = labels, kind: str = "mlp", **options: object) -> Tensor:
        return infer_attribute(texts, labels, texts, kind=kind, num_classes=2, seed=0, **options)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="kind 'attentoin' is unknown; did you mean 'attention'"):
        run(kind="attentoin")
    with pytest.raises(InputError, match="20 training texts, 19 labels"):
        run(labels=labels[:19])
    with pytest.raises(InputError, match="persons must be as many"):
        run(persons=["a"])
    with pytest.raises(InputError, match=r"labels must be in \[0, 1\]"):
        run(labels=labels + 1)
    with pytest.raises(InputError, match="at least two classes"):
        run(labels=torch.zeros(20, dtype=torch.long))
    with pytest.raises(InputError, match="at least one vector"):
        run(texts=[*texts[:19], torch.zeros(0, HIDDEN)])
    with pytest.raises(InputError, match="at least 2 persons, got 1"):
        split_by_person(["a", "a"], seed=0)
    with pytest.raises(InputError, match="share must be in"):
        split_by_person(["a", "b"], seed=0, share=1.5)
    with pytest.raises(InputError, match="scores are for 2 texts, the secret has 20"):
        score_attribute(torch.zeros(2, 2), labels, "x")
    with pytest.raises(InputError, match="no word that occurs in two"):
        bag_of_words_ceiling([f"word{i}" for i in range(20)], labels, ["b"], num_classes=2)
