"""How well an attack did: successes out of trials, with an exact interval."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import beta

from veiltune._validate import in_range
from veiltune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """Successes of a named attack.

    >>> print(AttackResult(name="embedding_inversion", successes=3, trials=3))
    embedding_inversion: 1.00 [0.29, 1.00] n=3
    """

    name: str
    successes: int
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials or self.trials < 1:
            raise InputError(
                f"successes must be in [0, trials] and trials at least 1, got {self.successes}/{self.trials}"
            )

    @property
    def success_rate(self) -> float:
        """Successes / trials."""
        return self.successes / self.trials

    @property
    def empirical_privacy(self) -> float:
        """1 - success rate of this attack: an upper limit of the privacy, since a better attacker may come.

        Source: arXiv:2312.15603.
        """
        return 1.0 - self.success_rate

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Clopper-Pearson interval of the success rate.

        Guarantee:
            It covers the true rate with at least that probability if trials are independent. Tokens of one text are
            not: for them it is a lower limit of the uncertainty.

        Source: Clopper and Pearson 1934.
        """
        alpha = 1.0 - in_range(0.0, 1.0, confidence=confidence)
        k, n = self.successes, self.trials
        low = 0.0 if k == 0 else float(beta.ppf(alpha / 2, k, n - k + 1))
        high = 1.0 if k == n else float(beta.ppf(1 - alpha / 2, k + 1, n - k))
        return low, high

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.name}: {self.success_rate:.2f} [{low:.2f}, {high:.2f}] n={self.trials}"
