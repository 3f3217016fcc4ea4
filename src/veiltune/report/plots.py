"""The plots of a report, each with the numbers behind it as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from veiltune.audit.record import Attack, Attribute, FrequencyBin, Rate, RepeatedRelease
from veiltune.report.figures import (
    estimate_with_interval,
    figure,
    label_of,
    percent,
    rate_with_interval,
    utility_interval,
)
from veiltune.report.sources import Run
from veiltune.report.svg import INK, MUTED, SERIES, SHADE, draw
from veiltune.report.words import is_dominated

_MARKERS, _LINES = ("o", "s", "^", "D"), ("-", "--", "-.", ":")
_NAMES = 250  # pixels that names take on a wide page
_PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.0f} %")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One plot for a wide page and for a phone, and the table behind it."""

    title: str
    reading: str
    """what is to be seen, for those who do not see it"""
    wide: Markup
    narrow: Markup
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def plot_tradeoff(runs: Sequence[Run], key: str) -> Plot:
    """Utility against empirical privacy, one point a run, with customer alone at empirical privacy 1."""
    alone = sorted({value for run in runs if (value := run.summary.customer_alone_utility) is not None})

    def paint(axes: Axes, narrow: bool) -> None:
        if len(alone) == 1:
            axes.axhspan(-1, alone[0], color=SHADE, linewidth=0)
        for value in alone:
            axes.axhline(value, color=SERIES[1], linewidth=1.2, linestyle="--")
            axes.plot(1, value, "D", color=SERIES[1], markersize=8, clip_on=False)
            _note(axes, "customer alone", (1, value), (-2, 10), ha="right", color=SERIES[1])
        for run in runs:
            _paint_run(axes, run)
        ranges = [utility_interval(run.summary.utility, run.summary.eval_examples) for run in runs]
        low, high = min([*alone, *(item.low for item in ranges)]), max([*alone, *(item.high for item in ranges)])
        margin = max(0.15 * (high - low), 0.02)
        axes.set(xlim=(0, 1), ylim=(low - margin, high + margin))
        axes.set_xlabel(
            "empirical privacy (1 - success of the strongest attack)" if not narrow else "empirical privacy"
        )
        axes.set_title(f"utility ({label_of(runs[0].summary.utility_metric, 20)})", **_ABOVE)
        axes.yaxis.set_major_locator(MaxNLocator(5))

    wide, narrow = draw(paint, key=key, wide=(330, 56), narrow=(280, 50))
    reading = "; ".join(f"{row[0]}: utility {row[1]}, customer alone {row[2]}, privacy {row[3]}" for row in _rows(runs))
    return Plot(
        title="Utility against empirical privacy",
        reading=reading,
        wide=wide,
        narrow=narrow,
        columns=("Run", "Utility", "Customer alone", "Empirical privacy", "Against customer alone"),
        rows=_rows(runs),
    )


def plot_attacks(attacks: Sequence[Attack], strongest: str, key: str) -> Plot | None:
    """Success of each finished attack with its interval, best first; attacks that failed stand below as failed."""
    done = sorted((attack for attack in attacks if attack.reported), key=lambda attack: -_value(attack.reported))
    failed = [attack for attack in attacks if attack.status == "failed"]
    if not done:
        return None
    points = [
        (label_of(attack.title, 40), attack.reported, "failed to run", attack.name == strongest)
        for attack in (*done, *failed)
    ]
    return _dot_plot(points, title="Tokens recovered, by attack", axis="share of tokens recovered", key=key)


def plot_frequency(bins: Sequence[FrequencyBin], key: str) -> Plot | None:
    """Recovery by how often tokens occur in the public text."""
    if not any(item.rate for item in bins):
        return None
    points = [(label_of(item.label, 40), item.rate, "too few tokens", False) for item in bins]
    return _dot_plot(
        points, title="Tokens recovered, by frequency in public text", axis="share of tokens recovered", key=key
    )


