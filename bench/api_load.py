"""`veiltune guard serve` under load: a process, a model of 6 blocks of width 384 with 50257 tokens, eight clients.

Measured: completions of 32 tokens by one client, one after the other, and by eight at once, in alternating stretches,
so that the ratio of throughputs is of one machine in one state; errors; latencies; the status of hostile requests sent
all the while; whole vectors told at the tokens of texts, as an audit asks for them; whether a budget is spent exactly
by eight clients of one key; and whether it survives a kill -9. The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from guard import CARRIERS, gpt2_tokenizer
from small_model import new_model

TOKENS = 32
HOSTILE: dict[str, tuple[bytes, dict[str, str], int]] = {
    "malformed": (b"{", {}, 400),
    "not utf-8": (b'{"prompt": "\xff"}', {}, 400),
    "wrong type": (b'{"prompt": 5}', {}, 400),
    "nan": (b'{"prompt": "a", "temperature": NaN}', {}, 400),
    "too large": (b'{"prompt": "' + b"a" * 2**21 + b'"}', {}, 413),
    "no key": (b'{"prompt": "a"}', {"Authorization": ""}, 401),
    "wrong key": (b'{"prompt": "a"}', {"Authorization": "Bearer vt-wrong"}, 401),
}


class Server:
    """A process; `kill` leaves it no time to tidy up."""

    def __init__(self, folder: Path, toml: str) -> None:
        self._folder = folder
        (folder / "guard.toml").write_text(toml)
        self._keys = {name: self._key(name) for name in ("load", "few", "killed")}
        self.start()

    def _key(self, name: str) -> str:
        command = [sys.executable, "-m", "veiltune", "guard", "key", "--name", name, "--file", "keys.jsonl"]
        return subprocess.run(command, cwd=self._folder, check=True, capture_output=True, text=True).stdout.strip()

    def start(self) -> None:
        ready = self._folder / "ready"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "veiltune", "guard", "serve", "model", "--guard", "guard.toml"]
        command += ["--address", "127.0.0.1:0", "--ready-file", "ready"]
        self._process = subprocess.Popen(command, cwd=self._folder, env=os.environ | {"VEILTUNE_SETTLED": "1"})
        while not (ready.exists() and ready.read_text()):
            if self._process.poll() is not None:
                raise SystemExit("the server did not start")
            time.sleep(0.05)
        self.port = int(ready.read_text())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        self._process.terminate()
        return self._process.wait(60)

    def client(self, key: str) -> Client:
        return Client(self.port, self._keys[key])


class Client:
    """One kept connection."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def ask(self, path: str, body: Any, headers: dict[str, str] | None = None) -> int:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request("POST", path, data, self._headers | (headers or {}))
        answer = self._connection.getresponse()
        answer.read()
        return answer.status


def stretch(server: Server, clients: int, seconds: float, seed: int) -> tuple[float, list[float], Counter[int]]:
    """(completions a second, seconds of each, statuses) of so many clients who ask one after the other."""
    taken: list[float] = []
    statuses: Counter[int] = Counter()
    lock, end = threading.Lock(), time.monotonic() + seconds

    def work(number: int) -> None:
        client, asked = server.client("load"), 0
        while time.monotonic() < end:
            prompt = CARRIERS[(number + asked) % len(CARRIERS)]
            began = time.perf_counter()
            status = client.ask("/v1/completions", {"prompt": prompt, "max_tokens": TOKENS, "seed": seed + asked})
            with lock:
                taken.append(time.perf_counter() - began)
                statuses[status] += 1
            asked += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(taken) / (time.monotonic() - began), taken, statuses


def hostile(server: Server, stopping: threading.Event, wrong: list[str]) -> None:
    """Sends each kind again and again; a slow request is kept open meanwhile."""
    while not stopping.is_set():
        for kind, (body, headers, expected) in HOSTILE.items():
            try:
                status = server.client("load").ask("/v1/completions", body, headers)
            except OSError as error:
                wrong.append(f"{kind}: {type(error).__name__}")
                continue
            if status != expected:
                wrong.append(f"{kind}: {status}")
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n")
            if b" 408 " not in slow.recv(4096):
                wrong.append("slow")
        stopping.wait(0.5)


