"""What steps of Poisson-sampled Gaussian noise add up to: every figure comes from dp-accounting, none is home-made.

Each step is described by a `DpEvent`. `claimed_epsilon` reads it with the privacy loss distribution (PLD), rounded up
on a grid; `rdp_epsilon` is the older, looser bound, computed by other code, and serves as a cross-check. Neighbours
differ by one unit that is added or removed.

Central limit ("Gaussian DP") figures are not offered: they are estimates that can lie below the truth.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from veiltune._validate import in_range, positive, refusal
from veiltune.dp.sampling import probability, whole
from veiltune.errors import PrivacyError

MIN_NOISE, MAX_NOISE = 0.3, 1000.0  # that calibration looks between
MIN_DELTA = 1e-12  # below, the arithmetic of the convolution is not fine enough
_ROUNDING = 1e-16  # of delta a step, at most, that the convolution can lose; measured: 3e-17
_LEAST_CELL = 3e-8  # times sqrt(steps): rounding in the differences adds about 1e-17 / cell^2 of mass a step
_MOSTLY = 0.9  # of delta: with less of it left, the looser bound may be the smaller one
_TAIL = 10.0  # standard deviations at which dp-accounting cuts the noise (e^-50)
_NO_EPSILON = 1e-9  # keeps logarithms finite
_LEAST_NOISE = 0.1  # of one step, for a grid
_MOST_COMPOSED_CELLS = 5e6


class _Grid(NamedTuple):
    """How finely a step's privacy loss is cut into cells."""

    cell: float  # the widest
    per_std: int  # cells at least, in the loss's standard deviation
    most: int  # cells in all


_FINE = _Grid(cell=1e-4, per_std=10, most=400_000)  # for what is claimed
_COARSE = _Grid(cell=1e-3, per_std=3, most=40_000)  # for the search of calibration; also never too low


def gaussian_event(*, noise_multiplier: float, sampling_prob: float, steps: int) -> dp_accounting.DpEvent:
    """The mechanism as plain data: so many steps of Gaussian noise on a sum over Poisson-sampled units.

    >>> gaussian_event(noise_multiplier=2.0, sampling_prob=1.0, steps=3)
    SelfComposedDpEvent(event=GaussianDpEvent(noise_multiplier=2.0), count=3)

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity of the sum, at least 0.
        sampling_prob: Of each unit at each step, in (0, 1]; 1 is no sampling.
        steps: At least 0.

    Raises:
        InputError: If an argument is out of range.
    """
    event = dp_accounting.GaussianDpEvent(_not_negative(noise_multiplier=noise_multiplier))
    if probability(sampling_prob=sampling_prob) < 1.0:
        event = dp_accounting.PoissonSampledDpEvent(sampling_prob, event)
    return dp_accounting.SelfComposedDpEvent(event, whole(steps=steps))


def claimed_epsilon(*, noise_multiplier: float, sampling_prob: float, steps: int, delta: float) -> float:
    """The epsilon that holds at this delta after so many steps, by privacy loss distributions.

    >>> round(claimed_epsilon(noise_multiplier=1.0, sampling_prob=32 / 2000, steps=187, delta=1e-5), 3)
    1.438

    Guarantee:
        The noisy sums of all steps, seen together and chosen in the light of each other, are
        (epsilon, delta)-indistinguishable for tables that differ by one added or removed unit, if each unit is sampled
        independently and moves the sum by at most the sensitivity. Every cell of the grid is rounded up. It says
        nothing of shuffled batches, of two units at once, or of anything else that is published.

    ======================================  ============================================================
    case                                    epsilon
    ======================================  ============================================================
    steps 0                                 0
    noise_multiplier 0                      infinity
    noise_multiplier below 0.1              `rdp_epsilon`: there the grid has no use (epsilon is above 20)
    noise_multiplier below about 0.3        coarser cells, so that building them takes at most 3 s and 0.6 GB
    a step's loss varies by under 0.003     finer cells: with the usual ones the figure could be several
    (weak sampling, much noise)             times too large
    steps above about 1e15 times delta      `rdp_epsilon` where it is less, since rounding is allowed for: 1e-16
                                            of delta a step
    ======================================  ============================================================

    Args:
        noise_multiplier: As in `gaussian_event`.
        sampling_prob: As in `gaussian_event`.
        steps: As in `gaussian_event`.
        delta: In [1e-12, 1).

    Raises:
        InputError: If an argument is out of range.

    Source: Koskela et al. 2020, arXiv:1906.03049; the grid: Doroshenko et al. 2022, arXiv:2207.04380; both directions
        and adaptive steps: Zhu et al. 2022, arXiv:2106.08567.
    """
    _check(noise_multiplier, sampling_prob, steps, delta)
    return _pld_epsilon(float(noise_multiplier), float(sampling_prob), steps, float(delta), _FINE)


