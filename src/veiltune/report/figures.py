"""How a figure is written: shares, intervals and names."""

from __future__ import annotations

import unicodedata
from pathlib import PurePath

from veiltune.attacks.result import AttackResult
from veiltune.audit.record import Estimate, Rate

FEW = 0.05
"""of the tokens: below one in twenty"""


def percent(share: float) -> str:
    r"""A share in percent with one decimal; never rounds to a bare 0 or 100 what is neither.

    >>> percent(0.4127), percent(0.0), percent(0.0001), percent(0.9999)
    ('41.3\xa0%', '0\xa0%', '< 0.1\xa0%', '> 99.9\xa0%')
    """
    if share in (0, 1):
        number = f"{100 * share:.0f}"
    elif share < 0.0005:
        number = "< 0.1"
    elif share >= 0.9995:
        number = "> 99.9"
    else:
        number = f"{100 * share:.1f}"
    return f"{number}\N{NO-BREAK SPACE}%"


def at_most(share: float) -> str:
    r"""An upper limit in percent, rounded up.

    >>> at_most(0.0074), at_most(0.012)
    ('0.8\xa0%', '1.2\xa0%')
    """
    return f"{outwards(0, 100 * share, 1)[1]}\N{NO-BREAK SPACE}%"


def outwards(low: float, high: float, decimals: int = 3) -> tuple[str, str]:
    """The ends of an interval, rounded so that it never gets narrower.

    >>> outwards(0.4128, 0.594), outwards(0.0, 0.99991)
    (('0.412', '0.594'), ('0.000', '1.000'))
    """
    half = 0.5 * 10.0**-decimals - 1e-9  # what comes that near to a round number is one
    return f"{low - half:z.{decimals}f}", f"{high + half:z.{decimals}f}"


def figure(value: float) -> str:
    """A number with three decimals; never rounds to a bare 0 or 1 what is neither.

    >>> figure(0.5), figure(1.0), figure(0.9999), figure(0.0001)
    ('0.500', '1.000', '> 0.999', '< 0.001')
    """
    if 0 < value < 0.0005:
        return "< 0.001"
    return "> 0.999" if 0.9995 <= value < 1 else f"{value:z.3f}"


def limits(estimate: Estimate) -> str:
    """The interval of an estimate.

    >>> limits(Estimate(value=0.5, low=0.41, high=0.5934))
    '[0.410, 0.594]'
    """
    return f"[{', '.join(outwards(estimate.low, estimate.high))}]"


def rate_with_interval(rate: Rate) -> str:
    r"""A rate and its interval in percent.

    >>> rate_with_interval(Rate(successes=1, trials=4, value=0.25, low=0.0063, high=0.8059))
    '25.0\xa0% [0.6, 80.6]'
    """
    low, high = rate.interval()
    return f"{percent(rate.value)} [{', '.join(outwards(100 * low, 100 * high, 1))}]"


def estimate_with_interval(estimate: Estimate) -> str:
    """An estimate and its interval.

    >>> estimate_with_interval(Estimate(value=0.5, low=0.41, high=0.594))
    '0.500 [0.410, 0.594]'
    """
    return f"{figure(estimate.value)} {limits(estimate)}"


def of_ten(share: float, noun: str = "tokens") -> str:
    """A share of things in the words of everyday speech.

    >>> for share in (0, 0.02, 0.05, 0.52, 0.96, 0.998):
    ...     print(of_ten(share))
    no tokens
    fewer than 1 in 20 tokens
    about 1 of 10 tokens
    about 5 of 10 tokens
    more than 9 of 10 tokens
    practically all tokens
    """
    if share == 0:
        return f"no {noun}"
    if share < FEW:
        return f"fewer than 1 in 20 {noun}"
    if share >= 0.99:
        return f"practically all {noun}"
    if share >= 0.95:
        return f"more than 9 of 10 {noun}"
    return f"about {max(1, int(10 * share + 0.5))} of 10 {noun}"


def printable(text: str) -> str:
    """The text with a mark in place of each character that cannot be printed; spaces of any kind stay."""
    spaces = {char for char in text if unicodedata.category(char) == "Zs"}
    return "".join(char if char.isprintable() or char in spaces else "\N{REPLACEMENT CHARACTER}" for char in text)


def label_of(text: str, longest: int = 60) -> str:
    """A name that others chose, on one line: what cannot be printed is replaced, what is too long is cut.

    >>> label_of("a" + chr(10) + "b"), label_of("abcdef", 4)
    ('a�b', 'abc…')
    """
    shown = printable(text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def model_label(name: str, longest: int = 60) -> str:
    """A model as its user named it, an absolute path by its last part, since pages are passed on.

    >>> model_label("/home/ada/models/gpt2"), model_label("HuggingFaceTB/SmolLM2-135M")
    ('gpt2', 'HuggingFaceTB/SmolLM2-135M')
    """
    path = PurePath(name)
    return label_of(path.name if path.is_absolute() else name, longest)


def utility_interval(utility: float, examples: int) -> Estimate:
    """Clopper-Pearson interval of an accuracy."""
    low, high = AttackResult(name="utility", successes=round(utility * examples), trials=examples).interval()
    return Estimate(value=utility, low=low, high=high)
