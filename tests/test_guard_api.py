"""The API over real sockets: the audit's own clients, hostile requests, keys, rates, budgets."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard_server import ask, serving
from tiny import VOCAB, tiny_model
from tiny_text import causal_tokenizer
from veiltune.audit.http_api import CompletionsApi, NextTokenApi
from veiltune.audit.local_model import LocalModel
from veiltune.errors import InputError
from veiltune.guard.decoding import Guard
from veiltune.guard.door import Door
from veiltune.guard.keys import Keys, new_key
from veiltune.guard.limits import Budget, RateLimit
from veiltune.guard.protected import ProtectedStrings
from veiltune.guard.vectors import Shape
from veiltune.guard.vocabulary import Vocabulary

TEXTS = [[5, 17, 80], [5], [9, 44, 63, 7, 101, 33]]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(max_prompts=20, max_new_tokens=30) as number:
        yield number


@pytest.fixture(scope="module")
def box() -> LocalModel:
    return LocalModel(tiny_model("gpt2", "causal"), causal_tokenizer(), name="tiny")


def test_the_audit_sees_the_same_numbers_through_next_token(port: int, box: LocalModel) -> None:
    url = f"http://127.0.0.1:{port}/v1/next-token"
    with NextTokenApi(url, tokenizer=causal_tokenizer(), context=box.context) as api:
        assert api.vocabulary == VOCAB
        np.testing.assert_allclose(api.next_token_log_probs(TEXTS), box.next_token_log_probs(TEXTS), atol=1e-5)
        np.testing.assert_allclose(
            api.suffix_log_probs([5, 6], [[7, 8], [9]]), box.suffix_log_probs([5, 6], [[7, 8], [9]]), atol=1e-4
        )


def test_the_audit_sees_the_same_numbers_through_completions(port: int, box: LocalModel) -> None:
    url = f"http://127.0.0.1:{port}/v1/completions"
    with CompletionsApi(url, tokenizer=causal_tokenizer(), top=7, context=box.context) as api:
        assert api.echo and api.top_tokens == 7
        for mine, whole in zip(api.next_token_log_probs(TEXTS), box.next_token_log_probs(TEXTS), strict=True):
            known = ~np.isnan(mine)
            assert known.sum() == 7 and set(np.flatnonzero(known)) == set(np.argsort(-whole)[:7])
            np.testing.assert_allclose(mine[known], whole[known], atol=1e-5)
        texts = [text for text in TEXTS if len(text) > 1]
        for text, mine, whole in zip(texts, api.along(texts), box.along(texts), strict=True):
            rows = np.arange(len(text) - 1)
            np.testing.assert_allclose(mine[rows, text[1:]], whole[rows, text[1:]], atol=1e-5)


def test_texts_top_k_and_raw(port: int, box: LocalModel) -> None:
    tokenizer = causal_tokenizer()
    ids = tokenizer("Ann")["input_ids"]
    (expected,) = np.exp(box.next_token_log_probs([ids]))
    for prompt in ("Ann", ["Ann"]):
        status, _, content = ask(port, "/v1/next-token", {"prompt": prompt})
        assert status == 200
        np.testing.assert_allclose(content["probs"][0], expected, atol=1e-6)
    (top,) = ask(port, "/v1/next-token", {"prompt": "Ann", "top_k": 3})[2]["top"]
    assert [one["id"] for one in top] == np.argsort(-expected)[:3].tolist()
    assert top[0]["token"] == tokenizer.decode([top[0]["id"]]) and top[0]["prob"] == pytest.approx(expected.max())
    _, headers, raw = ask(port, "/v1/next-token", {"prompt_ids": [ids, ids]}, Accept="application/octet-stream")
    rows = np.frombuffer(raw, dtype="<f2").reshape([int(n) for n in headers["x-shape"].split(",")])
    np.testing.assert_allclose(rows, np.log([expected, expected]), rtol=2e-3)


def test_completions_text_echo_stop_seed_and_stream(port: int) -> None:
    question: dict[str, Any] = {"prompt": "Ann", "max_tokens": 12, "seed": 4}
    first = ask(port, "/v1/completions", question)[2]
    text = first["choices"][0]["text"]
    assert first["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15} and text
    assert ask(port, "/v1/completions", question)[2]["choices"] == first["choices"]
    assert ask(port, "/v1/completions", question | {"echo": True})[2]["choices"][0]["text"] == "Ann" + text
    stopped = ask(port, "/v1/completions", question | {"stop": [text[2:4]]})[2]["choices"][0]
    assert stopped["text"] == text[: text.find(text[2:4])] and stopped["finish_reason"] == "stop"
    for extra, whole in (({}, text), ({"stop": [text[2:4]]}, stopped["text"])):
        _, headers, events = ask(port, "/v1/completions", question | {"stream": True} | extra)
        assert headers["content-type"].startswith("text/event-stream")
        *parts, done = [line[6:] for line in events.decode().split("\n\n") if line]
        assert done == "[DONE]" and "".join(json.loads(part)["choices"][0]["text"] for part in parts) == whole
    none = ask(port, "/v1/completions", {"prompt": [[5, 6]], "max_tokens": 0, "echo": True, "logprobs": 2})[2]
    assert none["usage"]["completion_tokens"] == 0 and len(none["choices"][0]["logprobs"]["tokens"]) == 2


def test_log_probabilities_of_the_drawn_tokens_only(port: int) -> None:
    question = {"prompt": "a", "max_tokens": 3, "seed": 1, "temperature": 0.7}
    (told,) = ask(port, "/v1/completions", question | {"logprobs": 0})[2]["choices"]
    (more,) = ask(port, "/v1/completions", question | {"logprobs": 2})[2]["choices"]
    assert told["logprobs"]["top_logprobs"] == [{}] * 3
    assert told["logprobs"]["token_logprobs"] == more["logprobs"]["token_logprobs"]


def test_a_streamed_text_shorter_than_its_stop_text_waits_for_it(port: int) -> None:
    """It is sent at the end only, when it is known not to be the beginning of the stop text."""
    question = {"prompt": "a", "max_tokens": 30, "seed": 3}
    (whole,) = ask(port, "/v1/completions", question)[2]["choices"]
    for length in (2, 5, len(whole["text"]) - 1):
        stop = whole["text"][:length]
        for streamed in (False, True):
            content = ask(port, "/v1/completions", question | {"stop": stop, "stream": streamed})[2]
            if streamed:
                parts = [line[6:] for line in content.decode().split("\n\n") if line][:-1]
                assert "".join(json.loads(part)["choices"][0]["text"] for part in parts) == ""
            else:
                assert content["choices"][0]["text"] == ""


def test_pages_about_the_server(port: int) -> None:
    assert ask(port, "/healthz")[2] == {"status": "ok"}
    (one,) = ask(port, "/v1/models")[2]["data"]
    assert (one["id"], one["vocabulary"]) == ("tiny", VOCAB)
    described = ask(port, "/openapi.json")[2]
    assert {"/v1/next-token", "/v1/completions"} <= set(described["paths"])
    assert ask(port, "/docs")[0] == 404  # it would load scripts from the net
    status, headers, page = ask(port, "/")
    assert (
        status == 200
        and b"http" not in page.replace(b"http-equiv", b"")
        and "default-src 'none'" in headers["content-security-policy"]
    )
    ask(port, "/v1/next-token", {"prompt": "Zebra"})
    told = ask(port, "/metrics")[2].decode()
    assert 'veiltune_requests_total{endpoint="/v1/next-token",status="200"}' in told and "Zebra" not in told
    assert 'endpoint="other",status="404"' in told


SECRET = "Zanzibar"
HOSTILE: list[tuple[Any, int]] = [
    (b"{", 400),
    (b"", 400),
    (b"[" * 100_000, 400),
    (b'{"prompt": "Zanzibar"', 400),
    (b'{"prompt": "\xff\xfe Zanzibar"}', 400),
    (b'{"prompt_ids": [[NaN]]}', 400),
    (b'{"prompt_ids": [[Infinity]]}', 400),
    (b'{"prompt": "\\ud800 Zanzibar"}', 400),
    ([], 400),
    ({}, 400),
    ({"prompt": SECRET, "prompt_ids": [[5]]}, 400),
    ({"prompt": SECRET, "Zanzibar": 1}, 400),
    ({"prompt_ids": []}, 400),
    ({"prompt_ids": [[]]}, 400),
    ({"prompt_ids": [["Zanzibar"]]}, 400),
    ({"prompt_ids": [[True]]}, 400),
    ({"prompt_ids": [[1.5]]}, 400),
    ({"prompt_ids": [[VOCAB]]}, 400),
    ({"prompt_ids": [[-1]]}, 400),
    ({"prompt_ids": [[2**70]]}, 400),
    ({"prompt_ids": [[5] * 65]}, 400),
    ({"prompt_ids": [[5]] * 21}, 400),
    ({"prompt": SECRET, "top_k": 0}, 400),
    ({"prompt": SECRET * 200_000}, 413),
]


@pytest.mark.parametrize(("body", "status"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_questions(port: int, body: Any, status: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        found, _, content = ask(port, "/v1/next-token", body)
    assert found == status
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type"}
    assert "\n" not in content["error"]["message"] and SECRET not in json.dumps(content) + caplog.text
    assert ask(port, "/healthz")[0] == 200


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 31}, {"max_tokens": 0}, {"max_tokens": -1}, {"temperature": -0.1}, {"temperature": "1"},
        {"top_p": 0}, {"n": 2}, {"stop": ["a"] * 5}, {"stop": ""}, {"stream": True, "logprobs": 1}, {"prompt": []},
        {"prompt": ["a", "b"]}, {"prompt": [5, "a"]}, {"seed": -1}, {"logprobs": 1001}, {"prompt": [5] * 50},
        {"suffix": "x"}, {"presence_penalty": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_completions_that_are_refused(port: int, change: dict[str, Any]) -> None:
    question = {"prompt": "Ann", "max_tokens": 20} | change
    status, _, content = ask(port, "/v1/completions", question)
    assert status == 400 and content["error"]["type"] == "invalid"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be greater than or equal to 0"),
        ({"max_tokens": 31}, "max_tokens must be 1 to 30, or 0 with echo, got 31"),
        ({"temperature": "1"}, "temperature must be a valid number"),
        ({"model": SECRET * 60}, "model must have at most 256 characters"),
        ({"prompt": [5, SECRET]}, "prompt has a wrong type or is out of range; it takes: a text or its token ids; several are refused"),  # noqa: E501
    ],
    ids=range(5),
)  # fmt: skip
def test_a_refusal_says_what_a_field_takes(port: int, change: dict[str, Any], message: str) -> None:
    assert ask(port, "/v1/completions", {"prompt": "Ann"} | change)[2]["error"]["message"] == message


def test_an_empty_list_of_prompts_is_refused_in_our_words(port: int) -> None:
    message = ask(port, "/v1/next-token", {"prompt_ids": []})[2]["error"]["message"]
    assert message == "prompt_ids must have at least 1 item, not 0"


def test_other_addresses_methods_and_kinds_of_body(port: int) -> None:
    assert ask(port, "/v1/Zanzibar", {})[0] == 404
    status, headers, content = ask(port, "/v1/next-token")
    assert (status, headers["allow"], content["error"]["message"]) == (405, "POST", "POST is wanted here")
    status, _, content = ask(port, "/v1/next-token", b"prompt=a", Content_Type="text/plain")
    assert status == 415 and content["error"]["type"] == "not_json"


def slow(port: int, sent: bytes) -> bytes:
    """What comes back, until the server closes, when the rest of a request does not come."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(4096), b""))


