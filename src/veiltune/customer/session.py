"""A whole fine-tuning run from the customer's side: data in; a trained job at the vendor and a run folder out."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from veiltune.config import TuneConfig, dump_toml
from veiltune.customer.baseline import customer_alone_utility
from veiltune.customer.batching import secret_order
from veiltune.customer.evaluation import accuracy, predict_logits
from veiltune.customer.model_privacy import model_plan, model_statement
from veiltune.customer.opening import (
    JobCard,
    check_calls,
    connect,
    encode,
    fetch_bundle,
    job_spec,
    local_optimizer,
    long_tokens,
    make_releaser,
    output_size,
)
from veiltune.customer.protection import contributing_tokens, protect_labels, run_secret, statement
from veiltune.customer.releasing import Releaser
from veiltune.customer.remote import JobRewoundError, RemoteJob, VendorClient, ragged
from veiltune.customer.reporting import Reporter
from veiltune.customer.training import Examples, PoissonBatches, Schedule, Trainer, checkpoint_steps
from veiltune.data.tables import LabelSet, Table, check_labels, read_table
from veiltune.errors import DataError, PrivacyError
from veiltune.models.bundle import Bundle
from veiltune.models.optim import ResumableAdamW
from veiltune.runs import RunFolder, atomic_write_bytes, storage_errors
from veiltune.wire import veiltune_pb2 as pb

TRAIN, INFERENCE = "train", "inference"
MAX_REOPENINGS = 5
NORM_TEXTS = 256  # whose norms are held against the public sentences'


@dataclass(frozen=True)
class _Data:
    train_ids: list[list[int]]
    train_labels: list[int]  # as they are; what leaves is protected first
    eval_ids: list[list[int]]
    eval_labels: list[int]
    keys: list[bytes]


def tune(
    config: TuneConfig, *, reporter: Reporter | None = None, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Fine-tunes the vendor's model on text that the vendor never sees; called again, it goes on where it stopped.

    Args:
        config: The run.
        reporter: Told about progress.
        stop: Asked between steps; True saves a checkpoint and raises.

    Returns:
        The summary, as written to summary.json.

    Raises:
        InputError: Bad data or configuration; nothing was made or sent.
        InterruptedRunError: If `stop` said so.
        RunInUseError: If another process is at this run.
        VendorError: The vendor is away or refused; the same call goes on once it is back.
    """
    tables = read_tables(config)
    run = RunFolder.create(config.run, config=dump_toml(config))
    if (run.path / "summary.json").exists():
        return dict(run.read_json("summary.json"))
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with run.held(), _undone_if_refused(run), storage_errors(run.path), contextlib.closing(connect(config)) as client:
        session = _Session(config, run, client, tables, reporter or Reporter())
        with contextlib.closing(session.releaser):
            return session.tune(stop)


@contextlib.contextmanager
def _undone_if_refused(run: RunFolder) -> Iterator[None]:
    """A run that fails before its job was opened has sent nothing, and leaves nothing in a corrected run's way."""
    try:
        yield
    except BaseException:
        card = JobCard.load(run.private)
        if card is None or not card.job:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def read_tables(config: TuneConfig) -> tuple[Table, Table, LabelSet]:
    """The training and evaluation tables and the label set, checked."""
    data = config.data
    train, evaluation = (
        read_table(source, text_column=data.text_column, label_column=data.label_column, format=data.format)
        for source in (data.train, data.eval)
    )
    check_labels(train, data.train)
    labels = LabelSet.fit(train.labels or [])
    try:
        labels.encode(evaluation.labels or [])
    except DataError as error:
        raise DataError(f"{data.eval}: {error} of the training table") from None
    return train, evaluation, labels


