"""The inversion suite: what each attack is given, and how it is run on what crossed the wire.

An attack gets an `Adversary`, which is all that an honest-but-curious vendor has, and the released vectors. The truth
is in `scoring`, which attacks cannot reach. What attackers train on is public text under the same mechanism with fresh
noise of the operating system; it never is the run's own noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from veiltune.attacks.decoding import NgramPrior, decode_with_prior
from veiltune.attacks.inversion import invert_by_map, invert_by_nearest_embedding, rank_candidates, unigram_log_prior
from veiltune.attacks.learned import Inverter, Kind, train_inverter
from veiltune.attacks.optimize import invert_by_optimization
from veiltune.attacks.sequences import rows_of, token_codebook
from veiltune.audit.attempts import NotApplicableError
from veiltune.audit.presets import Preset
from veiltune.models.split import BottomModel

TOP_K = 5
CANDIDATES = 64  # a position of the optimising attack and of the language prior
_TUNING_TOKENS = 2_000
_NOISELESS = 20.0  # stands for an infinite multiplier: less noise than any other token, more than rounding
_SHARPNESS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """What the vendor knows and what he can make of it.

    Attributes:
        bottom: The bottom model as he gave it away.
        clean: Sequences -> (N, H) representations, as the customer computes them.
        template: Token ids of a text of one token.
        position: Of that token in it.
        special_ids: Token ids that are no secret.
        public_ids: Public texts.
        public_clean: (N, H) their representations.
        privatize: Public vectors, row for row, to vectors with the noise that the observed ones have; fresh each time.
        eta: Of that noise if it is d_chi.
        sigma: Of that noise if it is Gaussian.
        multipliers: (C, V) of eta by class and token, where contributing tokens have less noise.
        seed: Of his own training.
    """

    bottom: BottomModel
    clean: Callable[[Sequence[Sequence[int]]], Tensor]
    template: tuple[int, ...]
    position: int
    special_ids: frozenset[int]
    public_ids: list[list[int]]
    public_clean: Tensor
    privatize: Callable[[Tensor], Tensor]
    eta: float | None
    sigma: float | None
    multipliers: Tensor | None
    seed: int
    _made: dict[str, Tensor | Inverter] = field(default_factory=dict, repr=False)

    @property
    def public_flat(self) -> Tensor:
        """(N,) public token ids."""
        return torch.tensor([token for ids in self.public_ids for token in ids])

    @property
    def public_lengths(self) -> list[int]:
        """Tokens of each public text."""
        return [len(ids) for ids in self.public_ids]

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.bottom.word_embeddings)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the noise in one coordinate; None without noise."""
        if self.eta is not None:
            return math.sqrt(self.bottom.hidden_size + 1) / self.eta
        return self.sigma

    @property
    def codebook(self) -> Tensor:
        """(V, H) each token alone at the cut; the embedding matrix itself where words are released."""
        if "codebook" not in self._made:
            self._made["codebook"] = token_codebook(self.bottom, template=self.template, position=self.position)
        made = self._made["codebook"]
        assert isinstance(made, Tensor)
        return made

    def inverter(self, kind: Kind, passes: int) -> Inverter:
        """A trained inverter; trained once."""
        if kind not in self._made:
            self._made[kind] = train_inverter(
                kind,
                self.public_clean,
                self.public_flat,
                self.public_lengths,
                privatize=self.privatize,
                word_embeddings=self.bottom.word_embeddings.detach().float(),
                seed=self.seed,
                passes=passes,
            )
        made = self._made[kind]
        assert not isinstance(made, Tensor)
        return made


@dataclass(frozen=True)
class Guesses:
    """Token ids of each position, best first: (N, K); and (N,) which positions were attacked at all."""

    ids: Tensor
    attempted: Tensor

    @classmethod
    def of_all(cls, ids: Tensor) -> Guesses:
        """Every position was attacked."""
        return cls(ids, torch.ones(len(ids), dtype=torch.bool))


@dataclass(frozen=True)
class InversionAttack:
    """An entry of the suite: for people, what it needs, and how it is run."""

    title: str
    sees: str
    run: Callable[[Adversary, Tensor, Sequence[int], Preset], Guesses]


def _nearest(adversary: Adversary, values: Tensor, lengths: Sequence[int], preset: Preset) -> Guesses:
    return Guesses.of_all(invert_by_nearest_embedding(values, adversary.codebook, top_k=TOP_K))


def _map(adversary: Adversary, values: Tensor, lengths: Sequence[int], preset: Preset) -> Guesses:
    prior = unigram_log_prior(adversary.public_flat, adversary.vocab_size)
    return Guesses.of_all(_by_bayes(adversary, values, lengths, prior, top_k=TOP_K)[0])


def _lm_prior(adversary: Adversary, values: Tensor, lengths: Sequence[int], preset: Preset) -> Guesses:
    """Candidates and likelihoods from the exact codebook at cut 0, from the linear inverter above it."""
    if adversary.bottom.releases_words:
        unigram = unigram_log_prior(adversary.public_flat, adversary.vocab_size)
        ids, scores = _by_bayes(adversary, values, lengths, unigram, top_k=CANDIDATES)
    else:
        inverter = adversary.inverter("linear", preset.passes)
        unigram = inverter.log_prior
        ids, scores = inverter.log_scores(values, lengths, top_k=CANDIDATES)
    prior = NgramPrior(adversary.public_flat, adversary.public_lengths, vocab_size=adversary.vocab_size)
    decoded = decode_with_prior(ids, scores - unigram[ids], lengths, prior, beam=preset.beam)
    return Guesses.of_all(decoded)


