"""How much of the training text a model recites beyond what it says of any such text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veiltune._validate import positive_int
from veiltune.dp.losses import IGNORED, Batch

PASSAGE = 4
_AT_ONCE = 4  # rows, as their logits are all formed


@dataclass(frozen=True)
class Recitation:
    """Shares of passages that a model recites, in [0, 1].

    Attributes:
        train: Of rows that it learnt.
        unseen: Of rows that it did not.
    """

    train: float
    unseen: float

    @property
    def excess(self) -> float:
        """What is memory and not the language of such texts."""
        return self.train - self.unseen


def recitation(
    model: nn.Module,
    train: Sequence[Any],
    unseen: Sequence[Any],
    *,
    collate: Callable[[Sequence[Any]], Batch],
    rows: int = 64,
    seed: int = 0,
) -> Recitation:
    """Measures a causal language model on a sample of learnt and of unseen rows.

    A passage is four tokens with loss in a row; it is recited if greedy decoding from what stands before it gives it.
    Computed from training rows without noise: not for a run with a claim.

    Args:
        model: Left in the mode that it is in.
        train: Encoded training rows.
        unseen: Encoded rows of the same kind.
        collate: Makes a batch of rows.
        rows: At most so many of each are looked at, the same ones each time.
        seed: Chooses them.

    Returns:
        Shares; 0 where no row has a passage.

    Source: memorised n-grams as the reason to stop early: Slack et al., ACL 2025.
    """
    positive_int(rows=rows)
    return Recitation(*(_share(model, _sample(some, rows, seed), collate) for some in (train, unseen)))


def passages(right: Tensor, counts: Tensor) -> tuple[int, int]:
    """Of runs of four positions that all count, those that are all right, and all.

    >>> passages(torch.tensor([[True, True, True, True, False]]), torch.ones(1, 5, dtype=torch.bool))
    (1, 2)

    Args:
        right: (B, T), whether a token is the likeliest.
        counts: (B, T), whether it has loss.
    """
    if right.shape[1] < PASSAGE:
        return 0, 0
    whole = counts.unfold(1, PASSAGE, 1).all(-1)
    return int((right.unfold(1, PASSAGE, 1).all(-1) & whole).sum()), int(whole.sum())


@torch.no_grad()
def _share(model: nn.Module, rows: Sequence[Any], collate: Callable[[Sequence[Any]], Batch]) -> float:
    device = next(model.parameters()).device
    recited = total = 0
    for at in range(0, len(rows), _AT_ONCE):
        batch = {name: value.to(device) for name, value in collate(rows[at : at + _AT_ONCE]).items()}
        labels = batch.pop("labels")[:, 1:]
        likeliest = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        found, all_of_them = passages(likeliest == labels, labels != IGNORED)
        recited, total = recited + found, total + all_of_them
    return recited / total if total else 0.0


def _sample(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    chosen = random.Random(f"recitation {seed}").sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen, key=lambda index: len(rows[index].input_ids))]
