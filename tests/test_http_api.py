"""A model behind HTTP tells what the local one tells; and whatever goes wrong on the way is one clear line."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from api_server import Api, Change, planted, serve
from tiny import VOCAB, model_of, tiny_config, tiny_model
from tiny_text import EOS, causal_tokenizer
from veiltune.audit.blackbox import BlackBox
from veiltune.audit.http_api import CompletionsApi, HttpApi, NextTokenApi, open_api
from veiltune.audit.local_model import LocalModel
from veiltune.audit.sampling_text import greedy, sample
from veiltune.audit.token_names import TokenNames
from veiltune.audit.tracing import trace
from veiltune.errors import InputError, ProtocolError, VendorError, VendorRefusedError, VendorUnreachableError

TOKENIZER = causal_tokenizer()
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, VOCAB, size=length).tolist() for length in (5, 12, 2, 9, 20)]
QUICK: dict[str, Any] = {"context": 64, "attempts": 3, "backoff": 0.01, "timeout": 5.0}


@pytest.fixture(scope="module")
def local() -> LocalModel:
    return LocalModel(tiny_model("gpt2", "causal"), TOKENIZER)


@pytest.fixture
def api(local: LocalModel) -> Iterator[Api]:
    with serve(local, TOKENIZER) as running:
        yield running


def vectors_of(api: Api, **options: Any) -> HttpApi:
    return open_api(f"{api.url}/v1/next-token", tokenizer=TOKENIZER, **QUICK | options)


def completions_of(api: Api, **options: Any) -> HttpApi:
    return open_api(f"{api.url}/v1/completions", tokenizer=TOKENIZER, **QUICK | options)


def test_whole_vectors_equal_the_local_models(api: Api, local: LocalModel) -> None:
    with vectors_of(api, model="mine") as box:
        assert isinstance(box, NextTokenApi) and box.full_vectors and (box.vocabulary, box.name) == (VOCAB, "mine")
        for far, near in zip(box.along(SEQUENCES), local.along(SEQUENCES), strict=True):
            assert np.allclose(far, near, atol=1e-5)
        many = SEQUENCES * 30  # several questions
        assert np.allclose(box.next_token_log_probs(many), local.next_token_log_probs(many), atol=1e-5)
        assert api.most_in_flight <= 4
        assert np.allclose(
            box.suffix_log_probs([1, 2], SEQUENCES), local.suffix_log_probs([1, 2], SEQUENCES), atol=1e-4
        )
        assert sample(box, SEQUENCES, new_tokens=5, eos=EOS, seed=0) == sample(
            local, SEQUENCES, new_tokens=5, eos=EOS, seed=0
        )
        far_trace, near_trace = trace(box, SEQUENCES)[1].trace, trace(local, SEQUENCES)[1].trace
        assert np.allclose(far_trace.deviations, near_trace.deviations, atol=1e-4)
        assert box.next_token_log_probs([]).shape == (0, VOCAB)
    assert api.connections <= 6  # kept, not one a question
    assert all(set(question) == {"prompt_ids"} for question in api.questions)


def test_null_is_probability_zero(api: Api) -> None:
    def silence(answer: Any) -> Any:
        answer["log_probs"] = [[0.0, -1e300, *[None] * (VOCAB - 2)] for _ in answer["log_probs"]]
        return answer

    api.spoil = silence
    with vectors_of(api) as box:
        vector = box.next_token_log_probs([[1]])[0]
        assert vector[0] == 0.0 and np.isneginf(vector[1:]).all()  # float32 takes e to the -1e300 for zero, too


@pytest.mark.parametrize(
    ("names", "echo"),
    [("text", True), ("piece", True), ("id", True), ("text", False), ("content", False)],  # llama.cpp has no echo
)
def test_the_most_likely_tokens_equal_the_local_models(api: Api, local: LocalModel, names: str, echo: bool) -> None:
    api.names, api.echo = names, echo
    with completions_of(api, top=6) as box:
        assert isinstance(box, CompletionsApi) and box.echo == echo and box.top_tokens == 6 and not box.full_vectors
        asked = len(api.questions)
        for text, far, near in zip(SEQUENCES, box.along(SEQUENCES), local.along(SEQUENCES), strict=True):
            known = ~np.isnan(far)
            for row, (token, tells, vector) in enumerate(zip(text[1:], known, near, strict=True)):
                best = set(np.argsort(-vector, kind="stable")[:6].tolist())
                assert set(np.flatnonzero(tells).tolist()) == (best | {token} if echo else best), row
            assert np.allclose(far[known], near[known], atol=1e-5)
        assert len(api.questions) - asked == (5 if echo else sum(len(text) - 1 for text in SEQUENCES))
        traced = trace(box, SEQUENCES)
        exact = [one.trace for one in trace(local, SEQUENCES)]
        for one, near in zip(traced, exact, strict=True):
            assert one.trace.hits.tolist() == near.hits.tolist()
            assert np.isnan(one.trace.means).all() and np.isnan(one.top_k_log_probs).all()
            assert np.allclose(one.trace.log_probs[one.exact], near.log_probs[one.exact], atol=1e-5)
            assert (one.trace.log_probs >= near.log_probs - 1e-5).all()  # an upper limit elsewhere
        assert all(one.exact.all() for one in traced) == echo
        suffixes = [text[:4] for text in SEQUENCES]
        limit = box.suffix_log_probs([1, 2], suffixes) - local.suffix_log_probs([1, 2], suffixes)
        assert np.allclose(limit, 0.0, atol=1e-4) if echo else (limit >= -1e-4).all()
        assert [text.tokens for text in greedy(box, SEQUENCES, new_tokens=4, eos=EOS)] == [
            text.tokens for text in greedy(local, SEQUENCES, new_tokens=4, eos=EOS)
        ]
        assert sample(box, SEQUENCES, new_tokens=3, eos=EOS, seed=0, top_k=6) == sample(
            local, SEQUENCES, new_tokens=3, eos=EOS, seed=0, top_k=6
        )
        with pytest.raises(InputError, match="tells the 6 most likely tokens only"):
            sample(box, SEQUENCES, new_tokens=3, eos=EOS, seed=0)


@pytest.mark.parametrize("echo", [True, False])
def test_a_server_may_leave_out_the_token_that_ends_a_text(api: Api, local: LocalModel, echo: bool) -> None:
    """With echo it is not needed; without, every second answer is empty and the question is put again."""
    asked = 0

    def ended(answer: dict[str, Any]) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        told = answer["choices"][0]["logprobs"]
        short = {name: values[:-1] for name, values in told.items()}
        return {"choices": [{"index": 0, "logprobs": short if len(told["tokens"]) > 1 or asked % 2 else told}]}

    api.echo, api.spoil = echo, ended
    with completions_of(api, top=6) as box:
        assert isinstance(box, CompletionsApi) and box.echo == echo
        for far, near in zip(box.along(SEQUENCES), local.along(SEQUENCES), strict=True):
            known = ~np.isnan(far)
            assert known.any(axis=1).all() and np.allclose(far[known], near[known], atol=1e-5)
    api.spoil = lambda answer: {"choices": [{"logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": []}}]}
    with pytest.raises(ProtocolError, match="tells 0 positions"):
        completions_of(api)


def test_a_strict_server_is_asked_in_the_form_that_it_takes(api: Api) -> None:
    api.strict = True
    with completions_of(api, model="tuned", top=3) as box:
        assert isinstance(box, CompletionsApi) and not box.echo
        box.next_token_log_probs([[1, 2]])
    assert api.questions[-1] == {
        "model": "tuned", "prompt": [1, 2], "max_tokens": 1, "logprobs": 3, "temperature": 1.0
    }  # fmt: skip


def test_the_longest_text(api: Api, local: LocalModel) -> None:
    """With echo one place of the context goes to the new token."""
    text = RNG.integers(0, VOCAB, size=65).tolist()
    for echo in (True, False):
        api.echo = echo
        with completions_of(api) as box:
            assert box.context == 64 - echo
            assert len(next(box.along([text[: box.context + 1]]))) == box.context
            with pytest.raises(InputError, match=f"2 to {box.context + 1} tokens"):
                list(box.along([[*text, 1]]))


def test_passing_failures_are_asked_again(api: Api, local: LocalModel) -> None:
    with vectors_of(api) as box:
        wanted = local.next_token_log_probs(SEQUENCES)
        for failures in ([429], [503, 0], [500, 502]):
            api.failures = list(failures)
            before = len(api.questions)
            assert np.allclose(box.next_token_log_probs(SEQUENCES[:1]), wanted[:1], atol=1e-5)
            assert len(api.questions) - before == 1 + len(failures)
    api.closes = True  # the server ends kept connections: that is no failed attempt
    with vectors_of(api, attempts=1) as box:
        for _ in range(4):
            assert np.allclose(box.next_token_log_probs(SEQUENCES[:1]), wanted[:1], atol=1e-5)


def test_a_server_may_say_when(api: Api) -> None:
    with vectors_of(api, backoff=0.001) as box:
        api.failures, api.headers = [429], {"Retry-After": "1"}
        began = time.monotonic()
        box.next_token_log_probs([[1]])
        assert 1.0 <= time.monotonic() - began < 3.0


def test_a_dead_api_ends_the_audit_so_that_it_resumes(api: Api) -> None:
    """The trace stops where the server died, with exit code 4, and goes on from there when it is back."""
    seen: list[int] = []
    with completions_of(api) as box:
        api.dies_after = len(api.questions) + 2
        with pytest.raises(VendorUnreachableError, match=r"no answer from http://127\S+ in 3 attempts") as caught:
            trace(box, SEQUENCES, progress=seen.append)
        assert caught.value.exit_code == 4 and isinstance(caught.value, VendorError) and "\n" not in str(caught.value)
        assert seen and seen[-1] < len(SEQUENCES)
        api.dies_after = None
        rest = trace(box, SEQUENCES[seen[-1] :])
        assert len(rest) == len(SEQUENCES) - seen[-1]
    assert threading.active_count() < 20


def test_no_server_at_all() -> None:
    with serve(LocalModel(tiny_model("gpt2", "causal"), TOKENIZER), TOKENIZER) as gone:
        pass
    with pytest.raises(VendorUnreachableError, match=r"in 3 attempts \(last: ConnectionRefusedError\)"):
        vectors_of(gone)


def test_a_silent_server_times_out(api: Api) -> None:
    with vectors_of(api, timeout=0.2, attempts=2) as box, api.lock:  # it takes the question and does not answer
        began = time.monotonic()
        with pytest.raises(VendorUnreachableError, match=r"2 attempts \(last: TimeoutError\)"):
            box.next_token_log_probs([[1]])
        assert time.monotonic() - began < 3.0


def test_half_an_answer_is_asked_for_again(api: Api) -> None:
    with vectors_of(api) as box:
        api.cut = 100
        with pytest.raises(VendorUnreachableError, match="IncompleteRead"):
            box.next_token_log_probs([[1]])


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "HTTP 401; is the key right"),
        (404, "HTTP 404; is it the right address"),
        (307, "HTTP 307; is it the right address"),
        (400, "does not take such a question"),
    ],
)
def test_a_refusal_is_not_repeated(api: Api, status: int, message: str) -> None:
    with vectors_of(api) as box:
        before = len(api.questions)
        api.failures, api.headers = [status], {"Location": "http://127.0.0.1:1/elsewhere"}
        with pytest.raises(VendorRefusedError, match=message) as caught:
            box.next_token_log_probs([[1]])
        assert len(api.questions) == before + 1
        assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)


FIRST = ("log_probs", 0, 3)
VECTOR_GARBAGE: list[tuple[Change, str]] = [
    (lambda answer: b"<html>hello</html>", "is no JSON"),
    (lambda answer: b"[" * 50_000, "is no JSON"),
    (lambda answer: b"\xff\xfe", "is no JSON"),
    (lambda answer: [], "no log_probs with one list a prompt"),
    (lambda answer: {"log_probs": []}, "no log_probs with one list a prompt"),
    (lambda answer: {"log_probs": answer["log_probs"] * 2}, "no log_probs with one list a prompt"),
    (lambda answer: {"log_probs": [row[:-1] for row in answer["log_probs"]]}, "127"),
    (lambda answer: {"log_probs": [[*row, -50.0] for row in answer["log_probs"]]}, "129"),
    (planted(float("nan"), FIRST), "is no JSON"),
    (planted(float("inf"), FIRST), "is no JSON"),
    (planted(0.5, FIRST), "must be at most 0"),
    (planted(10**400, FIRST), "is no JSON"),
    (planted("-1.0", FIRST), "no number"),
    (planted(True, FIRST), "no number"),
    (planted([], FIRST), "no number"),
    (planted(-0.001, FIRST), "must add up to 1"),
    (lambda answer: answer | {"more": "x" * 200_000}, "larger than"),
]


@pytest.mark.parametrize(("change", "message"), VECTOR_GARBAGE)
def test_garbage_instead_of_vectors_is_refused(api: Api, change: Change, message: str) -> None:
    with vectors_of(api) as box:
        api.spoil = change
        with pytest.raises(ProtocolError, match=message) as caught:
            box.next_token_log_probs([[1, 2]])
        assert caught.value.exit_code == 4 and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def in_logprobs(change: Callable[[dict[str, Any]], Any]) -> Change:
    def spoil(answer: Any) -> Any:
        told = answer["choices"][0]["logprobs"]
        change(told)
        return answer

    return spoil


def rename(told: dict[str, Any]) -> None:
    told["top_logprobs"] = [
        row and {f"no such {name}": value for name, value in row.items()} for row in told["top_logprobs"]
    ]


def shift(told: dict[str, Any]) -> None:
    told["tokens"] = [told["tokens"][-1], *told["tokens"][:-1]]


def set_first(name: str, value: Any) -> Change:
    def change(told: dict[str, Any]) -> None:
        column = list(told[name])
        column[1] = value
        told[name] = column

    return in_logprobs(change)


TOP_GARBAGE: list[tuple[Change, str]] = [
    (lambda answer: b"nothing", "is no JSON"),
    (lambda answer: None, "no log-probabilities"),
    (lambda answer: {"choices": []}, "no log-probabilities"),
    (planted(None, ("choices", 0, "logprobs")), "no log-probabilities"),
    (in_logprobs(lambda told: told.pop("tokens")), "no log-probabilities"),
    (in_logprobs(lambda told: told.update(tokens=told["tokens"][1:])), "no log-probabilities"),
    (in_logprobs(lambda told: told.update({name: column[1:] for name, column in told.items()})), "repeats other"),
    (in_logprobs(lambda told: told.update({name: column[2:] for name, column in told.items()})), "tells 4 positions"),
    (in_logprobs(rename), "names a token that the tokenizer does not know"),
    (in_logprobs(shift), "repeats other tokens"),
    (set_first("token_logprobs", None), "no number of at most 0"),
    (set_first("token_logprobs", float("nan")), "is no JSON"),
    (set_first("token_logprobs", 0.7), "no number of at most 0"),
    (set_first("top_logprobs", None), "tells 0 of the 5 tokens"),
    (set_first("top_logprobs", {"a": -1.0}), "tells 1 of the 5 tokens"),
    (set_first("top_logprobs", dict.fromkeys("abcde", -0.1)), "must add up to 1"),
    (lambda answer: answer | {"more": "x" * 200_000}, "larger than"),
]


@pytest.mark.parametrize(("change", "message"), TOP_GARBAGE)
def test_garbage_instead_of_the_most_likely_is_refused(api: Api, change: Change, message: str) -> None:
    with completions_of(api) as box:
        api.spoil = change
        with pytest.raises(ProtocolError, match=message) as caught:
            list(box.along([SEQUENCES[0]]))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_another_tokenizer_is_noticed(local: LocalModel) -> None:
    config = tiny_config("gpt2")
    config.vocab_size = 100
    small = model_of(config, "causal")

    class Small(BlackBox):
        name, vocabulary, context, digest = "small", 100, 64, ""
        inner = LocalModel.__new__(LocalModel)

        def next_token_log_probs(self, prefixes: Any) -> Any:
            import torch

            with torch.inference_mode():
                rows = [small(input_ids=torch.tensor([prefix])).logits[0, -1].log_softmax(-1) for prefix in prefixes]
            return torch.stack(rows).numpy()

    with serve(Small(), TOKENIZER) as api, pytest.raises(InputError, match="knows 100 tokens and the tokenizer 128"):
        vectors_of(api)
    with serve(local, TOKENIZER) as api, completions_of(api) as box, pytest.raises(InputError, match="outside"):
        box.next_token_log_probs([[128]])


def test_a_server_that_begins_texts_itself_is_noticed(api: Api) -> None:
    def begun(told: dict[str, Any]) -> None:
        for name, column in told.items():
            told[name] = [column[0], *column]

    api.spoil = in_logprobs(begun)
    with pytest.raises(ProtocolError, match="tokens of its own"):
        completions_of(api)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    api: Api, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_API_KEY", "sk-very-secret")
    with vectors_of(api, key="TEST_API_KEY") as box:
        assert api.seen_headers[-1]["Authorization"] == "Bearer sk-very-secret"
        api.failures = [401]
        with pytest.raises(VendorRefusedError) as caught:
            box.next_token_log_probs([[1]])
        told = (
            str(caught.value)
            + repr(box)
            + repr(vars(box)["_client"].address)
            + box.digest
            + "".join(capfd.readouterr())
        )
        assert "sk-very-secret" not in told
    with vectors_of(api):
        assert "Authorization" not in api.seen_headers[-1]
    monkeypatch.setenv("TEST_API_KEY", " ")
    with pytest.raises(InputError, match="environment variable TEST_API_KEY must hold the API key"):
        vectors_of(api, key="TEST_API_KEY")
    monkeypatch.setenv("TEST_API_KEY", "a\r\nHost: b")
    with pytest.raises(InputError, match="no header can carry") as refused:
        vectors_of(api, key="TEST_API_KEY")
    assert "Host" not in str(refused.value)
    monkeypatch.setenv("TEST_API_KEY", "sk-very-secret")
    with pytest.raises(InputError, match=r"would go in clear to http://models\.example/v1/next-token; use"):
        open_api("http://models.example/v1/next-token?user=me", tokenizer=TOKENIZER, key="TEST_API_KEY")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost/v1/chat/completions", "must end in"),
        ("http://localhost/", "must end in"),
        ("ftp://localhost/v1/completions", r"must be http\(s\)"),
        ("http://me:pass@localhost/v1/completions", "without a user name"),
        ("http://localhost:99999/v1/completions", r"must be http\(s\)"),
        ("http:///v1/completions", r"must be http\(s\)"),
    ],
)
def test_addresses(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_api(url, tokenizer=TOKENIZER, **QUICK)
    assert "pass@" not in str(caught.value)


def test_numbers_are_checked(api: Api) -> None:
    for option, value in (
        ("top", 0),
        ("top", 5000),
        ("timeout", 0.0),
        ("attempts", 0),
        ("concurrency", 0),
        ("context", 0),
    ):
        with pytest.raises(InputError, match=f"{option} must be"):
            completions_of(api, **{option: value})


def test_connections_are_closed_when_forgotten(api: Api) -> None:
    box = vectors_of(api)
    client = box._client
    assert client._idle.qsize() == 1
    idle = client._idle
    del box, client
    gc.collect()
    assert idle.qsize() == 0


def test_the_digest_is_of_address_and_name(api: Api) -> None:
    with vectors_of(api) as one, vectors_of(api) as same, vectors_of(api, model="b") as other:
        assert one.digest == same.digest != other.digest and len(one.digest) == 64


def test_questions_run_side_by_side(api: Api) -> None:
    with completions_of(api, concurrency=3) as box:
        api.echo = True
        list(box.along(SEQUENCES * 6))
        assert 1 < api.most_in_flight <= 3


def byte_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level one without merges: tokens that are half a character decode to the same replacement mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: i for i, letter in enumerate(alphabet, start=1)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_a_name_that_several_tokens_share_is_no_name(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    names = TokenNames(tokenizer)
    half, other = tokenizer("\u4e2d", add_special_tokens=False)["input_ids"][:2]
    mark = tokenizer.decode([half])
    assert mark == tokenizer.decode([other]) == "\ufffd"
    assert names.find({"token": mark}) is None
    assert names.find({"token": mark}, expected=half) == half  # the prompt's own token is known
    assert names.find({"token": mark}, expected=tokenizer("a")["input_ids"][0]) is None
    assert names.find({"token": tokenizer.convert_ids_to_tokens(half)}) == half
    assert names.find({"token": f"token_id:{half}"}) == half
    assert names.find({"token": mark, "id": other}) == other
    for name in ({"token": "token_id:999999"}, {"token": "nonsense"}, {"id": -1}, {"id": 10**6}, {"token": 7}, {}):
        assert names.find(name) is None
    assert [names.find({"token": tokenizer.decode([i])}) for i in tokenizer("a b")["input_ids"]] == tokenizer("a b")[
        "input_ids"
    ]