class _Session:
    def __init__(
        self,
        config: TuneConfig,
        run: RunFolder,
        client: VendorClient,
        tables: tuple[Table, Table, LabelSet],
        reporter: Reporter,
    ) -> None:
        self.config, self.run, self.client, self.reporter = config, run, client, reporter
        self.train_table, self.eval_table, self.label_set = tables
        self.plan = model_plan(config, len(self.train_table))
        self.secret = run_secret(run.private, config.noise_seed)
        self.bundle: Bundle = fetch_bundle(config, client, run.path / "bottom", num_labels=len(self.label_set))
        self.releaser: Releaser = make_releaser(config, self.bundle, run, self.secret)
        self.local: ResumableAdamW = local_optimizer(config, self.bundle)
        self.data = self._encode()
        check_calls(config, self.releaser, self.data.train_ids)
        self.order = secret_order(self.secret, len(self.data.keys))
        sample = [self.data.train_ids[i] for i in self.order[:NORM_TEXTS]]
        self.long_tokens = long_tokens(config, self.bundle, self.releaser, sample)
        self.card = self._card()
        self.seconds_training = 0.0
        self.examples_trained = 0
        self.started = time.monotonic()
        self._take_up_totals()

    def tune(self, stop: Callable[[], bool]) -> dict[str, Any]:
        alone = self._customer_alone()  # before the bottom trains
        protected, flips = self._protect()
        if self.config.split.bottom == "frozen":
            self._make_releases(protected)
        try:
            opened, utility, busy = self._carry_out(protected, flips, stop)
        finally:
            self._write_privacy()  # of a run that was stopped, too: what was released was released
        summary = {
            "utility": utility,
            "utility_metric": "accuracy",
            "customer_alone_utility": alone,
            "dominated": None if alone is None else utility <= alone,
            "eval_examples": len(self.data.eval_labels),
            "seconds": round(self._seconds(), 3),
            "examples_per_second": round(self.examples_trained / max(self.seconds_training, 1e-9), 2),
            "vendor_busy_seconds": round(busy, 3),
            "bytes_up": self.client.bytes_up,
            "bytes_down": self.client.bytes_down,
            "releases": self.releaser.ledger.totals().releases,
            "bottom_digest": self.bundle.digest,
            "trainable_parameters": opened.trainable_parameters,
            "total_parameters": opened.total_parameters,
            "strength": None if self.releaser.privatizer.strength is None else vars(self.releaser.privatizer.strength),
            "seeds": {"train": self.config.train.seed, "noise": self.config.noise_seed},
        }
        self.run.write_json("summary.json", summary)
        return summary

    def _encode(self) -> _Data:
        train_ids = encode(self.config, self.bundle, self.train_table.texts)
        return _Data(
            train_ids,
            self.label_set.encode(self.train_table.labels or []),
            encode(self.config, self.bundle, self.eval_table.texts),
            self.label_set.encode(self.eval_table.labels or []),
            [self.releaser.key(sequence) for sequence in train_ids],
        )

    def _card(self) -> JobCard:
        """The run's card; a run folder goes on only with the data that it began with."""
        facts = b"".join(self.data.keys) + repr(self.data.train_labels).encode()
        digest = hmac.new(self.secret, facts, hashlib.sha256).hexdigest()
        card = JobCard.load(self.run.private)
        if card is None:
            card = JobCard.new(self.label_set.names, digest)
            card.save(self.run.private)
        if card.data_digest != digest:
            raise PrivacyError(f"the training data has changed since run {self.run.path} began; name a new run folder")
        return card

    def _protect(self) -> tuple[list[int], Tensor | None]:
        protected, flips = protect_labels(
            self.data.train_labels,
            self.data.keys,
            num_classes=len(self.label_set),
            config=self.config,
            secret=self.secret,
            memo=self.run.private / "labels.safetensors",
        )
        if self.releaser.contributing is None:
            fitted = contributing_tokens(
                self.config,
                self.data.train_ids,
                protected,
                num_classes=len(self.label_set),
                vocab_size=len(self.bundle.tokenizer),
            )
            if fitted is not None:
                atomic_write_bytes(self.run.private / "contributing.safetensors", save(fitted.state()))
            self.releaser.contributing = fitted
        return protected, flips

    def _make_releases(self, protected: Sequence[int]) -> None:
        self.reporter.phase("privatize", len(set(self.data.keys)))
        self.releaser.prepare(self.data.train_ids, protected, part=TRAIN, progress=self.reporter.advance)

    def _carry_out(
        self, protected: list[int], flips: Tensor | None, stop: Callable[[], bool]
    ) -> tuple[pb.OpenJobReply, float, float]:
        """Trains, evaluates and closes the job; a vendor that went back to a checkpoint is followed there.

        Returns:
            What the vendor said at opening, the utility, and the seconds that the vendor was busy.
        """
        for attempt in range(MAX_REOPENINGS):
            opened = self._open()
            columns = output_size(self.config, self.bundle, num_labels=len(self.label_set))
            job = RemoteJob(self.client, opened.job, next_seq=opened.next_seq, output_size=columns)
            try:
                self._train(self._trainer(job, protected, flips), opened, stop)
                busy = self.client.call("Status", pb.StatusRequest(job=job.job)).busy_seconds
                utility = self._evaluate(job)
                job.close()
                return opened, utility, busy
            except JobRewoundError:
                if attempt + 1 == MAX_REOPENINGS:
                    raise
        raise AssertionError("unreachable")

    def _train(self, trainer: Trainer, opened: pb.OpenJobReply, stop: Callable[[], bool]) -> None:
        trainer.resume_at(opened.step)
        if self.config.split.bottom == "frozen":
            self._upload(trainer.job, opened.uploaded_rows)
        self.reporter.phase("train", trainer.total_steps)
        started = time.monotonic()
        try:
            with self._own_threads():
                trainer.run(on_step=self._on_step, stop=stop)
            trainer.job.settle()
        finally:
            self.seconds_training += time.monotonic() - started

    @contextlib.contextmanager
    def _own_threads(self) -> Iterator[None]:
        """With a frozen bottom the loop only computes losses: one thread is enough, the cores are the vendor's."""
        before = torch.get_num_threads()
        if self.config.split.bottom == "frozen":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _open(self) -> pb.OpenJobReply:
        steps = checkpoint_steps(self._checkpoints())
        spec = job_spec(self.config, self.releaser, self.plan, num_labels=len(self.label_set))
        request = pb.OpenJobRequest(spec=spec, key=self.card.key, customer_checkpoints=steps)
        opened: pb.OpenJobReply = self.client.call("OpenJob", request)
        self.card = replace(self.card, job=opened.job)
        self.card.save(self.run.private)
        return opened

    def _trainer(self, job: RemoteJob, protected: list[int], flips: Tensor | None) -> Trainer:
        train = self.config.train
        position = {key: row for row, key in enumerate(self.releaser.outbox.keys(TRAIN))}
        frozen = self.config.split.bottom == "frozen"
        return Trainer(
            job,
            releaser=self.releaser,
            examples=Examples(
                token_ids=self.data.train_ids,
                labels=protected,
                rows=[position[key] for key in self.data.keys] if frozen else None,
                order=self.order,
            ),
            schedule=Schedule(
                epochs=train.epochs,
                batch_size=train.batch_size,
                micro_batches=train.micro_batches,
                learning_rate=train.learning_rate,
                warmup_fraction=train.warmup_fraction,
                seed=train.seed,
                checkpoint_every=train.checkpoint_every,
            ),
            flip_matrix=flips,
            head=self.bundle.head,
            local=self.local,
            checkpoints=self._checkpoints(),
            keep_releases=self.config.privacy.keep_releases,
            poisson=PoissonBatches(self.plan, self.secret) if self.plan else None,
        )

    def _upload(self, job: RemoteJob, uploaded_rows: int) -> None:
        """Sends the releases that the vendor does not have, counting each before its first byte leaves."""
        keys = self.releaser.outbox.keys(TRAIN)
        self.reporter.phase("upload", len(keys))

        row = 0
        for released in self.releaser.outbox.shards(TRAIN):
            first, row = row, row + len(released.lengths)
            if first >= uploaded_rows:
                self.releaser.sent(keys[first:row], released.lengths)
                frame = ragged(released.values, released.scales, released.lengths)
                self.client.upload([pb.UploadChunk(job=job.job, first_row=first, rows=frame)])
            self.reporter.advance(row)

    def _on_step(self, progress: Any) -> None:
        self.examples_trained += progress.examples
        totals = self.client.bytes_up + self.client.bytes_down
        self.reporter.step(progress, bytes_sent=totals, releases=self.releaser.num_releases)
        totals_so_far = {"bytes_up": self.client.bytes_up, "bytes_down": self.client.bytes_down}
        self.run.log(vars(progress) | totals_so_far | {"seconds": round(self._seconds(), 3)})

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _take_up_totals(self) -> None:
        """A resumed run counts on from what its last step had counted."""
        lines = self.run.metrics()
        if lines:
            self.client.bytes_up += lines[-1]["bytes_up"]
            self.client.bytes_down += lines[-1]["bytes_down"]
            self.started -= lines[-1]["seconds"]

    def _customer_alone(self) -> float | None:
        if not self.config.train.customer_alone:
            return None
        self.reporter.phase("alone", 1)
        utility = customer_alone_utility(
            self.releaser.clean,
            self.data.train_ids,
            self.data.train_labels,
            self.data.eval_ids,
            self.data.eval_labels,
            num_classes=len(self.label_set),
            seed=self.config.train.seed,
        )
        self.reporter.advance(1)
        return utility

    def _evaluate(self, job: RemoteJob) -> float:
        self.reporter.phase("evaluate", len(self.data.eval_ids))
        logits = predict_logits(
            job, self.releaser, self.bundle.head, self.data.eval_ids, part=INFERENCE, progress=self.reporter.advance
        )
        atomic_write_bytes(self.run.private / "answers.safetensors", save({"logits": logits.contiguous()}))
        return accuracy(logits, torch.tensor(self.data.eval_labels))

    def _write_privacy(self) -> None:
        totals = self.releaser.ledger.totals()
        classes = len(self.label_set)
        finished = model_statement(self.plan, seeded=self.config.noise_seed is not None)
        content = statement(
            self.config,
            self.releaser.privatizer,
            totals,
            finished_model=finished,
            long_tokens=self.long_tokens,
            num_classes=classes,
        )
        self.run.write_json("privacy.json", content)

    def _checkpoints(self) -> Path:
        folder = self.run.private / "checkpoints"
        folder.mkdir(exist_ok=True)
        return folder
