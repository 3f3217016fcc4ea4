"""Gates for pipelines: `--fail-if 'excess_recall_upper > 0.01'`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from veiltune._validate import nearest
from veiltune.attacks.operating import non_members_needed
from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm.subjects import CALIBRATION_SHARE
from veiltune.audit.proportions import persons_needed
from veiltune.audit.record import Estimate
from veiltune.errors import InputError

_OPERATORS: MappingProxyType[str, Callable[[float, float], bool]] = MappingProxyType(
    {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
)
_FORM = re.compile(r"\s*([a-z_0-9]+)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")


def tpr_at_one_percent(record: LeakageRecord) -> Estimate | None:
    """Share of the persons in the text that the strongest attack finds at 1 % false positives; None if not measured."""
    found = record.membership
    attacks = () if found is None else (one for one in found.attacks if one.name == found.strongest)
    rates = (rate for one in attacks if one.level == "person" for rate in one.tpr_at_fpr)
    return next((rate.tpr for rate in rates if rate.fpr == 0.01), None)


def figures(record: LeakageRecord) -> dict[str, float | None]:
    """What a gate may name; None where the audit did not measure it."""
    found, extraction, bound = record.membership, record.extraction, record.audited_epsilon
    excess, at_one = extraction.excess_recall, tpr_at_one_percent(record)
    exposures = [one.median_bits for one in record.exposure]
    return {
        "auc": found.auc.value if found else None,
        "auc_lower": found.auc.low if found else None,
        "auc_upper": found.auc.high if found else None,
        "tpr_at_1_percent": at_one.value if at_one else None,
        "tpr_at_1_percent_upper": at_one.high if at_one else None,
        "recall": extraction.recall.value,
        "recall_upper": extraction.recall.high,
        "excess_recall": excess.value if excess else None,
        "excess_recall_lower": excess.low if excess else None,
        "excess_recall_upper": excess.high if excess else None,
        "exposure_median_bits": max(exposures) if exposures else None,
        "audited_epsilon": bound.epsilon if bound else None,
        "claimed_epsilon": bound.claimed_epsilon if bound else None,
        "perplexity": record.perplexity.carrier if record.perplexity else None,
    }


NAMES = (
    "auc", "auc_lower", "auc_upper", "tpr_at_1_percent", "tpr_at_1_percent_upper", "recall", "recall_upper",
    "excess_recall", "excess_recall_lower", "excess_recall_upper", "exposure_median_bits", "audited_epsilon",
    "claimed_epsilon", "perplexity",
)  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """A condition under which a pipeline fails.

    >>> Gate.parse("excess_recall_upper > 0.01")
    Gate(name='excess_recall_upper', comparison='>', limit=0.01)
    """

    name: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """From what the user wrote.

        Raises:
            InputError: If it has another form, or no such figure exists.
        """
        match = _FORM.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            name, comparison, limit = match[1], match[2], float(match[3])
        except ValueError:
            raise InputError(f"--fail-if must be 'FIGURE > NUMBER' (or >=, <, <=), got {text!r}") from None
        if name not in NAMES:
            raise InputError(f"--fail-if knows no {name!r}; {nearest(name, NAMES)} (known: {', '.join(NAMES)})")
        return cls(name, comparison, limit)

    def check_persons(self, persons: int) -> None:
        """Refuses a gate that so few persons could never pass, before anything is asked.

        Raises:
            InputError: With the number that is needed.
        """
        least = non_members_needed(0.01)
        if self.name.startswith("tpr_at_1_percent") and persons < least:
            raise InputError(
                f"--fail-if {self}: a rate at 1 % false positives needs {least} reporting persons who are not in the"
                f" text, there are {persons}; a corpus of {_pairs(least)} pairs has them"
            )
        if self.name == "excess_recall_upper" and self.comparison in (">", ">=") and 0 < self.limit < 1:
            needed = persons_needed(self.limit)
            if persons < needed:
                raise InputError(
                    f"--fail-if {self}: with {persons} reporting persons on a side the upper limit cannot be that low"
                    f" even if nothing is found; it needs {needed} (a corpus of {_pairs(needed)} pairs)"
                )

    def fails(self, record: LeakageRecord) -> str:
        """What to say if the pipeline is to fail; "" if it passes.

        A figure that was not measured fails: a gate that cannot see must not pass.
        """
        value = figures(record)[self.name]
        if value is None:
            return f"{self.name} was not measured, so {self} cannot pass"
        return f"{self.name} is {value:.4g}: {self}" if _OPERATORS[self.comparison](value, self.limit) else ""

    def __str__(self) -> str:
        return f"{self.name} {self.comparison} {self.limit:g}"


def failures(gates: Sequence[Gate], record: LeakageRecord) -> list[str]:
    """Of all gates that fail, what to say."""
    return [line for gate in gates if (line := gate.fails(record))]


def _pairs(reporting: int) -> int:
    return -int(-reporting // (1 - CALIBRATION_SHARE))