def _learned(kind: Kind) -> Callable[[Adversary, Tensor, Sequence[int], Preset], Guesses]:
    def run(adversary: Adversary, values: Tensor, lengths: Sequence[int], preset: Preset) -> Guesses:
        return Guesses.of_all(adversary.inverter(kind, preset.passes).guess(values, lengths, top_k=TOP_K))

    return run


def _optimize(adversary: Adversary, values: Tensor, lengths: Sequence[int], preset: Preset) -> Guesses:
    """Starts from what the sequence inverter thinks, over its candidates and the codebook's, on some of the texts."""
    if not preset.optimized_texts:
        raise NotApplicableError(f"left out by the preset {preset.name}: it takes long")
    if adversary.bottom.releases_words:
        raise NotApplicableError("at cut 0 the nearest embedding is its exact optimum")
    half, texts = len(lengths) // 2, range(len(lengths))
    share = min(half, preset.optimized_texts // 2)
    chosen = [*texts[:share], *texts[half : half + share]]
    rows = rows_of(lengths, chosen)
    some, sizes = values[rows], [lengths[i] for i in chosen]
    learned, scores = adversary.inverter("sequence", preset.passes).log_scores(some, sizes, top_k=CANDIDATES // 2)
    nearest = invert_by_nearest_embedding(some, adversary.codebook, top_k=CANDIDATES // 2)
    sigma = adversary.deviation
    floor = scores.min(dim=1, keepdim=True).values.expand(-1, nearest.shape[1])
    found = invert_by_optimization(
        adversary.bottom,
        some,
        sizes,
        candidates=torch.cat([learned, nearest], dim=1),
        initial_scores=torch.cat([scores, floor], dim=1),
        log_prior=None if sigma is None else unigram_log_prior(adversary.public_flat, adversary.vocab_size),
        sigma=sigma,
        fixed=dict(enumerate(adversary.template[: adversary.position])),
        steps=preset.optimize_steps,
        seed=adversary.seed,
    )
    ids = torch.full((len(values), found.shape[1]), -1)
    ids[rows] = found
    return Guesses(ids, ids[:, 0] >= 0)


_KNOWS = "the released vectors and the bottom model"
_TRAINS = f"{_KNOWS}, public text and the mechanism"
INVERSIONS: Mapping[str, InversionAttack] = MappingProxyType(
    {
        "nearest": InversionAttack("nearest embedding", _KNOWS, _nearest),
        "map": InversionAttack("nearest, by token frequency", _TRAINS, _map),
        "lm_prior": InversionAttack("language model (trigrams)", _TRAINS, _lm_prior),
        "linear": InversionAttack("learned: linear map", _TRAINS, _learned("linear")),
        "window": InversionAttack("learned: window", _TRAINS, _learned("window")),
        "sequence": InversionAttack("learned: transformer", _TRAINS, _learned("sequence")),
        "optimize": InversionAttack("optimisation", _TRAINS, _optimize),
    }
)


def _by_bayes(
    adversary: Adversary, values: Tensor, lengths: Sequence[int], log_prior: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor]:
    """Candidates and scores by Bayes' rule, each token by itself.

    Where the noise of a token depends on the class of its text, each class is tried, and for every text the one that
    explains all of its vectors best is taken.
    """
    likelihood = _likelihood(adversary, log_prior)
    rows: Sequence[Tensor | None] = [None]
    if adversary.multipliers is not None and adversary.bottom.releases_words:
        finite = torch.where(adversary.multipliers.isinf(), _NOISELESS, adversary.multipliers)
        rows = list(finite.unique(dim=0))
    found = [
        rank_candidates(
            values, adversary.codebook, top_k=top_k, log_prior=log_prior, multipliers=row, **likelihood
        )
        for row in rows
    ]  # fmt: skip
    evidence = torch.stack([scores.logsumexp(dim=1) for _, scores in found])  # (C, N)
    texts = torch.stack([part.sum(dim=1) for part in evidence.split(list(lengths), dim=1)])  # (B, C)
    chosen = texts.argmax(dim=1).repeat_interleave(torch.tensor(lengths))
    ids, scores = (torch.stack(part)[chosen, torch.arange(len(values))] for part in zip(*found, strict=True))
    return ids, scores


def _likelihood(adversary: Adversary, prior: Tensor) -> dict[str, float | None]:
    """The strength to give a likelihood: the mechanism's own at cut 0, above it one tuned on public text.

    Above cut 0 a token's vector lies off its place in the codebook by noise and by context together; the spread that
    reads public text best is found there, with fresh noise.
    """
    if adversary.bottom.releases_words:
        if adversary.eta is None and adversary.sigma is None:
            raise NotApplicableError("without noise at cut 0 the nearest embedding is exact")
        return {"eta": adversary.eta, "sigma": adversary.sigma}
    secret = adversary.public_flat[:_TUNING_TOKENS]
    values = adversary.privatize(adversary.public_clean)[:_TUNING_TOKENS]
    spread = float((values - adversary.codebook[secret]).square().mean().sqrt())

    def recovered(sigma: float) -> float:
        guesses = invert_by_map(values, adversary.codebook, log_prior=prior, sigma=sigma)
        return float((guesses[:, 0] == secret).float().mean())

    return {"eta": None, "sigma": max((share * spread for share in _SHARPNESS), key=recovered)}