def plot_repeated(points: Sequence[RepeatedRelease], titles: Mapping[str, str], key: str) -> Plot | None:
    """Recovery over the number of fresh releases of the same texts; None for fewer than two points."""
    ordered = sorted(points, key=lambda point: point.releases)
    if len({point.releases for point in ordered}) < 2:
        return None
    names = list(dict.fromkeys(point.attack for point in ordered))

    def paint(axes: Axes, narrow: bool) -> None:
        for index, name in enumerate(names):
            own = [point for point in ordered if point.attack == name]
            _paint_curve(axes, own, index, label_of(titles.get(name, name), 40))
        axes.set_xscale("log")
        counts = sorted({point.releases for point in ordered})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(
            ylim=(0, 1.02),
            xlabel="releases (log scale)" if narrow else "releases of the same texts with fresh noise (log scale)",
        )
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.set_title("share of tokens recovered", **_ABOVE)
        if len(names) > 1:
            _legend(axes, loc="lower right")

    wide, narrow = draw(paint, key=key, wide=(280, 56), narrow=(250, 54))
    rows = tuple(
        (str(point.releases), label_of(titles.get(point.attack, point.attack)), *_cells(point.rate))
        for point in ordered
    )
    return Plot(
        title="Tokens recovered if the same texts were released again",
        reading="; ".join(f"{row[0]} releases: {row[2]}" for row in rows),
        wide=wide,
        narrow=narrow,
        columns=("Releases", "Attack", "Recovered [95 %]", "Tokens"),
        rows=rows,
    )


def plot_roc(attribute: Attribute, key: str) -> Plot | None:
    """ROC of the attacks on an attribute, the clean text's dashed; None if none has a curve."""
    curves = [(attack, False) for attack in attribute.attacks if attack.roc]
    if attribute.ceiling.roc:
        curves.append((attribute.ceiling, True))
    if not curves:
        return None

    def paint(axes: Axes, narrow: bool) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
        for index, (attack, is_ceiling) in enumerate(curves):
            x, y = zip(*attack.roc, strict=True)
            colour = MUTED if is_ceiling else SERIES[index % len(SERIES)]
            line = "--" if is_ceiling else _LINES[index % len(_LINES)]
            label = label_of(attack.title, 40) + (" (guide)" if is_ceiling else "")
            axes.plot(x, y, color=colour, linestyle=line, linewidth=2, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="false positive rate")
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_formatter(_PERCENT)
        axes.set_title("true positive rate", **_ABOVE)
        _legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.2 if not narrow else -0.26))

    extra = 22 * len(curves)
    wide, narrow = draw(
        paint, key=key, wide=(344 + extra, 56), narrow=(274 + extra, 54), bottom=62 + extra, wide_width=460
    )
    rows = tuple(
        (
            label_of(attack.title) + (" (guide)" if is_ceiling else ""),
            estimate_with_interval(attack.auc) if attack.auc else "not measured",
            rate_with_interval(attack.reported) if attack.reported else "not measured",
        )
        for attack, is_ceiling in curves
    )
    return Plot(
        title=f"ROC of the attribute {label_of(attribute.name, 40)}",
        reading="; ".join(f"{row[0]}: AUC {row[1]}" for row in rows),
        wide=wide,
        narrow=narrow,
        columns=("Attack", "AUC [95 %]", "Right [95 %]"),
        rows=rows,
    )


_ABOVE: dict[str, Any] = {"loc": "left", "fontsize": 12, "color": MUTED}


def _value(rate: Rate | None) -> float:
    return rate.value if rate else 0.0


def _cells(rate: Rate | None) -> tuple[str, str]:
    return (rate_with_interval(rate), str(rate.trials)) if rate else ("", "")


def _rows(runs: Sequence[Run]) -> tuple[tuple[str, ...], ...]:
    verdicts = {None: "not measured", True: "dominated", False: "better"}
    return tuple(
        (
            f"{run.letter} {label_of(run.label)}",
            figure(run.summary.utility),
            "not measured"
            if run.summary.customer_alone_utility is None
            else figure(run.summary.customer_alone_utility),
            estimate_with_interval(run.record.inversion.empirical_privacy),
            verdicts[is_dominated(run)],
        )
        for run in runs
    )


