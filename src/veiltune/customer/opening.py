"""What a customer's command needs before it can work: the connection, the bottom model, the releaser, the job."""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from veiltune.config import TuneConfig
from veiltune.customer.batching import encode_texts, padded_length
from veiltune.customer.outbox import Outbox
from veiltune.customer.protection import LONG_NORM, long_token_share, privatizer_for, reference_norm
from veiltune.customer.releasing import Releaser
from veiltune.customer.remote import VendorClient
from veiltune.dp.plan import DPPlan
from veiltune.errors import ConfigError, DataError, PrivacyError
from veiltune.models.adapters import attach_peft, trainable_parameters
from veiltune.models.bundle import Bundle, read_bundle
from veiltune.models.families import longest_sequence
from veiltune.models.optim import ResumableAdamW
from veiltune.privatize.importance import ContributingTokens
from veiltune.privatize.release import ReleaseLedger
from veiltune.runs import RunFolder, atomic_write_bytes
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import MAX_PADDED_TOKENS, PROTOCOL, WIRE_DTYPES

MOST_LONG_TOKENS = 1 / 3
NORM_SLACK = 20.0  # the vendor refuses tokens longer than this many times what clean text plus noise should have


@dataclass(frozen=True)
class JobCard:
    """What a run folder remembers of its job at the vendor."""

    key: str  # drawn once, so that opening twice gives the same job
    labels: list[str]
    data_digest: str
    job: str = ""

    @classmethod
    def load(cls, private: Path) -> JobCard | None:
        """The card of a run folder, if the run has one."""
        path = private / "job.json"
        return cls(**json.loads(path.read_text())) if path.exists() else None

    @classmethod
    def new(cls, labels: Sequence[str], data_digest: str) -> JobCard:
        """A card for a run that starts."""
        return cls(key=secrets.token_hex(16), labels=list(labels), data_digest=data_digest)

    def save(self, private: Path) -> None:
        """Writes the card."""
        atomic_write_bytes(private / "job.json", json.dumps(self.__dict__).encode())


def connect(config: TuneConfig) -> VendorClient:
    """A client for the vendor of the config; nothing is sent yet."""
    vendor = config.vendor
    return VendorClient(
        vendor.address,
        credentials=Path(vendor.credentials) if vendor.credentials else None,
        plaintext=vendor.plaintext,
        timeout_seconds=vendor.timeout_seconds,
    )


def fetch_bundle(config: TuneConfig, client: VendorClient, folder: Path, *, num_labels: int) -> Bundle:
    """The bottom bundle of a run: downloaded once, or again to the same digest, which is checked before every use."""
    digest_file = folder.with_suffix(".digest")
    expected = config.model.digest or (digest_file.read_text() if digest_file.exists() else None)
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        client.get_bottom(
            pb.GetBottomRequest(
                cut_layer=config.split.cut_layer,
                cut_embeddings=config.split.cut_embeddings,
                num_labels=num_labels,
                with_head=config.split.head == "customer",
                seed=config.train.seed,
            ),
            partial,
        )
        bundle = read_bundle(partial, expected_digest=expected)
        atomic_write_bytes(digest_file, bundle.digest.encode())
        partial.rename(folder)
    return read_bundle(folder, expected_digest=config.model.digest or digest_file.read_text())


def make_releaser(config: TuneConfig, bundle: Bundle, run: RunFolder, secret: bytes) -> Releaser:
    """Bottom, mechanism, ledger and outbox of a run, with its contributing tokens once they are fitted."""
    connection = sqlite3.connect(run.private / "ledger.sqlite")
    connection.execute("PRAGMA journal_mode=WAL")  # one flush a transaction
    fitted = run.private / "contributing.safetensors"
    norm = reference_norm(bundle)
    return Releaser(
        bottom=bundle.bottom,
        privatizer=privatizer_for(config, dim=bundle.bottom.hidden_size, reference_norm=norm),
        contributing=ContributingTokens.from_state(load_file(fitted)) if fitted.exists() else None,
        ledger=ReleaseLedger(connection),
        outbox=Outbox(run.private / "outbox", connection),
        secret=secret,
        wire_dtype=WIRE_DTYPES[config.wire.dtype],
        reference_norm=norm,
        autocast=config.train.precision == "bf16",
    )


