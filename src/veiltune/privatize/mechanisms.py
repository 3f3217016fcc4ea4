"""The mechanisms by name: a representation goes in, a release comes out, and its claim in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from scipy.special import gammaln
from torch import Tensor

from veiltune._validate import one_of, positive, positive_int
from veiltune.errors import InputError
from veiltune.privatize.accounting import metric_bound
from veiltune.privatize.noise import sample_d_chi_noise, sample_gaussian_noise
from veiltune.privatize.randomness import Generator


@dataclass(frozen=True, kw_only=True)
class Strength:
    """One strength in its three measures.

    Attributes:
        eta: 1 / distance; smaller is more private. For the Gaussian mechanism that of d_chi noise of equal power.
        noise_to_norm: E||noise|| / reference_norm; larger is more private.
        snr_db: 10 log10(reference_norm^2 / E||noise||^2), decibels; smaller is more private.
        reference_norm: Mean L2 norm of a clean representation that the two ratios refer to.
    """

    eta: float
    noise_to_norm: float
    snr_db: float
    reference_norm: float


class Privatizer(Protocol):
    """A mechanism with its strength."""

    name: ClassVar[str]

    @property
    def strength(self) -> Strength | None:
        """In all measures; None if there is no noise."""

    def privatize(
        self, representations: Float[Tensor, "N H"], *, generator: Generator, multipliers: Float[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N H"]:
        """Adds independent noise to each token's vector; `multipliers` scale eta per token, inf means no noise."""

    def claim(self, *, num_releases: int) -> dict[str, object]:
        """What holds after so many releases of a text, for privacy.json."""


