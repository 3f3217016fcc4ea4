"""The vendor seen from the customer: a channel, a job with numbered calls, and one autograd function.

Calls are sent ahead and awaited later, so that both parties work at the same time. A call that got no answer is sent
again byte for byte; the vendor answers a repeat from memory, so nothing is ever done twice.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import torch
from torch import Tensor

from veiltune.errors import ConfigError, ProtocolError, VendorError, VendorRefusedError, VendorUnreachableError
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire import veiltune_pb2_grpc as rpc
from veiltune.wire.codec import MAX_FRAME_BYTES, decode_tensor, encode_raw, encode_tensor
from veiltune.wire.credentials import check_credentials

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
T = TypeVar("T")
_NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_BROKEN_FRAME = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.OUT_OF_RANGE)


class JobRewoundError(VendorError):
    """The vendor came back at an earlier step: open the job again and go on from the last common checkpoint."""


class VendorClient:
    """A connection to one vendor; counts what crosses it."""

    def __init__(
        self, address: str, *, credentials: Path | None, plaintext: bool = False, timeout_seconds: float = 60.0
    ) -> None:
        self.address, self.timeout_seconds = address, timeout_seconds
        self.bytes_up = self.bytes_down = 0
        self._channel = _open_channel(address, credentials=credentials, plaintext=plaintext)
        self.stub: Any = rpc.VendorStub(self._channel)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def call(self, method: str, request: Any) -> Any:
        """One call, awaited; repeated while there is no answer, until the timeout."""
        return self.send(method, request).result()

    def send(self, method: str, request: Any) -> PendingCall:
        """One call, sent; ask the result for the answer."""
        return PendingCall(self, method, request)

    def get_bottom(self, request: pb.GetBottomRequest, folder: Path) -> None:
        """Downloads a bottom bundle into a folder; nothing in it is read before its digest is checked."""

        def download() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with _as_our_errors(self):
                self._receive_files(request, folder)

        _until_answered(download, self.timeout_seconds)

    def _receive_files(self, request: pb.GetBottomRequest, folder: Path) -> None:
        for chunk in self.stub.GetBottom(request, timeout=self.timeout_seconds):
            if Path(chunk.name).name != chunk.name or chunk.name.startswith("."):
                raise ProtocolError("the vendor sent a bundle file whose name is not a plain file name")
            self.bytes_down += chunk.ByteSize()
            with (folder / chunk.name).open("ab") as file:
                file.write(chunk.data)

    def upload(self, chunks: Sequence[pb.UploadChunk]) -> int:
        """Streams pieces of an upload; returns the rows that the vendor has. Sent again while there is no answer."""

        def stream() -> int:
            self.bytes_up += sum(chunk.ByteSize() for chunk in chunks)
            with _as_our_errors(self):
                return int(self.stub.Upload(iter(chunks), timeout=self.timeout_seconds).uploaded_rows)

        return _until_answered(stream, self.timeout_seconds)


def _until_answered(attempt: Callable[[], T], timeout_seconds: float, *, retry: Callable[[], None] = lambda: None) -> T:
    """Tries, with growing pauses, until there is an answer or the time is up."""
    deadline, pause = time.monotonic() + timeout_seconds, 0.1
    while True:
        try:
            return attempt()
        except VendorUnreachableError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
        retry()


class PendingCall:
    """A call under way."""

    def __init__(self, client: VendorClient, method: str, request: Any) -> None:
        self._client, self._request = client, request
        self._method = getattr(client.stub, method)
        self._future = self._send()

    def result(self) -> Any:
        """Awaits the answer; a call without one is sent again, the same bytes, with a growing pause.

        Raises:
            VendorUnreachableError: No answer within the timeout.
            VendorRefusedError: The vendor refused; its cause is the message.
            ProtocolError: The vendor found the frame malformed.
            JobRewoundError: The vendor stands at an earlier step than the frame.
        """

        def attempt() -> Any:
            with _as_our_errors(self._client):
                return self._future.result()

        def retry() -> None:
            self._future = self._send()

        reply = _until_answered(attempt, self._client.timeout_seconds, retry=retry)
        self._client.bytes_down += reply.ByteSize()
        return reply

    def done(self) -> bool:
        """Whether an answer or a failure has come."""
        return bool(self._future.done())

    def _send(self) -> Any:
        self._client.bytes_up += self._request.ByteSize()
        return self._method.future(self._request, timeout=self._client.timeout_seconds)


class RemoteJob:
    """One job at the vendor: every call that changes it gets the next number.

    Args:
        client: The connection.
        job: The vendor's name of the job.
        next_seq: The number of the next call.
        output_size: Columns that outputs must have: classes, or the hidden size where the head is the customer's.
    """

    def __init__(self, client: VendorClient, job: str, *, next_seq: int, output_size: int) -> None:
        self.client, self.job, self.output_size = client, job, output_size
        self._next_seq = next_seq
        self._unconfirmed: list[PendingCall] = []

    def send_forward(
        self, *, step: int, micro_batch: int, rows: Sequence[int] | None = None, released: pb.Ragged | None = None
    ) -> PendingForward:
        """Sends a forward pass over uploaded rows or over released representations."""
        request = pb.ForwardRequest(job=self.job, seq=self._seq(), step=step, micro_batch=micro_batch)
        if released is not None:
            request.representations.CopyFrom(released)
        else:
            request.rows.index.extend(rows or [])
        size = len(request.rows.index) or len(request.representations.lengths)
        call = self.client.send("Forward", request)
        return PendingForward(self, call, step=step, micro_batch=micro_batch, size=size)

    def send_backward(self, gradients: Tensor, *, step: int, micro_batch: int) -> PendingCall:
        """Sends the (B, C) gradients of a micro-batch's outputs."""
        request = pb.BackwardRequest(
            job=self.job,
            seq=self._seq(),
            step=step,
            micro_batch=micro_batch,
            output_gradients=encode_tensor(gradients),
        )
        return self.client.send("Backward", request)

    def confirm_later(self, call: PendingCall) -> None:
        """Keeps a call whose answer holds nothing that is needed now; `settle` awaits it."""
        self._unconfirmed.append(call)

    def send_optim_step(self, *, step: int, learning_rate: float) -> None:
        """Sends the update of the vendor's parameters; `settle` awaits it."""
        request = pb.OptimStepRequest(job=self.job, seq=self._seq(), step=step, learning_rate=learning_rate)
        self.confirm_later(self.client.send("OptimStep", request))

    def settle(self, *, wait: bool = True) -> None:
        """Takes the confirmations that have come; with `wait`, awaits the others too."""
        while self._unconfirmed and (wait or self._unconfirmed[0].done()):
            self._unconfirmed.pop(0).result()

    def save(self, step: int) -> None:
        """Has the vendor write a checkpoint."""
        self.settle()
        self.client.call("Save", pb.SaveRequest(job=self.job, seq=self._seq(), step=step))

    def close(self, *, erase: bool = False) -> None:
        """Ends the job; the vendor drops the upload and, with `erase`, everything else."""
        self.settle()
        self.client.call("Close", pb.CloseRequest(job=self.job, seq=self._seq(), erase=erase))

    def predict(self, released: pb.Ragged) -> Tensor:
        """(B, C) outputs for released representations, without training."""
        reply = self.client.call("Predict", pb.PredictRequest(job=self.job, representations=released))
        return decode_tensor(reply.outputs, expected=(len(released.lengths), self.output_size))

    def _seq(self) -> int:
        self._next_seq += 1
        return self._next_seq - 1


