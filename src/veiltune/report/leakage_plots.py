"""The curves of a report on language models, each with the numbers behind it as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from veiltune.audit.leakage import Discoverable, Exposure, Extraction, Membership, MembershipAttack
from veiltune.report.figures import estimate_with_interval, outwards
from veiltune.report.leakage_figures import (
    FAMILIES,
    attack_title,
    bits,
    found_rate,
    found_share,
    nominal,
    share_estimate,
)
from veiltune.report.plots import Plot
from veiltune.report.svg import INK, MUTED, SERIES, draw

ABOVE: dict[str, Any] = {"loc": "left", "fontsize": 12, "color": MUTED}
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")
_LINES = ("-", "--", "-.", ":")
_OTHERS = (SERIES[0], SERIES[2], SERIES[3])
_LEGEND_LINE = 22  # pixels

Level = Sequence[tuple[float, float, float, float]]
"""points: (x, value, low, high)"""


def plot_roc(found: Membership, key: str) -> Plot | None:
    """ROC of all attacks over persons on log axes, the strongest in bold; None if none has a curve."""
    curves = [attack for attack in found.attacks if attack.level == "person" and attack.roc and attack.auc]
    if not curves:
        return None
    curves.sort(key=lambda attack: (attack.name != found.strongest, -(attack.auc.value if attack.auc else 0)))
    floor = (1 / max(2, found.persons_out), 1 / max(2, found.persons_in))

    def paint(axes: Axes, narrow: bool) -> None:
        axes.plot([min(floor), 1], [min(floor), 1], color=MUTED, linewidth=1, linestyle=":", label="guessing")
        for index, attack in reversed(list(enumerate(curves))):
            _paint_roc(axes, attack, index, floor)
        axes.set(xscale="log", yscale="log", xlim=(floor[0], 1), ylim=(floor[1], 1.05))
        axes.set_xlabel("false positive rate (log)" if narrow else "false positive rate (log scale)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(10))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(PERCENT)
        axes.set_title("true positive rate (log scale)", **ABOVE)
        handles, labels = axes.get_legend_handles_labels()
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.1, -0.17 if narrow else -0.14)}
        axes.legend(handles[::-1], labels[::-1], frameon=False, labelcolor=INK, handlelength=3, **place)

    extra = _LEGEND_LINE * (len(curves) + 1)
    wide, narrow = draw(
        paint, key=key, wide=(400 + extra, 60), narrow=(304 + extra, 60), bottom=62 + extra, wide_width=460
    )
    rows = tuple(
        (
            attack_title(attack.name) + (" (strongest)" if attack.name == found.strongest else ""),
            estimate_with_interval(attack.auc) if attack.auc else "",
        )
        for attack in curves
    )
    return Plot(
        title="ROC of membership, persons",
        reading="; ".join(f"{row[0]}: AUC {row[1]}" for row in rows),
        wide=wide,
        narrow=narrow,
        columns=("Attack", "AUC [95 %]"),
        rows=rows,
    )


def _paint_roc(axes: Axes, attack: MembershipAttack, index: int, floor: tuple[float, float]) -> None:
    """The first is the strongest; between its points a curve is straight on linear axes, so it is bent on these."""
    colour = SERIES[1] if index == 0 else _OTHERS[(index - 1) % len(_OTHERS)]
    line = "-" if index == 0 else _LINES[((index - 1) // len(_OTHERS)) % len(_LINES)]
    title = attack_title(attack.name) + (" (strongest)" if index == 0 else "")
    x = np.geomspace(floor[0], 1.0, 201)
    false, true = np.array(attack.roc).T
    y = np.interp(x, false, true).clip(floor[1])
    axes.plot(x, y, color=colour, linestyle=line, linewidth=2.6 if index == 0 else 1.3, label=title)
    if index == 0:
        for rate in attack.tpr_at_fpr:
            if rate.fpr >= floor[0]:
                ends = [max(rate.tpr.low, floor[1]), max(rate.tpr.high, floor[1])]
                axes.plot([rate.fpr] * 2, ends, color=colour, linewidth=1.5)
                axes.plot(rate.fpr, max(rate.tpr.value, floor[1]), "D", color=colour, markersize=7)


def plot_exposure(items: Sequence[Exposure], key: str) -> Plot | None:
    """Median exposure over the number of insertions, by family, below the cap of the references."""
    if not items:
        return None
    families = list(dict.fromkeys(item.family for item in items))

    def paint(axes: Axes, narrow: bool) -> None:
        for index, family in enumerate(families):
            own = sorted((item for item in items if item.family == family), key=lambda item: item.repetitions)
            shift = 1 + 0.05 * (index - (len(families) - 1) / 2)
            points = [(item.repetitions * shift, item.median_bits, item.low, item.high) for item in own]
            _paint_points(axes, points, index, FAMILIES[family])
        for cap in sorted({item.cap_bits for item in items}):
            axes.axhline(cap, color=MUTED, linewidth=1.2, linestyle="--")
            _note(axes, "cap", cap)
        axes.axhline(1, color=MUTED, linewidth=1, linestyle=":")
        _note(axes, "chance", 1)
        _repetition_axis(axes, {item.repetitions for item in items}, narrow, "insertions")
        axes.set_ylim(0, _top(items))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_title("median exposure (bits)", **ABOVE)
        _legend_below(axes, narrow)

    extra = _LEGEND_LINE * len(families)
    wide, narrow = draw(paint, key=key, wide=(290 + extra, 48), narrow=(250 + extra, 36), bottom=58 + extra, right=58)
    rows = tuple(
        (
            FAMILIES[item.family],
            f"{item.repetitions:,}",
            bits(item),
            f"{item.at_cap:,} of {item.canaries:,}",
            f"{item.cap_bits:.2f}",
        )
        for item in items
    )
    return Plot(
        title="Exposure of inserted secrets",
        reading="; ".join(f"{row[0]}, {row[1]} times: {row[2]}" for row in rows),
        wide=wide,
        narrow=narrow,
        columns=("Family", "Insertions", "Median [95 %]", "At the cap", "Cap (bits)"),
        rows=rows,
    )


def _top(items: Sequence[Exposure]) -> float:
    return 1.1 * max(2.0, *(max(item.high, item.cap_bits) for item in items))


def plot_discoverable(points: Sequence[Discoverable], key: str) -> Plot | None:
    """Share of values that sampling meets, over the number of samples: members against twins."""
    if not points:
        return None
    chances = sorted({point.probability for point in points})

    def paint(axes: Axes, narrow: bool) -> None:
        for index, probability in enumerate(chances):
            own = sorted((p for p in points if p.probability == probability), key=lambda p: p.queries)
            shift = 1 + 0.08 * index
            members = [(p.queries * shift, p.recall.value, p.recall.low, p.recall.high) for p in own]
            twins = [
                (p.queries * shift, p.chance.value, p.chance.low, p.chance.high) for p in own if p.chance is not None
            ]
            line, said = _LINES[index % len(_LINES)], nominal(probability)
            _paint_points(axes, members, 1, f"training text, chance {said}", line=line)
            if twins:
                _paint_points(axes, twins, 0, f"twins, chance {said}", line=line)
        counts = sorted({point.queries for point in points})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlim=(0.8 * counts[0], 1.4 * counts[-1]), ylim=(0, _headroom(points)))
        axes.set_xlabel("samples (log)" if narrow else "samples drawn after the true text before a value (log scale)")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_title("share of cue-free values met", **ABOVE)
        _legend_below(axes, narrow)

    lines = len(chances) * (2 if any(point.chance for point in points) else 1)
    extra = _LEGEND_LINE * lines
    wide, narrow = draw(paint, key=key, wide=(290 + extra, 56), narrow=(250 + extra, 54), bottom=58 + extra)
    rows = tuple(
        (
            f"{point.queries:,}",
            nominal(point.probability),
            found_rate(point.recall),
            found_rate(point.chance) if point.chance else "not measured",
        )
        for point in points
    )
    return Plot(
        title="Values met by sampling",
        reading="; ".join(f"{row[0]} samples at {row[1]}: {row[2]}, twins {row[3]}" for row in rows),
        wide=wide,
        narrow=narrow,
        columns=("Samples", "Chance of at least", "In the training text [95 %]", "Twins [95 %]"),
        rows=rows,
    )


def _headroom(points: Sequence[Discoverable]) -> float:
    return min(1.02, 1.15 * max(p.high for point in points for p in (point.recall, point.chance) if p) + 0.01)


def plot_errors(extraction: Extraction, key: str) -> Plot | None:
    """Recall over wrong guesses, the most confident first, with the interval at 100 errors."""
    curve, at = extraction.errors_curve, extraction.recall_at_100_errors
    if len(curve) < 2:
        return None

    def paint(axes: Axes, narrow: bool) -> None:
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, color=SERIES[1], linewidth=2)
        if at is not None:
            axes.plot([100, 100], [at.low, at.high], color=SERIES[1], linewidth=1.5)
            axes.plot(100, at.value, "D", color=SERIES[1], markersize=7, clip_on=False)
        highest = max([*y, at.high if at else 0.0])
        axes.set(xlim=(0, max([*x, 1])), ylim=(0, min(1.02, 1.15 * highest + 0.01)))
        axes.set_xlabel("wrong guesses" if narrow else "wrong guesses so far, the most confident guess first")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title("share of cue-free values guessed right", **ABOVE)

    wide, narrow = draw(paint, key=key, wide=(270, 56), narrow=(240, 54))
    rows = tuple((f"{errors:,}", found_share(share)) for errors, share in curve)
    said = f"{found_rate(at)} at 100 errors" if at else "fewer than 100 errors"
    return Plot(
        title="Recall against errors, true prefix",
        reading=f"{said}; {rows[-1][1]} after all {rows[-1][0]} errors",
        wide=wide,
        narrow=narrow,
        columns=("Wrong guesses", "Recall"),
        rows=rows,
    )


def plot_repetitions(found: Membership, key: str) -> Plot | None:
    """AUC over the number of documents of a person: the strongest attack drawn, all of them in the table."""
    drawn = next((one for one in found.attacks if one.level == "person" and one.name == found.strongest), None)
    if drawn is None or not drawn.by_repetition:
        return None

    def paint(axes: Axes, narrow: bool) -> None:
        points = [(float(count), auc.value, auc.low, auc.high) for count, auc in drawn.by_repetition]
        _paint_points(axes, points, 1, "", line="")
        axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=":")
        _repetition_axis(axes, {count for count, _ in drawn.by_repetition}, narrow, "documents of the person")
        low = min([0.4, *(auc.low for _, auc in drawn.by_repetition)])
        axes.set(ylim=(low - 0.02, 1.02))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_title(f"AUC, {attack_title(drawn.name)}", **ABOVE)

    wide, narrow = draw(paint, key=key, wide=(260, 48), narrow=(240, 48))
    rows = tuple(
        (attack_title(one.name), f"{one.level}s", f"{count:,}", estimate_with_interval(auc))
        for one in found.attacks
        for count, auc in one.by_repetition
    )
    return Plot(
        title="Membership by how often a person occurs",
        reading="; ".join(f"{count} documents: {estimate_with_interval(auc)}" for count, auc in drawn.by_repetition),
        wide=wide,
        narrow=narrow,
        columns=("Attack", "Told apart", "Documents of the person", "AUC [95 %]"),
        rows=rows,
    )


def rate_cell(attack: MembershipAttack, fpr: float) -> tuple[str, str] | None:
    """True positive rate at a false positive rate, and what is known of the threshold; None if not measured."""
    rate = next((one for one in attack.tpr_at_fpr if one.fpr == fpr), None)
    if rate is None:
        return None
    low, high = outwards(100 * rate.fpr_low, 100 * rate.fpr_high, 1)
    known = f"{rate.false_positives:,} errors: {low} to {high}\N{NO-BREAK SPACE}%"
    return share_estimate(rate.tpr), known


def _paint_points(axes: Axes, points: Level, index: int, label: str, *, line: str = "-") -> None:
    colour, marker = SERIES[index % len(SERIES)], "osD^"[index % 4]
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.plot(
        x, y, color=colour, linestyle=line, marker=marker, markersize=6, linewidth=2, label=label or None, clip_on=False
    )
    for at, _, low, high in points:
        axes.plot([at, at], [low, high], color=colour, linewidth=1.5)


def _repetition_axis(axes: Axes, counts: set[int], narrow: bool, what: str) -> None:
    ordered = sorted(counts)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ordered, [str(count) for count in ordered])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ordered[0] / 1.2, ordered[-1] * 1.2)
    axes.set_xlabel(f"{what} (log)" if narrow else f"{what} (log scale)")


def _note(axes: Axes, text: str, height: float) -> None:
    """Names a horizontal line at its right end, outside the axes."""
    axes.annotate(
        text, (1, height), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
        color=MUTED,
    )  # fmt: skip


def _legend_below(axes: Axes, narrow: bool) -> None:
    below = (-50 if narrow else -46) / axes.bbox.height * axes.figure.dpi / 72
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, below)}
    axes.legend(frameon=False, labelcolor=INK, handlelength=3, borderaxespad=0, **place)
