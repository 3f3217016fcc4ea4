"""Starts and stops the vendor's gRPC server: certificates, limits, a clean shutdown."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

import grpc
import torch
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from veiltune.config import VendorConfig
from veiltune.errors import ConfigError, StorageError
from veiltune.models.loading import BaseModel, load_base
from veiltune.runs import storage_errors
from veiltune.vendor.engine import Limits, LocalEngine
from veiltune.vendor.jobs import JobStore
from veiltune.vendor.service import VendorService
from veiltune.vendor.store import BlobStore
from veiltune.wire import veiltune_pb2_grpc as rpc
from veiltune.wire.credentials import check_credentials

log = logging.getLogger("veiltune.vendor")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
SHUTDOWN_GRACE_SECONDS = 5.0


def make_engine(config: VendorConfig) -> LocalEngine:
    """Loads the base model and opens the job store of a vendor's state folder."""
    state = Path(config.state)
    with storage_errors(state):
        state.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    jobs, blobs = _stores(config, state.resolve())
    return LocalEngine(
        _on_device(load_base(config.model), config.device),
        jobs=jobs,
        blobs=blobs,
        limits=Limits(
            max_jobs=config.max_jobs_per_tenant, max_cut_layer=config.max_cut_layer, norm_bound=config.norm_bound
        ),
    )


def make_server(config: VendorConfig, engine: LocalEngine) -> tuple[grpc.aio.Server, int]:
    """Builds the server, bound but not started; returns it with its port.

    Raises:
        ConfigError: If plaintext is asked for off the loopback interface, or the address cannot be bound.
        InputError: If the server's certificate is missing, expired or foreign.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            ("grpc.so_reuseport", 0),
        ]
    )
    rpc.add_VendorServicer_to_server(VendorService(engine), server)
    try:
        if config.plaintext:
            if config.address.rpartition(":")[0] not in LOOPBACK_HOSTS:
                raise ConfigError(f"plaintext is possible only on loopback, not on {config.address!r}")
            port = server.add_insecure_port(config.address)
        else:
            port = server.add_secure_port(config.address, _credentials(Path(config.state)))
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {config.address}: the port is taken, or the host is not this machine; set `address`"
        ) from error
    return server, port


async def serve(config: VendorConfig, *, ready_file: Path | None = None) -> None:
    """Serves until SIGINT or SIGTERM; open calls get a few seconds to end.

    Args:
        config: What to serve, where.
        ready_file: Receives the port once the server accepts calls, for a parent process that waits.
    """
    engine = make_engine(config)
    server, port = make_server(config, engine)
    await server.start()
    log.info("serving %s (%s) on port %d", config.model, "plaintext" if config.plaintext else "mTLS", port)
    if ready_file is not None:
        ready_file.write_text(str(port))
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    await stop.wait()
    await server.stop(SHUTDOWN_GRACE_SECONDS)
    engine.jobs.close()
    log.info("stopped; jobs resume at their last checkpoint")


def _stores(config: VendorConfig, state: Path) -> tuple[JobStore, BlobStore]:
    try:
        blobs = BlobStore(config.blobs or str(state / "blobs"))
        return JobStore(config.database or f"sqlite:///{state / 'jobs.sqlite'}"), blobs
    except DBAPIError as error:
        raise StorageError(f"cannot open the job database: {error.orig}") from error
    except (ValueError, ImportError, SQLAlchemyError) as error:  # never the URL itself: it may hold a password
        raise ConfigError(f"database or blobs names no store that can be opened ({type(error).__name__})") from error


def _on_device(base: BaseModel, device: str) -> BaseModel:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for and there is no GPU; set device = 'cpu'")
    base.model.to(torch.device(device))  # type: ignore[arg-type]
    return base


def _credentials(state: Path) -> grpc.ServerCredentials:
    check_credentials(state / "server", name="server")
    folder = state / "server"
    return grpc.ssl_server_credentials(
        [((folder / "server.key").read_bytes(), (folder / "server.crt").read_bytes())],
        root_certificates=(folder / "ca.crt").read_bytes(),
        require_client_auth=True,
    )
