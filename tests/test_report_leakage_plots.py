"""The plots about language models: what is drawn stands in the table, what cannot be drawn is not."""

from __future__ import annotations

from typing import Any

import pytest

from leakage_records import attack, bare, leakage, membership, run
from test_report_page import Page
from veiltune.report import leakage_plots, leakage_rows


def test_the_figures_of_a_plot_stand_in_its_table() -> None:
    record = leakage()
    assert record.membership is not None
    drawn = leakage_plots.plot_roc(record.membership, "k")
    assert drawn is not None
    assert drawn.rows[0] == ("EZ-MIA (strongest)", "0.950 [0.920, 0.980]") and len(drawn.rows) == 8
    text = Page(str(drawn.wide)).text
    assert "EZ-MIA (strongest)" in text and "guessing" in text and "1 %" in text and "10 %" in text
    drawn = leakage_plots.plot_exposure(record.exposure, "k")
    assert drawn is not None and len(drawn.rows) == 12 and "cap" in Page(str(drawn.narrow)).text
    drawn = leakage_plots.plot_discoverable(record.extraction.discoverable, "k")
    assert drawn is not None
    assert drawn.rows[0] == ("1", "50\xa0%", "9.8\xa0% [7.5, 12.5]", "none of 602, at most 0.7\xa0%")
    drawn = leakage_rows.plot_types(record.extraction, "k")
    assert drawn is not None
    assert drawn.rows[0][0] == "name" and "e-mail, cue-free" in Page(str(drawn.wide)).text


def test_nothing_to_draw_draws_nothing() -> None:
    nothing = bare()
    assert leakage_plots.plot_exposure((), "k") is None
    assert leakage_plots.plot_discoverable((), "k") is None
    assert leakage_plots.plot_errors(nothing.extraction, "k") is None
    without = membership(
        0.9, attacks=(attack("ez", "person", 0.9).model_copy(update={"roc": (), "by_repetition": ()}),)
    )
    assert leakage_plots.plot_roc(without, "k") is None and leakage_plots.plot_repetitions(without, "k") is None
    assert leakage_rows.plot_excess([run(nothing)], "k") is None and leakage_rows.plot_auc([run(nothing)], "k") is None


def test_a_curve_between_two_points_is_bent_on_log_axes() -> None:
    """From (0, 0) to (1, 1) in one straight line is guessing: it must lie on the diagonal, not above or below it."""
    seen: list[Any] = []

    class Axes:
        def plot(self, x: Any, y: Any, **_: Any) -> None:
            seen.append((x, y))

    straight = {"roc": ((0.0, 0.0), (1.0, 1.0)), "tpr_at_fpr": ()}
    one = attack("ez", "person", 0.9).model_copy(update=straight)
    leakage_plots._paint_roc(Axes(), one, 0, (0.01, 0.01))  # type: ignore[arg-type]
    ((x, y),) = seen
    assert x[0] == pytest.approx(0.01) and y == pytest.approx(x)
