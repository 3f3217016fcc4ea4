"""The gRPC edge: who is calling, is the frame sound, whose turn is it; the engine does the work in its own thread.

A refusal is a gRPC status with a one-line cause and has changed nothing. Frames are never logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from veiltune.errors import InputError, ProtocolError, StorageError, VeiltuneError, VendorRefusedError
from veiltune.vendor.engine import JobNotOpenError, LocalEngine
from veiltune.vendor.jobs import CallRecord
from veiltune.vendor.sequencer import SeqGapError, Sequencer, UsedSeqError
from veiltune.vendor.slots import StepMismatchError
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire import veiltune_pb2_grpc as rpc
from veiltune.wire.codec import check_lengths, decode_raw, decode_tensor, encode_tensor

log = logging.getLogger("veiltune.vendor")
CHUNK_BYTES = 2**20
CLOSED_REMEMBERED = 64  # jobs whose last answer can be asked for again
LOOPBACK_TENANT = "loopback"

T = TypeVar("T")


_STATUS: list[tuple[type[Exception], grpc.StatusCode]] = [
    (UsedSeqError, grpc.StatusCode.ALREADY_EXISTS),
    (StepMismatchError, grpc.StatusCode.ABORTED),
    (JobNotOpenError, grpc.StatusCode.ABORTED),
    (SeqGapError, grpc.StatusCode.ABORTED),
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT),
    (VendorRefusedError, grpc.StatusCode.PERMISSION_DENIED),
    (StorageError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (VeiltuneError, grpc.StatusCode.FAILED_PRECONDITION),
]


class VendorService(rpc.VendorServicer):
    """Answers customers; see `veiltune.proto` for the calls."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._sequencers: dict[str, Sequencer[Any]] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()
        self._unrecorded: dict[str, list[CallRecord]] = {}

    async def OpenJob(self, request: pb.OpenJobRequest, context: Any) -> pb.OpenJobReply:
        """Creates or resumes a job."""

        async def work() -> pb.OpenJobReply:
            tenant = tenant_of(context)
            reply = await self._in_worker(lambda: self._engine.open_job(tenant, request))
            known = self._sequencers.get(reply.job)
            reply.next_seq = max(reply.next_seq, known.next_seq if known else 0)
            self._sequencers[reply.job] = Sequencer(reply.next_seq)
            self._closed.pop(reply.job, None)
            log.info("job %s of tenant %s: opened at step %d", reply.job, tenant, reply.step)
            return reply

        return await _answer(context, work)

    async def GetBottom(self, request: pb.GetBottomRequest, context: Any) -> AsyncIterator[pb.FileChunk]:
        """Streams the files of a bottom bundle."""
        files = await _answer(context, lambda: self._in_worker(lambda: self._engine.bottom_files(request)))
        for name, data in files:
            for start in range(0, max(len(data), 1), CHUNK_BYTES):
                yield pb.FileChunk(name=name, data=data[start : start + CHUNK_BYTES])

    async def Upload(self, chunks: AsyncIterator[pb.UploadChunk], context: Any) -> pb.UploadReply:
        """Stores representations of a frozen bottom, piece by piece; each piece is kept even if a later one fails."""

        async def work() -> pb.UploadReply:
            tenant, stored = tenant_of(context), 0
            async for chunk in chunks:
                stored = await self._in_worker(lambda chunk=chunk: self._store_chunk(tenant, chunk))  # type: ignore[misc]
            return pb.UploadReply(uploaded_rows=stored)

        return await _answer(context, work)

    async def Forward(self, request: pb.ForwardRequest, context: Any) -> pb.ForwardReply:
        """Runs the vendor's part on a micro-batch and keeps its graph."""
        return await self._sequenced(context, "forward", request, lambda tenant: self._forward(tenant, request))

    async def Backward(self, request: pb.BackwardRequest, context: Any) -> pb.BackwardReply:
        """Takes output gradients; answers with cut gradients if the bottom trains."""
        return await self._sequenced(context, "backward", request, lambda tenant: self._backward(tenant, request))

    async def OptimStep(self, request: pb.OptimStepRequest, context: Any) -> pb.OptimStepReply:
        """Updates the vendor's parameters."""

        def work(tenant: str) -> pb.OptimStepReply:
            slot = self._engine.running(tenant, request.job).slot
            return pb.OptimStepReply(step=slot.optim_step(request.step, request.learning_rate))

        return await self._sequenced(context, "optim_step", request, work)

    async def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictReply:
        """Runs the vendor's part without dropout; changes nothing, so it needs no number."""

        async def work() -> pb.PredictReply:
            tenant = tenant_of(context)
            return await self._in_worker(lambda: self._predict(tenant, request))

        return await _answer(context, work)

    async def Save(self, request: pb.SaveRequest, context: Any) -> pb.SaveReply:
        """Writes a checkpoint that survives this process."""

        def work(tenant: str) -> pb.SaveReply:
            slot = self._engine.running(tenant, request.job).slot
            slot.check_step(request.step)
            return pb.SaveReply(step=self._engine.save(request.job, slot))

        return await self._sequenced(context, "save", request, work)

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        """Where a job stands."""

        async def work() -> pb.StatusReply:
            tenant = tenant_of(context)
            job = self._engine.jobs.get(tenant=tenant, job_id=request.job)
            running = await self._in_worker(lambda: self._engine.loaded(tenant, request.job))
            sequencer = self._sequencers.get(request.job)
            return pb.StatusReply(
                state=job.state,
                step=running.slot.step,
                next_seq=sequencer.next_seq if sequencer else self._engine.jobs.next_seq(request.job),
                uploaded_rows=len(running.upload),
                waiting_calls=sequencer.waiting if sequencer else 0,
                busy_seconds=running.slot.busy_seconds,
            )

        return await _answer(context, work)

    async def Close(self, request: pb.CloseRequest, context: Any) -> pb.CloseReply:
        """Finishes a job, or erases what it left."""

        def work(tenant: str) -> pb.CloseReply:
            slot = self._engine.running(tenant, request.job).slot
            state = self._engine.close(tenant, request.job, slot, erase=request.erase)
            log.info("job %s of tenant %s: %s", request.job, tenant, state.lower())
            return pb.CloseReply(state=state)

        reply = await self._sequenced(context, "close", request, work)
        self._retire(request.job)
        return reply

    def _retire(self, job_id: str) -> None:
        """Lets go of a closed job's answers but the last, and of the job that was closed long ago."""
        if job_id in self._sequencers:
            self._sequencers[job_id].keep_last()
            self._closed[job_id] = None
            self._closed.move_to_end(job_id)
        while len(self._closed) > CLOSED_REMEMBERED:
            self._sequencers.pop(self._closed.popitem(last=False)[0], None)

    def _store_chunk(self, tenant: str, chunk: pb.UploadChunk) -> int:
        job = self._engine.running(tenant, chunk.job)
        spec = job.slot.spec
        if not spec.frozen_bottom:
            raise ProtocolError("an upload is for a frozen bottom; this job declared an unfrozen one")
        lengths = check_lengths(chunk.rows, max_tokens=spec.max_tokens)
        if chunk.first_row + len(lengths) > self._engine.limits.max_rows:
            raise VendorRefusedError(f"an upload may have at most {self._engine.limits.max_rows} rows")
        self._checked_ragged(chunk.rows, spec)
        values, scales = decode_raw(chunk.rows.values, expected=(None, None))
        return job.upload.add(chunk.first_row, values, scales, lengths, _hash(chunk))

    def _forward(self, tenant: str, request: pb.ForwardRequest) -> pb.ForwardReply:
        job = self._engine.running(tenant, request.job)
        if request.WhichOneof("input") == "rows":
            values, lengths = job.upload.gather(list(request.rows.index))
        else:
            values, lengths = self._checked_ragged(request.representations, job.slot.spec)
        outputs = job.slot.forward(request.step, request.micro_batch, values, lengths)
        return pb.ForwardReply(outputs=encode_tensor(outputs))

    def _backward(self, tenant: str, request: pb.BackwardRequest) -> pb.BackwardReply:
        job = self._engine.running(tenant, request.job)
        gradients = decode_tensor(
            request.output_gradients,
            expected=(None, job.slot.output_size),
            norm_bound=self._engine.limits.gradient_norm_bound,
        )
        cut = job.slot.backward(request.step, request.micro_batch, gradients)
        if cut is None:
            return pb.BackwardReply()
        dtype = pb.DTYPE_FLOAT32 if job.slot.spec.wire_dtype == pb.DTYPE_FLOAT32 else pb.DTYPE_BFLOAT16
        return pb.BackwardReply(cut_gradients=encode_tensor(cut, dtype))

    def _predict(self, tenant: str, request: pb.PredictRequest) -> pb.PredictReply:
        slot = self._engine.loaded(tenant, request.job).slot
        outputs = slot.predict(*self._checked_ragged(request.representations, slot.spec))
        return pb.PredictReply(outputs=encode_tensor(outputs))

    def _checked_ragged(self, message: pb.Ragged, spec: pb.JobSpec) -> tuple[Any, list[int]]:
        lengths = check_lengths(message, max_tokens=spec.max_tokens)
        if message.values.dtype != spec.wire_dtype:
            raise ProtocolError(f"the job declared wire dtype {spec.wire_dtype}, the tensor has {message.values.dtype}")
        hidden = int(self._engine.base.model.config.hidden_size)
        return decode_tensor(message.values, expected=(None, hidden), norm_bound=spec.norm_bound), lengths

    async def _sequenced(self, context: Any, kind: str, request: Any, work: Callable[[str], T]) -> T:
        async def ordered() -> T:
            tenant = tenant_of(context)
            if not self._engine.serves(tenant, request.job):  # refuses strangers before they get a turn
                await self._in_worker(lambda: self._engine.loaded(tenant, request.job))
            payload_hash = _hash(request)

            def carry_out() -> T:
                reply = work(tenant)
                self._record(CallRecord(request.job, request.seq, kind, payload_hash))
                return reply

            sequencer = self._sequencers.get(request.job)
            if sequencer is None:
                raise JobNotOpenError("the vendor has come back since this job was opened; open the job again")
            reply: T = await sequencer.run(request.seq, payload_hash, lambda: self._in_worker(carry_out))
            return reply

        return await _answer(context, ordered)

    def _record(self, call: CallRecord) -> None:
        """Notes a call; passes, which change only memory, are noted with the update that they belong to."""
        self._unrecorded.setdefault(call.job_id, []).append(call)
        if call.kind in ("forward", "backward"):
            return
        try:
            self._engine.jobs.record_calls(self._unrecorded.pop(call.job_id))
        except StorageError:
            self._engine.forget(call.job_id)  # done but not recorded: never let a retry do it twice
            self._sequencers.pop(call.job_id, None)
            raise

    async def _in_worker(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)


def tenant_of(context: Any) -> str:
    """The tenant named in the client certificate; on a plaintext loopback port everyone is `loopback`."""
    facts = context.auth_context()
    if facts.get("x509_common_name"):
        return str(facts["x509_common_name"][0].decode())
    if facts.get("transport_security_type") != [b"insecure"]:
        raise VendorRefusedError("a client certificate is required; ask the vendor for one")
    return LOOPBACK_TENANT


async def _answer(context: Any, work: Callable[[], Awaitable[T]]) -> T:
    """Awaits the work; a refusal becomes a status with its one-line cause, a defect of ours becomes INTERNAL."""
    try:
        return await work()
    except VeiltuneError as error:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        log.warning("refused: %s", error)
        await context.abort(status, str(error))
    except Exception as error:
        log.error("internal error: %s", type(error).__name__)
        await context.abort(grpc.StatusCode.INTERNAL, f"the vendor failed with {type(error).__name__}; see its log")
    raise AssertionError("unreachable: abort raises")


def _hash(message: Message) -> bytes:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
