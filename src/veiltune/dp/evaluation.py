"""The scores of a model on the evaluation table, each with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from veiltune._validate import positive_int
from veiltune.config import EvaluationSection
from veiltune.data.prompts import Prompted, references
from veiltune.dp.decoding import evaluating, generate_texts
from veiltune.dp.encoding import NO_LOSS, Classified, Encoded
from veiltune.dp.engine import Collate
from veiltune.dp.losses import causal_lm_losses
from veiltune.dp.metrics import Score, accuracy_scores, generation_scores
from veiltune.errors import InputError
from veiltune.models.families import longest_sequence
from veiltune.models.precision import bf16_products

Progress = Callable[[int, int], None]
_LARGEST_LOSS = 709.0


def classification_scores(
    model: nn.Module, examples: Sequence[Classified], *, collate: Collate, batch_size: int
) -> dict[str, Score]:
    """The accuracy on held-out examples.

    Args:
        model: A sequence classifier; evaluated in eval mode, left as it was.
        examples: At least one.
        collate: As in training.
        batch_size: Examples at once.

    Raises:
        InputError: If there is no example or the model has diverged.
    """
    logits = []
    with evaluating(model):
        for batch in _batches(model, examples, collate, batch_size):
            labels = batch.pop("labels")
            logits.append((model(**batch).logits.float().cpu(), labels.cpu()))
    if not logits:
        raise InputError("accuracy needs at least one example; give an evaluation table")
    return accuracy_scores(torch.cat([rows for rows, _ in logits]), torch.cat([labels for _, labels in logits]))


def perplexity_score(
    model: nn.Module,
    examples: Sequence[Encoded],
    *,
    collate: Collate,
    batch_size: int,
    seed: int = 0,
    resamples: int = 1000,
) -> Score:
    """`metrics.perplexity` with an interval: tokens of one text depend on each other, so whole examples are resampled.

    Args:
        model: A causal language model; evaluated in eval mode, left as it was.
        examples: Held-out ones.
        collate: As in training.
        batch_size: Examples at once.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Raises:
        InputError: If no position has a label.

    Source: Efron 1979 (bootstrap, percentiles).
    """
    totals, counts = [], []
    with evaluating(model):
        for batch in _batches(model, examples, collate, batch_size):
            tokens = (batch["labels"][:, 1:] != NO_LOSS).sum(1)
            totals.append((causal_lm_losses(model, batch).double() * tokens).cpu().numpy())
            counts.append(tokens.cpu().numpy())
    total, count = (np.concatenate([np.zeros(0), *values]) for values in (totals, counts))
    if not count.sum():
        raise InputError("perplexity needs a position with a label and there is none")
    value = _perplexity(float(total.sum() / count.sum()))
    if not math.isfinite(value):
        return Score(value, value, value, len(total))
    drawn = np.random.default_rng(seed).multinomial(
        len(total), np.full(len(total), 1 / len(total)), size=positive_int(resamples=resamples)
    )
    means = (drawn @ total) / np.maximum(drawn @ count, 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Score(value, _perplexity(float(low)), _perplexity(float(high)), len(total))


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The evaluation table, encoded, and how to score on it.

    Attributes:
        examples: Encoded rows.
        rows: The rows themselves where texts are generated, else None.
        collate: As in training.
        tokenizer: Of the model.
        separator: As in training.
        settings: How texts are generated.
        bf16: Matrix products in bfloat16.
        seed: Of the bootstraps.
    """

    examples: Sequence[Any]
    rows: Prompted | None
    collate: Collate
    tokenizer: Any
    separator: str
    settings: EvaluationSection
    bf16: bool
    seed: int

    def scores(self, model: nn.Module) -> dict[str, Score]:
        """Accuracy or perplexity: what needs no generation."""
        size = self.settings.batch_size
        with self._precision(model):
            if self.rows is None:
                return classification_scores(model, self.examples, collate=self.collate, batch_size=size)
            found = perplexity_score(model, self.examples, collate=self.collate, batch_size=size, seed=self.seed)
            return {"perplexity": found}

    def prompts(self) -> tuple[list[str], list[list[str]]]:
        """The prompts to generate for and their references; both empty where there are no prompts."""
        if self.rows is None or not any(self.rows.prompts):
            return [], []
        prompts, wanted = references(self.rows)
        limit = self.settings.examples or len(prompts)
        return prompts[:limit], wanted[:limit]

    def generated(self, model: Any, *, progress: Progress | None = None) -> tuple[dict[str, Score], list[str]]:
        """BLEU and ROUGE-L of generated texts, and the texts; both empty where there are no prompts."""
        prompts, wanted = self.prompts()
        if not prompts:
            return {}, []
        with self._precision(model):
            texts = generate_texts(
                model,
                self.tokenizer,
                prompts,
                max_new_tokens=self.settings.max_new_tokens,
                separator=self.separator,
                num_beams=self.settings.num_beams,
                length_penalty=self.settings.length_penalty,
                max_prompt_length=longest_sequence(model.config) - self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                progress=progress,
            )
        return generation_scores(texts, wanted, seed=self.seed), texts

    def _precision(self, model: nn.Module) -> AbstractContextManager[object]:
        return bf16_products(next(model.parameters()).device.type, enabled=self.bf16)


def _batches(model: nn.Module, examples: Sequence[Any], collate: Collate, batch_size: int) -> Any:
    """Batches of examples alike in length, on the model's device."""
    device = next(model.parameters()).device
    order = sorted(examples, key=lambda example: -len(example.input_ids))
    for start in range(0, len(order), positive_int(batch_size=batch_size)):
        batch = collate(order[start : start + batch_size])
        yield {name: values.to(device) for name, values in batch.items()}


def _perplexity(mean_loss: float) -> float:
    return math.exp(mean_loss) if not mean_loss > _LARGEST_LOSS else math.inf
