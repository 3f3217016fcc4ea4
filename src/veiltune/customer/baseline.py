"""The customer alone: what the bottom model that it holds is worth without the vendor and without any release.

A split run that does no better than this has given text away for nothing; its summary says `dominated`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from veiltune.customer.batching import epoch_batches
from veiltune.customer.evaluation import accuracy

EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 8, 64, 3e-3, 0.01


class AttentionPooler(nn.Module):
    """Weighs a text's tokens by a learned score, adds them up and classifies the sum."""

    def __init__(self, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.score = nn.Linear(hidden_size, 1)
        self.classify = nn.Linear(hidden_size, num_classes)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """(B, T, H) and (B, T) -> (B, C)."""
        values = self.norm(values)
        weights = self.score(values).squeeze(-1).masked_fill(~mask, -torch.inf).softmax(dim=-1)  # (B, T)
        logits: Tensor = self.classify((weights.unsqueeze(-1) * values).sum(dim=1))
        return logits


def customer_alone_utility(
    clean: Callable[[Sequence[Sequence[int]]], Tensor],
    train_ids: Sequence[Sequence[int]],
    train_labels: Sequence[int],
    eval_ids: Sequence[Sequence[int]],
    eval_labels: Sequence[int],
    *,
    num_classes: int,
    seed: int,
) -> float:
    """Trains a pooling head on clean representations, at the customer, and returns its accuracy.

    The bottom stays frozen; labels are the true ones, since nothing leaves. The hyper-parameters are fixed: they were
    not chosen on anyone's data.

    Args:
        clean: Sequences -> (N, H) representations at the cut, one after the other.
        train_ids: Training sequences.
        train_labels: Their true classes.
        eval_ids: Evaluation sequences.
        eval_labels: Theirs.
        num_classes: C.
        seed: Of initialisation and order.
    """
    train, evaluation = _per_text(clean, train_ids), _per_text(clean, eval_ids)
    targets = torch.tensor(list(train_labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AttentionPooler(train[0].shape[-1], num_classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    lengths = [len(ids) for ids in train_ids]
    for epoch in range(EPOCHS):
        for batch in epoch_batches(lengths, batch_size=BATCH_SIZE, seed=seed, epoch=epoch):
            loss = nn.functional.cross_entropy(_logits(head, [train[i] for i in batch]), targets[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        logits = [_logits(head, evaluation[i : i + BATCH_SIZE]) for i in range(0, len(evaluation), BATCH_SIZE)]
    return accuracy(torch.cat(logits), torch.tensor(list(eval_labels)))


@torch.no_grad()
def _per_text(clean: Callable[[Sequence[Sequence[int]]], Tensor], token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    values: dict[int, Tensor] = {}
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        pieces = torch.split(clean([token_ids[i] for i in batch]), [len(token_ids[i]) for i in batch])
        values.update(zip(batch, pieces, strict=True))
    return [values[i].bfloat16() for i in range(len(token_ids))]  # half the memory; nothing is sent


def _logits(head: nn.Module, texts: Sequence[Tensor]) -> Tensor:
    padded = nn.utils.rnn.pad_sequence([text.float() for text in texts], batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(text) for text in texts]).unsqueeze(1)
    logits: Tensor = head(padded, mask)
    return logits