class NoPrivacy:
    """Sends representations as they are.

    Guarantee:
        None. The vendor holds the bottom model and can read the text from clean representations at any depth.
    """

    name: ClassVar[str] = "none"
    strength: Strength | None = None

    def privatize(
        self, representations: Float[Tensor, "N H"], *, generator: Generator, multipliers: Float[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N H"]:
        """Returns a float32 copy."""
        return representations.float().clone()

    def claim(self, *, num_releases: int) -> dict[str, object]:
        """Says that nothing is protected."""
        return {
            "mechanism": self.name,
            "statement": "nothing is protected: representations are sent without noise and the vendor can read the text",
        }


@dataclass(frozen=True, kw_only=True)
class DChi:
    """d_chi-privacy under L2: noise with density proportional to exp(-eta ||z||).

    Guarantee:
        For each token's vector and each release, against the vendor who sees it: inputs at distance D are told apart
        by a likelihood ratio of at most exp(eta * D). A text of n tokens that all change adds up its n distances;
        above the embeddings one changed token moves every vector. Not (epsilon, delta)-DP over examples. Multipliers
        that differ void the bound between tokens of different scale, and the radius shows which are which.

    Source: Feyisetan et al. 2020, arXiv:1910.08902; in split fine-tuning Shen et al. 2023, arXiv:2312.15603.
    """

    name: ClassVar[str] = "d_chi"
    dim: int
    eta: float
    reference_norm: float

    @property
    def strength(self) -> Strength:
        """E||z|| = dim / eta and E||z||^2 = dim (dim + 1) / eta^2, exactly."""
        power = self.dim * (self.dim + 1) / self.eta**2
        return _strength(self.eta, self.dim / self.eta, power, self.reference_norm)

    def privatize(
        self, representations: Float[Tensor, "N H"], *, generator: Generator, multipliers: Float[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N H"]:
        """Adds the noise; the gradient of the result with respect to the input is the identity."""
        noisy, scale = _split_multipliers(representations, multipliers)
        noise = sample_d_chi_noise(
            (int(noisy.sum()), self.dim), eta=(self.eta * scale).double(), generator=generator
        )
        return _add(representations, noise, noisy)

    def claim(self, *, num_releases: int) -> dict[str, object]:
        """The metric bound of all releases of a text."""
        return _claim(
            self.name,
            self.strength,
            num_releases,
            composed_eta=metric_bound(self.eta, num_releases),
            statement="a token's inputs at L2 distance D are indistinguishable up to exp(composed_eta * D)",
        )


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Isotropic Gaussian noise of standard deviation sigma = sqrt(dim + 1) / eta, so that its power equals d_chi's.

    Guarantee:
        For each token's vector and each release, against the vendor who sees it: inputs at distance D are
        (D / sigma)-Gaussian-DP apart; n releases sqrt(n) times that. The limits are those of `DChi`.

    Source: Dong et al. 2019, arXiv:1905.02383.
    """

    name: ClassVar[str] = "gaussian"
    dim: int
    eta: float
    reference_norm: float

    @property
    def sigma(self) -> float:
        """Standard deviation of a coordinate."""
        return math.sqrt(self.dim + 1) / self.eta

    @property
    def strength(self) -> Strength:
        """E||z|| = sigma sqrt(2) Gamma((dim+1)/2) / Gamma(dim/2) and E||z||^2 = dim sigma^2, exactly."""
        mean = self.sigma * _unit_gaussian_norm(self.dim)
        return _strength(self.eta, mean, self.dim * self.sigma**2, self.reference_norm)

    def privatize(
        self, representations: Float[Tensor, "N H"], *, generator: Generator, multipliers: Float[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N H"]:
        """Adds the noise; the gradient of the result with respect to the input is the identity."""
        noisy, scale = _split_multipliers(representations, multipliers)
        noise = sample_gaussian_noise(
            (int(noisy.sum()), self.dim), sigma=(self.sigma / scale).double(), generator=generator
        )
        return _add(representations, noise, noisy)

    def claim(self, *, num_releases: int) -> dict[str, object]:
        """The Gaussian-DP parameter of all releases of a text, per unit of distance."""
        return _claim(
            self.name,
            self.strength,
            num_releases,
            sigma=self.sigma,
            composed_mu_per_distance=math.sqrt(num_releases) / self.sigma,
            statement="a token's inputs at L2 distance D are (composed_mu_per_distance * D)-Gaussian-DP apart; eta is"
            " that of d_chi noise of equal power",
        )


MECHANISMS: Mapping[str, type[NoPrivacy] | type[DChi] | type[Gaussian]] = MappingProxyType(
    {mechanism.name: mechanism for mechanism in (NoPrivacy, DChi, Gaussian)}
)


def make_privatizer(
    name: str,
    *,
    dim: int,
    reference_norm: float,
    eta: float | None = None,
    noise_to_norm: float | None = None,
    snr_db: float | None = None,
) -> Privatizer:
    """Builds a mechanism from one measure of its strength.

    >>> make_privatizer("d_chi", dim=3, reference_norm=2.0, noise_to_norm=0.5).strength.eta  # mean norm 3 / 3 = 1
    3.0

    Args:
        name: A key of `MECHANISMS`.
        dim: H.
        reference_norm: Mean norm of a clean representation.
        eta: See `Strength`; exactly one of the three, none for "none".
        noise_to_norm: See `Strength`.
        snr_db: See `Strength`.

    Raises:
        InputError: If the name is unknown, or not exactly one strength is given, or it is out of range.
    """
    one_of(MECHANISMS, mechanism=name)
    given = {k: v for k, v in (("eta", eta), ("noise_to_norm", noise_to_norm), ("snr_db", snr_db)) if v is not None}
    if name == "none":
        if given:
            raise InputError(f"mechanism 'none' has no strength, got {', '.join(given)}; remove it")
        return NoPrivacy()
    if len(given) != 1:
        raise InputError(
            f"mechanism {name!r} needs exactly one of eta, noise_to_norm, snr_db, got {', '.join(given) or 'none'}"
        )
    positive_int(dim=dim), positive(reference_norm=reference_norm)
    kind = DChi if name == "d_chi" else Gaussian
    unit = kind(dim=dim, eta=1.0, reference_norm=reference_norm)  # noise norms scale as 1 / eta
    if eta is None:
        wanted = noise_to_norm if noise_to_norm is not None else _ratio_of(unit.strength, snr_db or 0.0)
        eta = unit.strength.noise_to_norm / positive(noise_to_norm=wanted)
    return kind(dim=dim, eta=positive(eta=eta), reference_norm=reference_norm)


def _ratio_of(unit: Strength, snr_db: float) -> float:
    """The noise_to_norm at which the signal-to-noise ratio has the wanted value."""
    if not math.isfinite(snr_db):
        raise InputError(f"snr_db must be finite, got {snr_db}")
    return unit.noise_to_norm * 10.0 ** ((unit.snr_db - snr_db) / 20.0)


def _strength(eta: float, mean_norm: float, power: float, reference_norm: float) -> Strength:
    return Strength(
        eta=eta,
        noise_to_norm=mean_norm / reference_norm,
        snr_db=10.0 * math.log10(reference_norm**2 / power),
        reference_norm=reference_norm,
    )


def _unit_gaussian_norm(dim: int) -> float:
    return math.sqrt(2.0) * math.exp(gammaln((dim + 1) / 2) - gammaln(dim / 2))


def _claim(name: str, strength: Strength, num_releases: int, **bounds: object) -> dict[str, object]:
    return {
        "mechanism": name,
        "metric": "L2",
        "unit": "one token's vector",
        "num_releases": num_releases,
        "strength": asdict(strength),
        **bounds,
    }


def _split_multipliers(representations: Tensor, multipliers: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens get noise, and the eta multiplier of each that does."""
    count = len(representations)
    if multipliers is None:
        return torch.ones(count, dtype=torch.bool), torch.ones(count)
    if multipliers.shape != (count,) or bool((multipliers <= 0).any()) or bool(multipliers.isnan().any()):
        raise InputError(f"multipliers must be {count} positive numbers, one a token, got shape {tuple(multipliers.shape)}")
    noisy = torch.isfinite(multipliers)
    return noisy, multipliers[noisy]


def _add(representations: Tensor, noise: Tensor, noisy: Tensor) -> Tensor:
    full = torch.zeros(representations.shape)
    full[noisy] = noise
    return representations.float() + full
