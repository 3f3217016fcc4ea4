"""An HTTP server on a real socket that answers for a black box, in Veiltune's protocol and in OpenAI's; or badly."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from veiltune.audit.blackbox import BlackBox

Change = Callable[[Any], Any]


@dataclass
class Api:
    """What the server does, and what it was asked; change it while it runs.

    Attributes:
        names: Of tokens in OpenAI's protocol: "text", "piece", "id" (vLLM) or "content" (llama.cpp).
        echo: Whether the log-probabilities of the prompt are told when asked for.
        strict: Refuses fields that OpenAI does not know, and echo together with logprobs.
        failures: Statuses (0: the connection is cut) of the next answers, before it answers well.
        dies_after: Answers, after which it gives no more.
        spoil: What happens to a good answer before it is sent; bytes are sent as they are.
        headers: Of every answer.
        cut: Bytes of the body that are sent, of all that were promised.
        closes: Whether each connection serves one answer only.
    """

    box: BlackBox
    tokenizer: Any
    names: str = "text"
    echo: bool = True
    strict: bool = False
    failures: list[int] = field(default_factory=list)
    dies_after: int | None = None
    spoil: Change | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    closes: bool = False
    url: str = ""
    questions: list[dict[str, Any]] = field(default_factory=list)
    seen_headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, question: dict[str, Any]) -> Any:
        with self.lock:  # the model is used by one thread at a time
            if path == "/v1/next-token":
                vectors = self.box.next_token_log_probs(question["prompt_ids"])
                rows = vectors.astype(np.float64).tolist()
                return {"log_probs": [[None if value == -math.inf else value for value in row] for row in rows]}
            return {"choices": [{"index": 0, "logprobs": self._log_probs(question)}]}

    def _log_probs(self, question: dict[str, Any]) -> dict[str, Any]:
        prompt, top = question["prompt"], question["logprobs"]
        last = self.box.next_token_log_probs([prompt])[0]
        positions = [(int(last.argmax()), last)]
        if question.get("echo") and self.echo:
            vectors = next(self.box.along([prompt]))
            positions = list(zip(prompt[1:], vectors, strict=True)) + positions
        by_id = self.names == "id" and question.get("return_tokens_as_token_ids")
        if self.names == "content":
            return {"content": [self._content(token, vector, top) for token, vector in positions]}
        name = (lambda token: f"token_id:{token}") if by_id else self._name
        columns = [
            (name(token), float(vector[token]), {name(i): float(vector[i]) for i in self._best(vector, token, top)})
            for token, vector in positions
        ]
        if len(positions) > 1:
            columns.insert(0, (name(prompt[0]), None, None))  # type: ignore[arg-type]
        names, values, tops = zip(*columns, strict=True)
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": [0] * len(names)}

    def _best(self, vector: Any, token: int, top: int) -> list[int]:
        """As vLLM: the most likely and, if it is not among them, the prompt's own."""
        best = np.argsort(-vector, kind="stable")[:top].tolist()
        return best if token in best else [*best, token]

    def _content(self, token: int, vector: Any, top: int) -> dict[str, Any]:
        def one(i: int) -> dict[str, Any]:
            return {"id": i, "token": self.tokenizer.decode([i]), "logprob": float(vector[i])}

        best = np.argsort(-vector, kind="stable")[:top].tolist()
        return one(token) | {"top_logprobs": [one(i) for i in best]}

    def _name(self, token: int) -> str:
        if self.names == "piece":
            return str(self.tokenizer.convert_ids_to_tokens([token])[0])
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class _Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # else each answer waits 40 ms
    protocol_version = "HTTP/1.1"
    api: Api

    def setup(self) -> None:
        super().setup()
        with self.api.lock:
            self.api.connections += 1

    def do_POST(self) -> None:
        api = self.api
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with api.lock:
            api.questions.append(question)
            api.seen_headers.append(dict(self.headers))
            api.in_flight += 1
            api.most_in_flight = max(api.most_in_flight, api.in_flight)
            dead = api.dies_after is not None and len(api.questions) > api.dies_after
            status = 0 if dead else api.failures.pop(0) if api.failures else 200
        try:
            self._reply(status, question)
        finally:
            with api.lock:
                api.in_flight -= 1

    def _reply(self, status: int, question: dict[str, Any]) -> None:
        api = self.api
        unknown = {"return_tokens_as_token_ids", "echo"} & set(question)
        if status == 200 and api.strict and unknown:
            status = 400
        if status == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body: Any = {"error": "SECRET TEXT OF THE SERVER"} if status != 200 else api.answer(self.path, question)
        if status == 200 and api.spoil is not None:
            body = api.spoil(body)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | api.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: api.cut] if status == 200 else content)
        if api.closes or api.cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of the test's concern."""


@contextmanager
def serve(box: BlackBox, tokenizer: Any, **options: Any) -> Iterator[Api]:
    """Serves a box on a free port of this machine; `Api.url` has no path."""
    api = Api(box, tokenizer, **options)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def planted(value: Any, places: Sequence[Any]) -> Change:
    """Puts a value at a place of the answer (keys and indices)."""

    def change(answer: Any) -> Any:
        inner = answer
        for place in places[:-1]:
            inner = inner[place]
        inner[places[-1]] = value
        return answer

    return change
