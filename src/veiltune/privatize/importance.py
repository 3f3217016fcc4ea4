"""Contributing tokens (CTI): less noise where the task looks, as Split-and-Privatize does it.

It is implemented faithfully and it leaks. Token-dependent noise tells the vendor, by the radius alone, which positions
hold contributing tokens; where the scale depends on the label it tells the label too; those tokens are sent nearly in
the clear; and the list is fitted on private counts without noise. DESIGN section 5.4 has the alternative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veiltune._validate import in_range, one_of, positive
from veiltune.errors import InputError

VARIANTS = ("budget", "top")


def token_importance(
    token_ids: Sequence[Sequence[int]], labels: Sequence[int], *, num_classes: int, vocab_size: int
) -> Float[Tensor, "C V"]:
    """How much more often a token stands in texts of a class than in those of the others.

    With f[c, t] the share of token t among the tokens of class c and xi = 1 / (tokens of the largest class):
    UI[c, t] = sum over c' != c of ln(f[c, t] / (f[c', t] + 3 xi)), and 0 where class c never has the token.

    >>> ui = token_importance([[0, 1], [0, 2]], [0, 1], num_classes=2, vocab_size=3)
    >>> round(ui[0, 1].item(), 3)  # f = 1/2 against 0 + 3/2
    -1.099

    Args:
        token_ids: One sequence an example; special tokens count like all others.
        labels: The class of each.
        num_classes: C.
        vocab_size: V.

    Raises:
        InputError: If a token or label is out of range, or a class has no example.

    Source: the released text privatisation SDK of SAP's authors (volcengine), described in arXiv:2312.15603.
    """
    counts = torch.zeros(num_classes, vocab_size, dtype=torch.float64)
    for ids, label in zip(token_ids, labels, strict=True):
        if not 0 <= label < num_classes or not ids or not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InputError(
                f"every text needs a label in [0, {num_classes - 1}] and token ids, all in [0, {vocab_size - 1}]"
            )
        counts[label] += torch.bincount(torch.tensor(list(ids)), minlength=vocab_size)
    totals = counts.sum(dim=1, keepdim=True)
    if bool((totals == 0).any()):
        raise InputError("every class needs at least one example to find its contributing tokens")
    frequency = counts / totals
    smoothed = (frequency + 3.0 / totals.max()).log()
    own = frequency.log().nan_to_num(neginf=0.0)
    importance = (num_classes - 1) * own - (smoothed.sum(dim=0) - smoothed)
    return torch.where(counts > 0, importance, 0.0)


@dataclass(frozen=True, kw_only=True)
class ContributingTokens:
    """The eta multiplier of each token, by class.

    Attributes:
        table: (C, V) float32 multipliers; inf means no noise.
        at_inference: Scale also where the label is unknown (then by the largest over classes).

    Guarantee:
        None of its own. Between tokens of different multipliers the d_chi bound does not hold; see the module.
    """

    table: Float[Tensor, "C V"]
    at_inference: bool

    @classmethod
    def fit(
        cls,
        token_ids: Sequence[Sequence[int]],
        labels: Sequence[int],
        *,
        num_classes: int,
        vocab_size: int,
        variant: str,
        top_fraction: float = 0.01,
        top_multiplier: float = math.inf,
        floor: float = 0.6,
        at_inference: bool = True,
    ) -> ContributingTokens:
        """Fits the multipliers.

        Args:
            token_ids: Training sequences.
            labels: Their classes, protected if labels are to be.
            num_classes: C.
            vocab_size: V.
            variant: "budget": max(importance, floor), the SDK's. "top": `top_multiplier` for the top fraction of the
                vocabulary in each class, 1 for the rest.
            top_fraction: Of the vocabulary, in (0, 1]; at least one token is taken.
            top_multiplier: At least 1; inf sends those tokens without noise.
            floor: Least multiplier of "budget", > 0.
            at_inference: Whether texts without a label are scaled too.

        Raises:
            InputError: If the variant is unknown or a number is out of range.

        Source: "budget": the SDK (arXiv:2312.15603); "top": its reproduction in Split-N-Denoise, arXiv:2310.09130.
        """
        one_of(VARIANTS, cti=variant)
        importance = token_importance(token_ids, labels, num_classes=num_classes, vocab_size=vocab_size)
        if variant == "budget":
            table = importance.clamp_min(positive(floor=floor))
        else:
            in_range(1.0, math.inf, top_multiplier=top_multiplier)
            positive(top_fraction=top_fraction, hint="to scale no token switch cti off")
            chosen = max(1, int(in_range(0.0, 1.0, top_fraction=top_fraction) * vocab_size))
            best = importance.topk(chosen, dim=1)
            table = torch.ones_like(importance)
            table.scatter_(1, best.indices, torch.where(best.values > 0, top_multiplier, 1.0).double())
        return cls(table=table.float(), at_inference=at_inference)

    def multipliers(self, token_ids: Int[Tensor, " T"], label: int | None) -> Float[Tensor, " T"]:
        """The eta multiplier of each token of a text; `label` None at inference."""
        if label is not None:
            return self.table[label, token_ids]
        if not self.at_inference:
            return torch.ones(len(token_ids))
        return self.table[:, token_ids].amax(dim=0)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a safetensors file."""
        return {"table": self.table.contiguous(), "at_inference": torch.tensor(self.at_inference)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> ContributingTokens:
        """Back from `state`."""
        return cls(table=state["table"], at_inference=bool(state["at_inference"]))