def test_slow_requests_are_closed_and_nobody_waits_for_them() -> None:
    head = b"POST /v1/next-token HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    with serving(door=Door(read_seconds=0.5), patience=1.0) as port:
        answers: dict[int, bytes] = {}
        kinds = [head[:30], head + b"\r\n" + b'{"prompt', b""]
        threads = [
            threading.Thread(target=lambda i=i: answers.update({i: slow(port, kinds[i % 3])})) for i in range(30)
        ]
        for thread in threads:
            thread.start()
        assert ask(port, "/v1/next-token", {"prompt": "a"})[0] == 200
        for thread in threads:
            thread.join(20)
        assert len(answers) == 30
        assert all(answer.startswith(b"HTTP/1.1 408 ") and b'"too_slow"' in answer for answer in answers.values())
        again = socket.create_connection(("127.0.0.1", port), timeout=20)  # a kept connection may not dawdle either
        with again:
            again.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert again.recv(4096).startswith(b"HTTP/1.1 200")
            again.sendall(b"GET /heal")
            assert b"".join(iter(lambda: again.recv(4096), b"")).find(b" 408 ") >= 0


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice, bob = new_key(file, "alice"), new_key(file, "bob")
    assert alice not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    keys = Keys(file)
    assert keys.owner(f"Bearer {alice}") == "alice" and keys.owner(f"bearer {bob}") == "bob"
    for wrong in ("", alice, f"Basic {alice}", f"Bearer {alice}x", "Bearer ", "Bearer é", "Bearer " + "a" * 9999):
        assert keys.owner(wrong) is None
    for name in ("alice", "", "Alice", "a b", "../x"):
        with pytest.raises(InputError):
            new_key(file, name)
    file.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        Keys(file)
    file.chmod(0o600)
    file.write_text('{"name": "x"}\n')
    with pytest.raises(InputError, match="line 1"):
        Keys(file)