def vectors_a_second(server: Server, text: list[int], *, raw: bool, seconds: float = 5.0) -> float:
    """Whole vectors at the tokens of a text, sixteen a question, asked for by two clients one after the other."""
    asked = {"prompt_ids": [text[: number + 1] for number in range(len(text) - 16, len(text))]}
    headers = {"Accept": "application/octet-stream"} if raw else {}
    counts, end = [0, 0], time.monotonic() + seconds

    def work(number: int) -> None:
        client = server.client("load")
        while time.monotonic() < end:
            if client.ask("/v1/next-token", asked, headers) == 200:
                counts[number] += 16

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - began)


def spent_together(server: Server, key: str, *, stop_after: int | None = None) -> Counter[int]:
    """Statuses of next-token questions by eight clients of one key until each is refused, or the server is killed."""
    statuses: Counter[int] = Counter()
    lock = threading.Lock()

    def work() -> None:
        client = server.client(key)
        while True:
            try:
                status = client.ask("/v1/next-token", {"prompt": "a", "top_k": 1})
            except (OSError, http.client.HTTPException):
                return
            with lock:
                statuses[status] += 1
                enough = stop_after is not None and statuses[200] == stop_after
            if enough:
                server.kill()
            if status == 429:
                return

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of eight clients, in all")
    parser.add_argument("--stretches", type=int, default=6)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--budget", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = gpt2_tokenizer()
        model = new_model(tokenizer, width=options.width, blocks=6, context=256, seed=0)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "names.txt").write_text("Jane Zanzibar\n+1 (212) 555-0123\n")
        limits = f"[limits]\nread_seconds = 3.0\nconcurrent = {4 * options.clients}\n"
        top = f'keys = "keys.jsonl"\nthreads = {options.threads}\n'
        server = Server(folder, top + '[protect]\nfiles = ["names.txt"]\n' + limits)
        stretch(server, options.clients, 3.0, 0)  # warm
        stopping, wrong = threading.Event(), []
        noise = threading.Thread(target=hostile, args=(server, stopping, wrong))
        noise.start()
        alone, together, taken, statuses = [], [], [], Counter()
        each = options.seconds / options.stretches
        for number in range(options.stretches):
            rate, _, seen = stretch(server, 1, each / 2, 1000 * number)
            alone.append(rate)
            statuses += seen
            rate, times, seen = stretch(server, options.clients, each, 1000 * number)
            together.append(rate)
            taken += times
            statuses += seen
        stopping.set()
        noise.join()
        text = (tokenizer(" ".join(CARRIERS))["input_ids"] * 128)[:128]
        vectors = {kind: vectors_a_second(server, text, raw=kind == "raw") for kind in ("json", "raw")}
        code = server.stop()
        result: dict[str, Any] = {
            "clients": options.clients,
            "tokens_a_second_alone": TOKENS * float(np.mean(alone)),
            "tokens_a_second_together": TOKENS * float(np.mean(together)),
            "batching_ratio": float(np.sum(together) / np.sum(alone)),
            "p50_seconds": float(np.quantile(taken, 0.5)),
            "p95_seconds": float(np.quantile(taken, 0.95)),
            "completions": len(taken),
            "vectors_a_second": vectors,
            "errors": sum(count for status, count in statuses.items() if status != 200),
            "hostile_wrong": sorted(set(wrong)),
            "exit_code": code,
        }
        (folder / "guard.toml").write_text(top + limits + f"budget = {options.budget}\n")
        server.start()
        exact = spent_together(server, "few")
        result["budget"] = {"allowed": options.budget, "answered": exact[200], "refused": exact[429]}
        before = spent_together(server, "killed", stop_after=options.budget // 3)[200]
        server.start()
        after = spent_together(server, "killed")[200]
        result["killed"] = {"allowed": options.budget, "before": before, "after": after, "clients": 8}
        result["budget_exact"] = exact[200] == options.budget
        result["budget_survives"] = options.budget - 8 <= before + after <= options.budget
        server.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