class PendingForward:
    """A forward pass under way at the vendor."""

    def __init__(self, job: RemoteJob, call: PendingCall, *, step: int, micro_batch: int, size: int) -> None:
        self.job, self.call, self.step, self.micro_batch, self.size = job, call, step, micro_batch, size

    def outputs(self, representations: Tensor | None = None) -> Tensor:
        """Awaits the (B, C) outputs, as a tensor whose `backward` trains the vendor's part.

        Args:
            representations: The (N, H) tensor that was released, if the bottom trains: its gradient comes back from
                the vendor. None for a frozen bottom: then no gradient crosses the cut.
        """
        source = torch.zeros(0, requires_grad=True) if representations is None else representations
        outputs: Tensor = RemoteTop.apply(source, self)  # type: ignore[no-untyped-call]
        return outputs


class RemoteTop(torch.autograd.Function):
    """The vendor's part as one differentiable function: representations -> outputs.

    Forward awaits outputs, backward sends their gradient. With a trainable bottom it awaits the cut gradient; with a
    frozen one it returns at once and the answer is settled later.

    Source: split learning, Gupta and Raskar 2018, arXiv:1810.06060; SAP, arXiv:2312.15603.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, pending: PendingForward) -> Tensor:
        """Awaits the vendor's outputs (B, C)."""
        ctx.pending, ctx.source_shape = pending, source.shape
        return decode_tensor(pending.call.result().outputs, expected=(pending.size, pending.job.output_size))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        """Sends the output gradients; returns the cut gradients (N, H) if the bottom trains."""
        pending: PendingForward = ctx.pending
        call = pending.job.send_backward(gradients[0], step=pending.step, micro_batch=pending.micro_batch)
        if ctx.source_shape[0] == 0:
            pending.job.confirm_later(call)
            return None, None
        cut = decode_tensor(call.result().cut_gradients, expected=tuple(ctx.source_shape))
        return cut, None


