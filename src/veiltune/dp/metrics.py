"""How good a model is on held-out data: perplexity, BLEU and ROUGE-L of generated texts, accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from veiltune._validate import positive_int
from veiltune.dp.decoding import causal_lm, evaluating
from veiltune.dp.encoding import NO_LOSS, Encoded, collate
from veiltune.errors import InputError

_LOGITS_AT_ONCE = 2**24  # elements of a chunk of logits: 64 MB in float32
_LARGEST_LOSS = 709.0  # beyond, exp leaves float64


@dataclass(frozen=True)
class Perplexity:
    """The token-level perplexity of a data set.

    Attributes:
        value: exp(mean_loss).
        tokens: Positions that were predicted.
        mean_loss: In nats a token: every token weighs the same, whatever example it is in.
    """

    value: float
    tokens: int
    mean_loss: float


@dataclass(frozen=True)
class Score:
    """A measured value and its 95 % interval.

    >>> print(Score(67.8, 66.1, 69.4, 630))
    67.80 [66.10, 69.40] n=630
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] n={self.count}"


def perplexity(model: nn.Module, examples: Sequence[Encoded], *, batch_size: int = 16) -> Perplexity:
    """The exponential of the mean negative log-likelihood of all positions that have a label.

    Logits are made for those positions only, and for a few of them at once: (B, T, V) is never held.

    Args:
        model: A causal language model of `FAMILIES`, bare or wrapped by peft; evaluated in eval mode, left as it was.
        examples: Held-out ones.
        batch_size: Examples at once in the backbone.

    Raises:
        InputError: If no position has a label, or a batch size is not positive.
        UnsupportedModelError: If the model has no language model head.
    """
    positive_int(batch_size=batch_size)
    causal = causal_lm(model)
    order = sorted(examples, key=lambda example: -len(example.input_ids))
    total, tokens = 0.0, 0
    with evaluating(causal):
        for start in range(0, len(order), batch_size):
            losses = _token_losses(causal, order[start : start + batch_size])
            total += float(losses.double().sum())
            tokens += len(losses)
    if not tokens:
        raise InputError("perplexity needs a position with a label and there is none")
    mean = total / tokens
    return Perplexity(math.exp(mean) if not mean > _LARGEST_LOSS else math.inf, tokens, mean)


def _token_losses(model: PreTrainedModel, examples: Sequence[Encoded]) -> Tensor:
    """The losses of the labelled positions of a batch, (N,) float32, row by row."""
    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in collate(examples, pad_id=0).items()}
    labels = batch.pop("labels")[:, 1:]
    counted = labels != NO_LOSS
    hidden = model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1][counted]  # (N, H)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    rows = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    chunks = [
        nn.functional.cross_entropy(head(some).float(), wanted, reduction="none")
        for some, wanted in zip(hidden.split(rows), labels[counted].split(rows), strict=True)
    ]
    return torch.cat(chunks)


