"""Mechanisms: the strength is the one asked for, multipliers do what they say, and the claim says what holds."""

from __future__ import annotations

import json
import math
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from veiltune.errors import InputError
from veiltune.privatize.mechanisms import MECHANISMS, DChi, Gaussian, NoPrivacy, Privatizer, make_privatizer

DIM, ETA, NORM = 24, 6.0, 5.0
NOISY: list[DChi | Gaussian] = [
    DChi(dim=DIM, eta=ETA, reference_norm=NORM),
    Gaussian(dim=DIM, eta=ETA, reference_norm=NORM),
]
both = pytest.mark.parametrize("privatizer", NOISY, ids=lambda p: p.name)
numbers = st.floats(1e-3, 1e3)


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets wrong shapes reach our own refusal where pytest runs with --jaxtyping-packages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def noise_of(privatizer: Privatizer, count: int, **options: Any) -> torch.Tensor:
    clean = torch.zeros(count, DIM)
    return privatizer.privatize(clean, generator=torch.Generator().manual_seed(0), **options)


@both
def test_strength_is_what_the_noise_has(privatizer: DChi | Gaussian) -> None:
    norms = noise_of(privatizer, 40_000).double().norm(dim=-1)

    def p_values(strength_norm: float, power: float) -> list[float]:
        return [float(stats.ttest_1samp(x, m).pvalue) for x, m in ((norms, strength_norm), (norms.square(), power))]

    mean = privatizer.strength.noise_to_norm * NORM
    power = NORM**2 / 10 ** (privatizer.strength.snr_db / 10)
    assert min(p_values(mean, power)) > 1e-3
    assert max(p_values(mean * 1.01, power * 1.01)) < 1e-3  # planted: a hundredth off


def test_strength_by_hand() -> None:
    strength = DChi(dim=3, eta=2.0, reference_norm=1.5).strength
    assert (strength.eta, strength.noise_to_norm, strength.reference_norm) == (2.0, 1.0, 1.5)
    assert strength.snr_db == pytest.approx(10 * math.log10(2.25 / 3.0))  # 3 * 4 / 2^2 = 3
    gaussian = Gaussian(dim=3, eta=2.0, reference_norm=1.5)
    assert gaussian.sigma == 1.0
    assert gaussian.strength.noise_to_norm == pytest.approx(stats.chi(3).mean() / 1.5)


@pytest.mark.parametrize("dim", [1, 2, 384, 4096])
def test_mechanisms_of_one_eta_have_the_same_power(dim: int) -> None:
    d_chi, gaussian = (kind(dim=dim, eta=3.0, reference_norm=2.0).strength for kind in (DChi, Gaussian))
    assert d_chi.snr_db == pytest.approx(gaussian.snr_db, abs=1e-9)
    assert gaussian.noise_to_norm == pytest.approx(math.sqrt(dim + 1) / 3.0 * stats.chi(dim).mean() / 2.0)


@settings(deadline=None)
@given(name=st.sampled_from(["d_chi", "gaussian"]), dim=st.integers(1, 5000), norm=numbers, value=numbers)
def test_each_measure_sets_the_same_strength(name: str, dim: int, norm: float, value: float) -> None:
    strength = make_privatizer(name, dim=dim, reference_norm=norm, noise_to_norm=value).strength
    assert strength is not None
    assert strength.noise_to_norm == pytest.approx(value)
    for measure in ("eta", "snr_db"):
        again = make_privatizer(name, dim=dim, reference_norm=norm, **{measure: getattr(strength, measure)}).strength
        assert again is not None
        assert again.eta == pytest.approx(strength.eta, rel=1e-9)
        assert again.noise_to_norm == pytest.approx(value, rel=1e-9)


