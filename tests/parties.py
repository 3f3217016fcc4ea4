"""A real vendor on loopback for tests: gRPC server, engine, SQLite and files, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veiltune.config import VendorConfig, parse_config
from veiltune.customer.remote import RemoteJob, VendorClient
from veiltune.vendor.engine import LocalEngine
from veiltune.vendor.pki import create_authority, issue_server, issue_tenant
from veiltune.vendor.server import make_engine, make_server
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import PROTOCOL


@dataclass
class Vendor:
    """A running vendor."""

    address: str
    state: Path
    engine: LocalEngine

    def client(self, tenant: str | None = None, timeout_seconds: float = 20.0) -> VendorClient:
        """A client: enrolled as `tenant` over mTLS, or in plaintext if the vendor serves that."""
        credentials = None if tenant is None else self.state / "tenants" / tenant
        return VendorClient(
            self.address, credentials=credentials, plaintext=tenant is None, timeout_seconds=timeout_seconds
        )


@contextlib.contextmanager
def running_vendor(state: Path, model: Path, *, tenants: tuple[str, ...] = (), **options: object) -> Iterator[Vendor]:
    """Starts a vendor; with tenants it speaks mTLS only, without it serves plaintext on loopback."""
    if tenants and not (state / "ca.key").exists():
        create_authority(state)
        issue_server(state, ["localhost", "127.0.0.1"])
        for tenant in tenants:
            issue_tenant(state, tenant)
    tree = {"model": str(model), "address": "127.0.0.1:0", "state": str(state), "plaintext": not tenants, **options}
    config = parse_config(VendorConfig, tree)
    engine = make_engine(config)
    started, box = threading.Event(), {}

    async def serve() -> None:
        server, port = make_server(config, engine)
        await server.start()
        box.update(port=port, loop=asyncio.get_running_loop(), stop=asyncio.Event())
        started.set()
        await box["stop"].wait()
        await server.stop(0.1)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield Vendor(f"127.0.0.1:{box['port']}", state, engine)
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(10)
        engine.jobs.close()


def job_spec(**changes: object) -> pb.JobSpec:
    """A small valid job; fields can be changed."""
    fields: dict[str, object] = {
        "protocol": PROTOCOL,
        "cut_layer": 1,
        "cut_embeddings": "word",
        "head": "vendor",
        "num_labels": 2,
        "frozen_bottom": True,
        "method": "lora",
        "rank": 4,
        "alpha": 8.0,
        "adapter_size": 8,
        "weight_decay": 0.01,
        "seed": 3,
        "wire_dtype": pb.DTYPE_FLOAT32,
        "norm_bound": 1e3,
        "max_tokens": 32,
        "precision": "fp32",
    }
    return pb.JobSpec(**(fields | changes))  # type: ignore[arg-type]


def open_job(
    client: VendorClient, *, key: str = "k" * 32, checkpoints: tuple[int, ...] = (), **changes: object
) -> RemoteJob:
    """Opens a job and returns it ready for calls."""
    request = pb.OpenJobRequest(spec=job_spec(**changes), key=key, customer_checkpoints=checkpoints)
    opened = client.call("OpenJob", request)
    spec = request.spec
    columns = spec.num_labels if spec.head == "vendor" else 32  # the tiny models' hidden size
    return RemoteJob(client, opened.job, next_seq=opened.next_seq, output_size=columns)
