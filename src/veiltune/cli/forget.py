"""The command that makes a finished run forget: `unlearn`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def unlearn(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `veiltune train` of a language model.")],
    persons: Annotated[Path, typer.Argument(help="Whose rows: a file with a value of the person column on each line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New run folder for the model that forgot.")],
    method: Annotated[
        str, typer.Option(help="npo (fades once a row is unlikely) or ascent (gradient ascent).")
    ] = "npo",
    beta: Annotated[float, typer.Option(help="Of npo; near 0 it is gradient ascent.")] = 0.1,
    steps: Annotated[
        int, typer.Option(help="At most; it ends once the rows have gained no more than unseen ones.")
    ] = 200,
    batch_size: Annotated[int, typer.Option(help="Rows to forget, and rows to keep, in a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    keep_weight: Annotated[float, typer.Option(help="Of the loss on rows to keep.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Draws the rows of a step.")] = 0,
) -> None:
    """Make a finished run forget the rows of some persons; nothing is proven by it, so audit again.

    `veiltune audit OUT --leave-out PERSONS` judges who remains, `--only PERSONS` who was forgotten (40 or more).
    """
    from veiltune.dp.unlearning import UnlearnOptions
    from veiltune.dp.unlearning import unlearn as run_unlearn
    from veiltune.models.loading import quiet_libraries
    from veiltune.terminal import TerminalReporter

    quiet_libraries()
    options = UnlearnOptions(
        method=method,
        beta=beta,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        keep_weight=keep_weight,
        seed=seed,
    )
    with TerminalReporter() as reporter:
        found = run_unlearn(run, persons, output, options, reporter=reporter)
    public, before, after = found["loss_public"], found["loss_before"], found["loss_after"]
    for name, what in (("forget", "rows to forget"), ("keep", "rows to keep"), ("unseen", "unseen rows")):
        typer.echo(
            f"loss a token, {what}: {public[name]:.3f} under the model that training started from,"
            f" {before[name]:.3f} before, {after[name]:.3f} after"
        )
    still = "no" if found["no_likelier_than_unseen"] else "still"
    typer.echo(
        f"training has made {found['rows']} rows {still} likelier than rows that it never saw, after {found['steps']}"
        f" steps; nothing is proven: audit {output}"
    )