def test_a_key_is_revoked_by_taking_its_line_out(tmp_path: Path) -> None:
    """While the server runs; a broken file lets nobody in, a mended one those that it names."""
    file = tmp_path / "keys.jsonl"
    alice, bob = new_key(file, "alice"), new_key(file, "bob")
    keys = Keys(file)
    both = file.read_text()
    file.write_text(both.splitlines(keepends=True)[1])
    assert keys.owner(f"Bearer {alice}") is None and keys.owner(f"Bearer {bob}") == "bob"
    carol = new_key(file, "carol")
    assert keys.owner(f"Bearer {carol}") == "carol"
    file.write_text("broken")
    assert keys.owner(f"Bearer {bob}") is None
    file.unlink()
    assert keys.owner(f"Bearer {bob}") is None
    file.write_text(both)
    file.chmod(0o600)
    assert keys.owner(f"Bearer {alice}") == "alice" and keys.names == ("alice", "bob")


def test_keys_that_are_made_at_the_same_time_are_all_taken(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "keys.jsonl"
    names = [f"k{number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        made = dict(zip(names, pool.map(lambda name: new_key(file, name), names), strict=True))
    keys = Keys(file)
    assert [keys.owner(f"Bearer {key}") for key in made.values()] == names
    assert (tmp_path / "keys" / "keys.jsonl.lock").stat().st_mode & 0o777 == 0o600


def test_a_ledger_that_is_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "letters.txt"
    file.write_text("Dear Ann,\n" * 200)
    with pytest.raises(InputError, match="no ledger of budgets"):
        Budget(file, 10)
    assert file.read_text() == "Dear Ann,\n" * 200


@pytest.mark.parametrize("path", ["/v1/next-token", "/v1/completions"])
def test_another_models_name_is_not_found(path: str, port: int) -> None:
    name = ask(port, "/v1/models")[2]["data"][0]["id"]
    assert ask(port, path, {"prompt": "Ann", "model": name})[0] == 200
    status, _, content = ask(port, path, {"prompt": "Ann", "model": "gpt-9"})
    assert (status, content["error"]["type"]) == (404, "model_not_found")
    assert name in content["error"]["message"] and "gpt-9" not in content["error"]["message"]


def test_doors_of_a_server_with_keys_rates_and_budgets(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice, bob = new_key(file, "alice"), new_key(file, "bob")
    budget = Budget(tmp_path / "spent.sqlite", 10)
    now = [0.0]
    door = Door(keys=Keys(file), budget=budget, rate=RateLimit(rate=0.5, burst=12, clock=lambda: now[0]))
    with serving(door=door) as port:
        for key in ("", "vt-wrong"):
            status, headers, content = ask(port, "/v1/next-token", {"prompt": "a"}, key=key)
            assert (status, content["error"]["type"]) == (401, "unauthorized") and headers[
                "www-authenticate"
            ] == "Bearer"
        assert ask(port, "/v1/models")[0] == 401
        assert ask(port, "/v1/next-token", {"prompt_ids": [[5], [6]]}, key=alice)[0] == 200
        assert ask(port, "/v1/next-token", {"prompt_ids": [[VOCAB]]}, key=alice)[0] == 400
        assert budget.spent("alice") == 2
        question = {"prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 1, "echo": True}
        assert ask(port, "/v1/completions", question, key=alice)[0] == 200
        assert budget.spent("alice") == 2 + 4 + 3
        status, _, content = ask(port, "/v1/completions", question, key=alice)
        assert (status, content["error"]["type"]) == (429, "budget_exhausted")
        assert content["error"]["message"] == "the budget of this key has not the 7 queries left that this takes"
        assert ask(port, "/v1/next-token", {"prompt": "a"}, key=alice)[0] == 200
        assert ask(port, "/v1/next-token", {"prompt": "a"}, key=alice)[0] == 429
        assert budget.spent("alice") == 10
        for _ in range(12):
            assert ask(port, "/v1/models", key=bob)[0] == 200
        status, headers, content = ask(port, "/v1/models", key=bob)
        assert (status, content["error"]["type"], headers["retry-after"]) == (429, "rate_limited", "2")
        now[0] = 2.0
        assert ask(port, "/v1/models", key=bob)[0] == 200


def test_budgets_are_exact_under_parallel_requests(tmp_path: Path) -> None:
    budget = Budget(tmp_path / "spent.sqlite", 25)
    with serving(door=Door(budget=budget)) as port:
        statuses: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: statuses.extend(ask(port, "/v1/next-token", {"prompt": "a"})[0] for _ in range(5))
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(statuses) == [200] * 25 + [429] * 15
    other = Budget(tmp_path / "spent.sqlite", 30)  # a second process on the same file
    assert other.spent("anyone") == 25 and not other.charge("anyone", 6) and other.charge("anyone", 5)
    with pytest.raises(InputError):
        other.charge("anyone", 0)


def test_too_many_at_once_are_told_to_come_back() -> None:
    with serving(door=Door(concurrent=1), max_new_tokens=50) as port:
        statuses: list[tuple[int, Any]] = []
        question = {"prompt": "a", "max_tokens": 50}
        threads = [
            threading.Thread(target=lambda: statuses.append(ask(port, "/v1/completions", question)[:2]))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert {status for status, _ in statuses} == {200, 503}
    assert all(headers["retry-after"] == "1" for status, headers in statuses if status == 503)


def test_a_guarded_server_seals_vectors_and_never_writes_the_string() -> None:
    tokenizer = causal_tokenizer()
    vocabulary = Vocabulary.of(tokenizer, size=VOCAB)
    guard = Guard(vocabulary, protected=ProtectedStrings(["Jane Doe"], vocabulary), shape=Shape(top_k=110, decimals=4))
    with serving(guard=guard) as port:
        url = f"http://127.0.0.1:{port}/v1/next-token"
        with NextTokenApi(url, tokenizer=tokenizer, context=64) as api:
            ids = tokenizer("It is jane-d")["input_ids"]
            (sealed,) = api.next_token_log_probs([ids])
        letters = tokenizer.convert_tokens_to_ids(list("oexyz"))
        assert np.ptp(sealed[letters]) < 1e-6 and np.isneginf(sealed).sum() == VOCAB - 110
        answer = ask(port, "/v1/completions", {"prompt": "jane doe", "max_tokens": 1, "logprobs": 3, "echo": True})
        assert answer[0] == 200 and len(answer[2]["choices"][0]["logprobs"]["tokens"]) == 9
        assert "veiltune_positions_sealed 1.0" in ask(port, "/metrics")[2].decode()
        for head in ("It is jane d", "It is Jane Do"):  # known or guessed: the text ends all the same
            (ended,) = ask(port, "/v1/completions", {"prompt": head, "max_tokens": 5})[2]["choices"]
            assert (ended["text"], ended["finish_reason"]) == ("", "content_filter")
