"""A run as its vendor saw it: the releases in the outbox, and beside them, for scoring only, the truth."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from veiltune.config import TuneConfig, load_config
from veiltune.customer.batching import epoch_batches, micro_batches, secret_order
from veiltune.customer.opening import JobCard, encode, make_releaser
from veiltune.customer.outbox import Released
from veiltune.customer.releasing import Releaser
from veiltune.customer.session import read_tables
from veiltune.data.tables import LabelSet, Table
from veiltune.errors import InputError
from veiltune.models.bundle import Bundle, read_bundle
from veiltune.runs import RunFolder


@dataclass(frozen=True)
class AuditedRun:
    """A run folder, opened for reading."""

    run: RunFolder
    config: TuneConfig
    bundle: Bundle
    releaser: Releaser
    table: Table
    labels: LabelSet
    token_ids: list[list[int]]
    keys: list[bytes]
    eval_keys: list[bytes]

    @property
    def frozen(self) -> bool:
        """Whether each text was released once."""
        return self.config.split.bottom == "frozen"

    @property
    def true_labels(self) -> list[int]:
        """The class of each text."""
        return self.labels.encode(self.table.labels or [])

    @property
    def sent_labels(self) -> list[int]:
        """The class of each text that the loss saw: randomised, or the true one if labels are disclosed."""
        kept = self.run.private / "labels.safetensors"
        return load_file(kept)["labels"].tolist() if kept.exists() else self.true_labels


@contextlib.contextmanager
def open_run(path: Path) -> Iterator[AuditedRun]:
    """Opens the folder of a run whose training table has been released.

    Raises:
        InputError: If the folder is no run, nothing was released, or the table or the tokenizer is not the one that
            the releases were made with.
    """
    run = RunFolder(path)
    if not run.config_path.exists():
        raise InputError(
            f"{path} is not a run folder (it has no config.toml); name the folder that `veiltune tune` wrote"
        )
    private = path / "private"
    if not (private / "ledger.sqlite").exists() or not any((private / "outbox").glob("*.safetensors")):
        raise InputError(f"{path} has no outbox: nothing was sent, or its private folder was removed")
    config = load_config(TuneConfig, run.config_path, [])
    if not (path / "summary.json").exists():
        raise InputError(f"{path} is not the folder of a finished run; finish it with the command that began it")
    bundle = read_bundle(path / "bottom", expected_digest=_pinned(path, config))
    table, evaluation, labels = read_tables(config)
    token_ids = encode(config, bundle, table.texts)
    releaser = make_releaser(config, bundle, run, (private / "secret").read_bytes())
    with contextlib.closing(releaser):
        keys = [releaser.key(ids) for ids in token_ids]
        eval_keys = [releaser.key(ids) for ids in encode(config, bundle, evaluation.texts)]
        audited = AuditedRun(run, config, bundle, releaser, table, labels, token_ids, keys, eval_keys)
        _check_released(audited)
        yield audited


def choose_texts(audited: AuditedRun, count: int, *, seed: int) -> list[int]:
    """Rows of at most `count` different texts of the training table, in random order."""
    first_rows = {key: row for row, key in reversed(list(enumerate(audited.keys)))}
    rows = sorted(first_rows.values())
    return random.Random(seed).sample(rows, min(count, len(rows)))


def observed_views(audited: AuditedRun, rows: Sequence[int]) -> list[list[Tensor]]:
    """Every (T, H) release of each text that the vendor received: one if the bottom is frozen."""
    if audited.frozen:
        outbox = audited.releaser.outbox
        return [[dequantized(outbox.get([audited.keys[row]]))] for row in rows]
    wanted = set(rows)
    views: dict[int, list[Tensor]] = {row: [] for row in rows}
    order = _step_order(audited)
    for step, micro_batch, released in audited.releaser.outbox.steps():
        pieces = dequantized(released).split(released.lengths)
        for row, piece in zip(order[step, micro_batch], pieces, strict=True):
            if row in wanted:
                views[row].append(piece)
    return [views[row] for row in rows]


def dequantized(released: Released) -> Tensor:
    """(N, H) float32: what the vendor computes with."""
    values = released.values.float()
    return values if released.scales is None else values * released.scales.float().reshape(-1, 1)


def _pinned(path: Path, config: TuneConfig) -> str | None:
    digest_file = path / "bottom.digest"
    return config.model.digest or (digest_file.read_text() if digest_file.exists() else None)


def _check_released(audited: AuditedRun) -> None:
    """The texts of the table must be those that were released: their keyed hashes are in the ledger."""
    absent = sum(audited.releaser.ledger.num_releases(key) == 0 for key in set(audited.keys))
    if absent:
        raise InputError(
            f"{absent} of {len(set(audited.keys))} texts of {audited.config.data.train} were not released by"
            f" {audited.run.path}: the table or the tokenizer is not the run's, or the run has not sent all yet"
        )
    if JobCard.load(audited.run.private) is None:
        raise InputError(f"{audited.run.path} remembers no job; was its private folder changed?")
    if not audited.frozen and not audited.config.privacy.keep_releases:
        raise InputError(f"{audited.run.path} kept no releases of its trainable bottom (privacy.keep_releases = false)")


def _step_order(audited: AuditedRun) -> dict[tuple[int, int], list[int]]:
    """Rows of each (step, micro-batch) of a trainable bottom, as the trainer drew them."""
    train, found, step = audited.config.train, {}, 0
    lengths = [len(ids) for ids in audited.token_ids]
    order = secret_order((audited.run.private / "secret").read_bytes(), len(lengths))
    for epoch in range(train.epochs):
        for batch in epoch_batches(lengths, batch_size=train.batch_size, seed=train.seed, epoch=epoch, order=order):
            for number, part in enumerate(micro_batches(batch, train.micro_batches)):
                found[step, number] = part
            step += 1
    return found


def flat(texts: Sequence[Sequence[int]]) -> Tensor:
    """(N,) token ids of texts, one after the other."""
    return torch.tensor([token for ids in texts for token in ids])
