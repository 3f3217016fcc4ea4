"""JSON questions to one HTTP address: kept connections, bounded retries, bounded answers, one-line errors.

No error message holds the key, the question, the answer or the address's query.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import queue
import ssl
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

import orjson

from veiltune._validate import positive, positive_int
from veiltune.errors import InputError, ProtocolError, VendorRefusedError, VendorUnreachableError

LONGEST_PAUSE = 30.0  # seconds between two attempts, whatever the server asks for
_MORE_THAN_ENOUGH = "the answer of {} is larger than {} MB, more than the question can need; is it the right address?"
_PASSING = frozenset({408, 425, 429})  # and 5xx: worth another attempt
_UNSUITABLE = frozenset({400, 413, 422})
_BROKEN = (OSError, http.client.HTTPException)  # a connection that fails or times out (TimeoutError is an OSError)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class UnsuitableError(VendorRefusedError):
    """The server does not take questions of this form."""


class HttpClient:
    """Asks one address, from several threads at once.

    Guarantee:
        The key goes only into the Authorization header, only over https or to this machine itself, and never after a
        redirect (none is followed). What is sent otherwise is the question, in clear if the address is http.

    Attributes:
        address: Scheme, host, port and path: what messages show.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        attempts: int = 6,
        backoff: float = 0.5,
        concurrency: int = 4,
    ) -> None:
        """Opens no connection yet.

        Args:
            url: http:// or https://.
            key: Name of the environment variable that holds the API key; None for no key.
            timeout: Seconds without a byte, after which an attempt has failed.
            attempts: In all, for each question.
            backoff: Seconds before the second attempt; doubled for each later one, at most 30. A server's Retry-After
                counts where it is longer.
            concurrency: Questions in flight.

        Raises:
            InputError: If the address or a number is unusable, the variable is empty, or the key would go in clear.
        """
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise InputError("the address of an API must be http(s)://host[:port]/path without a user name")
        self.address = f"{parts.scheme}://{host}" + (f":{port}" if port else "") + parts.path
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {_secret(key)}"
            if parts.scheme == "http" and not _this_machine(host):
                raise InputError(f"an API key would go in clear to {self.address}; use https")
        self._connect = _connector(parts.scheme, host, port, positive(timeout=timeout))
        self._attempts, self._backoff = positive_int(attempts=attempts), positive(backoff=backoff)
        self.concurrency = positive_int(concurrency=concurrency)
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()
        self._stopping = threading.Event()
        self._finalizer = weakref.finalize(self, _close_all, self._idle)

    def ask(self, question: dict[str, Any], *, most_bytes: int) -> Any:
        """Sends a question as JSON and returns the answer's JSON.

        Args:
            question: Sent by POST.
            most_bytes: A longer answer is refused unread.

        Raises:
            VendorUnreachableError: If every attempt failed; names the address and the number of attempts.
            VendorRefusedError: If the server refuses (4xx) or redirects; `UnsuitableError` where it is the question's
                form.
            ProtocolError: If the answer is too long or no JSON.
        """
        body = json.dumps(question, allow_nan=False).encode()
        cause, wait = "", 0.0
        for attempt in range(self._attempts):
            pause = max(min(self._backoff * 2 ** (attempt - 1), LONGEST_PAUSE), wait) if attempt else 0.0
            if self._stopping.wait(pause):
                break
            try:
                status, wait, content = self._attempt(body, most_bytes)
            except _BROKEN as error:
                cause, wait = type(error).__name__, 0.0
                continue
            if status == 200:
                return self._parsed(content)
            if status not in _PASSING and status < 500:
                kind = UnsuitableError if status in _UNSUITABLE else VendorRefusedError
                raise kind(f"{self.address} refused the question with HTTP {status}; {_advice(status)}")
            cause = f"HTTP {status}"
        raise VendorUnreachableError(
            f"no answer from {self.address} in {self._attempts} attempts (last: {cause}); when it is back, repeat the"
            " command"
        )

    def in_order(self, items: Iterable[Item], ask: Callable[[Item], Answer]) -> Iterator[Answer]:
        """`ask` of each item, several at once, answers in order; at most twice `concurrency` are held."""
        pending: deque[Future[Answer]] = deque()
        pool = ThreadPoolExecutor(self.concurrency)
        self._stopping.clear()
        try:
            for item in items:
                if len(pending) >= 2 * self.concurrency:
                    yield pending.popleft().result()
                pending.append(pool.submit(ask, item))
            while pending:
                yield pending.popleft().result()
        except BaseException:
            self._stopping.set()  # or the others would wait through all their attempts
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stopping.clear()

    def close(self) -> None:
        """Closes the kept connections."""
        _close_all(self._idle)

    def _attempt(self, body: bytes, most_bytes: int) -> tuple[int, float, bytes]:
        """(status, seconds that the server asks to wait, content) of one exchange."""
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = self._connect()
        try:
            response = self._exchange(connection, body)
            content = response.read(most_bytes + 1)
            if response.status == 200 and len(content) > most_bytes:
                raise ProtocolError(_MORE_THAN_ENOUGH.format(self.address, most_bytes // 10**6 or 1))
            if response.status == 200 and response.length:
                raise http.client.IncompleteRead(content, response.length)
            wait = _seconds(response.getheader("Retry-After"))
            reusable = response.isclosed() and not response.will_close
        except BaseException:
            connection.close()
            raise
        if reusable:
            self._idle.put(connection)
        else:
            response.close()
            connection.close()
        return response.status, wait, content

    def _exchange(self, connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
        """A kept connection that the server has closed meanwhile is opened again once: that is no failure."""
        fresh = connection.sock is None
        try:
            connection.request("POST", self._target, body, self._headers)
            return connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            if fresh:
                raise
            connection.close()
            connection.request("POST", self._target, body, self._headers)
            return connection.getresponse()

    def _parsed(self, content: bytes) -> Any:
        try:
            return orjson.loads(content)
        except ValueError:
            raise ProtocolError(f"the answer of {self.address} is no JSON; is it the right address?") from None


def _secret(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise InputError(f"the environment variable {variable} must hold the API key and is empty or not set")
    if not value.isascii() or not value.isprintable():
        raise InputError(f"the API key in the environment variable {variable} has characters that no header can carry")
    return value


def _this_machine(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _connector(scheme: str, host: str, port: int | None, timeout: float) -> Callable[[], http.client.HTTPConnection]:
    if scheme == "https":
        context = ssl.create_default_context()
        return lambda: http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    return lambda: http.client.HTTPConnection(host, port, timeout=timeout)


def _close_all(idle: queue.LifoQueue[http.client.HTTPConnection]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            idle.get_nowait().close()


def _seconds(header: str | None) -> float:
    """Retry-After in seconds; a date counts as none."""
    return min(float(header), LONGEST_PAUSE) if header and header.isascii() and header.isdigit() else 0.0


def _advice(status: int) -> str:
    if status in (401, 403):
        return "is the key right?"
    if status in _UNSUITABLE:
        return "it does not take such a question: token ids as prompt, or so many tokens or log-probabilities"
    return "is it the right address?"