def generation_scores(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Corpus BLEU and mean ROUGE-L of one text a prompt against several references, both times 100.

    BLEU is sacrebleu's (up to 4-grams, exponential smoothing, closest reference length). Its "13a" tokenizer leaves
    text alone that is tokenized already, as E2E's is, and splits the rest as mteval does, so a model that forgot a
    space before a full stop does not lose by it. ROUGE-L is rouge_score's F1, the best over a prompt's references,
    without stemming; it lowers case and reads only a-z and 0-9. The E2E challenge's own script combines the best
    precision and the best recall with beta 1.2 instead, so its figures are others: compare like with like.

    Args:
        hypotheses: One a prompt.
        references: At least one a prompt, of any number each.
        tokenize: sacrebleu's tokenizer for BLEU: "13a", "intl", "char" or "none" (split at blanks).
        lowercase: Whether BLEU ignores case.
        resamples: Of the bootstrap over prompts that gives the 95 % intervals.
        seed: Of the bootstrap.

    Returns:
        ``{"bleu": ..., "rouge_l": ...}``.

    Raises:
        InputError: If the lengths differ, are zero, or a prompt has no reference; names the row.

    Source: Papineni et al. 2002; Post 2018, arXiv:1804.08771; Lin 2004 (ROUGE); Efron 1979 (bootstrap, percentiles).
    """
    _check_texts(hypotheses, references)
    counts = _bleu_counts(hypotheses, references, tokenize=tokenize, lowercase=lowercase)
    rouge = _rouge_l(hypotheses, references)
    weights = _resampled(len(hypotheses), positive_int(resamples=resamples), seed)
    whole = np.ones(len(hypotheses), dtype=np.int64)
    bleu = [_bleu(row) for row in weights @ counts]
    return {
        "bleu": _score(_bleu(whole @ counts), np.array(bleu), len(hypotheses)),
        "rouge_l": _score(float(rouge.mean()), weights @ rouge / len(hypotheses), len(hypotheses)),
    }


def accuracy_scores(predictions: Tensor | Sequence[int], classes: Tensor | Sequence[int]) -> dict[str, Score]:
    """The share of right classes, times 100, and its exact interval.

    >>> print(accuracy_scores([0, 1, 1, 0], [0, 1, 1, 1])["accuracy"])
    75.00 [19.41, 99.37] n=4

    Args:
        predictions: (N,) predicted classes, or (N, K) logits, of which the largest is the prediction.
        classes: (N,) true ones.

    Raises:
        InputError: If the lengths differ or are zero, or a logit is nan.

    Source: Clopper and Pearson 1934; takes the examples as independent.
    """
    from scipy.stats import binomtest

    predicted, true = torch.as_tensor(predictions), torch.as_tensor(classes)
    if predicted.is_floating_point() and predicted.isnan().any():
        raise InputError("predictions must not be nan: the model has diverged; lower the learning rate, in a new run")
    if predicted.ndim == 2:
        predicted = predicted.argmax(dim=1)
    if predicted.shape != true.shape or true.ndim != 1 or not len(true):
        shapes = f"{tuple(predicted.shape)} and {tuple(true.shape)}"
        raise InputError(f"predictions and classes must be as many, at least one, got {shapes}")
    right = binomtest(int((predicted.cpu() == true.cpu()).sum()), len(true))
    interval = right.proportion_ci(0.95, method="exact")
    return {"accuracy": Score(100 * right.statistic, 100 * interval.low, 100 * interval.high, len(true))}


def _check_texts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(hypotheses) != len(references) or not hypotheses:
        raise InputError(
            f"hypotheses and references must be as many, at least one, got {len(hypotheses)} and {len(references)}"
        )
    for row, texts in enumerate(references, start=1):
        if isinstance(texts, str) or not texts:
            raise InputError(f"references of row {row} must be a list of at least one text")


def _bleu_counts(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: str, lowercase: bool
) -> NDArray[np.int64]:
    """(N, 10) per prompt: matches and totals of 1- to 4-grams, own length, closest reference's length."""
    from sacrebleu.metrics.bleu import BLEU

    if tokenize not in BLEU.TOKENIZERS:
        raise InputError(f"tokenize {tokenize!r} is unknown; known: {', '.join(map(str, BLEU.TOKENIZERS))}")
    metric = BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True)
    rows = []
    for text, texts in zip(hypotheses, references, strict=True):
        one = metric.sentence_score(text, list(texts))
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    return np.array(rows, dtype=np.int64)


def _bleu(counts: NDArray[np.int64]) -> float:
    """Corpus BLEU of summed counts."""
    from sacrebleu.metrics.bleu import BLEU

    matches, totals, own, wanted = counts[:4].tolist(), counts[4:8].tolist(), int(counts[8]), int(counts[9])
    return float(BLEU.compute_bleu(matches, totals, own, wanted, smooth_method="exp").score)


def _rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """(N,) the best F1 of each prompt, times 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    best = [
        scorer.score_multi(list(texts), text)["rougeL"].fmeasure
        for text, texts in zip(hypotheses, references, strict=True)
    ]
    return 100 * np.array(best)


def _resampled(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """(resamples, count): how often each prompt was drawn."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples)


def _score(value: float, resampled: NDArray[np.float64], count: int) -> Score:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Score(value, float(low), float(high), count)
