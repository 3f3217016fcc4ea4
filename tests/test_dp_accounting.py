"""The accountant's figures: golden values, slow twins by numeric integration, monotony, and calibration."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from veiltune.dp import accounting
from veiltune.dp.accounting import calibrated_noise, claimed_epsilon, gaussian_event, rdp_epsilon
from veiltune.errors import InputError, PrivacyError

few = settings(max_examples=5, deadline=None, derandomize=True)

# batch, units, epochs, noise multiplier, delta; epsilon by PLD, by RDP, by the central limit
SETTINGS = [
    (128, 42061, 20, 0.6, 1e-5, 5.415, 6.35, 4.17),
    (2000, 67349, 50, 1.5, 1e-5, 4.069, 4.43, 3.93),
    (32, 2000, 3, 1.0, 1e-5, 1.438, 1.82, 1.08),
    (2000, 392702, 20, 0.65, 1e-6, 6.290, 7.17, 4.84),
]


def plan(batch: int, units: int, epochs: int, noise: float, delta: float) -> dict[str, Any]:
    steps = epochs * units // batch
    return {"noise_multiplier": noise, "sampling_prob": batch / units, "steps": steps, "delta": delta}


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Of one unsampled Gaussian of sensitivity / deviation = mu: Balle and Wang, arXiv:1805.06530, Theorem 8."""
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


def gaussian_epsilon(mu: float, delta: float) -> float:
    return float(brentq(lambda epsilon: gaussian_delta(mu, epsilon) - delta, 0.0, 50.0, xtol=1e-10))


def central_limit_epsilon(*, noise_multiplier: float, sampling_prob: float, steps: int, delta: float) -> float:
    """The peers' "gdp" accountant: Bu et al. 2019, arXiv:1911.11607; an estimate, no bound."""
    return gaussian_epsilon(sampling_prob * math.sqrt(steps * math.expm1(noise_multiplier**-2)), delta)


def slow_delta(epsilon: float, noise: float, sampling_prob: float, steps: int) -> float:
    """The hockey-stick divergence of both directions as a plain sum over a grid, of one step or of two."""
    points = 100_001 if steps == 1 else 1501
    x = np.linspace(-9 * noise, 1 + 9 * noise, points)
    without = norm.pdf(x, scale=noise)
    with_unit = (1 - sampling_prob) * without + sampling_prob * norm.pdf(x, loc=1, scale=noise)
    if steps == 2:
        without, with_unit = np.outer(without, without), np.outer(with_unit, with_unit)
    volume = (x[1] - x[0]) ** steps

    def excess(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.maximum(0, one - math.exp(epsilon) * other).sum() * volume)

    return max(excess(with_unit, without), excess(without, with_unit))


# --- golden values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "units", "epochs", "noise", "delta", "pld", "rdp", "central_limit"), SETTINGS)
def test_published_settings(
    batch: int, units: int, epochs: int, noise: float, delta: float, pld: float, rdp: float, central_limit: float
) -> None:
    given = plan(batch, units, epochs, noise, delta)
    assert claimed_epsilon(**given) == pytest.approx(pld, abs=6e-4)
    assert rdp_epsilon(**given) == pytest.approx(rdp, abs=6e-3)
    estimate = central_limit_epsilon(**given)
    assert estimate == pytest.approx(central_limit, abs=6e-3)
    assert estimate < claimed_epsilon(**given) - 0.1, "the central limit states less than what was spent"
    assert claimed_epsilon(**given) <= rdp_epsilon(**given)


@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[2]])
def test_the_event_says_the_same_as_the_claim(setting: tuple[Any, ...]) -> None:
    given = plan(*setting[:5])
    accountant = PLDAccountant()
    accountant.compose(gaussian_event(**{name: given[name] for name in given if name != "delta"}))
    assert claimed_epsilon(**given) == pytest.approx(accountant.get_epsilon(given["delta"]), abs=1e-6)


