"""A guarded API on a real socket, in a thread of the test or as a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny import tiny_model
from tiny_text import causal_tokenizer
from veiltune.guard.api import make_app
from veiltune.guard.decoding import Guard
from veiltune.guard.door import Door
from veiltune.guard.engine import Engine
from veiltune.guard.serving import run


@contextmanager
def serving(
    *, door: Door | None = None, guard: Guard | None = None, patience: float = 5.0, **options: Any
) -> Iterator[int]:
    """Serves the tiny GPT-2 on a free port of this machine; gives the port."""
    engine = Engine(tiny_model("gpt2", "causal"), guard=guard, slots=4)
    app = make_app(engine, causal_tokenizer(), door=door or Door(), name="tiny", **options)
    listening = socket.create_server(("127.0.0.1", 0))
    servers: list[Any] = []
    settings = {"read_seconds": patience, "server": servers}
    thread = threading.Thread(target=run, args=(app, listening), kwargs=settings, daemon=True)
    thread.start()
    until(lambda: servers and servers[0].started)
    try:
        yield listening.getsockname()[1]
    finally:
        servers[0].should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive()


def until(true: Any, *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def ask(port: int, path: str, body: Any = None, *, key: str = "", **headers: str) -> tuple[int, dict[str, str], Any]:
    """(status, headers, content as JSON where it is); bytes are sent as they are, None by GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request("GET" if body is None else "POST", path, data, sent)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    told = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, told, json.loads(content) if "json" in told.get("content-type", "") else content


class Process:
    """`veiltune guard serve` as a process of its own, on a free port."""

    def __init__(self, folder: Path, model: Path, toml: str, *options: str) -> None:
        self._folder, self._ready = folder, folder / "ready"
        (folder / "guard.toml").write_text(toml)
        self._command = [sys.executable, "-m", "veiltune", "guard", "serve", str(model), "--guard", "guard.toml"]
        self._command += ["--address", "127.0.0.1:0", "--ready-file", "ready", *options]
        self.log = folder / "log"
        self.start()

    def start(self) -> None:
        self._ready.unlink(missing_ok=True)
        environment = os.environ | {"VEILTUNE_SETTLED": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=self._folder, env=environment, stderr=log, stdout=log)
        until(lambda: self._written() or self.process.poll() is not None, seconds=100)
        assert self.process.poll() is None, self.log.read_text()
        self.port = int(self._ready.read_text())

    def _written(self) -> bool:
        return self._ready.exists() and bool(self._ready.read_text())

    def kill(self) -> None:
        """SIGKILL: nothing is tidied up."""
        self.process.kill()
        self.process.wait(30)