def rdp_epsilon(*, noise_multiplier: float, sampling_prob: float, steps: int, delta: float) -> float:
    """The same as `claimed_epsilon` by Renyi differential privacy: also an upper bound, 5 to 30 % looser.

    >>> round(rdp_epsilon(noise_multiplier=1.0, sampling_prob=32 / 2000, steps=187, delta=1e-5), 2)
    1.82

    Guarantee:
        That of `claimed_epsilon`; the same edge cases.

    Args:
        noise_multiplier: As in `gaussian_event`.
        sampling_prob: As in `gaussian_event`.
        steps: As in `gaussian_event`.
        delta: In [1e-12, 1).

    Source: Mironov et al. 2019, arXiv:1908.10530.
    """
    _check(noise_multiplier, sampling_prob, steps, delta)
    return _rdp_epsilon(float(noise_multiplier), float(sampling_prob), steps, float(delta))


def calibrated_noise(*, target_epsilon: float, sampling_prob: float, steps: int, delta: float) -> float:
    """The smallest noise multiplier, to within 0.0002, whose `claimed_epsilon` is at most the target.

    >>> calibrated_noise(target_epsilon=0.5, sampling_prob=0.01, steps=200, delta=1e-5)
    1.3225

    Guarantee:
        `claimed_epsilon` of the result has been computed and is at most the target.

    Args:
        target_epsilon: Above 0. Where noise 0.3 already gives less, 0.3 is returned.
        sampling_prob: As in `gaussian_event`.
        steps: As in `gaussian_event`; 0 is like 1.
        delta: In [1e-12, 1).

    Raises:
        InputError: If an argument is out of range.
        PrivacyError: If even noise 1000 does not reach the target; says what would.
    """
    positive(target_epsilon=target_epsilon)
    _check(MAX_NOISE, sampling_prob, steps, delta)
    steps = max(steps, 1)

    def epsilon(noise: float, grid: _Grid = _FINE) -> float:
        return _pld_epsilon(noise, float(sampling_prob), steps, float(delta), grid)

    def search(target: float) -> int:
        return math.ceil(1e4 * _crossing(lambda noise: epsilon(noise, _COARSE), target))

    if epsilon(MAX_NOISE) > target_epsilon:
        raise _out_of_reach(target_epsilon, sampling_prob, steps, delta)
    ticks, before = search(target_epsilon), -1
    for _ in range(4):  # the coarse curve, scaled so as to meet the fine one where that was last looked at
        if abs(ticks - before) <= 1:
            break
        exact, rough = epsilon(ticks / 1e4), epsilon(ticks / 1e4, _COARSE)
        ticks, before = search(target_epsilon * rough / max(exact, _NO_EPSILON)), ticks
    else:
        ticks = math.ceil(1e4 * _crossing(epsilon, target_epsilon))
    ticks = max(ticks, before) if abs(ticks - before) == 1 else ticks
    while epsilon(ticks / 1e4) > target_epsilon:
        ticks += 1
    return ticks / 1e4


def _crossing(epsilon: Callable[[float], float], target: float) -> float:
    """The noise at which a falling epsilon meets the target, or the end of the range that is nearer to it."""
    high = MIN_NOISE
    while epsilon(high) > target:
        if high == MAX_NOISE:
            return MAX_NOISE
        high = min(2 * high, MAX_NOISE)
    if high == MIN_NOISE:
        return MIN_NOISE

    def excess(log_noise: float) -> float:
        return math.log(max(epsilon(math.exp(log_noise)), _NO_EPSILON) / target)

    return math.exp(brentq(excess, math.log(max(high / 2, MIN_NOISE)), math.log(high), xtol=1e-6))