# --- slow twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "steps", "delta"), [(1.0, 1, 1e-5), (4.0, 1, 1e-6), (0.7, 1, 1e-3), (5.0, 20, 1e-5)])
def test_without_sampling_it_is_the_analytic_gaussian(noise: float, steps: int, delta: float) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / noise, delta)
    claimed = claimed_epsilon(noise_multiplier=noise, sampling_prob=1.0, steps=steps, delta=delta)
    assert exact - 1e-9 <= claimed <= exact + 1e-3
    planted = gaussian_epsilon(math.sqrt(steps) / noise * 1.01, delta)
    assert not exact - 1e-3 <= planted <= exact + 1e-3


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("noise", "sampling_prob", "delta"), [(0.8, 0.1, 1e-4), (1.0, 0.5, 1e-3), (2.0, 0.9, 1e-3)])
def test_sampled_steps_equal_the_integrals(noise: float, sampling_prob: float, delta: float, steps: int) -> None:
    exact = brentq(lambda epsilon: slow_delta(epsilon, noise, sampling_prob, steps) - delta, 0.0, 12.0, xtol=1e-6)
    given: dict[str, Any] = {"noise_multiplier": noise, "steps": steps, "delta": delta}
    assert claimed_epsilon(sampling_prob=sampling_prob, **given) == pytest.approx(exact, abs=1e-3)
    assert claimed_epsilon(sampling_prob=sampling_prob * 1.02, **given) != pytest.approx(exact, abs=1e-3)  # planted


def test_weak_sampling_is_not_overstated() -> None:
    """With a step's loss far below the usual cell, where the central limit is all but exact."""
    given = {"noise_multiplier": 1000.0, "sampling_prob": 0.01, "steps": 1000, "delta": 1e-5}
    exact = central_limit_epsilon(**given)  # type: ignore[arg-type]
    assert exact * (1 - 1e-4) <= claimed_epsilon(**given) <= exact * 1.01  # type: ignore[arg-type]
    usual = PLDAccountant()
    usual.compose(gaussian_event(noise_multiplier=1000.0, sampling_prob=0.01, steps=1000))
    assert usual.get_epsilon(1e-5) > 3 * exact


@pytest.mark.parametrize(
    ("noise", "steps", "delta"), [(1000.0, 10**6, 1e-12), (1000.0, 10**6, 1e-10), (500.0, 10**6, 1e-9)]
)
def test_many_steps_at_a_tiny_delta_are_not_understated(noise: float, steps: int, delta: float) -> None:
    """Rounding takes from delta what the convolution adds up; sampling all but surely, the exact figure is known."""
    exact = gaussian_epsilon(math.sqrt(steps) / noise, delta)
    claimed = claimed_epsilon(noise_multiplier=noise, sampling_prob=1 - 1e-13, steps=steps, delta=delta)
    assert exact <= claimed <= exact * 1.2


def test_coarser_cells_state_no_less() -> None:
    for noise, steps in ((0.8, 50), (2.0, 2000)):
        fine, coarse = (
            accounting._pld_epsilon(noise, 0.02, steps, 1e-5, grid) for grid in (accounting._FINE, accounting._COARSE)
        )
        assert fine <= coarse * (1 + 1e-9) <= fine * 1.02


# --- properties -------------------------------------------------------------------------------------------------------


@few
@given(
    noise=st.floats(1.1, 30),
    sampling_prob=st.floats(1e-3, 0.7),
    steps=st.integers(1, 500),
    factor=st.floats(1.05, 1.4),
)
def test_epsilon_falls_with_noise_and_grows_with_steps_and_sampling(
    noise: float, sampling_prob: float, steps: int, factor: float
) -> None:
    def epsilon(noise: float, sampling_prob: float, steps: int, delta: float = 1e-5) -> float:
        return claimed_epsilon(noise_multiplier=noise, sampling_prob=sampling_prob, steps=steps, delta=delta)

    here = epsilon(noise, sampling_prob, steps)
    assert here > 0
    assert epsilon(noise * factor, sampling_prob, steps) < here
    assert epsilon(noise, sampling_prob * factor, steps) > here
    assert epsilon(noise, sampling_prob, math.ceil(steps * factor)) > here
    assert epsilon(noise, sampling_prob, steps, delta=1e-7) > here
    assert here <= rdp_epsilon(noise_multiplier=noise, sampling_prob=sampling_prob, steps=steps, delta=1e-5)