def ragged(values: Tensor, scales: Tensor | None, lengths: Sequence[int]) -> pb.Ragged:
    """The frame of released token vectors in the wire's dtype; the same tensors give the same bytes."""
    return pb.Ragged(values=encode_raw(values, scales), lengths=list(lengths))


def _open_channel(address: str, *, credentials: Path | None, plaintext: bool) -> Any:
    options = [
        ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
        ("grpc.max_send_message_length", MAX_FRAME_BYTES),
        ("grpc.enable_retries", 0),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]
    if plaintext:
        if address.rpartition(":")[0] not in LOOPBACK_HOSTS:
            raise ConfigError(f"plaintext is possible only on loopback, not to {address!r}; use credentials")
        return grpc.insecure_channel(address, options=options)
    if credentials is None:
        raise ConfigError(
            "vendor.credentials must name the folder that the vendor gave you (tenant.key, tenant.crt, ca.crt)"
        )
    check_credentials(credentials, name="tenant")
    secure = grpc.ssl_channel_credentials(
        root_certificates=(credentials / "ca.crt").read_bytes(),
        private_key=(credentials / "tenant.key").read_bytes(),
        certificate_chain=(credentials / "tenant.crt").read_bytes(),
    )
    return grpc.secure_channel(address, secure, options=options)


class _as_our_errors:
    """Turns gRPC statuses into our exceptions, with the vendor's one-line cause."""

    def __init__(self, client: VendorClient) -> None:
        self._address = client.address

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, grpc.RpcError):
            return
        code, details = error.code(), _one_line(error.details())
        if "CERTIFICATE_VERIFY_FAILED" in details:
            raise VendorRefusedError(
                f"the certificate of the vendor at {self._address} is not signed by the ca.crt in your credentials"
            ) from None
        if code in _NO_ANSWER:
            raise VendorUnreachableError(f"no answer from the vendor at {self._address}: {details}") from None
        if code == grpc.StatusCode.ABORTED:
            raise JobRewoundError(details) from None
        if code in _BROKEN_FRAME:
            raise ProtocolError(f"the vendor refused the frame: {details}") from None
        raise VendorRefusedError(f"the vendor refused ({code.name.lower()}): {details}") from None


def _one_line(details: str | None) -> str:
    return " ".join((details or "no cause given").split())[:300]
