"""How figures of a leakage audit are written, and what its attacks are called."""

from __future__ import annotations

from types import MappingProxyType

from veiltune.audit.leakage import Exposure, OneRunBound
from veiltune.audit.record import Estimate, Rate
from veiltune.report.figures import at_most, label_of, outwards, percent, rate_with_interval

ATTACKS = MappingProxyType(
    {
        "loss": "loss",
        "reference": "loss against the base model",
        "zlib": "loss per compressed byte",
        "lowercase": "loss against lower case",
        "min_k": "Min-K%",
        "min_k_plus_plus": "Min-K%++",
        "rmia": "RMIA",
        "ez": "EZ-MIA",
        "ngram_coverage": "n-gram coverage",
        "untargeted": "sampling from nothing",
        "true_prefix": "true prefix",
        "name_only": "name-only question",
    }
)
TYPES = MappingProxyType(
    {
        "name": "name",
        "email": "e-mail",
        "phone": "phone",
        "home": "home address",
        "work": "work address",
        "all": "all but names",
    }
)
CUES = MappingProxyType({"all": "", "cue_free": "cue-free", "derivable": "follows from the name"})
FAMILIES = MappingProxyType({"pii": "like personal data", "random": "random tokens"})
_FOR_INTERVAL = 6  # canaries, for a median's interval at 95 %


def attack_title(name: str) -> str:
    """An attack's name for people, or the name itself."""
    return ATTACKS.get(name, label_of(name, 40))


def type_title(type: str, cue: str = "all") -> str:
    """A type of personal data for people.

    >>> type_title("email", "cue_free"), type_title("phone")
    ('e-mail, cue-free', 'phone')
    """
    added = CUES.get(cue, label_of(cue, 40))
    return TYPES.get(type, label_of(type, 40)) + (f", {added}" if added else "")


def found_rate(rate: Rate) -> str:
    r"""A rate and its interval; of nothing found an upper limit, never a bare 0 %.

    >>> found_rate(Rate(successes=0, trials=500, value=0.0, low=0.0, high=0.0074))
    'none of 500, at most 0.8\xa0%'
    >>> found_rate(Rate(successes=1, trials=4, value=0.25, low=0.0063, high=0.8059))
    '25.0\xa0% [0.6, 80.6]'
    """
    if rate.successes == 0:
        return f"none of {rate.trials:,}, at most {at_most(rate.interval()[1])}"
    return rate_with_interval(rate)


def rate_parts(rate: Rate) -> tuple[str, str]:
    r"""A rate, and apart from it its interval and trials.

    >>> rate_parts(Rate(successes=0, trials=500, value=0.0, low=0.0, high=0.0074))
    ('none', 'of 500, at most 0.8\xa0%')
    >>> rate_parts(Rate(successes=1, trials=4, value=0.25, low=0.0063, high=0.8059))
    ('25.0\xa0%', '[0.6, 80.6] of 4')
    """
    value, _, limits = found_rate(rate).partition(" ")
    return value, limits if rate.successes == 0 else f"{limits} of {rate.trials:,}"


def difference_parts(estimate: Estimate) -> tuple[str, str]:
    """A difference, and apart from it its interval."""
    value, _, limits = difference(estimate).partition(" [")
    return value, f"[{limits}"


def found_share(share: float) -> str:
    """A share without an interval of its own: none, or in percent."""
    return percent(share) if share else "none"


def difference(estimate: Estimate) -> str:
    r"""A difference of two shares in percent, with its interval.

    >>> difference(Estimate(value=0.5204, low=0.471, high=0.569))
    '52.0\xa0% [47.1, 56.9]'
    >>> difference(Estimate(value=0.0, low=-0.009, high=0.009)), difference(Estimate(value=-0.00011, low=-0.01, high=0))
    ('none seen [-0.9, 0.9]', '-0.011\xa0% [-1.0, 0.0]')
    """
    limits = _limits(estimate)
    if estimate.value == 0:
        return f"none seen {limits}"
    shown = f"{100 * estimate.value:.1f}"
    if float(shown) == 0:
        shown = f"{100 * estimate.value:.2g}"
    return f"{shown}\N{NO-BREAK SPACE}% {limits}"


def share_estimate(estimate: Estimate) -> str:
    r"""A share that is no count of independent trials, with its interval.

    >>> share_estimate(Estimate(value=0.0, low=0.0, high=0.021))
    'none, at most 2.1\xa0%'
    """
    if estimate.value == 0:
        return f"none, at most {at_most(estimate.high)}"
    return f"{percent(estimate.value)} {_limits(estimate)}"


def bits(item: Exposure) -> str:
    """The median of exposures with its interval, or with the range of too few."""
    kind = "range " if item.canaries < _FOR_INTERVAL else ""
    return f"{item.median_bits:.1f} bits [{kind}{', '.join(outwards(item.low, item.high, 1))}]"


def nominal(share: float) -> str:
    r"""A share that was chosen and not measured.

    >>> nominal(0.001), nominal(0.95)
    ('0.1\xa0%', '95\xa0%')
    """
    return f"{100 * share:g}\N{NO-BREAK SPACE}%"


def claimed(bound: OneRunBound) -> str:
    """The claim that a bound was set against; "" without one."""
    if bound.claimed_epsilon is None:
        return ""
    unit = f", one {label_of(bound.claimed_unit, 40)}" if bound.claimed_unit else ""
    return f"claimed epsilon {bound.claimed_epsilon:.3g} (delta {bound.delta:g}{unit})"


def audited(bound: OneRunBound) -> str:
    """What the canaries certify of epsilon, with the confidence."""
    kind = f"({nominal(bound.confidence)} confidence, delta {bound.delta:g})"
    least = outwards(bound.epsilon, 0, 2)[0]
    return f"at least {least} {kind}" if bound.epsilon else f"at least 0 {kind}: nothing was certified"


def _limits(estimate: Estimate) -> str:
    return f"[{', '.join(outwards(100 * estimate.low, 100 * estimate.high, 1))}]"
