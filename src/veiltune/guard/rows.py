"""The texts that a model is writing at the moment: one padded batch with a cache, which rows join and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from veiltune.guard.jobs import TextJob


class Rows:
    """A batch of texts, padded on the left to one length; keys and values of all earlier positions are kept.

    Positions are counted from each text's first token, so a row's numbers depend on its neighbours through rounding
    only.

    Args:
        backbone: Of a causal model; called with input_ids, attention_mask, position_ids, past_key_values.
        device: Where it computes.

    Attributes:
        jobs: One a row.
    """

    def __init__(self, backbone: Any, device: torch.device) -> None:
        self._backbone, self._device = backbone, device
        self._clear()

    def _clear(self) -> None:
        self.jobs: list[TextJob] = []
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)
        self._lengths = torch.zeros(0, dtype=torch.long, device=self._device)

    def begin(self, jobs: Sequence[TextJob]) -> tuple[Tensor, Any]:
        """Reads prompts: (n, H) hidden states of their last positions, and what `join` needs to take them in."""
        longest = max(len(job.prompt) for job in jobs)
        ids = torch.tensor([[0] * (longest - len(job.prompt)) + job.prompt for job in jobs], device=self._device)
        lengths = torch.tensor([len(job.prompt) for job in jobs], device=self._device)
        mask = (torch.arange(longest, device=self._device) >= longest - lengths[:, None]).long()
        cache = DynamicCache()
        hidden = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        return hidden, (list(jobs), cache, mask, lengths)

    def join(self, read: Any, going: Sequence[int]) -> None:
        """Takes in those of the texts just read that go on."""
        if not len(going):
            return
        jobs, cache, mask, lengths = read
        kept = torch.tensor(list(going), device=self._device)
        if len(kept) < len(jobs):
            cache.batch_select_indices(kept)
            mask, lengths = mask[kept], lengths[kept]
        if self._cache is None:
            self._cache, self._mask = cache, mask
        else:
            width = max(self._mask.shape[1], mask.shape[1])
            for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([_widened(mine.keys, width), _widened(theirs.keys, width)])
                mine.values = torch.cat([_widened(mine.values, width), _widened(theirs.values, width)])
            pairs = [torch.nn.functional.pad(one, (width - one.shape[1], 0)) for one in (self._mask, mask)]
            self._mask = torch.cat(pairs)
        self._lengths = torch.cat([self._lengths, lengths])
        self.jobs += [jobs[row] for row in going]
        self._trim()

    def step(self) -> Tensor:
        """(n, H) hidden states at the last token of each text, which is read now."""
        ids = torch.tensor([[job.ids[-1]] for job in self.jobs], device=self._device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
        hidden = self._forward(ids, self._mask, self._lengths[:, None], self._cache)
        self._lengths = self._lengths + 1
        return hidden

    def keep(self, going: Sequence[int]) -> None:
        """Lets all other texts leave."""
        if len(going) == len(self.jobs):
            return
        if not len(going):
            self._clear()
            return
        kept = torch.tensor(list(going), device=self._device)
        self._cache.batch_select_indices(kept)
        self._mask, self._lengths = self._mask[kept], self._lengths[kept]
        self.jobs = [self.jobs[row] for row in going]
        self._trim()

    def drop(self) -> list[TextJob]:
        """Empties the batch and returns its jobs."""
        jobs = self.jobs
        self._clear()
        return jobs

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        outputs = self._backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden: Tensor = outputs.last_hidden_state[:, -1]
        return hidden

    def _trim(self) -> None:
        """Cuts off columns in which no text has a token."""
        spare = self._mask.shape[1] - int(self._lengths.max())
        if spare > 0:
            self._mask = self._mask[:, spare:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, spare:], layer.values[:, :, spare:]


def _widened(values: Tensor, width: int) -> Tensor:
    """(n, heads, T, d) padded on the left to `width` positions."""
    return torch.nn.functional.pad(values, (0, 0, width - values.shape[2], 0))
