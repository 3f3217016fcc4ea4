"""One pass a text and model, kept on disk in parts, so that an audit of a slow API goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from veiltune.attacks.membership import TokenTrace
from veiltune.audit.blackbox import BlackBox
from veiltune.audit.lm.encoding import Sequenced
from veiltune.audit.stages import Stages
from veiltune.audit.tracing import Traced, trace


class TraceStore:
    """Makes and keeps traces.

    Args:
        stages: Where they are kept.
        advance: Told how many texts are done.
    """

    def __init__(self, stages: Stages, advance: Callable[[int], None] = lambda done: None) -> None:
        self._stages, self._advance, self._done = stages, advance, 0

    def of(self, box: BlackBox, name: str, texts: Sequence[Sequenced]) -> list[Traced]:
        """Traces of texts under one model, in their order.

        Args:
            box: The model.
            name: Of the model and the texts, the same at every call.
            texts: Of at least two tokens each.
        """
        found: list[Traced] = []
        for start in range(0, len(texts), box.texts_a_part):
            part = [text.ids for text in texts[start : start + box.texts_a_part]]
            flat = self._stages.tensors(f"{name}-{start}", lambda part=part: _flat(trace(box, part)))  # type: ignore[misc]
            found += _apart(flat)
            self._done += len(part)
            self._advance(self._done)
        return found


def secret_log_prob(traced: Traced, place: tuple[int, int], *, top_k: bool = False) -> float:
    """Log-probability of the tokens in a range of the sequence, each given all before it."""
    values = traced.top_k_log_probs if top_k else traced.trace.log_probs
    return float(values[place[0] - 1 : place[1] - 1].sum(dtype=np.float64))


def _flat(traces: Sequence[Traced]) -> dict[str, Tensor]:
    def joined(parts: Sequence[NDArray[Any]], kind: type) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(kind))

    return {
        "lengths": torch.tensor([len(one.trace) for one in traces]),
        "log_probs": joined([one.trace.log_probs for one in traces], np.float32),
        "means": joined([one.trace.means for one in traces], np.float32),
        "deviations": joined([one.trace.deviations for one in traces], np.float32),
        "hits": joined([one.trace.hits for one in traces], np.bool_),
        "exact": joined([one.exact for one in traces], np.bool_),
        "top_k": joined([one.top_k_log_probs for one in traces], np.float32),
    }


def _apart(flat: dict[str, Tensor]) -> list[Traced]:
    ends = flat["lengths"].cumsum(dim=0).tolist()
    starts = [0, *ends[:-1]]
    arrays = {name: values.numpy() for name, values in flat.items()}

    def cut(name: str, start: int, end: int) -> NDArray[Any]:
        return arrays[name][start:end]

    return [
        Traced(
            TokenTrace(*(cut(name, start, end) for name in ("log_probs", "means", "deviations", "hits"))),
            cut("top_k", start, end),
            cut("exact", start, end),
        )
        for start, end in zip(starts, ends, strict=True)
    ]
