"""A model behind an HTTP API as a black box: Veiltune's own endpoint, or any OpenAI-compatible one.

Veiltune's own endpoint tells whole vectors::

    POST .../v1/next-token     {"prompt_ids": [[5, 17], [5]]}
    200                        {"log_probs": [[-3.1, null, ...], [-0.7, -9.2, ...]]}

One inner list a prompt, with V natural log-probabilities; null stands for probability zero. Statuses: 400 for token ids
or lengths that the model does not take, 429 and 503 (with Retry-After) for "later".

An OpenAI-compatible ``.../v1/completions`` tells the k most likely tokens of each position. The prompt is sent as token
ids. With ``echo`` (vLLM has it) a record costs one question; servers without it get one for each position.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from veiltune._validate import in_range, positive_int
from veiltune.audit.blackbox import BlackBox, Float64, Tokens, Vectors, spans, start_ids, told
from veiltune.audit.http_client import HttpClient, UnsuitableError
from veiltune.audit.token_names import TokenNames
from veiltune.errors import InputError, ProtocolError

CONTEXT = 1024  # of GPT-2; an API does not say
MOST_TOP = 1000
_BYTES_A_VALUE = 32  # a float64 in JSON has at most 24 characters
_BYTES_A_NAME = 512  # a token with its log-probability, escaped
_SLACK = 2**16
_DRAWS = 20  # of a new token, until one comes that does not end the text


def open_api(url: str, *, tokenizer: Any, model: str = "", top: int = 5, **options: Any) -> HttpApi:
    """The box for an address: `/next-token` is Veiltune's endpoint, `/completions` an OpenAI-compatible one.

    Args:
        url: Whole, such as ``http://127.0.0.1:8000/v1/completions``.
        tokenizer: The model's own, from a local folder.
        model: Its name at the server; OpenAI-compatible servers want it.
        top: How many of the most likely tokens to ask an OpenAI-compatible server for.
        **options: `context`, `key`, `timeout`, `attempts`, `backoff`, `concurrency`, as `HttpApi` takes them.

    Raises:
        InputError: If the address ends in neither.
        VendorError: If the server does not answer, refuses, or answers what cannot be used.
    """
    path = urlsplit(url).path.rstrip("/")
    if path.endswith("/next-token"):
        return NextTokenApi(url, tokenizer=tokenizer, model=model, **options)
    if path.endswith("/completions") and not path.endswith("/chat/completions"):
        return CompletionsApi(url, tokenizer=tokenizer, model=model, top=top, **options)
    raise InputError(
        "the address of an API must end in /v1/next-token (Veiltune's) or /v1/completions (OpenAI-compatible; a chat"
        " endpoint wraps the prompt and cannot be audited)"
    )


class HttpApi(BlackBox, abc.ABC):
    """What both kinds of API share. Close it, or use it as a context manager.

    Its digest is of address, model name and protocol: a model that is swapped behind the same name goes unnoticed.
    """

    _refusal = ProtocolError

    def __init__(
        self,
        url: str,
        *,
        tokenizer: Any,
        model: str = "",
        context: int = CONTEXT,
        key: str | None = None,
        timeout: float = 60.0,
        attempts: int = 6,
        backoff: float = 0.5,
        concurrency: int = 4,
    ) -> None:
        """Asks one short question, to see that the API answers and what it tells.

        Args:
            url: Of the endpoint.
            tokenizer: The model's own, from a local folder.
            model: Its name at the server.
            context: The longest prefix that the model takes.
            key: Name of the environment variable that holds the API key.
            timeout: Seconds without a byte, after which an attempt has failed.
            attempts: In all, for each question, before the audit stops (and can be resumed).
            backoff: Seconds before the second attempt, doubled for each later one.
            concurrency: Questions in flight.

        Raises:
            InputError: If an argument is unusable.
            VendorError: If the server does not answer, refuses, or answers what cannot be used.
        """
        self._client = HttpClient(
            url, key=key, timeout=timeout, attempts=attempts, backoff=backoff, concurrency=concurrency
        )
        self.tokenizer, self._model, self.context = tokenizer, model, positive_int(context=context)
        self.name = model or self._client.address
        self.digest = hashlib.sha256(f"{type(self).__name__}\0{url}\0{model}".encode()).hexdigest()
        try:
            self._greet(start_ids(tokenizer))
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _greet(self, start: list[int]) -> None:
        """Asks the first question; sets what the answer tells about the box."""

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _broken(self, what: str) -> ProtocolError:
        return ProtocolError(f"the answer of {self._client.address} {what}; it does not follow the protocol")


class NextTokenApi(HttpApi):
    """Veiltune's endpoint: whole vectors. The protocol is in the module's docstring."""

    def _greet(self, start: list[int]) -> None:
        rows = self._lists([start], most_values=max(2 * len(self.tokenizer), 2**20))
        self.vocabulary = len(rows[0])
        if self.vocabulary < len(self.tokenizer):
            raise InputError(
                f"the model at {self._client.address} knows {self.vocabulary} tokens and the tokenizer"
                f" {len(self.tokenizer)}; use the tokenizer that it was trained with"
            )
        self._checked(self._numbers(rows), 1)

    def next_token_log_probs(self, prefixes: Sequence[Tokens]) -> Vectors:
        """As `BlackBox.next_token_log_probs`; a few prefixes a question."""
        texts = self._accepted(prefixes, least=1, most=self.context)
        size = max(1, min(16, self._rows_at_once, -(-len(texts) // self._client.concurrency)))
        questions = [texts[first:stop] for first, stop in spans(0, len(texts), size)]
        answers = list(self._client.in_order(questions, self._vectors))
        return np.concatenate(answers) if answers else np.empty((0, self.vocabulary), dtype=np.float32)

    def _vectors(self, prompts: list[list[int]]) -> Vectors:
        rows = self._lists(prompts, most_values=len(prompts) * self.vocabulary)
        return self._checked(self._numbers(rows), len(prompts))

    def _lists(self, prompts: list[list[int]], *, most_values: int) -> list[list[Any]]:
        answer = self._client.ask({"prompt_ids": prompts}, most_bytes=_SLACK + _BYTES_A_VALUE * most_values)
        rows = answer.get("log_probs") if isinstance(answer, dict) else None
        if not isinstance(rows, list) or len(rows) != len(prompts) or not all(isinstance(row, list) for row in rows):
            raise self._broken("has no log_probs with one list a prompt")
        if len({len(row) for row in rows}) != 1:
            raise self._broken("has vectors of different lengths")
        return rows

    def _numbers(self, rows: list[list[Any]]) -> Vectors:
        if not all({type(value) for value in row} <= {float, int, type(None)} for row in rows):
            raise self._broken("has a log-probability that is no number")
        zero = -math.inf
        values = np.array([[zero if value is None else value for value in row] for row in rows], dtype=np.float64)
        with np.errstate(over="ignore"):
            return values.astype(np.float32)


class CompletionsApi(HttpApi):
    """An OpenAI-compatible completions endpoint: the k most likely tokens of each position.

    What falls away: Min-K%++ (it needs the whole vector), top-k sampling beyond k, and exact probabilities of tokens
    outside the k most likely where the server has no echo.

    Attributes:
        echo: Whether the server tells the log-probabilities of a prompt's own tokens.
    """

    full_vectors = False

    def __init__(self, url: str, *, tokenizer: Any, model: str = "", top: int = 5, **options: Any) -> None:
        """As `HttpApi`.

        Args:
            url: Of the endpoint.
            tokenizer: The model's own; its names of tokens must be those of the server.
            model: Its name at the server.
            top: k, as many as the server allows (OpenAI 5, vLLM 20 by default).
            **options: As `HttpApi` takes them.
        """
        self.top_tokens = int(in_range(1, MOST_TOP, top=top))
        self._names = TokenNames(tokenizer)
        self.vocabulary = self._names.vocabulary
        self.top_tokens = min(self.top_tokens, self.vocabulary)
        self.echo = False
        super().__init__(url, tokenizer=tokenizer, model=model, **options)

    def _greet(self, start: list[int]) -> None:
        # With echo the answer tells each token and a new one; a server that ignores echo tells the new one only.
        entries = self._first_entries([*start, *start])
        self.echo = len(entries) > 1
        if self.echo and len(entries) - 2 * len(start) not in (0, 1):
            raise self._broken("has another number of tokens than the prompt: it puts tokens of its own before it")
        self.context -= self.echo  # the new token needs a place too
        self._row(entries[-1], token=None)

    def _first_entries(self, text: list[int]) -> list[_Entry]:
        """Finds out what the server takes: names by id, echo, echo without names by id, or neither (OpenAI)."""
        for request in (self._names.request, {}):
            self._names.request = request
            with contextlib.suppress(UnsuitableError):
                return self._entries(text, echo=True, least=1)
        return self._entries(text, echo=False)

    def next_token_log_probs(self, prefixes: Sequence[Tokens]) -> Vectors:
        """As `BlackBox.next_token_log_probs`; one question a prefix."""
        texts = self._accepted(prefixes, least=1, most=self.context)
        rows = self._client.in_order(texts, lambda text: self._row(self._entries(text, echo=False)[-1], token=None))
        answers = np.full((len(texts), self.vocabulary), np.nan, dtype=np.float32)
        for vector, row in zip(answers, rows, strict=True):
            _fill(vector, row)
        return self._checked(answers, len(texts))

    def parts(self, sequences: Sequence[Tokens], *, start: int = 0) -> Iterator[tuple[int, int, Vectors]]:
        """As `BlackBox.parts`; one question a sequence where the server has echo."""
        if not self.echo:
            yield from super().parts(sequences, start=start)
            return
        texts = self._accepted(sequences, least=start + 2, most=self.context + 1)
        for number, rows in enumerate(self._client.in_order(texts, self._along)):
            for first, stop in spans(start, len(rows), self._rows_at_once):
                vectors = np.full((stop - first, self.vocabulary), np.nan, dtype=np.float32)
                for vector, row in zip(vectors, rows[first:stop], strict=True):
                    _fill(vector, row)
                yield number, first, self._checked(vectors, stop - first)

    def suffix_log_probs(self, prefix: Tokens, suffixes: Sequence[Tokens]) -> Float64:
        """As `BlackBox.suffix_log_probs`; one question a suffix where the server has echo."""
        if not self.echo:
            return super().suffix_log_probs(prefix, suffixes)
        head, tails = self._suffixed(prefix, suffixes)
        totals = np.zeros(len(tails))
        for number, first, vectors in self.parts([head + tail for tail in tails], start=len(head) - 1):
            done = first - (len(head) - 1)
            values, _ = told(vectors, tails[number][done : done + len(vectors)])
            totals[number] += values.sum()
        return totals

    def _along(self, text: list[int]) -> list[dict[int, float]]:
        entries = self._entries(text, echo=True)
        return [self._row(entry, token=token) for entry, token in zip(entries[1 : len(text)], text[1:], strict=True)]

    def _entries(self, text: list[int], *, echo: bool, least: int | None = None) -> list[_Entry]:
        """One entry a token of the answer: with echo those of the prompt and a new one, else only the new one.

        The new token is drawn, and some servers tell nothing of one that ends the text: with echo it is not needed,
        and otherwise the question is put again.
        """
        question: dict[str, Any] = {"prompt": text, "max_tokens": 1, "logprobs": self.top_tokens, "temperature": 1.0}
        question |= {"echo": True} if echo else {}
        question |= {"model": self._model} if self._model else {}
        positions = len(text) + 1 if echo else 1
        most = _SLACK + _BYTES_A_NAME * positions * (self.top_tokens + 2)
        entries: list[_Entry] = []
        for _ in range(_DRAWS):
            entries = self._read(self._client.ask(question | self._names.request, most_bytes=most))
            if entries:
                break
        if len(entries) not in (positions, max(1, positions - 1)) and (least is None or len(entries) < least):
            raise self._broken(f"tells {len(entries)} positions where {positions} were asked for")
        return entries

    def _read(self, answer: Any) -> list[_Entry]:
        try:
            (choice,) = answer["choices"]
            told_here = choice["logprobs"]
            if "content" in told_here:  # llama.cpp
                return [
                    (item, item["logprob"], [(other, other["logprob"]) for other in item["top_logprobs"]])
                    for item in told_here["content"]
                ]
            columns = (told_here[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
            return [
                ({"token": name}, value, [({"token": other}, chance) for other, chance in (top or {}).items()])
                for name, value, top in zip(*columns, strict=True)
            ]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._broken("has no log-probabilities (choices[0].logprobs)") from None

    def _row(self, entry: _Entry, *, token: int | None) -> dict[int, float]:
        """Token ids and log-probabilities of one position; `token` is the prompt's own, if it is one of the prompt."""
        own, value, top = entry
        row = {self._id(name, token, own): self._number(chance) for name, chance in top}
        if len(row) < self.top_tokens:
            raise self._broken(f"tells {len(row)} of the {self.top_tokens} tokens asked for; ask for fewer")
        if token is not None:
            if self._id(own, token, own) != token:
                raise self._broken("repeats other tokens than the prompt's: the tokenizer is not the model's")
            row[token] = self._number(value)
        return row

    def _id(self, name: dict[str, Any], token: int | None, own: dict[str, Any]) -> int:
        found = self._names.find(name, expected=token if name.get("token") == own.get("token") else None)
        if found is None:
            raise ProtocolError(
                f"{self._client.address} names a token that the tokenizer does not know or has twice: the tokenizer is"
                " not the model's, or the server must name tokens by id (vLLM can)"
            )
        return found

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value <= 1e-4:
            raise self._broken("has a log-probability that is no number of at most 0")
        return min(float(value), 0.0)


# a token's name, its log-probability, and the most likely tokens at its place with theirs
_Entry = tuple[dict[str, Any], Any, list[tuple[dict[str, Any], Any]]]


def _fill(vector: Vectors, row: dict[int, float]) -> None:
    vector[list(row)] = list(row.values())
