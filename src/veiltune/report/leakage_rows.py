"""Plots of a report on language models that have one row for each thing: types of data, or models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from veiltune.audit.leakage import Extraction
from veiltune.audit.record import Estimate, Rate
from veiltune.report.figures import estimate_with_interval, label_of
from veiltune.report.leakage_figures import attack_title, difference, found_rate, rate_parts, type_title
from veiltune.report.leakage_plots import PERCENT
from veiltune.report.leakage_sources import ModelRun
from veiltune.report.plots import Plot
from veiltune.report.svg import INK, MUTED, SERIES, draw

_NAMES = 200  # pixels that names take on a wide page


@dataclass(frozen=True)
class _Dot:
    """Where a dot stands in its row, with its whisker; a second one of the row stands below the first."""

    value: float
    low: float
    high: float
    shown: str
    second: bool = False


def plot_types(extraction: Extraction, key: str) -> Plot | None:
    """Recall of the strongest attack by type, twins below members."""
    rates = [rate for rate in extraction.rates if rate.attack == extraction.strongest and rate.type != "all"]
    if not rates:
        return None
    rows = [
        (
            type_title(rate.type, rate.cue),
            [_of_rate(rate.recall)] + ([_of_rate(rate.chance, second=True)] if rate.chance else []),
        )
        for rate in rates
    ]
    highest = max(dot.high for _, dots in rows for dot in dots)
    cells = tuple(
        (
            type_title(rate.type, rate.cue),
            found_rate(rate.recall),
            found_rate(rate.chance) if rate.chance else "not measured",
        )
        for rate in rates
    )
    return _plot(
        rows,
        title=f"Recall by type, {attack_title(extraction.strongest)}",
        axis="recall",
        limits=(0.0, min(1.0, highest * 1.05 + 0.01)),
        key=key,
        columns=("Type", "In the training text [95 %]", "Twins [95 %]"),
        cells=cells,
    )


def plot_excess(runs: Sequence[ModelRun], key: str) -> Plot | None:
    """Excess recall of several models; None where no model has one."""
    found = [(run, run.record.extraction.excess_recall) for run in runs]
    return _compared(found, title="Excess recall of cue-free data", axis="excess recall", chance=0.0, key=key)


def plot_auc(runs: Sequence[ModelRun], key: str) -> Plot | None:
    """Membership AUC of several models; None where no model has one."""
    found = [(run, run.record.membership.auc if run.record.membership else None) for run in runs]
    return _compared(found, title="Membership of persons", axis="AUC", chance=0.5, key=key)


def _compared(
    found: Sequence[tuple[ModelRun, Estimate | None]], *, title: str, axis: str, chance: float, key: str
) -> Plot | None:
    known = [estimate for _, estimate in found if estimate]
    if not known:
        return None
    shown = difference if chance == 0.0 else estimate_with_interval
    rows = [
        (
            f"{run.letter} {label_of(run.label, 24)}",
            [_Dot(estimate.value, estimate.low, estimate.high, shown(estimate).split(" [")[0])] if estimate else [],
        )
        for run, estimate in found
    ]
    low, high = min(chance, *(item.low for item in known)), max(chance, *(item.high for item in known))
    margin = max(0.05 * (high - low), 0.005)
    return _plot(
        rows,
        title=title,
        axis=axis,
        limits=(low - margin, min(1.0, high + margin)),
        chance=chance,
        percent=chance == 0.0,
        key=key,
        columns=("Model", f"{axis[0].upper()}{axis[1:]} [95 %]"),
        cells=tuple(
            (f"{run.letter} {label_of(run.label)}", shown(estimate) if estimate else "not measured")
            for run, estimate in found
        ),
    )


def _of_rate(rate: Rate, *, second: bool = False) -> _Dot:
    return _Dot(rate.value, rate.low, rate.high, rate_parts(rate)[0], second)


def _plot(
    rows: Sequence[tuple[str, Sequence[_Dot]]],
    *,
    title: str,
    axis: str,
    limits: tuple[float, float],
    key: str,
    columns: tuple[str, ...],
    cells: tuple[tuple[str, ...], ...],
    chance: float | None = None,
    percent: bool = True,
) -> Plot:
    """A row a thing: name, dots with whiskers, figures."""

    def paint(axes: Axes, narrow: bool) -> None:
        for row, (name, dots) in enumerate(rows):
            if narrow:
                axes.text(limits[0], row - 0.42, name, va="center", clip_on=False)
            if not dots:
                axes.text(limits[0], row, " not measured", va="center", color=MUTED, style="italic")
            for dot in dots:
                _paint_dot(axes, row, dot, paired=len(dots) > 1)
        if chance is not None:
            axes.axvline(chance, color=MUTED, linewidth=1, linestyle=":")
        axes.set_yticks([] if narrow else range(len(rows)), [] if narrow else [name for name, _ in rows])
        for tick in axes.get_yticklabels():
            tick.set(color=INK, ha="left")
        axes.tick_params(axis="y", pad=_NAMES)
        axes.set(xlim=limits, ylim=(len(rows) - 0.5, -0.7 if narrow else -0.5), xlabel=axis)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if percent:
            axes.xaxis.set_major_formatter(PERCENT)
        axes.grid(visible=False, axis="y")

    paired = any(len(dots) > 1 for _, dots in rows)
    height = (40 if paired else 32, 58 if paired else 46)
    wide, narrow = draw(
        paint,
        key=key,
        wide=(height[0] * len(rows) + 64, _NAMES),
        narrow=(height[1] * len(rows) + 74, 16),
        top=8,
        right=70,
    )
    return Plot(
        title=title,
        reading="; ".join(": ".join([cell[0], ", twins ".join(cell[1:])]) for cell in cells),
        wide=wide,
        narrow=narrow,
        columns=columns,
        rows=cells,
    )


def _paint_dot(axes: Axes, row: int, dot: _Dot, *, paired: bool) -> None:
    colour, marker = (SERIES[0], "s") if dot.second else (SERIES[1], "D")
    place = row + (0.18 if dot.second else -0.12 if paired else 0.0)
    axes.plot([dot.low, dot.high], [place, place], color=colour, linewidth=2, clip_on=False)
    axes.plot(dot.value, place, marker, color=colour, markersize=7, clip_on=False)
    axes.annotate(
        dot.shown, (max(dot.high, dot.value), place), (8, 0), textcoords="offset points", va="center",
        annotation_clip=False, color=colour,
    )  # fmt: skip
