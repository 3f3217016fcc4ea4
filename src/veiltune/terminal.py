"""What the commands show on a terminal: progress bars, tables, a polite Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from veiltune.customer.reporting import Reporter
from veiltune.dp.reporting import TrainProgress, TrainReporter

if TYPE_CHECKING:
    from veiltune.customer.training import Progress as StepProgress
    from veiltune.models.catalog import ModelInfo

console = Console(highlight=False)


class TerminalReporter(Reporter, TrainReporter):
    """Draws one bar a phase; where there is no terminal, one line a phase."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True, highlight=False),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._progress.stop()

    def phase(self, name: str, total: int) -> None:
        """Starts a bar; before the first one nothing is drawn, so that an early refusal stands alone."""
        self._progress.start()
        self._task = self._progress.add_task(name, total=total, note="")

    def advance(self, done: int) -> None:
        """Moves the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)

    def step(self, progress: StepProgress, *, bytes_sent: int, releases: int) -> None:
        """Moves the bar and writes loss, speed, bytes and releases beside it."""
        if self._task is not None:
            speed, megabytes = f"{progress.examples_per_second:.0f} ex/s", f"{bytes_sent / 1e6:.0f} MB"
            note = f"loss {progress.loss:.2f} {speed} {megabytes} {releases} rel."
            self._progress.update(self._task, completed=progress.step, note=note)

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(line, soft_wrap=True, markup=False)

    def trained(self, progress: TrainProgress) -> None:
        """Moves the bar and writes loss, speed and the epsilon spent so far beside it."""
        if self._task is not None:
            loss = f"loss {progress.loss:.2f}" if progress.size else "nobody drawn"
            note = f"{loss} {progress.examples_per_second:.0f} ex/s epsilon {progress.epsilon:.3g}"
            self._progress.update(self._task, completed=progress.step, note=note)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks for a stop after this step, with a checkpoint; the second one stops at once."""
    asked = False

    def handle(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def print_summary(summary: Mapping[str, Any], run: Path) -> None:
    """The end of `veiltune tune`."""
    table = Table(title=f"run {run}", show_header=False)
    share = summary["trainable_parameters"] / max(1, summary["total_parameters"])
    for name, value in (
        (summary["utility_metric"], f"{summary['utility']:.4f} on {summary['eval_examples']} examples"),
        ("customer alone", _alone(summary)),
        ("examples/s", f"{summary['examples_per_second']:.0f}"),
        ("seconds", f"{summary['seconds']:.1f}"),
        ("bytes up / down", f"{summary['bytes_up']:,} / {summary['bytes_down']:,}"),
        ("releases", f"{summary['releases']:,}"),
        ("trainable at vendor", f"{summary['trainable_parameters']:,} ({share:.2%} of the vendor's part)"),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print(f"what was released and what it protects: {run / 'privacy.json'}")


def print_training(summary: Mapping[str, Any], run: Path) -> None:
    """The end of `veiltune train`."""
    table = Table(title=f"run {run}", show_header=False)
    share = summary["trainable_parameters"] / max(1, summary["total_parameters"])
    epsilon = float(summary["claimed_epsilon"])
    claim = f"{epsilon:.2f} at delta {summary['delta']:g}, add/remove one {summary['unit']}"
    for name, score in summary["scores"].items():
        interval = f"{float(score['low']):.2f} to {float(score['high']):.2f}"
        table.add_row(name, f"{float(score['value']):.2f}  (95 %: {interval}, {score['count']} examples)")
    for name, value in (
        ("claimed epsilon", claim if epsilon < float("inf") else "infinite: this run protects nothing"),
        ("noise multiplier", f"{summary['noise_multiplier']:g}, {summary['steps']:,} steps"),
        ("examples/s", f"{summary['examples_per_second']:.0f}"),
        ("seconds", f"{summary['seconds']:.1f}"),
        ("trainable", f"{summary['trainable_parameters']:,} ({share:.2%}), {summary['method']}"),
    ):
        table.add_row(name, value)
    if summary["non_finite"]:
        table.add_row("not finite", f"{summary['non_finite']:,} gradients, which contributed zero")
    console.print(table)
    console.print(f"what is claimed and what is not: {run / 'privacy.json'}", soft_wrap=True)


def _alone(summary: Mapping[str, Any]) -> str:
    alone = summary["customer_alone_utility"]
    if alone is None:
        return "not measured"
    if not summary["dominated"]:
        verdict = "sending nothing does worse"
    else:
        verdict = "DOMINATED: sending nothing does " + ("better" if alone > summary["utility"] else "as well")
    return f"{alone:.4f}  ({verdict})"


def print_plan(plan: Mapping[str, str]) -> None:
    """`--dry-run`: what would happen, a line each."""
    width = max(16, *map(len, plan))
    for name, value in plan.items():
        console.print(f"{name:<{width}} {value}", soft_wrap=True, markup=False)


def print_models(models: Mapping[str, ModelInfo]) -> None:
    """`veiltune models`."""
    for info in models.values():
        size = f"{info.family}, {info.blocks} blocks of {info.hidden_size}"
        console.print(f"{info.name:<36} {size:<30} {info.licence:<11} {escape(info.source)}", soft_wrap=True)


def print_demo(result: Mapping[str, Any]) -> None:
    """The demo's table and what to read next."""
    table = Table("", *result["columns"], title="same tickets, same model, same steps")
    for name, *values in result["rows"]:
        table.add_row(name, *values)
    console.print(table)
    for line in result["notes"]:
        console.print(line, soft_wrap=True)