def encode(config: TuneConfig, bundle: Bundle, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as the config wants them.

    Raises:
        DataError: If one is longer than the model has positions for.
    """
    encoded = encode_texts(bundle.tokenizer, texts, max_length=config.data.max_length, pad_to=config.wire.pad_to)
    longest, room = max(map(len, encoded)), longest_sequence(bundle.bottom.config)
    if longest > room:
        raise DataError(f"a text has {longest} tokens, the model takes {room}; lower data.max_length or wire.pad_to")
    return encoded


def check_calls(config: TuneConfig, releaser: Releaser, token_ids: Sequence[Sequence[int]]) -> None:
    """Refuses micro-batches that the vendor could not take, before anything is sent.

    Raises:
        ConfigError: If the longest texts, in one call, pass the limit; says how many calls are enough.
    """
    train, longest = config.train, max(map(len, token_ids))
    room = MAX_PADDED_TOKENS if config.split.bottom == "frozen" else min(MAX_PADDED_TOKENS, releaser.tokens_per_frame)
    batch, fitting = min(train.batch_size, len(token_ids)), room // longest
    if not fitting:
        raise ConfigError(f"a text of {longest} tokens is more than one call can carry; lower data.max_length")
    largest = -(-batch // train.micro_batches)
    if largest > fitting:
        raise ConfigError(
            f"a batch in {train.micro_batches} micro_batches is up to {largest} texts of {longest} tokens, of which a "
            f"call takes {fitting}; set train.micro_batches = {-(-batch // fitting)}"
        )


def long_tokens(
    config: TuneConfig, bundle: Bundle, releaser: Releaser, token_ids: Sequence[Sequence[int]]
) -> float | None:
    """The share of own tokens with less than a third of the noise asked for; None without noise.

    Raises:
        PrivacyError: If the strength is relative to the public sentences' norm, and it is more than a third of them.
    """
    if releaser.privatizer.strength is None:
        return None
    share = long_token_share(
        releaser.clean,
        token_ids,
        special_ids=bundle.tokenizer.all_special_ids,
        reference_norm=releaser.reference_norm,
    )
    if config.privacy.eta is None and share > MOST_LONG_TOKENS:
        raise PrivacyError(
            f"the vendor's bottom makes {share:.0%} of your tokens more than {LONG_NORM:g} times as long as the public "
            "sentences that the noise is measured on: they would have less than a third of the noise asked for; use "
            "another model or cut_layer, or give the noise as privacy.eta"
        )
    return share


def local_optimizer(config: TuneConfig, bundle: Bundle) -> ResumableAdamW:
    """What trains at the customer: the bottom unless it is frozen, the head in the U-shape. Possibly nothing."""
    parts: dict[str, nn.Module] = {}
    bundle.bottom.requires_grad_(False)
    if config.split.bottom != "frozen":
        attach_peft(
            bundle.bottom,
            method=config.split.bottom,
            seed=config.train.seed,
            rank=config.train.rank,
            alpha=config.train.alpha,
            dropout=config.train.dropout,
            adapter_size=config.train.adapter_size,
        )
        parts["bottom"] = bundle.bottom
    if bundle.head is not None:
        attach_peft(bundle.head, method="none", seed=config.train.seed)  # trains the family's task head only
        parts["head"] = bundle.head
    parameters = {
        f"{part}.{name}": p for part, module in parts.items() for name, p in trainable_parameters(module).items()
    }
    return ResumableAdamW(parameters, weight_decay=config.train.weight_decay)


def output_size(config: TuneConfig, bundle: Bundle, *, num_labels: int) -> int:
    """Columns of what the vendor answers: classes, or the hidden size where the head is here."""
    return num_labels if config.split.head == "vendor" else bundle.bottom.hidden_size


def job_spec(config: TuneConfig, releaser: Releaser, plan: DPPlan | None, *, num_labels: int) -> pb.JobSpec:
    """What the vendor is told of the job: shapes, method, seeds; nothing of the data but the number of classes."""
    train, strength = config.train, releaser.privatizer.strength
    reference = releaser.reference_norm
    noise = 0.0 if strength is None else strength.noise_to_norm * reference
    return pb.JobSpec(
        protocol=PROTOCOL,
        cut_layer=config.split.cut_layer,
        cut_embeddings=config.split.cut_embeddings,
        head=config.split.head,
        num_labels=num_labels,
        frozen_bottom=config.split.bottom == "frozen",
        method=train.method,
        rank=train.rank,
        alpha=train.alpha,
        dropout=train.dropout,
        adapter_size=train.adapter_size,
        weight_decay=train.weight_decay,
        seed=train.seed,
        wire_dtype=WIRE_DTYPES[config.wire.dtype],
        norm_bound=NORM_SLACK * (reference + noise),
        max_tokens=padded_length(config.data.max_length, config.wire.pad_to),
        precision=train.precision,
        clip_norm=plan.clip_norm if plan else 0.0,
        noise_multiplier=plan.noise_multiplier if plan else 0.0,
        expected_batch_size=plan.expected_batch_size if plan else 0.0,
    )
