"""The vendor's work on one machine: one base model in memory, many jobs, plain method calls, no sockets.

Everything here runs in one thread; the gRPC edge (`service.py`) puts calls in order and hands them over.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from veiltune.errors import ProtocolError, StorageError, VendorRefusedError
from veiltune.models.adapters import save_adapter
from veiltune.models.bundle import write_bundle
from veiltune.models.families import family_of
from veiltune.models.loading import BaseModel, classifier_model
from veiltune.models.split import split_head, split_model
from veiltune.vendor.jobs import JobStore
from veiltune.vendor.slots import Slot
from veiltune.vendor.store import BlobStore
from veiltune.vendor.upload import Upload
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import PROTOCOL, WIRE_DTYPES

METHODS = ("lora", "bitfit", "adapter", "none")
MAX_LABELS = 10_000


class JobNotOpenError(ProtocolError):
    """A call that trains, for a job that is finished or that this process has not opened."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one tenant may ask for."""

    max_jobs: int = 4
    max_cut_layer: int | None = None  # None: any; each block disclosed is one the customer can copy
    max_tokens: int = 512
    max_rows: int = 1_000_000
    norm_bound: float = 1e6
    gradient_norm_bound: float = 1e4


@dataclass
class RunningJob:
    """A job in memory."""

    tenant: str
    slot: Slot
    upload: Upload
    finished: bool  # here for predictions only


class LocalEngine:
    """Jobs on one shared base model, in this process."""

    def __init__(self, base: BaseModel, *, jobs: JobStore, blobs: BlobStore, limits: Limits) -> None:
        self.base, self.jobs, self.blobs, self.limits = base, jobs, blobs, limits
        self._running: dict[str, RunningJob] = {}

    def open_job(self, tenant: str, request: pb.OpenJobRequest) -> pb.OpenJobReply:
        """Creates a job or takes it up at the latest step that both parties can resume from."""
        spec = request.spec
        check_spec(spec, self.base, self.limits)
        if not 16 <= len(request.key) <= 64:
            raise ProtocolError(f"the job key must have 16 to 64 characters, got {len(request.key)}")
        job = self.jobs.open(
            tenant=tenant,
            key=request.key,
            spec=spec.SerializeToString(deterministic=True),
            base_digest=self.base.digest,
            max_jobs=self.limits.max_jobs,
        )
        if job.state == "ERASED":
            raise VendorRefusedError("the job was erased; start a new run")
        known = self._load(job.id, tenant, spec, finished=False)
        self._rewind(job.id, known.slot, set(request.customer_checkpoints))
        trainable, total = known.slot.num_parameters
        return pb.OpenJobReply(
            job=job.id,
            step=known.slot.step,
            next_seq=self.jobs.next_seq(job.id),
            uploaded_rows=len(known.upload),
            trainable_parameters=trainable,
            total_parameters=total,
            base_digest=self.base.digest,
        )

    def serves(self, tenant: str, job_id: str) -> bool:
        """Whether the tenant's job is in memory; cheap, and safe from any thread."""
        known = self._running.get(job_id)
        return known is not None and known.tenant == tenant

    def running(self, tenant: str, job_id: str) -> RunningJob:
        """The tenant's job in training.

        Raises:
            JobNotOpenError: If it is finished.
        """
        job = self.loaded(tenant, job_id)
        if job.finished:
            raise JobNotOpenError("the job is finished; open it again")
        return job

    def loaded(self, tenant: str, job_id: str) -> RunningJob:
        """The tenant's job, finished or not; one that this process has not served yet stands at its last checkpoint."""
        if self.serves(tenant, job_id):
            return self._running[job_id]
        job = self.jobs.get(tenant=tenant, job_id=job_id)
        if job.state == "ERASED":
            raise VendorRefusedError("the job was erased")
        known = self._load(job_id, tenant, pb.JobSpec.FromString(job.spec), finished=job.state == "FINISHED")
        steps = self.jobs.checkpoints(job_id)
        if steps:
            known.slot.restore(self.blobs.get(_checkpoint_name(job_id, steps[-1])))
        return known

    def forget(self, job_id: str) -> None:
        """Drops a job from memory, so that the next call finds it at its last checkpoint."""
        self._running.pop(job_id, None)

    def save(self, job_id: str, slot: Slot) -> int:
        """Writes a checkpoint of the current step, then records it, then drops the oldest."""
        self.blobs.put(_checkpoint_name(job_id, slot.step), slot.state())
        for forgotten in self.jobs.record_checkpoint(job_id, slot.step):
            self.blobs.delete(_checkpoint_name(job_id, forgotten))
        return slot.step

    def close(self, tenant: str, job_id: str, slot: Slot, *, erase: bool) -> str:
        """Ends a job. The upload goes in any case; the trained adapter is exported, or erased with the rest."""
        if not erase:
            self.save(job_id, slot)
            self._export(job_id, slot)
        state = self.jobs.finish(tenant=tenant, job_id=job_id, erase=erase)
        self.blobs.delete(f"jobs/{job_id}" if erase else f"jobs/{job_id}/upload")
        self.forget(job_id)
        return state

    def _export(self, job_id: str, slot: Slot) -> None:
        try:
            save_adapter(slot.top, Path(self.blobs.path(f"jobs/{job_id}/adapter")))
        except OSError as error:
            raise StorageError(f"cannot write the adapter: {error.strerror or error}") from error

    def write_bottom(self, request: pb.GetBottomRequest, folder: Path) -> str:
        """Writes the bundle that a customer asked for; returns its digest."""
        self._check_cut(request.cut_layer)
        if request.with_head:
            _check("num_labels", request.num_labels, 2, MAX_LABELS)
        _check_name("cut_embeddings", request.cut_embeddings or "word", ("word", "block"))
        num_labels = request.num_labels if request.with_head else 2  # a head that stays here and is dropped
        model = classifier_model(self.base, num_labels=num_labels, seed=request.seed)
        bottom, top = split_model(
            model, cut_layer=request.cut_layer, cut_embeddings=request.cut_embeddings or "word", share_weights=True
        )
        head = split_head(top)[1] if request.with_head else None
        return write_bundle(
            folder, bottom, self.base.tokenizer, head=head, base_name=self.base.name, base_digest=self.base.digest
        )

    def bottom_files(self, request: pb.GetBottomRequest) -> list[tuple[str, bytes]]:
        """The bundle's files by name."""
        with tempfile.TemporaryDirectory(prefix="veiltune-bundle-") as folder:
            root = Path(folder) / "bundle"
            self.write_bottom(request, root)
            return [(path.name, path.read_bytes()) for path in sorted(root.iterdir())]

    def _load(self, job_id: str, tenant: str, spec: pb.JobSpec, *, finished: bool) -> RunningJob:
        if job_id not in self._running:
            self._make_room(tenant)
            upload = Upload(job_id, jobs=self.jobs, blobs=self.blobs)
            self._running[job_id] = RunningJob(tenant, Slot(self.base, spec), upload, finished)
        self._running[job_id].finished = finished
        return self._running[job_id]

    def _make_room(self, tenant: str) -> None:
        """Drops the tenant's finished jobs that came first, so that he has no more in memory than he may have open."""
        finished = [job_id for job_id, job in self._running.items() if job.tenant == tenant and job.finished]
        for job_id in finished[: max(0, len(finished) - self.limits.max_jobs + 1)]:
            self.forget(job_id)

    def _rewind(self, job_id: str, slot: Slot, customer: set[int]) -> None:
        common = customer & set(self.jobs.checkpoints(job_id))
        step = max(common, default=0)
        for later in self.jobs.rewind(job_id, step):
            self.blobs.delete(_checkpoint_name(job_id, later))
        slot.restore(self.blobs.get(_checkpoint_name(job_id, step)) if common else None)

    def _check_cut(self, cut_layer: int) -> None:
        limit = self.limits.max_cut_layer
        if limit is not None and cut_layer > limit:
            raise VendorRefusedError(
                f"this vendor discloses at most {limit} blocks, cut_layer {cut_layer} was asked for"
            )


