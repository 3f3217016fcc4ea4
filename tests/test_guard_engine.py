"""Continuous batching: texts and vectors are those of one at a time, whoever joins or leaves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tiny import DECODERS, VOCAB, tiny_model
from tiny_text import causal_tokenizer
from veiltune.audit.local_model import LocalModel
from veiltune.errors import InputError
from veiltune.guard.decoding import Guard
from veiltune.guard.engine import Engine
from veiltune.guard.jobs import TextJob, VectorJob
from veiltune.guard.protected import ProtectedStrings
from veiltune.guard.vocabulary import Vocabulary

WAIT = 60.0


@pytest.fixture
def engine() -> Iterator[Engine]:
    with_engine = Engine(tiny_model("gpt2", "causal"), slots=3, batch_tokens=64)
    yield with_engine
    with_engine.close()


def prompts(count: int, *, seed: int = 0, longest: int = 20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", DECODERS)
def test_texts_written_together_are_those_written_alone(family: str) -> None:
    model = tiny_model(family, "causal")
    engine = Engine(model, slots=3, batch_tokens=64)
    texts = prompts(9)
    jobs = [TextJob(ids, max_tokens=1 + 3 * (n % 4), temperature=0.0) for n, ids in enumerate(texts)]
    try:
        for job in jobs:
            engine.submit(job)
        for job in jobs:
            text = job.done.result(WAIT)
            assert text.ids == alone(model, job.prompt, job.max_tokens) and text.finished == "length"
    finally:
        engine.close()
    assert engine.tokens == sum(job.max_tokens for job in jobs)


def test_vectors_and_echo_are_those_of_the_local_model(engine: Engine) -> None:
    box = LocalModel(tiny_model("gpt2", "causal"), causal_tokenizer(), name="tiny")
    texts = prompts(30, longest=40)
    found = engine.submit(VectorJob(texts)).result(WAIT)
    assert found.shape == (30, VOCAB)
    np.testing.assert_allclose(found, box.next_token_log_probs(texts), atol=1e-5)
    text = texts[1]
    answer = engine.submit(TextJob(text, max_tokens=1, temperature=0.0, logprobs=4, echo=True)).result(WAIT)
    expected = next(iter(box.along([text])))
    assert [one.token for one in answer.told] == [*text[1:], *answer.ids]
    for one, vector in zip(answer.told, expected, strict=False):
        assert one.log_prob == pytest.approx(vector[one.token], abs=1e-5)
        assert [token for token, _ in one.top] == np.argsort(-vector)[:4].tolist()


def test_a_vector_at_each_token_of_a_text_costs_one_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginnings are read off the text that they begin, in any order and with others between; the numbers are those
    of each alone."""
    first, second = prompts(2, longest=18)
    asked = [first[:n] for n in range(1, len(first) + 1)] + [second, second[:1], first, [*first[:1], 9]]
    random.Random(1).shuffle(asked)
    alone = [engine.submit(VectorJob([ids])).result(WAIT)[0] for ids in asked]
    read: list[list[int]] = []
    hidden = engine._hidden
    monkeypatch.setattr(engine, "_hidden", lambda texts: (read.extend(map(list, texts)), hidden(texts))[1])
    together = engine.submit(VectorJob(asked)).result(WAIT)
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    assert sorted(read) == sorted([first, second, [*first[:1], 9]])
    read.clear()
    for answer in [engine.submit(VectorJob([ids])) for ids in (first, first[:2])]:  # each caller has its own reading
        answer.result(WAIT)
    assert sorted(read) == sorted([first, first[:2]])


