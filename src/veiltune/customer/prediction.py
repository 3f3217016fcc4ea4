"""`veiltune predict`: new texts through a finished run's job, under that run's mechanism, key and ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from veiltune.config import TuneConfig, load_config
from veiltune.customer.evaluation import predict_logits
from veiltune.customer.opening import (
    JobCard,
    connect,
    encode,
    fetch_bundle,
    local_optimizer,
    make_releaser,
    output_size,
)
from veiltune.customer.protection import run_secret, statement
from veiltune.customer.releasing import Releaser
from veiltune.customer.remote import RemoteJob
from veiltune.customer.reporting import Reporter
from veiltune.customer.training import checkpoint_steps
from veiltune.data.predictions import write_predictions
from veiltune.data.tables import read_table
from veiltune.errors import InputError
from veiltune.runs import RunFolder, storage_errors


def predict(
    run_path: Path, source: str, output: Path, *, text_column: str | None = None, reporter: Reporter | None = None
) -> int:
    """Writes the predicted label and its probability for every text of a table.

    A text that the run has released before, in training or prediction, is sent as the same bytes and costs nothing
    new; the run's privacy.json is brought up to date with what was released now.

    Args:
        run_path: The folder of a finished run.
        source: A table as for `veiltune tune`, without labels.
        output: CSV to write, columns `prediction` and `probability`, in the order of the input. Must not exist.
        text_column: Where the texts are; the run's own column name if None.
        reporter: Told about progress.

    Returns:
        The number of predictions.

    Raises:
        InputError: If the run is not finished, or the table or the output cannot be used.
        RunInUseError: If another process is at this run.
    """
    run = RunFolder(run_path)
    if not (run.path / "summary.json").exists():
        raise InputError(f"{run.path} is not the folder of a finished run; finish it with the command that began it")
    if output.exists():
        raise InputError(f"{output} exists; name another file for the predictions")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a folder; name an existing one for the predictions")
    if not (run.private / "secret").exists():
        raise InputError(
            f"{run.path} has lost its private/secret: the same texts would get other noise; start a new run"
        )
    run.read_json("privacy.json")  # is brought up to date after the prediction, which is then paid for
    config = load_config(TuneConfig, run.config_path, [])
    card = JobCard.load(run.private)
    if card is None:
        raise InputError(f"{run.path} remembers no job; was its private folder removed?")
    table = read_table(source, text_column=text_column or config.data.text_column, format=config.data.format)
    logits = _predict(config, run, card, table.texts, reporter or Reporter())
    write_predictions(output, logits.softmax(dim=-1).tolist(), card.labels)
    return len(logits)


def _predict(config: TuneConfig, run: RunFolder, card: JobCard, texts: Sequence[str], reporter: Reporter) -> Tensor:
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.held())
        stack.enter_context(storage_errors(run.path))
        client = stack.enter_context(contextlib.closing(connect(config)))
        secret = run_secret(run.private, config.noise_seed)
        bundle = fetch_bundle(config, client, run.path / "bottom", num_labels=len(card.labels))
        # Before the trained parameters come: the reference norm is the untrained bottom's, as in training.
        releaser = stack.enter_context(contextlib.closing(make_releaser(config, bundle, run, secret)))
        steps = checkpoint_steps(run.private / "checkpoints")
        local_optimizer(config, bundle).restore(
            load_file(run.private / "checkpoints" / f"{steps[-1]:08d}.safetensors") if steps else None
        )
        token_ids = encode(config, bundle, texts)
        reporter.phase("predict", len(token_ids))
        job = RemoteJob(
            client, card.job, next_seq=0, output_size=output_size(config, bundle, num_labels=len(card.labels))
        )
        try:
            return predict_logits(job, releaser, bundle.head, token_ids, part="inference", progress=reporter.advance)
        finally:
            _count_again(config, run, releaser, num_classes=len(card.labels))


def _count_again(config: TuneConfig, run: RunFolder, releaser: Releaser, *, num_classes: int) -> None:
    """Brings privacy.json up to date with what has been released, also by a prediction that failed on its way."""
    before = run.read_json("privacy.json")
    content = statement(
        config,
        releaser.privatizer,
        releaser.ledger.totals(),
        finished_model=before.get("finished_model"),
        long_tokens=before["representations"].get("share_of_tokens_with_less_than_a_third_of_the_noise"),
        num_classes=num_classes,
    )
    run.write_json("privacy.json", content)
