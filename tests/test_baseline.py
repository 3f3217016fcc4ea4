"""The customer alone: learns what is in its representations, and nothing where nothing is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veiltune.customer.baseline import customer_alone_utility

TABLE = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))


def clean(token_ids: Sequence[Sequence[int]]) -> Tensor:
    """A bottom that only embeds."""
    return TABLE[torch.tensor([token for ids in token_ids for token in ids])]


def texts(count: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Sequences whose class is whether token 7 or token 8 is in them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator).tolist()
    rows = [[*torch.randint(10, 50, (5,), generator=generator).tolist(), 7 + label] for label in labels]
    return rows, labels


def test_finds_a_signal_and_stays_at_chance_for_shuffled_labels() -> None:
    (train, labels), (evaluation, eval_labels) = texts(1500, 1), texts(200, 2)
    found = customer_alone_utility(clean, train, labels, evaluation, eval_labels, num_classes=2, seed=0)
    shuffled = [labels[i] for i in torch.randperm(1500, generator=torch.Generator().manual_seed(3)).tolist()]
    chance = customer_alone_utility(clean, train, shuffled, evaluation, eval_labels, num_classes=2, seed=0)
    assert found > 0.9
    assert 0.35 < chance < 0.65