def test_the_guard_stands_behind_each_beginning_of_a_text() -> None:
    """Its state is carried from one beginning to the next: sealed are the places that are sealed for each alone."""
    tokenizer = causal_tokenizer()
    vocabulary = Vocabulary.of(tokenizer, size=VOCAB)
    guard = Guard(vocabulary, protected=ProtectedStrings(["abbaabba", "ccabccab", "babbcccc"], vocabulary))
    text = tokenizer.convert_tokens_to_ids(list("bcabbaacabbaabccabccaabab"))
    asked = [text[:n] for n in (3, 1, 25, 9, 10, 11, 12, 13, 17, 18, 19, 20, 21)]
    asked += [text[2:4], text[2:5]]  # a, b, b: read twice they would end with a head
    engine = Engine(tiny_model("gpt2", "causal"), guard=guard)
    try:
        together = engine.submit(VectorJob(asked)).result(WAIT)
        sealed = engine.sealed
        alone = [engine.submit(VectorJob([ids])).result(WAIT)[0] for ids in asked]
        assert 0 < sealed < len(asked) and engine.sealed == 2 * sealed
    finally:
        engine.close()
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_draws_follow_the_distribution_and_repeat_with_a_seed(engine: Engine) -> None:
    (vector,) = np.exp(engine.submit(VectorJob([[5, 6]])).result(WAIT))
    jobs = [TextJob([5, 6], max_tokens=1, seed=seed) for seed in range(1500)]
    drawn = np.bincount([job.draw(np.log(vector)) for job in jobs], minlength=VOCAB)
    likely = vector > 0.02
    assert likely.any()
    spread = np.sqrt(1500 * vector * (1 - vector))
    assert (np.abs(drawn - 1500 * vector)[likely] < 5 * spread[likely]).all()
    assert (np.abs(drawn - 1500 * np.roll(vector, 1))[likely] > 5 * spread[likely]).any()  # a wrong one is found
    first, second = (engine.submit(TextJob([5], max_tokens=9, seed=3)).result(WAIT).ids for _ in range(2))
    assert first == second
    nucleus = TextJob([5], max_tokens=1, top_p=0.3, seed=0)
    order = np.argsort(-vector)
    allowed = set(order[: int((vector[order].cumsum() < 0.3).sum()) + 1].tolist())
    assert {nucleus.draw(np.log(vector)) for _ in range(300)} == allowed


def test_end_stop_and_notify(engine: Engine) -> None:
    model = tiny_model("gpt2", "causal")
    free = alone(model, [7, 8], 6)
    ends = engine.submit(TextJob([7, 8], 6, temperature=0.0, end=frozenset({free[3]}))).result(WAIT)
    assert ends.finished == "stop" and ends.ids == free[: free.index(free[3])] and not ends.told
    job = TextJob([7, 8], 6, temperature=0.0, end=frozenset({free[3]}), logprobs=1)
    assert [one.token for one in engine.submit(job).result(WAIT).told] == [*ends.ids, free[3]]
    seen: list[list[int]] = []
    job = TextJob([7, 8], 6, temperature=0.0, stops=lambda ids: len(ids) == 2, notify=seen.append)
    assert engine.submit(job).result(WAIT).ids == free[:2] and seen == [free[:1], free[:2]]


def test_refusals_and_failures_touch_nobody_else(engine: Engine) -> None:
    for ids, new in (([], 1), ([VOCAB], 1), ([-1], 1), ([5] * 60, 10)):
        with pytest.raises(InputError):
            engine.submit(TextJob(ids, max_tokens=new))

    def broken(_: Any) -> bool:
        raise ZeroDivisionError

    good = engine.submit(VectorJob([[5]]))
    bad = engine.submit(TextJob([5], max_tokens=2, stops=broken))
    with pytest.raises(ZeroDivisionError):
        bad.result(WAIT)
    assert good.result(WAIT).shape == (1, VOCAB)
    assert len(engine.submit(TextJob([5], max_tokens=2)).result(WAIT).ids) == 2
    together = [TextJob([5], max_tokens=9), TextJob([6], max_tokens=9, stops=broken), TextJob([7], max_tokens=9)]
    first, failed, last = [engine.submit(job) for job in together]  # one batch: a failure is one text's
    with pytest.raises(ZeroDivisionError):
        failed.result(WAIT)
    assert len(first.result(WAIT).ids) == len(last.result(WAIT).ids) == 9
    engine.close()
    with pytest.raises(InputError, match="stopping"):
        engine.submit(VectorJob([[5]]))


def test_guarded_texts_hold_no_protected_string() -> None:
    tokenizer, model = causal_tokenizer(), tiny_model("gpt2", "causal")
    a, b = (tokenizer.convert_tokens_to_ids(c) for c in "ab")
    with torch.no_grad():  # a model that says a and b only
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone() * 0.05)
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
        model.lm_head.bias[[a, b]] = 9.0
    vocabulary = Vocabulary.of(tokenizer, size=VOCAB)
    guard = Guard(vocabulary, protected=ProtectedStrings(["abbaab", "aaaaa"], vocabulary))
    plain, careful = Engine(model), Engine(model, guard=guard)
    try:
        for engine, leaks in ((plain, True), (careful, False)):
            jobs = [TextJob([a], max_tokens=50, seed=seed) for seed in range(12)]
            texts = [tokenizer.decode(done.result(WAIT).ids) for done in [engine.submit(job) for job in jobs]]
            assert any("abbaab" in text or "aaaaa" in text for text in texts) == leaks
        assert careful.sealed > 0 and plain.sealed == 0
    finally:
        plain.close(), careful.close()
