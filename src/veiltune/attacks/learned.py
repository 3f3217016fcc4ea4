"""Learned inversion: models that the attacker trains on public text, under the same mechanism, to read releases.

All kinds score a token as ``query . E_v + bias_v`` with the public word embeddings E, so tokens that never occur in
the public text are guessed too. They differ in where the query comes from:

* linear: Gaussian discriminant analysis in closed form. A token's release is taken as A E_v + c plus Gaussian
  scatter (context and noise together), which with the unigram prior gives Bayes' rule exactly.
* window: the linear query plus a correction by a small network that sees the neighbours.
* sequence: the linear query plus a correction by a small transformer that sees the whole text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veiltune._validate import in_range, one_of, positive, positive_int
from veiltune.attacks.inversion import best_columns, check_token_ids, unigram_log_prior
from veiltune.attacks.networks import FREQUENT, Correction, correction_for
from veiltune.attacks.sequences import batches_by_length, check_lengths, pad_texts, rows_of
from veiltune.errors import InputError
from veiltune.models.precision import bf16_products

Kind = Literal["linear", "window", "sequence"]
KINDS: tuple[Kind, ...] = ("linear", "window", "sequence")
PASSES: Mapping[Kind, int] = {"linear": 3, "window": 5, "sequence": 5}

_RIDGE = 1e-3  # of the mean variance
_BLOCK = 2**24  # scores held at a time
_BATCH_TOKENS = 2048  # less for little text, so that a pass has some 40 steps
_FREQUENT = 1024  # candidates of every training step, by frequency
_SAMPLED = 1024  # further candidates, drawn anew each step
_PEAK_RATE = 1e-3
_WARMUP = 0.05

Privatize = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Inverter:
    """A trained inverter; see `train_inverter`.

    Attributes:
        kind: A key of `KINDS`.
        word_embeddings: E, the public (V, H') matrix.
        projection: (H, H'): the linear query is (values - center) @ projection.
        center: (H,), mean of the released vectors.
        bias: (V,).
        log_prior: (V,), the unigram log-prior that `bias` holds, for attacks that bring a better one.
        correction: What context adds to the query; None for "linear".
    """

    kind: Kind
    word_embeddings: Float[Tensor, "V E"]
    projection: Float[Tensor, "H E"]
    center: Float[Tensor, " H"]
    bias: Float[Tensor, " V"]
    log_prior: Float[Tensor, " V"]
    correction: Correction | None = None

    def guess(self, values: Float[Tensor, "N H"], lengths: Sequence[int], top_k: int = 1) -> Int[Tensor, "N top_k"]:
        """Guesses each token of some releases, best first; see `log_scores`."""
        return self._ranked(values, lengths, top_k, normalise=False)[0]

    def log_scores(
        self, values: Float[Tensor, "N H"], lengths: Sequence[int], top_k: int
    ) -> tuple[Int[Tensor, "N top_k"], Float[Tensor, "N top_k"]]:
        """The best candidates of each token and their log-probabilities.

        Args:
            values: Released vectors of several texts, one after the other, special tokens included.
            lengths: Rows of each text.
            top_k: Candidates per token, in [1, V].

        Raises:
            InputError: If a size is out of range.
        """
        return self._ranked(values, lengths, top_k, normalise=True)

    @torch.no_grad()
    def _ranked(self, values: Tensor, lengths: Sequence[int], top_k: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
        vocab_size = len(self.word_embeddings)
        if not 1 <= top_k <= vocab_size:
            raise InputError(f"top_k must be in [1, {vocab_size}] (the vocabulary size), got {top_k}")
        if values.shape[-1] != len(self.center):
            raise InputError(f"values have width {values.shape[-1]}, the inverter was trained on {len(self.center)}")
        queries = self.queries(values, lengths)
        rows = max(1, _BLOCK // vocab_size)
        ids = torch.empty(len(queries), top_k, dtype=torch.long, device=queries.device)
        scores = queries.new_empty(len(queries), top_k)
        buffer = queries.new_empty(min(rows, max(1, len(queries))), vocab_size)
        for start in range(0, len(queries), rows):
            block = queries[start : start + rows]
            logits = torch.addmm(self.bias, block, self.word_embeddings.T, out=buffer[: len(block)])
            best, ids[start : start + rows] = best_columns(logits, top_k)
            scores[start : start + rows] = best - logits.logsumexp(dim=-1, keepdim=True) if normalise else best
        return ids, scores

    @torch.no_grad()
    def queries(self, values: Float[Tensor, "N H"], lengths: Sequence[int]) -> Float[Tensor, "N E"]:
        """The vectors whose products with the word embeddings, plus the bias, are the logits."""
        check_lengths(lengths, len(values))
        centred = values.float() - self.center
        queries = centred @ self.projection
        if self.correction is not None:
            self.correction.train(False)
            for texts in batches_by_length(lengths, _BATCH_TOKENS):
                rows = rows_of(lengths, texts).to(values.device)
                sizes = [lengths[i] for i in texts]
                batch, mask = pad_texts(centred[rows], sizes)
                queries[rows] += self.correction(batch, pad_texts(queries[rows], sizes)[0], mask)[mask]
        return queries

    def state(self) -> dict[str, Tensor]:
        """Everything but the word embeddings, as tensors by name."""
        own = {name: getattr(self, name) for name in ("projection", "center", "bias", "log_prior")}
        learned = {} if self.correction is None else self.correction.state_dict()
        return own | {f"correction.{name}": value for name, value in learned.items()}

    @classmethod
    def from_state(cls, kind: Kind, state: Mapping[str, Tensor], word_embeddings: Float[Tensor, "V E"]) -> Inverter:
        """Rebuilds an inverter from what `state` gave.

        Raises:
            InputError: If the kind is unknown or the state is another's.
        """
        _check_kind(kind)
        own = {name: state[name] for name in ("projection", "center", "bias", "log_prior") if name in state}
        if len(own) != 4 or len(own["bias"]) != len(word_embeddings):
            raise InputError("the state is no inverter's for this vocabulary; train it again")
        correction = None
        if kind != "linear":
            rest = {name.removeprefix("correction."): value for name, value in state.items() if name not in own}
            correction = _new_correction(kind, own["projection"], len(word_embeddings), seed=0)
            correction.load_state_dict(rest)
            correction.train(False)
        return cls(kind=kind, word_embeddings=word_embeddings.float(), correction=correction, **own)


def train_inverter(
    kind: Kind,
    clean: Float[Tensor, "N H"],
    token_ids: Int[Tensor, " N"],
    lengths: Sequence[int],
    *,
    privatize: Privatize,
    word_embeddings: Float[Tensor, "V E"],
    seed: int,
    passes: int | None = None,
    max_seconds: float | None = None,
    smoothing: float = 0.1,
    bf16: bool = True,
) -> Inverter:
    """Trains an inverter on public text.

    >>> generator = torch.Generator().manual_seed(0)
    >>> vocabulary = torch.randn(9, 4, generator=generator)
    >>> public, secret = torch.randint(0, 9, (2, 300), generator=generator)
    >>> add_noise = lambda values: values + 0.1 * torch.randn(values.shape, generator=generator)
    >>> inverter = train_inverter(
    ...     "linear", vocabulary[public], public, [300], privatize=add_noise, word_embeddings=vocabulary, seed=0)
    >>> (inverter.guess(add_noise(vocabulary[secret]), [300])[:, 0] == secret).float().mean().item() > 0.95
    True

    Threat model:
        Honest-but-curious vendor: holds the bottom and its word embeddings, has public text, knows the mechanism and
        its strength and so can draw noise of his own; sees the releases. Strong: without noise it reads nearly all
        tokens at every depth tried, and under noise "linear" is already far above the nearest embedding. Costs
        seconds ("linear") to minutes on a CPU for 100,000 tokens of public text.

    Args:
        kind: A key of `KINDS`.
        clean: Representations of public texts at the cut, one text after the other.
        token_ids: Their tokens.
        lengths: Rows of each text.
        privatize: The mechanism with fresh noise at each call, (n, H) -> (n, H); called once a pass on all rows.
            Its randomness is the attacker's own.
        word_embeddings: Public (V, E) matrix of the bottom; E may differ from H.
        seed: Of initial weights, batches, sampled candidates and dropout.
        passes: Over the public text, each with fresh noise; default `PASSES`.
        max_seconds: Stop training the correction by then, the learning rate brought down in time. Results then
            depend on the machine's speed.
        smoothing: Of the unigram prior, see `unigram_log_prior`.
        bf16: Train the correction's matrix products in bfloat16.

    Raises:
        InputError: If sizes disagree, a number is out of range or the kind is unknown.

    Source: learned inverters as in Song and Raghunathan 2020, arXiv:2004.00053, and BiSR, arXiv:2409.00960; the linear
        one is Fisher's discriminant with means tied to the word embeddings.
    """
    _check_kind(kind)
    check_lengths(lengths, len(clean))
    if len(token_ids) != len(clean) or len(clean) < 2:
        raise InputError(f"clean and token_ids must be of one size above 1, got {len(clean)} and {len(token_ids)}")
    check_token_ids(token_ids, len(word_embeddings))
    passes = positive_int(passes=PASSES[kind] if passes is None else passes)
    began = time.monotonic()
    log_prior = unigram_log_prior(token_ids, len(word_embeddings), smoothing).to(clean.device)
    linear, deviation = _fit_linear(
        clean, token_ids, log_prior, privatize, word_embeddings.float(), min(passes, PASSES["linear"])
    )
    if kind == "linear":
        return linear
    correction = _new_correction(kind, linear.projection, len(word_embeddings), seed=seed)
    frequent = log_prior.topk(len(correction.frequent)).indices
    correction.prepare(deviation, linear.word_embeddings[frequent], linear.bias[frequent])
    inverter = replace(linear, kind=kind, correction=correction, bias=linear.bias.clone())
    deadline = None if max_seconds is None else began + positive(max_seconds=max_seconds)
    _Training(inverter, seed, passes, began, deadline, bf16).run(clean, token_ids, lengths, privatize)
    return inverter


def augmented_ids(
    token_ids: Int[Tensor, " N"],
    vocab_size: int,
    *,
    generator: torch.Generator,
    share: float = 0.15,
    keep: Sequence[int] = (),
) -> Int[Tensor, " N"]:
    """Replaces some tokens of public text by random ones, so that rare tokens occur in training.

    The attacker holds the bottom: he runs it on the result for further training rows. The unigram prior is then to be
    counted on the original.

    >>> ids = torch.tensor([0, 5, 6, 7, 1])
    >>> augmented_ids(ids, 100, generator=torch.Generator().manual_seed(0), share=1.0, keep=[0, 1]).tolist()[::4]
    [0, 1]

    Args:
        token_ids: Of public text.
        vocab_size: V.
        generator: Source of randomness.
        share: Of the tokens replaced, in [0, 1].
        keep: Ids never replaced nor drawn: the special tokens.
    """
    positive_int(vocab_size=vocab_size)
    in_range(0.0, 1.0, share=share)
    special = torch.tensor(list(keep), dtype=torch.long)
    ordinary = torch.arange(vocab_size)[~torch.isin(torch.arange(vocab_size), special)]
    replaced = (torch.rand(len(token_ids), generator=generator) < share) & ~torch.isin(token_ids.cpu(), special)
    drawn = ordinary[torch.randint(len(ordinary), (len(token_ids),), generator=generator)]
    return torch.where(replaced.to(token_ids.device), drawn.to(token_ids.device), token_ids)


def _check_kind(kind: str) -> None:
    one_of(KINDS, kind=kind)


@torch.no_grad()
def _fit_linear(
    clean: Tensor, token_ids: Tensor, log_prior: Tensor, privatize: Privatize, embeddings: Tensor, passes: int
) -> tuple[Inverter, Tensor]:
    """Regresses releases on word embeddings; means, shared scatter and prior give the discriminant. And std of rows."""
    counts = torch.bincount(token_ids, minlength=len(embeddings)).double()
    mean_in = (counts @ embeddings.double()) / counts.sum()
    centred_in = (embeddings.double() - mean_in).float()
    inputs = centred_in[token_ids]
    second_in = (centred_in * counts.unsqueeze(1).float()).T @ centred_in * passes
    center = clean.float().mean(dim=0)  # near the releases' mean is enough here; exact below
    cross = inputs.new_zeros(inputs.shape[1], clean.shape[1])
    second_out = inputs.new_zeros(clean.shape[1], clean.shape[1])
    total = inputs.new_zeros(clean.shape[1])
    for _ in range(passes):
        released = privatize(clean).float() - center
        cross += inputs.T @ released
        second_out += released.T @ released
        total += released.sum(dim=0)
    rows = len(clean) * passes
    shift = total / rows
    slope = _ridge_solve(second_in, cross)  # (E, H); inputs are centred
    scatter = second_out / rows - torch.outer(shift, shift)
    residual = scatter - (slope.T @ second_in @ slope) / rows
    precise = _ridge_solve(residual, slope.T)  # Sigma^-1 A', (H, E)
    quadratic = slope @ precise  # A Sigma^-1 A'
    offset = (centred_in @ quadratic * centred_in).sum(dim=1) / 2
    # (y - center - shift) @ precise . (E_v - mean) : the mean's part is the same for all v and drops out
    inverter = Inverter(
        kind="linear",
        word_embeddings=embeddings,
        projection=precise,
        center=center + shift,
        bias=log_prior - offset,
        log_prior=log_prior,
    )
    return inverter, scatter.diagonal().sqrt()


def _new_correction(kind: Kind, projection: Tensor, vocab_size: int, *, seed: int) -> Correction:
    return correction_for(kind, *projection.shape, num_frequent=min(FREQUENT, vocab_size), seed=seed).to(
        projection.device
    )


def _ridge_solve(matrix: Tensor, target: Tensor) -> Tensor:
    """(matrix + ridge)^-1 target in float64."""
    square = matrix.double()
    square = (square + square.T) / 2
    ridge = _RIDGE * square.diagonal().mean().clamp(min=1e-12)
    solution: Tensor = torch.linalg.solve(
        square + ridge * torch.eye(len(square), device=square.device), target.double()
    )
    return solution.float()


class _Training:
    """Trains a correction and the bias by softmax cross-entropy over sampled candidates."""

    def __init__(
        self, inverter: Inverter, seed: int, passes: int, began: float, deadline: float | None, bf16: bool
    ) -> None:
        assert inverter.correction is not None
        self.inverter, self.correction = inverter, inverter.correction
        self.generator = torch.Generator().manual_seed(seed)
        self.seed, self.passes, self.began, self.deadline, self.bf16 = seed, passes, began, deadline, bf16
        order = inverter.log_prior.argsort(descending=True)
        self.frequent, self.rare = order[:_FREQUENT], order[_FREQUENT:]
        groups = [
            {"params": [p for p in self.correction.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in self.correction.parameters() if p.ndim <= 1], "weight_decay": 0.0},
            {"params": [inverter.bias.requires_grad_()], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=_PEAK_RATE)

    def run(self, clean: Tensor, token_ids: Tensor, lengths: Sequence[int], privatize: Privatize) -> None:
        """All passes; afterwards the inverter is ready for use."""
        batches = batches_by_length(lengths, min(_BATCH_TOKENS, max(256, len(clean) // 40)))
        self.correction.train(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # dropout
            for number in range(self.passes):
                if self._set_rate(number / self.passes):
                    self._pass(number, batches, clean, token_ids, lengths, privatize)
        self.correction.train(False)
        self.correction.requires_grad_(False)
        self.inverter.bias.requires_grad_(False)

    def _pass(
        self,
        number: int,
        batches: list[list[int]],
        clean: Tensor,
        token_ids: Tensor,
        lengths: Sequence[int],
        privatize: Privatize,
    ) -> None:
        released = privatize(clean).float() - self.inverter.center
        for done, index in enumerate(torch.randperm(len(batches), generator=self.generator).tolist()):
            if not self._set_rate((number + done / len(batches)) / self.passes):
                return
            rows = rows_of(lengths, batches[index]).to(clean.device)
            self._step(released[rows], token_ids[rows], [lengths[i] for i in batches[index]])

    def _set_rate(self, progress: float) -> bool:
        """Linear warm-up and decay by steps or by time, whichever is further; False when done."""
        if self.deadline is not None:
            progress = max(progress, (time.monotonic() - self.began) / (self.deadline - self.began))
        for group in self.optimizer.param_groups:
            group["lr"] = _PEAK_RATE * min(progress / _WARMUP + 0.01, (1 - progress) / (1 - _WARMUP))
        return progress < 1

    def _step(self, values: Tensor, targets: Tensor, lengths: list[int]) -> None:
        queries = values @ self.inverter.projection
        batch, mask = pad_texts(values, lengths)
        with bf16_products(values.device.type, enabled=self.bf16):
            added = self.correction(batch, pad_texts(queries, lengths)[0], mask)[mask]
        loss = self._loss(queries + added.float(), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.correction.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(self, queries: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy whose normaliser sums the frequent tokens and, weighted up, a sample of the others."""
        count = min(_SAMPLED, len(self.rare))
        drawn = torch.randperm(len(self.rare), generator=self.generator)[:count].to(queries.device)
        candidates = torch.cat([self.frequent, self.rare[drawn]])
        weight = self.inverter.bias.new_zeros(len(candidates))
        weight[len(self.frequent) :] = torch.tensor(len(self.rare) / max(1, count)).log()
        table, bias = self.inverter.word_embeddings, self.inverter.bias
        own = (queries * table[targets]).sum(dim=1) + bias[targets]
        others = torch.addmm(bias[candidates] + weight, queries, table[candidates].T)
        others = others.masked_fill(candidates == targets.unsqueeze(1), -torch.inf)
        normaliser = torch.logaddexp(others.logsumexp(dim=1), own)
        return (normaliser - own).mean()
