"""Losses one an example, and a cross-entropy that never holds vocabulary-sized logits of a whole batch.

Each loss is a mean over the example's own tokens, so that no example can rescale another's gradient: a mean over the
batch's tokens (Hugging Face's default) lets one example change everybody's, before any clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from veiltune.dp.functions import apply, computing_dtype
from veiltune.dp.record import Record
from veiltune.dp.scratch import block
from veiltune.errors import InputError
from veiltune.models.families import FAMILIES
from veiltune.models.surgery import task_of

Batch = Mapping[str, Tensor]

#: (B,) losses of a batch's rows, each a function of its own row alone.
LossFn = Callable[[nn.Module, Batch], Tensor]

#: Scalars of one chunk of logits: 32 MB in float32.
_CHUNK = 2**23

IGNORED = -100


class HeadUse:
    """A trainable head during one recorded pass: the record and the weight's and bias's names in it."""

    def __init__(self, record: Record, weight: str | None, bias: str | None) -> None:
        self.record, self.weight, self.bias = record, weight, bias


#: The head that trains, by id of its weight, while a pass is recorded; set by `veiltune.dp.instrument`.
recorded_heads: ContextVar[Mapping[int, HeadUse]] = ContextVar("recorded_heads", default={})  # noqa: B039


def causal_lm_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of each row's labelled tokens, each predicted from those before it.

    Args:
        model: A causal LM. Of the families in `veiltune.models.families` only hidden states are formed for the whole
            batch, and logits for a chunk of labelled positions at a time; others form all logits.
        batch: ``input_ids``, ``attention_mask``, ``labels`` (B, T) and whatever else the model takes; label -100
            is skipped, and so is a row's first token.

    Returns:
        (B,) float32; 0 for a row without labels.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    if "attention_mask" in batch:  # what follows padding on the left has no context to be predicted from
        targets = targets.masked_fill(batch["attention_mask"][:, :-1] == 0, IGNORED)
    plain = _plain(model)
    head = plain.get_output_embeddings()  # type: ignore[no-untyped-call]
    family = FAMILIES.get(plain.config.model_type)
    if family is None or not family.causal or type(head) is not nn.Linear:  # an encoder's head is more, PEFT's too
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        labelled = targets != IGNORED
        each = nn.functional.cross_entropy(logits[labelled].float(), targets[labelled], reduction="none")
        return _row_means(each, targets)
    hidden = plain.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    return row_cross_entropy(hidden, head.weight, head.bias, targets)


def classification_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of each row's class; ``labels`` is (B,). Returns (B,) float32.

    Not for several labels a row, nor for regression: the model's ``problem_type`` is not asked.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    return nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="none")


def loss_for(model: nn.Module) -> LossFn:
    """The loss of a model's kind, bare, in a PeftModel or in a wrapper: next tokens, or one of several classes.

    Raises:
        InputError: If none is known: the model has another head, several labels a row, or one number.
    """
    inner = _plain(model)
    task = task_of(inner)
    if task == "base":
        raise InputError(f"no loss is known for a {type(inner).__name__}; pass loss=, which gives one number a row")
    kind = getattr(inner.config, "problem_type", None)
    if task == "classification" and (kind not in (None, "single_label_classification") or inner.config.num_labels == 1):
        raise InputError(
            "without loss= a classifier must tell several classes apart, one a row, got problem_type "
            f"{kind!r} with num_labels {inner.config.num_labels}; pass loss=, which gives one number a row"
        )
    return causal_lm_losses if task == "causal" else classification_losses


def row_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Each row's mean cross-entropy of a linear head, computed in chunks of labelled positions.

    The hidden states' gradient is formed on the way forward, so a chunk's logits are dropped at once. Where the head
    trains, a recorded pass keeps the logits' gradient of its micro-batch; an ordinary pass uses autograd.

    Args:
        hidden: (B, T, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (B, T) ids; -100 is skipped.

    Returns:
        (B,) float32; 0 for a row without targets.
    """
    labelled = targets != IGNORED
    rows, wanted = hidden[labelled], targets[labelled]
    use = recorded_heads.get().get(id(weight))
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if use is None and trains and torch.is_grad_enabled():
        logits = nn.functional.linear(rows, weight, bias).float()
        return _row_means(nn.functional.cross_entropy(logits, wanted, reduction="none"), targets)
    counts = labelled.sum(1)
    losses = apply(_HeadLoss, rows, weight, bias, wanted, labelled if use else None, use, torch.is_grad_enabled())
    return _row_means(losses, targets) if len(counts) else losses.sum(0, keepdim=True)[:0]


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of N positions under a linear head."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        labelled: Tensor | None,
        use: HeadUse | None,
        with_gradients: bool,
    ) -> Tensor:
        """(N, H) hidden states and (N,) targets to (N,) losses."""
        dtype = computing_dtype(rows)
        matrix, states = use.record.converted(weight, dtype) if use else weight.to(dtype), rows.to(dtype)
        losses = rows.new_empty(len(rows), dtype=torch.float32)
        gradients = torch.empty_like(states)
        step = max(32, _CHUNK // len(weight) // 32 * 32)
        chunk = block(min(step, len(rows)), len(weight), states)
        wide = chunk if dtype == torch.float32 else block(len(chunk), len(weight), losses)
        kept, places = _kept(use, labelled, matrix) if use and labelled is not None else (None, None)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            wanted = targets[part]
            logits = chunk[: len(wanted)] if kept is None or places is not None else kept[part]
            exponentials = logits if dtype == torch.float32 else wide[: len(wanted)]
            torch.mm(states[part], matrix.t(), out=logits)
            losses[part], total = _exponentials_(exponentials, logits, bias, wanted)
            if kept is not None:
                exponentials.div_(total)[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
            if exponentials is not logits:
                logits.copy_(exponentials)
            if kept is not None and places is not None:
                kept[places[part]] = logits
            if with_gradients:
                torch.mm(logits, matrix, out=gradients[part])
                if kept is None:
                    gradients[part].div_(total).sub_(matrix[wanted])
        ctx.use, ctx.dtype = use, rows.dtype
        ctx.save_for_backward(gradients, *((states, kept, labelled) if use else ()))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scales what was formed on the way forward; records the head's gradient where it trains."""
        gradients, *head = ctx.saved_tensors
        if ctx.use:
            states, kept, labelled = head
            _record_head(ctx.use, states, kept, labelled, gradient)
        below = gradients.mul(gradient[:, None]).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return below, None, None, None, None, None, None


def _exponentials_(wide: Tensor, logits: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Fills `wide` with the exponentials of logits, which it may be; returns their losses and the sum of each row."""
    if wide is not logits:
        wide.copy_(logits)
    if bias is not None:
        wide.add_(bias)
    top = wide.amax(1, keepdim=True)
    wanted = wide.gather(1, targets[:, None])
    total = wide.sub_(top).exp_().sum(1, keepdim=True)
    return (total.log() + top - wanted).squeeze(1), total


def _kept(use: HeadUse, labelled: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Memory for the logits' gradients, (B * longest, V), and where each of the N labelled positions goes.

    The places are None where every row has equally many labelled positions, so that they are in order.
    """
    front = _front(labelled)
    kept = use.record.block(front.numel(), len(matrix), matrix)
    if bool(front.all()):
        return kept, None
    kept.zero_()
    return kept, front.flatten().nonzero().squeeze(1)


def _record_head(use: HeadUse, states: Tensor, kept: Tensor, labelled: Tensor, gradient: Tensor) -> None:
    """Lays (N, .) rows out as (B, longest, .) and records the head's gradient."""
    front = _front(labelled)
    left = kept.view(*front.shape, kept.shape[1])
    if use.weight:  # the narrower factor takes the scale
        use.record.add_product(use.weight, left, _unpack(states * gradient[:, None].to(states.dtype), front))
    if use.bias:
        use.record.add_total(use.bias, left * _unpack(gradient[:, None].to(left.dtype), front))


def _front(labelled: Tensor) -> Tensor:
    """(B, longest) whether a row has so many labelled positions."""
    counts = labelled.sum(1)
    return torch.arange(int(counts.max()) if len(counts) else 0, device=labelled.device) < counts[:, None]


def _unpack(rows: Tensor, front: Tensor) -> Tensor:
    """(N, d) rows to (B, longest, d), zeros where `front` is False."""
    if bool(front.all()):
        return rows.view(*front.shape, rows.shape[1])
    laid = rows.new_zeros(*front.shape, rows.shape[1])
    laid[front] = rows
    return laid


def _row_means(losses: Tensor, targets: Tensor) -> Tensor:
    """(N,) losses of labelled positions to the (B,) mean of each row, 0 for a row without any."""
    labelled = targets != IGNORED
    row = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)[labelled]
    totals = losses.new_zeros(len(targets)).index_add(0, row, losses)
    return totals / labelled.sum(1).clamp_min(1)


def _plain(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model, also inside a PeftModel or a wrapper of `torch.nn.parallel`."""
    inner: Any = getattr(model, "module", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"this loss needs a Hugging Face model, got a {type(inner).__name__}; pass a loss of your own")
    return inner
