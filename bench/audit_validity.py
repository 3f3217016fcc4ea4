"""Are the audit's statistics valid? False alarms, power and coverage, by simulation where the truth is known.

    python bench/audit_validity.py                           # three minutes on one core
    python bench/audit_validity.py --simulations 100 --more 1  # a quick look

Four parts: (1) the one-run bound of epsilon where there is no leak, (2) where the leak is a Gaussian mechanism of known
epsilon, (3) its power, the table of docs/method.md, beside the reference table (audit.md A.3, medians of 30 runs), (4)
the coverage of every interval. Parts 1 and 4 also have a planted wrong variant, which must fail. Of 400 simulations of
a sound interval one in fifteen falls outside 93-97 % by chance, so coverage is judged on more of them, and an interval
is called wrong if it is outside by more than their binomial margin. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from veiltune.attacks.operating import tpr_at_fpr
from veiltune.attacks.ranking import roc_auc
from veiltune.audit.epsilon import audited_epsilon, one_run_p_value
from veiltune.audit.proportions import auc_difference, clopper_pearson, excess, median_interval, wilson

DELTA = 1e-5
EPSILONS = (1.0, 2.0, 4.0)
NULL_SIZES = (200, 1000)
POWER_SIZES = (64, 200, 500, 1000, 2000, 5000)
POWER_MUS = (0.5, 1.0, 2.0, 3.0, 5.0)
PUBLISHED = {  # median bound of 30 runs by mu, for each of the sizes that were published
    0.5: dict(zip((200, 500, 1000, 2000), (0.21, 0.50, 0.61, 0.66), strict=True)),
    1.0: dict(zip((200, 500, 1000, 2000), (0.81, 1.37, 1.53, 1.68), strict=True)),
    2.0: dict(zip((200, 500, 1000, 2000), (2.33, 2.66, 3.21, 3.53), strict=True)),
    3.0: dict(zip((200, 500, 1000, 2000), (3.04, 3.77, 4.27, 4.55), strict=True)),
}
PUBLISHED_RUNS = 30

Array = NDArray[np.float64]
Interval = tuple[float, float, float]


def gaussian_mu(epsilon: float) -> float:
    """The mu whose Gaussian mechanism is exactly (epsilon, DELTA)-differentially private."""

    def excess_delta(mu: float) -> float:
        below = math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
        return float(norm.cdf(-epsilon / mu + mu / 2) - below) - DELTA

    return float(brentq(excess_delta, 1e-3, 50.0, xtol=1e-12))


def coins_and_scores(rng: np.random.Generator, m: int, mu: float) -> tuple[NDArray[np.bool_], Array]:
    included = rng.random(m) < 0.5
    return included, rng.normal(size=m) + mu * included


def bound(rng: np.random.Generator, m: int, mu: float) -> float:
    included, scores = coins_and_scores(rng, m, mu)
    return audited_epsilon(scores, included, delta=DELTA, seed=int(rng.integers(2**31))).epsilon


def best_threshold_alarm(rng: np.random.Generator, m: int) -> bool:
    """Planted: the number of guesses that looks best on the coins, at 5 %, as if it had been fixed before."""
    included, scores = coins_and_scores(rng, m, 0.0)
    ranked = included[np.argsort(-scores)]
    right = np.cumsum(ranked) + np.cumsum(~ranked[::-1])  # of k guesses on each side
    sizes = range(max(5, m // 100), m // 2 + 1, max(1, m // 100))
    return any(one_run_p_value(m, 2 * k, int(right[k - 1]), epsilon=0.0, delta=0.0) <= 0.05 for k in sizes)


@dataclass(frozen=True)
class Case:
    """An interval, the truth it should cover, and whether it is known to be wider than need be."""

    name: str
    draw: Callable[[np.random.Generator], Interval]
    truth: float
    conservative: bool = False


def members_and_scores(
    rng: np.random.Generator, persons: int, records: int, shift: float
) -> tuple[NDArray[np.bool_], Array, list[int] | None]:
    """Unit-variance scores; of several records of a person 1 .. 2 `records` - 1, with half their variance in common."""
    if records == 1:
        members = np.arange(2 * persons) < persons
        return members, rng.normal(size=2 * persons) + shift * members, None
    owners = np.repeat(np.arange(2 * persons), rng.integers(1, 2 * records, size=2 * persons))
    noise = rng.normal(size=2 * persons)[owners] + rng.normal(size=len(owners))
    members = owners < persons
    return members, noise / math.sqrt(2) + shift * members, owners.tolist()


def auc_case(persons: int, records: int, shift: float) -> Case:
    def draw(rng: np.random.Generator) -> Interval:
        members, scores, owners = members_and_scores(rng, persons, records, shift)
        return roc_auc(scores, members, groups=owners)

    truth = float(norm.cdf(shift / math.sqrt(2)))
    return Case(f"AUC {truth:.2f}, {persons}+{persons} {units(records)}", draw, truth)


def tpr_case(persons: int, records: int, shift: float, fpr: float) -> Case:
    def draw(rng: np.random.Generator) -> Interval:
        members, scores, owners = members_and_scores(rng, persons, records, shift)
        point = tpr_at_fpr(scores, members, fpr=fpr, seed=0, groups=owners)
        return point.tpr, point.low, point.high

    truth = float(norm.sf(norm.isf(fpr) - shift))
    return Case(f"TPR {truth:.2f} at {fpr:.0%} FPR, {persons}+{persons} {units(records)}", draw, truth)


def units(records: int) -> str:
    return "persons" if records == 1 else f"persons of 1-{2 * records - 1} records"


def threshold_case(shift: float) -> Case:
    """Clopper-Pearson at the drawn threshold: shifted by the truth, which differs from draw to draw."""

    def draw(rng: np.random.Generator) -> Interval:
        members, scores, _ = members_and_scores(rng, 500, 1, shift)
        point = tpr_at_fpr(scores, members, fpr=0.1, seed=0)
        truth = float(norm.sf(np.sort(scores[~members])[-1 - point.false_positives] - shift))
        return point.tpr - truth, point.threshold_low - truth, point.threshold_high - truth

    return Case("TPR of the drawn threshold, Clopper-Pearson", draw, 0.0, conservative=True)


def excess_case(own: float, other: float, persons: int, *, fractional: bool = False) -> Case:
    def side(rng: np.random.Generator, share: float) -> Array:
        return rng.beta(share, 1 - share, size=persons) if fractional else (rng.random(persons) < share).astype(float)

    kind = "shares" if fractional else "yes or no"
    name = f"excess {own:g} - {other:g}, {persons}+{persons}, {kind} (Newcombe)"
    return Case(name, lambda rng: excess(side(rng, own), side(rng, other)), own - other, conservative=fractional)


def bootstrap_case() -> Case:
    truth = float(norm.cdf(1 / math.sqrt(2)) - norm.cdf(0.5 / math.sqrt(2)))

    def draw(rng: np.random.Generator) -> Interval:
        persons = np.repeat(np.arange(300), 2)
        members = persons < 150
        common = 0.8 * rng.normal(size=300)[persons]
        first, second = (common + 0.6 * rng.normal(size=600) + shift * members for shift in (1.0, 0.5))
        return auc_difference(
            first, second, members, persons=persons.tolist(), resamples=500, seed=int(rng.integers(2**31))
        )

    return Case("difference of AUC, 150+150 persons of 2 records (bootstrap)", draw, truth)


def cases() -> list[Case]:
    return [
        auc_case(150, 1, 0.0),
        auc_case(500, 1, 1.0),
        auc_case(150, 1, 2.3),
        auc_case(150, 5, 0.5),
        tpr_case(500, 1, 0.0, 0.1),
        tpr_case(500, 1, 1.0, 0.1),
        tpr_case(1000, 1, 1.0, 0.01),
        tpr_case(150, 5, 1.0, 0.1),
        tpr_case(300, 5, 1.0, 0.01),
        threshold_case(1.0),
        Case("share .3 of 200 (Wilson)", lambda rng: wilson(int(rng.binomial(200, 0.3)), 200), 0.3),
        Case("share .02 of 1000 (Wilson)", lambda rng: wilson(int(rng.binomial(1000, 0.02)), 1000), 0.02),
        Case(
            "share .02 of 300 (Clopper-Pearson)",
            lambda rng: clopper_pearson(int(rng.binomial(300, 0.02)), 300),
            0.02,
            conservative=True,
        ),
        excess_case(0.5, 0.1, 150),
        excess_case(0.05, 0.05, 500),
        excess_case(0.3, 0.1, 300, fractional=True),
        Case("median of 20 (order statistics)", lambda rng: median_interval(rng.standard_exponential(20)), math.log(2)),
        Case("median of 100 (order statistics)", lambda rng: median_interval(rng.standard_cauchy(100)), 0.0),
        bootstrap_case(),
    ]


@dataclass(frozen=True)
class Coverage:
    """Shares of simulations in which an interval held the truth."""

    first: float
    every: float
    narrowed: float  # of an interval 2/3 as wide about the same estimate


def coverage(case: Case, simulations: int, first: int, seed: int) -> Coverage:
    rng = np.random.default_rng(seed)
    drawn = np.array([case.draw(rng) for _ in range(simulations)])
    away = case.truth - drawn[:, 0]
    reach = np.where(away > 0, drawn[:, 2] - drawn[:, 0], drawn[:, 0] - drawn[:, 1]) + 1e-12
    held, narrow = np.abs(away) <= reach, np.abs(away) <= reach * 2 / 3
    return Coverage(float(held[:first].mean()), float(held.mean()), float(narrow.mean()))


def report_null(simulations: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    print(f"No leak: how often a bound above 0 comes out (nominal at most 5 %), {simulations} runs")
    alarms, planted = {}, {}
    for m in NULL_SIZES:
        rng = np.random.default_rng([seed, m])
        alarms[str(m)] = float(np.mean([bound(rng, m, 0.0) > 0 for _ in range(simulations)]))
        planted[str(m)] = float(np.mean([best_threshold_alarm(rng, m) for _ in range(simulations)]))
        print(f"  m={m:<5} {alarms[str(m)]:6.1%}   planted, best threshold uncorrected: {planted[str(m)]:6.1%}")
    return alarms, planted


def report_gaussian(simulations: int, seed: int) -> dict[str, float]:
    print(f"\nGaussian mechanism, m=1000, delta {DELTA:g}: how often bound <= truth, {simulations} runs")
    valid = {}
    for epsilon in EPSILONS:
        mu = gaussian_mu(epsilon)
        rng = np.random.default_rng([seed, int(epsilon)])
        bounds = np.array([bound(rng, 1000, mu) for _ in range(simulations)])
        valid[f"{epsilon:g}"] = float(np.mean(bounds <= epsilon))
        print(
            f"  epsilon {epsilon:g} (mu {mu:.3f})  {valid[f'{epsilon:g}']:6.1%}   median bound {np.median(bounds):.2f}"
        )
    return valid


def report_power(runs: int, seed: int) -> tuple[dict[str, dict[str, float]], list[str]]:
    print(f"\nPower: median bound; reference (30 runs) | ours, first 30 [95 %] | ours, {runs} | ratio of the last")
    ours: dict[str, dict[str, float]] = {}
    outside = []
    for mu in POWER_MUS:
        ours[f"{mu:g}"] = {}
        for m in POWER_SIZES:
            rng = np.random.default_rng([seed, m, int(10 * mu)])
            bounds = [bound(rng, m, mu) for _ in range(runs)]
            first, low, high = median_interval(bounds[:PUBLISHED_RUNS])
            median = float(np.median(bounds))
            ours[f"{mu:g}"][str(m)] = round(median, 3)
            line = f"  mu {mu:<4} m={m:<5} {{}} | {first:.2f} [{low:.2f}, {high:.2f}] | {median:.2f}"
            published = PUBLISHED.get(mu, {}).get(m)
            if published is None:
                print(line.format("    "))
                continue
            near = abs(median / published - 1) <= 0.1
            if not near:
                outside.append(f"mu {mu:g}, m {m}: {median:.2f} against {published:.2f}")
            print(
                line.format(f"{published:.2f}"),
                f"| {median / published:.2f}",
                "" if near else "  off by more than 10 %",
            )
    return ours, outside


def report_coverage(simulations: int, more: int, seed: int) -> tuple[dict[str, dict[str, float | bool]], list[str]]:
    total = simulations * more
    margins = [1.96 * math.sqrt(0.95 * 0.05 / count) for count in (simulations, total)]
    print(
        f"\nCoverage of intervals at 95 %: first {simulations} simulations (margin {margins[0]:.1%}) | all {total}"
        f" ({margins[1]:.1%}) | planted, 2/3 as wide (must be below 93 %)"
    )
    found: dict[str, dict[str, float | bool]] = {}
    wrong = []
    for number, case in enumerate(cases()):
        share = coverage(case, total, simulations, seed + number)
        fine = share.every >= 0.93 - margins[1] and (case.conservative or share.every <= 0.97 + margins[1])
        found[case.name] = {
            "coverage": share.every,
            "first": share.first,
            "narrowed": share.narrowed,
            "conservative": case.conservative,
        }
        if not fine:
            wrong.append(f"{case.name}: {share.every:.1%}")
        note = ("  conservative" if case.conservative else "") + ("" if fine else "  outside 93-97 %")
        print(f"  {case.name:<60} {share.first:6.1%} | {share.every:6.1%} | {share.narrowed:6.1%}{note}", flush=True)
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=400, help="of each null, mechanism and interval")
    parser.add_argument("--more", type=int, default=4, help="times as many simulations of each interval")
    parser.add_argument("--power-runs", type=int, default=200, help="of each cell of the power table, at least 30")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    alarms, planted = report_null(arguments.simulations, arguments.seed)
    valid = report_gaussian(arguments.simulations, arguments.seed)
    power, outside = report_power(max(PUBLISHED_RUNS, arguments.power_runs), arguments.seed)
    covered, wrong = report_coverage(arguments.simulations, arguments.more, arguments.seed)
    print()
    print(
        json.dumps(
            {
                "null_alarms": alarms,
                "planted_alarms": planted,
                "gaussian_valid": valid,
                "power": power,
                "power_off_by_10_percent": outside,
                "coverage": covered,
                "coverage_outside": wrong,
                "simulations": arguments.simulations,
                "coverage_simulations": arguments.simulations * arguments.more,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
