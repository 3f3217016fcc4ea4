"""Gates: what may be asked, what is refused before anything is asked, and that nothing unseen passes."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest

from lm_helper import person_of
from veiltune.audit.leakage import (
    Exposure,
    Extraction,
    LeakageRecord,
    LeakageSizes,
    Membership,
    MembershipAttack,
    OneRunBound,
    Perplexity,
    TprAtFpr,
)
from veiltune.audit.lm.extraction import ATTACKS
from veiltune.audit.lm.gates import NAMES, Gate, _pairs, failures, figures
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.proportions import excess, persons_needed
from veiltune.audit.record import Estimate, Rate
from veiltune.errors import InputError

RATE = Rate(successes=2, trials=100, value=0.02, low=0.002, high=0.07)


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


def attack(name: str, level: Any, tpr: float) -> MembershipAttack:
    one = TprAtFpr(fpr=0.01, tpr=estimate(tpr, tpr / 2, 2 * tpr), false_positives=10, fpr_low=0.005, fpr_high=0.02)
    tenth = one.model_copy(update={"fpr": 0.1})
    return MembershipAttack(name=name, level=level, status="done", tpr_at_fpr=(tenth, one))


def record(**changes: Any) -> LeakageRecord:
    """A whole record; hand-made figures, all different."""
    found = Membership(
        strongest="ez",
        auc=estimate(0.6, 0.55, 0.65),
        strongest_record="loss",
        blind=estimate(0.5, 0.4, 0.6),
        persons_in=100,
        persons_out=100,
        attacks=(attack("ez", "record", 0.3), attack("loss", "person", 0.2), attack("ez", "person", 0.1)),
    )
    extraction = Extraction(
        strongest="true_prefix",
        excess_recall=estimate(0.01, -0.02, 0.04),
        recall=RATE,
        chance=RATE,
        rates=(),
        discoverable=(),
        recall_at_100_errors=None,
        errors_curve=(),
        reconstruction=(),
        generated_tokens=0,
    )
    exposures = tuple(
        Exposure(family="pii", repetitions=r, canaries=5, median_bits=bits, low=0, high=9, at_cap=0, cap_bits=10)
        for r, bits in ((1, 1.5), (32, 7.5))
    )
    bound = OneRunBound(
        epsilon=1.25, confidence=0.95, delta=1e-5, canaries=64, included=32, guesses=64, correct=60, ceiling=2.6,
        claimed_epsilon=8.0, claimed_unit="person", exceeds_claim=False,
    )  # fmt: skip
    fields: dict[str, Any] = {
        "veiltune": "0", "created": "now", "preset": "ci", "seconds": 1.0, "seed": 0, "model": "m",
        "model_digest": "d", "base": None, "manifest_digest": "d", "full_vectors": True,
        "sizes": LeakageSizes(persons_in=1, persons_out=1, records=1, tokens=1, calibration_pairs=1),
        "perplexity": Perplexity(carrier=12.0, personal=99.0, all=20.0),
        "membership": found, "extraction": extraction, "exposure": exposures, "audited_epsilon": bound,
    }  # fmt: skip
    return LeakageRecord(**fields | changes)


def test_every_name_has_its_figure() -> None:
    found = figures(record())
    assert tuple(found) == NAMES
    assert found == {
        "auc": 0.6, "auc_lower": 0.55, "auc_upper": 0.65, "tpr_at_1_percent": 0.1, "tpr_at_1_percent_upper": 0.2,
        "recall": 0.02, "recall_upper": 0.07, "excess_recall": 0.01, "excess_recall_lower": -0.02,
        "excess_recall_upper": 0.04, "exposure_median_bits": 7.5, "audited_epsilon": 1.25, "claimed_epsilon": 8.0,
        "perplexity": 12.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auc_upper>.55", Gate("auc_upper", ">", 0.55)),
        ("  excess_recall_upper >= 1e-2 ", Gate("excess_recall_upper", ">=", 0.01)),
        ("perplexity < 3", Gate("perplexity", "<", 3.0)),
        ("excess_recall_lower <= -0.5", Gate("excess_recall_lower", "<=", -0.5)),
    ],
)
def test_what_may_be_written(text: str, expected: Gate) -> None:
    assert Gate.parse(text) == expected
    assert Gate.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "auc", "auc > ", "> 1", "auc == 1", "auc > x", "auc > 1 2", "auc > 1.2.3", "auc > e", "auc > nan"]
)
def test_what_may_not_be_written(text: str) -> None:
    with pytest.raises(InputError, match="--fail-if must be 'FIGURE > NUMBER'"):
        Gate.parse(text)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"did you mean 'excess_recall_upper'.*known: auc, "):
        Gate.parse("exces_recall_uper > 0.1")


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("auc_upper > 0.64", True), ("auc_upper > 0.65", False), ("auc_upper >= 0.65", True),
        ("auc_lower < 0.5", False), ("auc_lower <= 0.55", True), ("perplexity > 12", False),
        ("audited_epsilon > 1", True),
    ],
)  # fmt: skip
def test_when_a_pipeline_fails(text: str, fails: bool) -> None:
    (gate,) = gates = [Gate.parse(text)]
    assert bool(gate.fails(record())) == fails
    assert failures(gates, record()) == ([gate.fails(record())] if fails else [])


def test_what_was_not_measured_fails() -> None:
    bare = record(membership=None, exposure=(), audited_epsilon=None, perplexity=None)
    unseen = [name for name, value in figures(bare).items() if value is None]
    assert set(NAMES) - set(unseen) == {name for name in NAMES if "recall" in name}
    for name in unseen:
        for comparison in (">", "<"):
            assert "was not measured" in Gate(name, comparison, 0.5).fails(bare)
    assert failures([Gate.parse("auc > 1"), Gate.parse("recall > 0.5")], bare) == [
        "auc was not measured, so auc > 1 cannot pass"
    ]


def test_too_few_persons_are_told_before_anything_is_asked() -> None:
    gate = Gate.parse("excess_recall_upper > 0.01")
    needed = persons_needed(0.01)
    gate.check_persons(needed)
    with pytest.raises(InputError, match=f"with {needed - 1} reporting persons .* it needs {needed} .*corpus of"):
        gate.check_persons(needed - 1)
    assert excess([0.0] * needed, [0.0] * needed)[2] <= 0.01 < excess([0.0] * (needed - 1), [0.0] * (needed - 1))[2]
    for other in ("excess_recall_upper < 0.01", "excess_recall > 0.001", "auc_upper > 0.5", "excess_recall_upper > 1"):
        Gate.parse(other).check_persons(1)


def test_a_rate_that_so_few_persons_cannot_show_is_refused_with_the_number() -> None:
    gate = Gate.parse("tpr_at_1_percent_upper > 0.02")
    with pytest.raises(InputError, match=r"needs 1000 reporting persons .* there are 999; a corpus of 1429 pairs"):
        gate.check_persons(999)
    gate.check_persons(1000)


@pytest.mark.parametrize("limit", [0.5, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01])
def test_the_corpus_that_is_named_is_large_enough_and_hardly_larger(limit: float) -> None:
    needed = persons_needed(limit)

    def reporting(pairs: int) -> int:
        persons = [person_of(2 * n + k, side, f"p{n}") for n in range(pairs) for k, side in enumerate(("in", "out"))]
        found = Subjects.of(_Only(persons), seed=0)  # type: ignore[arg-type]
        return int((~found.calibration & found.members).sum())

    assert reporting(_pairs(needed)) >= needed > reporting(_pairs(needed) - 3)


class _Only:
    """A manifest of persons."""

    def __init__(self, persons: Any) -> None:
        self.persons, self.records = persons, ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "needs --manifest, or --data together with --pii"),
        ({"manifest": "m", "data": "d", "pii": "p"}, "needs --manifest, or --data"),
        ({"data": "d"}, "are given together"),
        ({"manifest": "m", "preset": "quick"}, "preset 'quick' is unknown"),
        ({"manifest": "m", "claimed_epsilon": 0.0}, "--claimed-epsilon must be above 0"),
        ({"manifest": "m", "claimed_epsilon": float("nan")}, "--claimed-epsilon must be above 0"),
        ({"manifest": "m", "claimed_epsilon": 1.0, "delta": -0.1}, "delta must be in"),
        ({"manifest": "m", "claimed_epsilon": 1.0, "delta": 1.0}, "delta must be"),
        ({"manifest": "m", "delta": 1e-5}, "--delta is of --claimed-epsilon"),
        ({"manifest": "m", "model": "https://x/v1/completions"}, "an API needs --tokenizer"),
    ],
)
def test_options_that_contradict_each_other(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LeakageOptions(**{"model": "m"} | changes)


def test_the_page_on_the_method_names_every_figure_and_its_examples_run() -> None:
    page = (Path(__file__).parents[1] / "docs" / "method.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in page] == []
    assert [name for name in ATTACKS if f"`{name}`" not in page] == []
    example = doctest.DocTestParser().get_doctest(page.replace("```", ""), {}, "method.md", None, 0)
    assert len(example.examples) >= 9
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