def _paint_run(axes: Axes, run: Run) -> None:
    privacy = run.record.inversion.empirical_privacy
    utility = utility_interval(run.summary.utility, run.summary.eval_examples)
    axes.plot([privacy.low, privacy.high], [utility.value] * 2, color=SERIES[0], linewidth=1.5, clip_on=False)
    axes.plot([privacy.value] * 2, [utility.low, utility.high], color=SERIES[0], linewidth=1.5)
    axes.plot(privacy.value, utility.value, "o", color=SERIES[0], markersize=8, clip_on=False)
    side, offset = ("left", 7) if privacy.value < 0.9 else ("right", -7)
    _note(axes, run.letter, (privacy.value, utility.value), (offset, 6), ha=side, weight="bold")


def _paint_curve(axes: Axes, points: Sequence[RepeatedRelease], index: int, label: str) -> None:
    colour = SERIES[index % len(SERIES)]
    x, y = [point.releases for point in points], [point.rate.value for point in points]
    axes.plot(
        x,
        y,
        color=colour,
        linestyle=_LINES[index % len(_LINES)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=7,
        linewidth=2,
        label=label,
        clip_on=False,
    )
    for point in points:
        axes.plot([point.releases] * 2, point.rate.interval(), color=colour, linewidth=1.5)


def _note(axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    axes.annotate(text, point, offset, textcoords="offset points", **style)


def _legend(axes: Axes, **place: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK, handlelength=3, **place)


def _dot_plot(points: Sequence[tuple[str, Rate | None, str, bool]], *, title: str, axis: str, key: str) -> Plot:
    """A row a point: name, dot, whisker and figure; a row without a rate says why. True marks the strongest."""

    def paint(axes: Axes, narrow: bool) -> None:
        for row, (name, rate, missing, marked) in enumerate(points):
            weight = "bold" if marked else "normal"
            if narrow:
                axes.text(0, row - 0.42, name, va="center", weight=weight, clip_on=False)
            if rate is None:
                axes.text(0.01, row, missing, va="center", color=MUTED, style="italic")
            else:
                _paint_rate(axes, row, rate, marked)
        names = [] if narrow else [name for name, *_ in points]
        axes.set_yticks(range(len(names)), names)
        for tick, (*_, marked) in zip(axes.get_yticklabels(), points, strict=False):
            tick.set(color=INK, ha="left", weight="bold" if marked else "normal")
        axes.tick_params(axis="y", pad=_NAMES)
        axes.set(xlim=(0, 1), ylim=(len(points) - 0.5, -0.7 if narrow else -0.5), xlabel=axis)
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.grid(visible=False, axis="y")

    rows = tuple(
        (name + (" (strongest)" if marked else ""), *(_cells(rate) if rate else (missing, "")))
        for name, rate, missing, marked in points
    )
    wide, narrow = draw(
        paint, key=key, wide=(30 * len(points) + 64, _NAMES), narrow=(44 * len(points) + 70, 16), top=8, right=52
    )
    return Plot(
        title=title,
        reading="; ".join(f"{row[0]}: {row[1]}" for row in rows),
        wide=wide,
        narrow=narrow,
        columns=("", "Recovered [95 %]", "Tokens"),
        rows=rows,
    )


def _paint_rate(axes: Axes, row: int, rate: Rate, marked: bool) -> None:
    colour = SERIES[1] if marked else SERIES[0]
    low, high = rate.interval()
    axes.plot([low, high], [row, row], color=colour, linewidth=2, clip_on=False)
    axes.plot(rate.value, row, "D" if marked else "o", color=colour, markersize=8, clip_on=False)
    _note(axes, percent(rate.value), (max(high, rate.value), row), (9, 0), va="center", annotation_clip=False)
