"""Inference through the vendor, under the same mechanism and ledger as training, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from veiltune.customer.releasing import Releaser, pieces
from veiltune.customer.remote import RemoteJob, ragged

TOKENS_PER_CALL = 8192


def predict_logits(
    job: RemoteJob,
    releaser: Releaser,
    head: nn.Module | None,
    token_ids: Sequence[Sequence[int]],
    *,
    part: str,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """(B, C) logits of each sequence; equal sequences share one release and one answer.

    A sequence that was released before, in training or in an earlier prediction, is sent again as the same bytes.
    """
    keys = releaser.prepare(token_ids, None, part=part)
    lengths = {key: len(ids) for key, ids in zip(keys, token_ids, strict=True)}
    order = sorted(lengths, key=lambda key: (lengths[key], key))
    answers: dict[bytes, Tensor] = {}
    for batch in pieces(order, [lengths[key] for key in order], min(TOKENS_PER_CALL, releaser.tokens_per_frame)):
        released = releaser.outbox.get(batch)
        releaser.sent(batch, released.lengths)
        outputs = job.predict(ragged(released.values, released.scales, released.lengths))
        answers.update(zip(batch, _logits(head, outputs), strict=True))
        progress(len(answers))
    return torch.stack([answers[key] for key in keys])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is at the label.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    0.5
    """
    return float((logits.argmax(dim=-1) == labels).float().mean())


@torch.no_grad()
def _logits(head: nn.Module | None, outputs: Tensor) -> Tensor:
    if head is None:
        return outputs
    logits: Tensor = head.eval()(outputs)
    return logits.float()
