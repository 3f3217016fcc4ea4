"""The black-box API: next-token vectors and completions over HTTP, with the guard in between.

`POST /v1/next-token` tells vectors (the protocol is in `veiltune.audit.http_api`), `POST /v1/completions` is compatible
with OpenAI's. Every refusal is one line of JSON: ``{"error": {"message": ..., "type": ...}}``, without what was sent.
`/openapi.json` describes all of it; the usual pages that show such a description load scripts from the net and are left
out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from veiltune import __version__
from veiltune.errors import InputError
from veiltune.guard.answers import completion, tops_json, vectors_json, vectors_raw
from veiltune.guard.door import Door, Metrics, retry_header
from veiltune.guard.engine import Engine
from veiltune.guard.jobs import Text, TextJob, VectorJob
from veiltune.guard.questions import CompletionQuestion, NextTokenQuestion, Refusal, parse, schema_of

log = logging.getLogger(__name__)

RAW = "application/octet-stream"
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
_PAGE_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_STOPS = 4

Scope = Any


def make_app(
    engine: Engine,
    tokenizer: Any,
    *,
    door: Door,
    name: str,
    max_prompts: int = 64,
    max_new_tokens: int = 1024,
) -> Callable[..., Awaitable[None]]:
    """The ASGI application.

    Args:
        engine: Computes; closed when the application shuts down.
        tokenizer: The model's.
        door: Checks and counts.
        name: Of the model, as callers see it.
        max_prompts: Of one request.
        max_new_tokens: Of one request.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="Veiltune guarded model",
        version=__version__,
        description="A language model as a black box. Errors: {'error': {'message', 'type'}}.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    metrics = Metrics(engine)
    asked = _Asked(engine, tokenizer, door, name, max_prompts, max_new_tokens)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(Exception, _failed)

    @app.post("/v1/next-token", openapi_extra=schema_of(NextTokenQuestion))
    async def next_token(request: Request) -> Response:
        """What token follows each prompt: JSON, or raw float16 log-probabilities if accepted."""
        return await asked.next_token(request)

    @app.post("/v1/completions", openapi_extra=schema_of(CompletionQuestion))
    async def completions(request: Request) -> Response:
        """A continuation, as OpenAI's endpoint of that name gives it."""
        return await asked.completions(request)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The one model there is."""
        door.enter(request)
        one = {"id": name, "object": "model", "created": 0, "owned_by": "veiltune"}
        sizes = {"context": engine.context, "vocabulary": engine.vocabulary}
        return JSONResponse({"object": "list", "data": [one | sizes]})

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the server is up."""
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Counts and times for Prometheus; no names, no text."""
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    page = resources.files("veiltune.guard").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    known = {route.path for route in app.routes if hasattr(route, "path")}
    return _Shell(app, metrics, known)


class _Asked:
    """The two questions."""

    def __init__(
        self, engine: Engine, tokenizer: Any, door: Door, name: str, max_prompts: int, max_new_tokens: int
    ) -> None:
        self._engine, self._tokenizer, self._door, self._name = engine, tokenizer, door, name
        self._max_prompts, self._max_new = max_prompts, min(max_new_tokens, engine.context)
        eos = getattr(tokenizer, "eos_token_id", None)
        self._end = frozenset() if eos is None else frozenset({int(eos)})

    async def next_token(self, request: Request) -> Response:
        who = self._door.enter(request)
        question = parse(NextTokenQuestion, await self._door.body(request))
        self._check_name(question.model)
        if (question.prompt_ids is None) == (question.prompt is None):
            raise Refusal(400, "invalid", "give either prompt_ids or prompt")
        texts = [question.prompt] if isinstance(question.prompt, str) else question.prompt
        if len(question.prompt_ids or texts or ()) > self._max_prompts:
            raise Refusal(400, "invalid", f"a request may have {self._max_prompts} prompts")
        prompts = question.prompt_ids or [await asyncio.to_thread(self._ids, text) for text in texts or ()]
        async with self._door.place():
            job = VectorJob(prompts)
            self._check(prompts, 0)
            await self._door.charge(who, len(prompts))
            vectors = await self._answer(job)
            if RAW in request.headers.get("accept", ""):
                shape = {"X-Shape": f"{vectors.shape[0]},{vectors.shape[1]}", "X-Dtype": "<f2"}
                return Response(vectors_raw(vectors), media_type=RAW, headers=shape)
            if question.top_k:
                content = tops_json(self._tokenizer, vectors, question.top_k)
            else:
                content = await asyncio.to_thread(vectors_json, vectors, probs=question.prompt_ids is None)
            return Response(content, media_type="application/json")

    def _check_name(self, model: str) -> None:
        if model not in ("", self._name):
            raise Refusal(404, "model_not_found", f"the model here is {self._name}; name that one, or none")

    async def completions(self, request: Request) -> Response:
        who = self._door.enter(request)
        question = parse(CompletionQuestion, await self._door.body(request))
        self._check_name(question.model)
        prompt = await asyncio.to_thread(self._prompt, question)
        stops = [question.stop] if isinstance(question.stop, str) else question.stop or []
        if len(stops) > _STOPS or not all(stops):
            raise Refusal(400, "invalid", f"stop takes up to {_STOPS} texts, none empty")
        if not 1 - question.echo <= question.max_tokens <= self._max_new:
            raise Refusal(
                400, "invalid", f"max_tokens must be 1 to {self._max_new}, or 0 with echo, got {question.max_tokens}"
            )
        if question.stream and (question.echo or question.logprobs is not None):
            raise Refusal(400, "invalid", "stream goes without echo and logprobs")
        self._check([prompt], question.max_tokens)
        told = len(prompt) if question.echo and question.logprobs is not None else 0
        job = TextJob(
            prompt,
            question.max_tokens,
            temperature=question.temperature,
            top_p=question.top_p,
            seed=question.seed,
            logprobs=question.logprobs,
            echo=question.echo,
            end=self._end,
            stops=(lambda ids: any(stop in self._decode(ids) for stop in stops)) if stops else None,
        )
        meta = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._name}
        if question.stream:
            place = self._door.place()
            await place.__aenter__()
            try:
                await self._door.charge(who, question.max_tokens)
            except BaseException:
                await place.__aexit__(None, None, None)
                raise
            return StreamingResponse(self._stream(job, stops, meta, place), media_type="text/event-stream")
        async with self._door.place():
            await self._door.charge(who, question.max_tokens + told)
            answer = await self._answer(job)
        text = _cut(self._decode(answer.ids), stops)
        content = completion(
            self._tokenizer,
            answer,
            prompt=prompt,
            text=self._decode(prompt) + text if question.echo else text,
            echo=question.echo,
            logprobs=question.logprobs is not None,
            by_id=question.return_tokens_as_token_ids,
            meta=meta,
        )
        return JSONResponse(content)

    async def _stream(self, job: TextJob, stops: Sequence[str], meta: dict[str, Any], place: Any) -> AsyncIterator[str]:
        """Server-sent events; what could be the beginning of a stop text or of a character waits."""
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[list[int] | None]()

        def put(ids: list[int] | None) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, ids)

        job.notify = put
        job.done.add_done_callback(lambda _: put(None))
        held, sent = max([0, *(len(stop) - 1 for stop in stops)]), ""
        try:
            self._engine.submit(job)
            while (ids := await parts.get()) is not None:
                ready = _cut(self._decode(ids), stops).rstrip("\ufffd")
                ready = ready[: max(0, len(ready) - held)]
                if len(ready) > len(sent):
                    yield _event(meta, ready[len(sent) :], None)
                    sent = ready
            answer: Text = job.done.result()
            rest = _cut(self._decode(answer.ids), stops)[len(sent) :]
            yield _event(meta, rest, answer.finished) + "data: [DONE]\n\n"
        except Exception as error:
            log.error("a text failed: %s", type(error).__name__)
            yield 'data: {"error": {"message": "the text could not be completed", "type": "stopped"}}\n\n'
        finally:
            job.done.cancel()
            await place.__aexit__(None, None, None)

    def _prompt(self, question: CompletionQuestion) -> list[int]:
        prompt: Any = question.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise Refusal(400, "invalid", "one prompt a request")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._ids(prompt)
        if not prompt:
            raise Refusal(400, "invalid", "the prompt must have at least one token")
        return list(prompt)

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text, beginning with the start token; GPT-2's tokenizer has none, its end token stands in."""
        if any("\ud800" <= character <= "\udfff" for character in text):  # half of a pair, escaped in JSON
            raise Refusal(400, "not_utf8", "a prompt must be text that can be written in UTF-8")
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            ids = sorted(self._end)
        if not ids:
            raise Refusal(400, "invalid", "the prompt must have at least one token")
        return ids

    def _check(self, prompts: Sequence[Sequence[int]], new: int) -> None:
        """Before anything is charged."""
        try:
            for ids in prompts:
                self._engine.check(ids, new)
        except InputError as error:
            raise Refusal(400, "invalid", str(error)) from None

    async def _answer(self, job: VectorJob | TextJob) -> Any:
        try:
            return await asyncio.wrap_future(self._engine.submit(job))
        except InputError as error:
            raise Refusal(503, "stopping", str(error), retry_after=5.0) from None

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Shell:
    """Around everything: no exception with somebody's text in it reaches a log, and every answer is counted."""

    def __init__(self, app: FastAPI, metrics: Metrics, known: set[str]) -> None:
        self._app, self._metrics, self._known = app, metrics, known

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in _HEADERS.items())]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            log.error("a request failed: %s", type(error).__name__)
            if not status:
                await _error(500, "internal", "the server failed; nothing was answered")(scope, receive, watched)
        finally:
            endpoint = scope["path"] if scope["path"] in self._known else "other"
            self._metrics.count(endpoint, status, began)


def _error(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = retry_header(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413, 415, 401, 429):
        headers["Connection"] = "close"  # the rest of the body may still be on its way
    return _error(error.status, error.kind, error.message, headers)


async def _unknown(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = getattr(error, "headers", None) or {}
    wanted = headers.get("Allow", "another method")
    kinds = {404: ("not_found", "no such address"), 405: ("bad_method", f"{wanted} is wanted here")}
    kind, message = kinds.get(status, ("http", "the request was not understood"))
    return _error(status, kind, message, dict(headers))


async def _failed(_: Request, __: Exception) -> Response:
    return _error(500, "internal", "the server failed; nothing was answered")


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop text."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _event(meta: dict[str, Any], text: str, finished: str | None) -> str:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finished}
    return "data: " + json.dumps(meta | {"object": "text_completion", "choices": [choice]}) + "\n\n"