@lru_cache(maxsize=1024)
def _pld_epsilon(noise: float, sampling_prob: float, steps: int, delta: float, grid: _Grid) -> float:
    if sampling_prob == 1.0 and steps:  # a sum of Gaussians is one
        noise, steps = noise / math.sqrt(steps), 1
    if noise < _LEAST_NOISE or not steps:
        return _rdp_epsilon(noise, sampling_prob, steps, delta)
    sure = delta - _ROUNDING * steps
    if sure <= 0.0:
        return _rdp_epsilon(noise, sampling_prob, steps, delta)
    one_step = _one_step(noise, sampling_prob, _cell(noise, sampling_prob, steps, grid))
    epsilon = float(one_step.self_compose(steps).get_epsilon_for_delta(sure))
    return epsilon if sure > _MOSTLY * delta else min(epsilon, _rdp_epsilon(noise, sampling_prob, steps, delta))


@lru_cache(maxsize=8)
def _one_step(noise: float, sampling_prob: float, cell: float) -> PrivacyLossDistribution:
    """Kept, as building it takes longer than composing it, which each report of progress does again."""
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        pessimistic_estimate=True,
        value_discretization_interval=cell,
        sampling_prob=sampling_prob,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _cell(noise: float, sampling_prob: float, steps: int, grid: _Grid) -> float:
    """The width of a cell: fine against how much a step's loss varies, but neither too many nor too fine."""
    power = math.expm1(noise**-2)
    deviation = sampling_prob * math.sqrt(power)
    span = max(0.0, math.log(sampling_prob) + _TAIL / noise + 0.5 / noise**2)
    composed = steps * math.log1p(sampling_prob**2 * power)  # Renyi divergence of order 2: about where the losses lie
    least = _LEAST_CELL * math.sqrt(10 ** math.ceil(math.log10(steps)))
    wanted = min(grid.cell, max(deviation / grid.per_std, least))
    return max(wanted, span / grid.most, composed / _MOST_COMPOSED_CELLS)


@lru_cache(maxsize=1024)
def _rdp_epsilon(noise: float, sampling_prob: float, steps: int, delta: float) -> float:
    if steps == 0:
        return 0.0
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    with _without_notes():
        accountant.compose(gaussian_event(noise_multiplier=noise, sampling_prob=sampling_prob, steps=steps))
        return float(accountant.get_epsilon(delta))


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keeps dp-accounting's notes on orders that it leaves out off the terminal: the bound holds without them."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _out_of_reach(target: float, sampling_prob: float, steps: int, delta: float) -> PrivacyError:
    def least(count: int) -> float:
        return _pld_epsilon(MAX_NOISE, float(sampling_prob), count, float(delta), _FINE)

    fits, too_many = 0, steps
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if least(middle) <= target else (fits, middle)
    remedy = f"take at most {fits} step{'s' * (fits > 1)}" if fits else "sample less"
    digits = 10.0 ** (math.floor(math.log10(least(steps))) - 2)
    return PrivacyError(
        f"epsilon must be at least {math.ceil(least(steps) / digits) * digits:.3g} for {steps} steps at "
        f"sampling_prob {sampling_prob:.4g} and delta {delta:g} (noise_multiplier {MAX_NOISE:g}), got {target:g}; "
        f"allow more epsilon, or {remedy}"
    )


def _check(noise_multiplier: float, sampling_prob: float, steps: int, delta: float) -> None:
    _not_negative(noise_multiplier=noise_multiplier)
    probability(sampling_prob=sampling_prob)
    whole(steps=steps)
    if in_range(MIN_DELTA, 1.0, delta=delta) == 1.0:
        raise refusal("delta", f"in [{MIN_DELTA:g}, 1)", delta)


def _not_negative(**values: float) -> float:
    ((name, value),) = values.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise refusal(name, "finite and at least 0", value)
    return value
