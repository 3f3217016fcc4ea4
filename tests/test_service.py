"""A hostile or clumsy peer against a real server: each bad frame gets one clear cause and changes nothing."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch

from parties import Vendor, open_job, running_vendor
from veiltune.config import VendorConfig, parse_config
from veiltune.customer.remote import JobRewoundError, RemoteJob, VendorClient, ragged
from veiltune.errors import ConfigError, ProtocolError, VendorRefusedError, VendorUnreachableError
from veiltune.vendor.server import serve
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import encode_tensor


@pytest.fixture
def vendor(tmp_path: Path, tiny_folder: Path) -> Iterator[Vendor]:
    with running_vendor(tmp_path / "vendor", tiny_folder, max_message_bytes=2**17) as running:
        yield running


@pytest.fixture
def job(vendor: Vendor) -> RemoteJob:
    return open_job(vendor.client())


def frame(tokens: int = 8, hidden: int = 32, value: float = 0.1, lengths: tuple[int, ...] = (5, 3)) -> pb.Ragged:
    return ragged(torch.full((tokens, hidden), value), None, lengths)


def state_of(vendor: Vendor, job: RemoteJob) -> dict[str, torch.Tensor]:
    return vendor.engine.running("loopback", job.job).slot.state()


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (frame(hidden=31), r"shape must be \['any', 32\], got \[8, 31\]"),
        (frame(value=float("nan")), "NaN or infinity"),
        (frame(value=1e6), "above the agreed bound"),
        (frame(lengths=(5, 4)), "add up to 9 tokens, the tensor has 8"),
        (frame(tokens=40, lengths=(40,)), r"lengths must be in \[1, 32\]"),
        (pb.Ragged(lengths=[1]), "add up to 1 tokens, the tensor has 0"),
        (pb.Ragged(values=encode_tensor(torch.zeros(8, 32), pb.DTYPE_BFLOAT16), lengths=[5, 3]), "declared wire dtype"),
    ],
)
def test_bad_representations_change_nothing(vendor: Vendor, job: RemoteJob, bad: pb.Ragged, cause: str) -> None:
    before = state_of(vendor, job)
    with pytest.raises(ProtocolError, match=cause):
        job.send_forward(step=0, micro_batch=0, released=bad).outputs()
    with pytest.raises(ProtocolError, match=cause):
        job.predict(bad)
    with pytest.raises(ProtocolError, match=cause):
        job.client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=bad)])
    status = job.client.call("Status", pb.StatusRequest(job=job.job))
    assert (status.step, status.next_seq, status.uploaded_rows) == (0, 0, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(vendor, job).items())


def test_an_oversized_message_is_refused(job: RemoteJob) -> None:
    with pytest.raises(VendorRefusedError, match="larger than max"):
        job.predict(frame(tokens=2000, lengths=(20,) * 100))


def test_bad_gradients_are_refused_and_the_right_ones_still_work(vendor: Vendor, job: RemoteJob) -> None:
    pending = job.send_forward(step=0, micro_batch=0, released=frame())
    outputs = pending.outputs()
    for bad, cause in (
        (torch.full((2, 2), float("inf")), "NaN or infinity"),
        (torch.full((2, 2), 1e9), "above the agreed bound"),
        (torch.zeros(3, 2), r"must have shape \[2, 2\], got \[3, 2\]"),
        (torch.zeros(2, 5), r"shape must be \['any', 2\], got \[2, 5\]"),
    ):
        request = pb.BackwardRequest(job=job.job, seq=1, step=0, micro_batch=0, output_gradients=encode_tensor(bad))
        with pytest.raises(ProtocolError, match=cause):
            job.client.call("Backward", request)
    outputs.sum().backward()
    job.send_optim_step(step=0, learning_rate=0.1)
    job.settle()
    assert vendor.engine.running("loopback", job.job).slot.step == 1


def test_backward_without_forward_and_update_with_open_graphs_are_refused(job: RemoteJob) -> None:
    gradients = encode_tensor(torch.zeros(2, 2))
    with pytest.raises(JobRewoundError, match="send Forward first"):
        job.client.call("Backward", pb.BackwardRequest(job=job.job, seq=0, output_gradients=gradients))
    job.send_forward(step=0, micro_batch=0, released=frame()).outputs()
    with pytest.raises(ProtocolError, match="still wait for their gradients"):
        job.client.call("OptimStep", pb.OptimStepRequest(job=job.job, seq=1, step=0, learning_rate=0.1))


def test_a_repeated_frame_is_answered_again_and_trains_once(vendor: Vendor, job: RemoteJob) -> None:
    forward = pb.ForwardRequest(job=job.job, seq=0, representations=frame())
    first, again = job.client.call("Forward", forward), job.client.call("Forward", forward)
    assert first == again
    backward = pb.BackwardRequest(job=job.job, seq=1, output_gradients=encode_tensor(torch.ones(2, 2)))
    step = pb.OptimStepRequest(job=job.job, seq=2, learning_rate=0.1)
    for request, method in ((backward, "Backward"), (step, "OptimStep")):
        job.client.call(method, request)
        after = state_of(vendor, job)
        job.client.call(method, request)
        assert all(torch.equal(after[name], tensor) for name, tensor in state_of(vendor, job).items())
    assert vendor.engine.running("loopback", job.job).slot.step == 1


def test_another_frame_under_a_used_number_is_refused(job: RemoteJob) -> None:
    job.client.call("Forward", pb.ForwardRequest(job=job.job, seq=0, representations=frame()))
    with pytest.raises(ProtocolError, match="seq 0 was used for another frame"):
        job.client.call("Forward", pb.ForwardRequest(job=job.job, seq=0, representations=frame(value=0.2)))


def test_frames_that_overtake_one_another_are_put_in_order(vendor: Vendor, job: RemoteJob) -> None:
    client = job.client
    backward = pb.BackwardRequest(job=job.job, seq=1, output_gradients=encode_tensor(torch.ones(2, 2)))
    early = client.send("Backward", backward)  # sent before the forward pass that it belongs to
    client.call("Forward", pb.ForwardRequest(job=job.job, seq=0, representations=frame()))
    early.result()
    assert client.call("Status", pb.StatusRequest(job=job.job)).next_seq == 2


def test_a_frame_for_another_step_tells_that_the_job_was_rewound(job: RemoteJob) -> None:
    with pytest.raises(JobRewoundError, match="the job is at step 0, the frame is for step 7"):
        job.send_forward(step=7, micro_batch=0, released=frame()).outputs()


def test_rows_beyond_the_upload_and_gaps_in_it_are_refused(job: RemoteJob) -> None:
    job.client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=frame())])
    with pytest.raises(ProtocolError, match="rows must be below 2, got 2"):
        job.send_forward(step=0, micro_batch=0, rows=[0, 2]).outputs()
    with pytest.raises(ProtocolError, match="the next row is 2, the piece starts at 5"):
        job.client.upload([pb.UploadChunk(job=job.job, first_row=5, rows=frame())])
    with pytest.raises(ProtocolError, match="stored already with other content"):
        job.client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=frame(value=0.3))])
    assert job.client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=frame())]) == 2  # the same again is fine


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"protocol": 2}, "peer speaks protocol 2, this build speaks 1"),
        ({"cut_layer": 5}, r"cut_layer must be in \[0, 4\], got 5"),
        ({"num_labels": 1}, r"num_labels must be in \[2, 10000\], got 1"),
        ({"method": "prefix"}, "method must be one of lora, bitfit, adapter, none, got 'prefix'"),
        ({"norm_bound": float("nan")}, "norm_bound must be in"),
        ({"dropout": 2.0}, "dropout must be in"),
        ({"wire_dtype": 9}, "wire_dtype 9 is unknown"),
        ({"max_tokens": 100_000}, "max_tokens must be in"),
    ],
)
def test_a_bad_spec_is_refused_and_opens_no_job(vendor: Vendor, changes: dict[str, object], cause: str) -> None:
    with pytest.raises(ProtocolError, match=cause):
        open_job(vendor.client(), **changes)
    assert not vendor.engine._running


def test_random_bytes_get_a_status_and_the_server_lives(vendor: Vendor, job: RemoteJob) -> None:
    channel = grpc.insecure_channel(vendor.address)
    garbage = channel.unary_unary("/veiltune.v1.Vendor/Forward", request_serializer=bytes, response_deserializer=bytes)
    for seed in range(20):
        noise = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(seed)).tolist()
        with pytest.raises(grpc.RpcError) as error:
            garbage(bytes(noise), timeout=10)
        assert error.value.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.PERMISSION_DENIED)
    channel.close()
    job.predict(frame())


def test_erasing_a_job_leaves_none_of_its_tensors(vendor: Vendor, job: RemoteJob) -> None:
    job.client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=frame())])
    job.save(0)
    job.close(erase=True)
    assert not list((vendor.state / "blobs").rglob("*.safetensors"))
    with pytest.raises(VendorRefusedError, match="erased"):
        job.predict(frame())


def test_a_full_disk_at_the_vendor_is_one_line_and_the_upload_can_go_on(
    vendor: Vendor, job: RemoteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    piece = pb.UploadChunk(job=job.job, first_row=0, rows=frame())
    with monkeypatch.context() as patch:
        patch.setattr("veiltune.vendor.store._flush_to_device", full)
        with pytest.raises(VendorRefusedError, match="No space left on device"):
            job.client.upload([piece])
    assert job.client.upload([piece]) == 2


class TestMutualTls:
    """Who gets in, and by which protocol."""

    @pytest.fixture
    def vendor(self, tmp_path: Path, tiny_folder: Path) -> Iterator[Vendor]:
        with running_vendor(tmp_path / "vendor", tiny_folder, tenants=("acme", "other")) as running:
            yield running

    def test_tls_1_3_is_negotiated_and_a_client_certificate_demanded(self, vendor: Vendor) -> None:
        folder = vendor.state / "tenants" / "acme"
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        context.load_cert_chain(folder / "tenant.crt", folder / "tenant.key")
        context.set_alpn_protocols(["h2"])
        host, port = vendor.address.split(":")
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            assert secure.version() == "TLSv1.3"

    def test_a_tenant_cannot_touch_anothers_job(self, vendor: Vendor) -> None:
        job = open_job(vendor.client("acme"))
        intruder = RemoteJob(vendor.client("other"), job.job, next_seq=0, output_size=2)
        for attempt in (
            lambda: intruder.predict(frame()),
            lambda: intruder.send_forward(step=0, micro_batch=0, released=frame()).outputs(),
            lambda: intruder.client.upload([pb.UploadChunk(job=job.job, first_row=0, rows=frame())]),
            lambda: intruder.close(erase=True),
        ):
            with pytest.raises(VendorRefusedError, match="no such job for this tenant"):
                attempt()

    def test_a_certificate_of_another_authority_is_refused(self, vendor: Vendor, tmp_path: Path) -> None:
        from veiltune.vendor.pki import create_authority, issue_tenant

        create_authority(tmp_path / "foreign")
        folder = issue_tenant(tmp_path / "foreign", "acme")
        (folder / "ca.crt").write_bytes(
            (vendor.state / "ca.crt").read_bytes()
        )  # trusts the vendor, but is unknown to it
        with pytest.raises(Exception, match="not signed by the authority"):
            VendorClient(vendor.address, credentials=folder)

    def test_a_stranger_without_certificate_gets_no_connection(self, vendor: Vendor) -> None:
        credentials = grpc.ssl_channel_credentials((vendor.state / "ca.crt").read_bytes())
        with grpc.secure_channel(vendor.address, credentials) as channel, pytest.raises(grpc.RpcError) as error:
            call = channel.unary_unary("/veiltune.v1.Vendor/Status", request_serializer=bytes)
            call(b"", timeout=5)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE

    def test_plaintext_to_a_tls_port_is_no_answer(self, vendor: Vendor) -> None:
        with pytest.raises(VendorUnreachableError, match="no answer from the vendor"):
            open_job(vendor.client(None, timeout_seconds=1.0))


def test_no_vendor_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(VendorUnreachableError, match=r"no answer from the vendor at 127\.0\.0\.1:1:"):
        open_job(VendorClient("127.0.0.1:1", credentials=None, plaintext=True, timeout_seconds=0.5))


def test_plaintext_off_loopback_is_refused() -> None:
    with pytest.raises(ConfigError, match="plaintext is possible only on loopback"):
        VendorClient("10.0.0.1:50051", credentials=None, plaintext=True)


def test_a_taken_port_is_one_line(tmp_path: Path, tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        tree = {"model": str(tiny_folder), "address": address, "state": str(tmp_path), "plaintext": True}
        config = parse_config(VendorConfig, tree)
        with pytest.raises(ConfigError, match=rf"cannot listen on {address}: the port is taken"):
            asyncio.run(serve(config))
