"""What is proven, beside what was measured: the bounds of a run's mechanism at distances that occur."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from veiltune.audit.record import Bound
from veiltune.privatize.accounting import d_chi_composed_epsilon, gaussian_delta, metric_bound
from veiltune.privatize.information import d_chi_information, gaussian_information, success_cap
from veiltune.privatize.mechanisms import DChi, Gaussian, Privatizer

DELTA = 1e-5
_SAMPLE = 1_000


@dataclass(frozen=True)
class Distances:
    """L2 distances of different tokens' vectors at the cut, each token alone.

    Attributes:
        nearest: Median over tokens of the distance to the nearest other one.
        median: Over pairs.
        largest: Over pairs.
    """

    nearest: float
    median: float
    largest: float

    @classmethod
    def between(cls, codebook: Tensor, tokens: Tensor, *, seed: int) -> Distances:
        """Over at most 1,000 of the tokens that occur in the public text, against one another."""
        present = tokens.unique()
        order = torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))[:_SAMPLE]
        vectors = codebook[present[order]].double()
        pairs = torch.cdist(vectors, vectors)
        apart = pairs[~torch.eye(len(pairs), dtype=torch.bool)]
        pairs.fill_diagonal_(math.inf)
        return cls(float(pairs.min(dim=1).values.median()), float(apart.median()), float(apart.max()))


def representation_bounds(
    privatizer: Privatizer, distances: Distances, *, num_releases: int, clean: Tensor, commonest: float, scaled: bool
) -> list[Bound]:
    """What the mechanism leaves to anyone who sees all releases of a text.

    Args:
        privatizer: Of the run.
        distances: Between tokens.
        num_releases: Fresh releases of one text, at most.
        clean: (N, H) public vectors, whose covariance stands for the distribution that information bounds need.
        commonest: Share of the commonest token in public text: the best guess without seeing anything.
        scaled: Whether contributing tokens had less noise, which voids the bounds between tokens of different scale.
    """
    if scaled:
        return [_nothing("contributing tokens have noise of their own scale: no bound holds between the scales")]
    named = {"nearest": distances.nearest, "median pair": distances.median, "farthest pair": distances.largest}
    if isinstance(privatizer, DChi):
        nats = num_releases * d_chi_information(_spread(clean), privatizer.eta)  # independent noise: it adds up
        between = [b for name, d in named.items() for b in _d_chi(privatizer, name, d, num_releases)]
        return [*between, *_information(nats, num_releases, commonest)]
    if isinstance(privatizer, Gaussian):
        nats = gaussian_information(_spread(clean), privatizer.sigma / math.sqrt(num_releases))
        return [
            *(_gaussian(privatizer, name, d, num_releases) for name, d in named.items()),
            *_information(nats, num_releases, commonest),
        ]
    return [_nothing("nothing was added to the representations, so nothing is proven about them")]


def label_bound(epsilon: float, cap: float) -> Bound:
    """Randomised response."""
    return Bound(
        name="label_success",
        title=f"labels, randomised response at label epsilon {epsilon:g}",
        value=cap,
        unit="share of labels",
        statement="no attack on what derives from the randomised labels finds more of the true ones, on average, all"
        " epochs together; it does not cover what the text itself tells of its label",
    )


def _d_chi(privatizer: DChi, name: str, distance: float, releases: int) -> list[Bound]:
    where = f"two tokens at the {name} distance {distance:.2f}"
    metric = metric_bound(privatizer.eta, releases) * distance
    exact = {
        count: d_chi_composed_epsilon(
            DELTA, eta=privatizer.eta, dim=privatizer.dim, distance=distance, num_releases=count
        )
        for count in sorted({1, releases})
    }
    slug = name.split()[0]
    return [
        Bound(
            name=f"metric_{slug}",
            title=f"d_chi between {where}",
            value=metric,
            unit=f"epsilon at delta 0, {_releases(releases)}",
            statement=f"anyone who sees the vector of one position tells {where} apart by a likelihood ratio of at"
            f" most exp({metric:.4g}); it covers one position, not the whole text",
        ),
        *(
            Bound(
                name=f"exact_{slug}_{count}",
                title=f"the same, exactly, at delta {DELTA:g}",
                value=epsilon,
                unit=f"epsilon at delta {DELTA:g}, {_releases(count)}",
                statement="exact integration of the privacy loss of d_chi noise, rounded up; the same limits",
            )
            for count, epsilon in exact.items()
        ),
    ]


def _gaussian(privatizer: Gaussian, name: str, distance: float, releases: int) -> Bound:
    mu = math.sqrt(releases) * distance / privatizer.sigma
    return Bound(
        name=f"gaussian_{name.split()[0]}",
        title=f"Gaussian noise between two tokens at the {name} distance {distance:.2f}",
        value=_gaussian_epsilon(mu),
        unit=f"epsilon at delta {DELTA:g}, {_releases(releases)}",
        statement=f"anyone who sees the vector of one position has {mu:.3g}-Gaussian-DP against him; one position,"
        " not the whole text",
    )


def _spread(clean: Tensor) -> Tensor:
    """(H,) variances along the principal axes."""
    centred = clean.double() - clean.double().mean(dim=0)
    axes: Tensor = torch.linalg.eigvalsh(centred.T @ centred / len(centred))
    return axes.clamp_min(0)


def _information(nats: float, releases: int, commonest: float) -> list[Bound]:
    return [
        Bound(
            name="information",
            title="mutual information between a token and the vector of its position",
            value=nats,
            unit=f"nats, {_releases(releases)}",
            statement="on average over tokens distributed as in the public text: half the log-determinant of one plus"
            " signal over noise; a shifted distribution voids it, and other positions are not covered",
        ),
        Bound(
            name="recovery_cap",
            title="largest average recovery from the vector of one position",
            value=success_cap(commonest, nats),
            unit="share of tokens",
            statement=f"follows from the line above, the commonest token ({commonest:.1%}) being the best blind guess",
        ),
    ]


def _gaussian_epsilon(mu: float) -> float:
    """The least epsilon with delta(epsilon) <= DELTA, by bisection."""
    low, high = 0.0, mu * mu / 2 + 10 * mu + 10
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > DELTA else (low, middle)
    return high


def _nothing(statement: str) -> Bound:
    return Bound(name="none", title="representations", value=None, unit="", statement=statement)


def _releases(count: int) -> str:
    return "one release" if count == 1 else f"all {count} releases of a text"
