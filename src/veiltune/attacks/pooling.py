"""A small classifier of whole texts from their token vectors, shared by attacks that learn: attention, then an MLP."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from veiltune.errors import InputError

HEADS, WIDTH, DROPOUT = 4, 128, 0.1
EPOCHS, PATIENCE, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 40, 4, 32, 1e-3, 0.01
_PREDICT_TOKENS = 16_384


class AttentionClassifier(nn.Module):
    """Each head weighs a text's tokens by a learned score and adds them up; an MLP classifies the sums."""

    def __init__(self, hidden_size: int, num_classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(hidden_size, HEADS)
        self.classify = nn.Sequential(
            nn.Dropout(DROPOUT),
            nn.Linear(HEADS * hidden_size, WIDTH),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(WIDTH, num_classes),
        )

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """(B, T, H) and (B, T) -> (B, C) logits."""
        values = nn.functional.layer_norm(values, values.shape[-1:])  # its scale and shift are left to what follows
        scores = self.score(values).masked_fill(~mask.unsqueeze(-1), -torch.inf)  # (B, T, heads)
        pooled = torch.einsum("bth,btk->bkh", values, scores.softmax(dim=1))
        logits: Tensor = self.classify(pooled.flatten(start_dim=1))
        return logits


def fit_attention_classifier(
    texts: Sequence[Tensor], targets: Float[Tensor, "N C"], *, held_in: Bool[Tensor, " N"], seed: int
) -> AttentionClassifier:
    """Trains on soft targets; keeps the epoch that is best on the texts that are held out inside.

    Args:
        texts: (T, H) vectors of each.
        targets: Class probabilities of each.
        held_in: Which train; the others choose the epoch. If none is left for that, all epochs are run.
        seed: Of initialisation, order and dropout; the global random state is left as it was.

    Raises:
        InputError: If there is nothing to train on or a text has no token.
    """
    if not bool(held_in.any()) or any(not len(text) for text in texts):
        raise InputError("a classifier needs at least one text to train on, and every text at least one vector")
    train, inner = held_in.nonzero().flatten(), (~held_in).nonzero().flatten()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AttentionClassifier(texts[0].shape[1], targets.shape[1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        best, best_loss, waited = copy.deepcopy(model.state_dict()), torch.inf, 0
        for _ in range(EPOCHS):
            _run_epoch(model, optimizer, texts, targets, train[torch.randperm(len(train))])
            if not len(inner):
                continue
            loss = _cross_entropy(predict_log_probabilities(model, [texts[i] for i in inner]), targets[inner])
            waited = waited + 1 if loss >= best_loss else 0
            if loss < best_loss:
                best, best_loss = copy.deepcopy(model.state_dict()), loss
            if waited > PATIENCE:
                break
    if len(inner):
        model.load_state_dict(best)
    return model.eval()


@torch.no_grad()
def predict_log_probabilities(model: nn.Module, texts: Sequence[Tensor]) -> Float[Tensor, "M C"]:
    """Log-probabilities of the classes of each text."""
    training = model.training
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    start = 0
    while start < len(order):
        count = max(1, _PREDICT_TOKENS // len(texts[order[min(start + 255, len(order) - 1)]]))
        batch = order[start : start + min(256, count)]
        found.update(zip(batch, model(*_padded([texts[i] for i in batch])).log_softmax(-1), strict=True))
        start += len(batch)
    model.train(training)
    return torch.stack([found[i] for i in range(len(texts))])


def _run_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, texts: Sequence[Tensor], targets: Tensor, order: Tensor
) -> None:
    """One pass; texts of one batch have similar lengths where there are enough of them."""
    model.train()
    batches: list[Tensor] = []
    for chunk in order.split(16 * BATCH_SIZE):
        by_length = torch.tensor([len(texts[i]) for i in chunk]).argsort(stable=True)
        batches += chunk[by_length].split(BATCH_SIZE)
    for index in torch.randperm(len(batches)).tolist():
        batch = batches[index]
        logits = model(*_padded([texts[i] for i in batch]))
        loss = nn.functional.cross_entropy(logits, targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> float:
    return float(-(targets * log_probabilities).sum(dim=-1).mean())


def _padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    padded = nn.utils.rnn.pad_sequence([text.float() for text in texts], batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(text) for text in texts]).unsqueeze(1)
    return padded, mask