@few
@given(
    noise=st.floats(1.2, 50),
    sampling_prob=st.one_of(st.floats(1e-3, 0.5), st.just(1.0)),
    steps=st.integers(1, 1000),
)
def test_calibration_inverts_reporting(noise: float, sampling_prob: float, steps: int) -> None:
    given: dict[str, Any] = {"sampling_prob": sampling_prob, "steps": steps, "delta": 1e-5}
    target = claimed_epsilon(noise_multiplier=noise, **given)
    found = calibrated_noise(target_epsilon=target, **given)
    assert found == pytest.approx(noise, abs=2e-4, rel=2e-4)
    assert claimed_epsilon(noise_multiplier=found, **given) <= target


@pytest.mark.parametrize(
    ("target", "sampling_prob", "steps"), [(8.0, 0.03, 300), (0.01, 0.01, 1000), (0.2, 1e-3, 10**4)]
)
def test_calibration_finds_the_least_noise(target: float, sampling_prob: float, steps: int) -> None:
    given: dict[str, Any] = {"sampling_prob": sampling_prob, "steps": steps, "delta": 1e-5}
    found = calibrated_noise(target_epsilon=target, **given)
    assert round(found, 4) == found
    assert claimed_epsilon(noise_multiplier=found, **given) <= target
    assert found == accounting.MIN_NOISE or claimed_epsilon(noise_multiplier=found - 2e-4, **given) > target


# --- edges ------------------------------------------------------------------------------------------------------------


def test_edges() -> None:
    given: dict[str, Any] = {"sampling_prob": 0.1, "delta": 1e-5}
    for epsilon in (claimed_epsilon, rdp_epsilon):
        assert epsilon(noise_multiplier=1.0, steps=0, **given) == 0.0
        assert epsilon(noise_multiplier=0, steps=3, **given) == math.inf
        assert epsilon(noise_multiplier=0.0, steps=0, **given) == 0.0
    assert calibrated_noise(target_epsilon=1e6, steps=1, **given) == accounting.MIN_NOISE


def test_hopeless_noise_is_answered_in_bounded_time_and_silently(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        figures = [
            claimed_epsilon(noise_multiplier=noise, sampling_prob=0.1, steps=steps, delta=1e-5)
            for noise, steps in ((0.01, 10), (0.1, 10**5), (0.2, 1000))
        ]
    assert all(1000 < figure < math.inf for figure in figures)
    assert not caplog.records


def test_a_target_out_of_reach_says_what_would_fit() -> None:
    given: dict[str, Any] = {"sampling_prob": 0.5, "delta": 1e-5}
    with pytest.raises(PrivacyError, match=r"got 0\.01; allow more epsilon, or take at most \d+ steps") as refusal:
        calibrated_noise(target_epsilon=0.01, steps=1000, **given)
    words = str(refusal.value).replace(";", "").split()
    fits, least = int(words[-2]), float(words[words.index("least") + 1])
    assert claimed_epsilon(noise_multiplier=1000.0, steps=fits, **given) <= 0.01
    assert claimed_epsilon(noise_multiplier=1000.0, steps=fits + 1, **given) > 0.01
    assert calibrated_noise(target_epsilon=least, steps=1000, **given) <= 1000.0
    with pytest.raises(PrivacyError, match="or sample less"):
        calibrated_noise(target_epsilon=1e-7, steps=1000, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be finite and at least 0, got -1.0"),
        ({"noise_multiplier": math.inf}, "noise_multiplier must be finite and at least 0, got inf"),
        ({"sampling_prob": 0.0}, r"sampling_prob must be in \(0, 1\], got 0.0"),
        ({"steps": -1}, "steps must be a whole number of at least 0, got -1"),
        ({"steps": 1.5}, "steps must be a whole number of at least 0, got 1.5"),
        ({"delta": 0.0}, "delta must be in"),
        ({"delta": 1.0}, "delta must be in"),
    ],
)
def test_unusable_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"noise_multiplier": 1.0, "sampling_prob": 0.1, "steps": 3, "delta": 1e-5}
    for epsilon in (claimed_epsilon, rdp_epsilon):
        with pytest.raises(InputError, match=message):
            epsilon(**good | change)
    with pytest.raises(InputError, match="target_epsilon must be positive"):
        calibrated_noise(target_epsilon=0.0, sampling_prob=0.1, steps=3, delta=1e-5)
