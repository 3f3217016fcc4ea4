"""Guesses against the truth: rates with intervals, the strongest attack, groups of tokens, controls."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from veiltune.attacks.result import AttackResult
from veiltune.attacks.sequences import bootstrap_by_text
from veiltune.audit.record import Control, Estimate, FrequencyBin, Group, GroupName, Rate

HALF_WIDTH = 0.1  # of the interval that a rate must have to be reported
FREQUENCY_EDGES = (1, 10, 100, 1000)  # occurrences in 100,000 public tokens


@dataclass(frozen=True)
class Truth:
    """What guesses are scored against; attacks never get it.

    Attributes:
        ids: (N,) token ids of all attacked texts, one after the other.
        lengths: Tokens of each text.
        real: (N,) tokens that count: no special tokens, no padding.
        calibration: (N,) tokens of the texts that choose the strongest attack; the others are reported.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    real: Tensor
    calibration: Tensor

    def hits(self, guesses: Tensor) -> Tensor:
        """(N,) whether each token was guessed."""
        return guesses == self.ids

    def rate(self, hits: Tensor, among: Tensor, *, seed: int) -> Rate | None:
        """The share of hits among some tokens, or None if there are none."""
        if not bool(among.any()):
            return None
        counts = [int(part.sum()) for part in among.split(list(self.lengths))]
        result = AttackResult(name="recovery", successes=int(hits[among].sum()), trials=int(among.sum()))
        return Rate.of(result, by_text=bootstrap_by_text(hits[among], counts, seed=seed))


@cache
def tokens_needed(half_width: float = HALF_WIDTH) -> int:
    """The least number of trials whose exact 95 % interval is no wider than twice this, whatever the rate.

    >>> tokens_needed(0.1)
    104
    """
    trials = 1
    while True:
        low, high = AttackResult(name="planning", successes=trials // 2, trials=trials).interval()
        if high - low <= 2 * half_width:
            return trials
        trials += 1


def best_attack(hits: Mapping[str, Tensor], attempted: Mapping[str, Tensor], among: Tensor) -> str | None:
    """The attack with the highest share of hits among some tokens; ties go to the first, None if none tried them."""
    shares = {
        name: float(hits[name][among & attempted[name]].float().mean())
        for name in hits
        if bool((among & attempted[name]).any())
    }
    return max(shares, key=shares.__getitem__) if shares else None


def with_enough_tokens(attempted: Mapping[str, Tensor], among: Tensor, truth: Truth) -> list[str]:
    """Attacks that tried enough tokens of each half for an interval; one on a few texts must not hide the others."""
    parts = among & truth.calibration, among & ~truth.calibration
    return [
        name for name, tried in attempted.items() if min(int((tried & part).sum()) for part in parts) >= tokens_needed()
    ]


def group_rate(
    name: GroupName, description: str, hits: Mapping[str, Tensor], attempted: Mapping[str, Tensor], truth: Truth,
    among: Tensor, *, seed: int,
) -> Group:  # fmt: skip
    """One kind of tokens: the strongest attack on them in the calibration half, its rate in the other."""
    enough = with_enough_tokens(attempted, among, truth)
    chosen = best_attack({attack: hits[attack] for attack in enough}, attempted, among & truth.calibration)
    if chosen is None:
        return Group(name=name, description=description, needed=2 * tokens_needed())
    rate = truth.rate(hits[chosen], among & ~truth.calibration & attempted[chosen], seed=seed)
    return Group(name=name, description=description, attack=chosen, rate=rate)


def by_frequency(hits: Tensor, truth: Truth, among: Tensor, per_100k: Tensor, *, seed: int) -> list[FrequencyBin]:
    """Recovery by how often the attacked token occurs in 100,000 tokens of public text."""
    frequency, first, last = per_100k[truth.ids], FREQUENCY_EDGES[0], FREQUENCY_EDGES[-1]
    bins = {"never": frequency == 0, f"less than {first}": (frequency > 0) & (frequency < first)}
    for low, high in itertools.pairwise(FREQUENCY_EDGES):
        bins[f"{low:,} to under {high:,}"] = (frequency >= low) & (frequency < high)
    bins[f"{last:,} or more"] = frequency >= last
    return [
        FrequencyBin(label=label, rate=truth.rate(hits, among & inside, seed=seed)) for label, inside in bins.items()
    ]


def privacy_of(rate: Rate) -> Estimate:
    """1 - success, with the wider of the two intervals at each end."""
    low, high = rate.interval()
    return Estimate(value=1 - rate.value, low=1 - high, high=1 - low)


def shuffled_control(guesses: Tensor, truth: Truth, among: Tensor, attack: str, *, seed: int) -> Control:
    """Guesses scored, as all of the audit is, against tokens of other places: they must do no better than chance.

    Chance is the probability that a random guess and a random true token of the sample agree. The check fails one
    time in a thousand by chance alone. It is of the scoring; an attack that was told the truth passes it.
    """
    secret, ids = truth.ids[among], truth.ids.clone()
    ids[among] = secret[torch.randperm(len(secret), generator=torch.Generator().manual_seed(seed))]
    shuffled = replace(truth, ids=ids)
    rate = shuffled.rate(shuffled.hits(guesses), among, seed=seed)
    assert rate is not None
    chance = collision(guesses[among], secret)
    low, high = AttackResult(name="shuffled", successes=rate.successes, trials=rate.trials).interval(0.999)
    return Control(
        name="shuffled",
        description="the strongest attack's guesses scored against the tokens in random order: must be at chance",
        attack=attack,
        rate=rate,
        expected=chance,
        passed=low <= chance <= high,
    )


def positive_control(hits: Mapping[str, Tensor], truth: Truth, among: Tensor, *, least: float, seed: int) -> Control:
    """The same attackers on the same texts without noise: they must read them, or their failure means nothing."""
    everywhere = {name: torch.ones_like(found) for name, found in hits.items()}
    chosen = best_attack(hits, everywhere, among & truth.calibration)
    assert chosen is not None
    rate = truth.rate(hits[chosen], among & ~truth.calibration, seed=seed)
    assert rate is not None
    return Control(
        name="positive",
        description="attackers of this suite on the same texts without noise: must read them",
        attack=chosen,
        rate=rate,
        expected=least,
        passed=rate.value >= least,
    )


def collision(first: Tensor, second: Tensor) -> float:
    """Probability that a random element of one equals a random element of the other.

    >>> collision(torch.tensor([1, 1]), torch.tensor([1, 2]))
    0.5
    """
    size = 1 + int(max(first.max(), second.max()))
    shares = [torch.bincount(part, minlength=size).double() / len(part) for part in (first, second)]
    return float(shares[0] @ shares[1])


def halves(lengths: Sequence[int]) -> Tensor:
    """(N,) True on the tokens of the first half of the texts."""
    middle = len(lengths) // 2
    return torch.cat([torch.full((n,), i < middle) for i, n in enumerate(lengths)])
