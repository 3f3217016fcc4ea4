"""Runs the API: a model, its guard and its door behind uvicorn, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from veiltune.config.guard import GuardConfig
from veiltune.errors import InputError
from veiltune.guard.api import make_app
from veiltune.guard.building import guard_of
from veiltune.guard.door import Door
from veiltune.guard.engine import Engine
from veiltune.guard.keys import Keys
from veiltune.guard.limits import Budget, RateLimit
from veiltune.guard.opening import open_model

log = logging.getLogger(__name__)

_GRACE = 30  # seconds in which running answers may end
_BACKLOG = 256
_SLOW = json.dumps({"error": {"message": "the request must come in sooner", "type": "too_slow"}}).encode()


def serve(model: str, config: GuardConfig, *, without_keys: bool = False, ready_file: Path | None = None) -> None:
    """Serves a model until SIGINT or SIGTERM; answers that are being computed are finished first.

    Args:
        model: As in `open_model`.
        config: Where, for whom, how much and how guarded.
        without_keys: Serve on an address that others can reach without asking for keys.
        ready_file: Receives the port once the server accepts connections.

    Raises:
        InputError: If the address is not loopback and there are no keys, or a file or the model cannot be had.
        StorageError: If the ledger of budgets cannot be written.
    """
    host = _host(config.address)
    keys = Keys(Path(config.keys)) if config.keys else None
    if keys is None and not without_keys and not _loopback(host):
        raise InputError(
            f"{config.address} can be reached from other machines and `keys` names no file; make one with"
            " `veiltune guard key --name NAME`, or say --insecure-no-keys"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    listening = _listen(host, int(config.address.rpartition(":")[2]))
    with contextlib.closing(listening):
        app = _application(model, config, keys)
        port = listening.getsockname()[1]
        log.info(
            "serving on http://%s:%d (%s)", f"[{host}]" if ":" in host else host, port, "keys" if keys else "no keys"
        )
        run(app, listening, read_seconds=config.limits.read_seconds, ready_file=ready_file)
    log.info("stopped")


def run(
    app: Any, listening: socket.socket, *, read_seconds: float, ready_file: Path | None = None, server: Any = None
) -> None:
    """Runs an ASGI application on a socket until it is told to stop.

    Args:
        app: As `make_app` gives it.
        listening: Bound and listening.
        read_seconds: In which the head of a request must have come in, and idle connections are kept.
        ready_file: As in `serve`.
        server: For tests: a list that receives the server, whose `should_exit` stops it.
    """
    settings = uvicorn.Config(
        app,
        http=type("_Timed", (_Patient,), {"patience": read_seconds}),
        ws="none",
        lifespan="on",
        loop="asyncio",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=max(1, int(read_seconds)),
        timeout_graceful_shutdown=_GRACE,
    )
    running = _Server(settings, ready_file, listening.getsockname()[1])
    if server is not None:
        server.append(running)
    asyncio.run(running.serve(sockets=[listening]))


def _application(model: str, config: GuardConfig, keys: Keys | None) -> Any:
    limits = config.limits
    found = open_model(model)
    size = int(found.model.get_output_embeddings().weight.shape[0])  # type: ignore[no-untyped-call]
    guard = guard_of(config, found.tokenizer, size=size)
    if guard is None:
        log.warning("no guard: nothing is protected and vectors are the model's own")
    elif guard.protected is not None:
        log.info("protected strings: %d, built in %.1f s", guard.protected.count, guard.protected.build_seconds)
    door = Door(
        keys=keys,
        rate=RateLimit(rate=limits.rate, burst=limits.burst) if limits.rate else None,
        budget=Budget(Path(limits.ledger), limits.budget) if limits.budget else None,
        max_body_bytes=limits.max_body_bytes,
        concurrent=limits.concurrent,
        read_seconds=limits.read_seconds,
    )
    engine = Engine(
        found.model, guard=guard, slots=config.slots, batch_tokens=config.batch_tokens, device=config.device
    )
    return make_app(
        engine,
        found.tokenizer,
        door=door,
        name=config.name or Path(model).name or "model",
        max_prompts=limits.max_prompts,
        max_new_tokens=limits.max_new_tokens,
    )


class _Server(uvicorn.Server):
    """Says when it is ready, and ends normally after a signal."""

    def __init__(self, config: uvicorn.Config, ready_file: Path | None, port: int) -> None:
        super().__init__(config)
        self._ready_file, self._port = ready_file, port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready_file is not None and not self.should_exit:
            self._ready_file.write_text(str(self._port))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not in the main thread: a test
            for name in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(name, self.handle_exit, name, None)
        yield


class _Patient(H11Protocol):
    """Closes a connection on which the head of a request does not come in within some seconds."""

    patience = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # an address may have text in it

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.patience, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        served = self.cycle
        super().data_received(data)
        if self.cycle is not served:  # the head of a request is complete
            self._timer.cancel()
        elif served is not None and served.response_complete and self._timer.cancelled():
            self._timer = self.loop.call_later(self.patience, self._too_slow)  # the next head has begun

    def _too_slow(self) -> None:
        if self.transport.is_closing():
            return
        head = f"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: {len(_SLOW)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + _SLOW)
        self.transport.close()


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; name another --address"
        ) from None
    return listening