@both
def test_representations_are_left_alone_and_gradients_pass(privatizer: Privatizer) -> None:
    clean = torch.randn(6, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before = clean.detach().clone()
    noisy = privatizer.privatize(clean, generator=torch.Generator().manual_seed(2))
    noisy.backward(torch.arange(6.0).unsqueeze(-1).expand(6, DIM))
    assert torch.equal(clean.detach(), before)
    assert clean.grad is not None and torch.equal(clean.grad, torch.arange(6.0).unsqueeze(-1).expand(6, DIM))
    assert bool((noisy != clean).all())
    narrow = privatizer.privatize(before.bfloat16(), generator=torch.Generator().manual_seed(2))
    assert noisy.dtype == narrow.dtype == torch.float32


@both
def test_multipliers_scale_eta_token_by_token(privatizer: Privatizer) -> None:
    factors = torch.tensor([1.0, 4.0, math.inf]).repeat(4000)
    norms = noise_of(privatizer, 12_000, multipliers=factors).norm(dim=-1).reshape(4000, 3)
    unit = noise_of(privatizer, 4000).norm(dim=-1)
    assert stats.ks_2samp(norms[:, 0], unit).pvalue > 1e-3
    assert stats.ks_2samp(norms[:, 1] * 4, unit).pvalue > 1e-3
    assert stats.ks_2samp(norms[:, 1] / 4, unit).pvalue < 1e-9  # planted: the scale the wrong way round
    assert bool((norms[:, 2] == 0).all())


@both
def test_infinite_multipliers_send_the_vector_itself(privatizer: Privatizer) -> None:
    clean = torch.randn(5, DIM, generator=torch.Generator().manual_seed(3))
    sent = privatizer.privatize(
        clean, generator=torch.Generator().manual_seed(0), multipliers=torch.full((5,), math.inf)
    )
    assert torch.equal(sent, clean) and sent is not clean


@both
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("bad", [torch.ones(3), torch.zeros(4), torch.tensor([1, 1, 1, math.nan]), -torch.ones(4)])
def test_unusable_multipliers_are_refused(privatizer: Privatizer, bad: torch.Tensor) -> None:
    with pytest.raises(InputError, match="multipliers must be 4 numbers above zero"):
        noise_of(privatizer, 4, multipliers=bad)


@both
@pytest.mark.usefixtures("unchecked_shapes")
def test_other_widths_are_refused(privatizer: Privatizer, generator: torch.Generator) -> None:
    for shape in ((4, DIM + 1), (2, 3, DIM)):
        with pytest.raises(InputError, match=r"representations must have shape \(N, 24\), got"):
            privatizer.privatize(torch.zeros(shape), generator=generator)


def test_none_sends_a_copy_and_claims_nothing(generator: torch.Generator) -> None:
    privatizer = make_privatizer("none", dim=DIM, reference_norm=NORM)
    clean = torch.ones(2, DIM)
    sent = privatizer.privatize(clean, generator=generator)
    assert torch.equal(sent, clean) and sent.data_ptr() != clean.data_ptr()
    assert privatizer.strength is None
    claim = privatizer.claim(num_releases=3)
    assert "nothing is protected" in str(claim["statement"])
    assert not any("eta" in key or "mu" in key for key in claim)


def test_claims_add_up_releases() -> None:
    one, four = (NOISY[0].claim(num_releases=n) for n in (1, 4))
    assert (one["composed_eta"], four["composed_eta"]) == (ETA, 4 * ETA)
    one, four = (NOISY[1].claim(num_releases=n) for n in (1, 4))
    assert one["composed_mu_per_distance"] == pytest.approx(ETA / math.sqrt(DIM + 1))
    assert four["composed_mu_per_distance"] == pytest.approx(2 * ETA / math.sqrt(DIM + 1))
    with pytest.raises(InputError, match="num_releases must be a whole number of at least 1, got 0"):
        NOISY[1].claim(num_releases=0)


@both
def test_claims_are_plain_data_and_never_say_epsilon(privatizer: DChi | Gaussian) -> None:
    claim = privatizer.claim(num_releases=2)
    text = json.dumps(claim)
    assert "epsilon" not in text
    assert claim["strength"] == vars(privatizer.strength)
    assert (claim["mechanism"], claim["metric"], claim["unit"]) == (privatizer.name, "L2", "one token's vector")


@both
def test_no_bound_is_claimed_between_scaled_tokens(privatizer: Privatizer) -> None:
    claim = privatizer.claim(num_releases=1, scaled=True)
    assert "composed_eta" not in claim and "composed_mu_per_distance" not in claim
    assert "no bound holds" in str(claim["statement"]) and "the radius discloses" in str(claim["statement"])


@pytest.mark.parametrize(
    ("name", "strength", "message"),
    [
        ("d_chl", {"eta": 1.0}, "mechanism 'd_chl' is unknown; did you mean 'd_chi'"),
        ("d_chi", {}, "needs exactly one of eta, noise_to_norm, snr_db, got none"),
        ("gaussian", {"eta": 1.0, "snr_db": 0.0}, "needs exactly one of .*, got eta, snr_db"),
        ("none", {"eta": 1.0}, "mechanism 'none' has no strength, got eta"),
        ("d_chi", {"eta": 0.0}, "eta must be positive and finite, got 0.0; .*name the mechanism 'none'"),
        ("d_chi", {"eta": math.inf}, "eta must be positive and finite"),
        ("d_chi", {"noise_to_norm": 0.0}, "noise_to_norm must be positive and finite"),
        ("d_chi", {"snr_db": math.nan}, "snr_db must be in"),
    ],
)
def test_unusable_strengths_are_refused(name: str, strength: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_privatizer(name, dim=DIM, reference_norm=NORM, **strength)


def test_snr_of_zero_decibels_is_a_strength() -> None:
    strength = make_privatizer("d_chi", dim=DIM, reference_norm=NORM, snr_db=0.0).strength
    assert strength is not None and strength.eta == pytest.approx(math.sqrt(DIM * (DIM + 1)) / NORM)


def test_the_table_of_mechanisms() -> None:
    assert {name: kind.name for name, kind in MECHANISMS.items()} == {n: n for n in ("none", "d_chi", "gaussian")}
    assert isinstance(make_privatizer("none", dim=1, reference_norm=1.0), NoPrivacy)