def check_spec(spec: pb.JobSpec, base: BaseModel, limits: Limits) -> None:
    """Refuses a job that this build, this model or this vendor's limits cannot serve.

    Raises:
        ProtocolError: Another protocol, or a field out of range.
        VendorRefusedError: More than the vendor's limits allow.
    """
    if spec.protocol != PROTOCOL:
        raise ProtocolError(f"peer speaks protocol {spec.protocol}, this build speaks {PROTOCOL}")
    blocks = int(getattr(base.model.config, "num_hidden_layers", 0))
    _check("cut_layer", spec.cut_layer, 0, blocks)
    _check("num_labels", spec.num_labels, 2, MAX_LABELS)
    _check("rank", spec.rank, 1, 1024)
    _check("adapter_size", spec.adapter_size, 1, 4096)
    _check("max_tokens", spec.max_tokens, 1, limits.max_tokens)
    _check("dropout", spec.dropout, 0.0, 0.9)
    _check("weight_decay", spec.weight_decay, 0.0, 10.0)
    _check("alpha", spec.alpha, 0.0, 1e4)
    _check("clip_norm", spec.clip_norm, 0.0, 1e6)
    if spec.clip_norm:
        _check("noise_multiplier", spec.noise_multiplier, 1e-3, 1e6)
        _check("expected_batch_size", spec.expected_batch_size, 1e-3, 1e9)
        if spec.head != "vendor" or not spec.frozen_bottom or spec.method == "none":
            raise ProtocolError("DP covers the vendor's part only: it needs head vendor, a frozen bottom and a method")
    _check("norm_bound", spec.norm_bound, 0.0, limits.norm_bound)
    _check_name("cut_embeddings", spec.cut_embeddings, ("word", "block"))
    _check_name("head", spec.head, ("vendor", "customer"))
    _check_name("method", spec.method, METHODS)
    _check_name("precision", spec.precision, ("fp32", "bf16"))
    if spec.wire_dtype not in WIRE_DTYPES.values():
        raise ProtocolError(f"wire_dtype {spec.wire_dtype} is unknown; expected one of {', '.join(WIRE_DTYPES)}")
    if limits.max_cut_layer is not None and spec.cut_layer > limits.max_cut_layer:
        raise VendorRefusedError(
            f"this vendor discloses at most {limits.max_cut_layer} blocks, cut_layer {spec.cut_layer} was asked for"
        )
    family_of(base.model.config)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ProtocolError(f"{name} must be in [{low}, {high}], got {value}")


def _check_name(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ProtocolError(f"{name} must be one of {', '.join(known)}, got {value[:32]!r}")


def _checkpoint_name(job_id: str, step: int) -> str:
    return f"jobs/{job_id}/checkpoints/{step:08d}.safetensors"
