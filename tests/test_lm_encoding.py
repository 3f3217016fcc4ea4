"""Texts become the very sequences of training, and every value is found again among the tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lm_helper import bpe_tokenizer
from tiny_text import BOS, EOS, causal_tokenizer
from veiltune.audit.lm.encoding import Encoder, Sequenced
from veiltune.data.manifest import Span
from veiltune.data.prompts import Prompted
from veiltune.dp.encoding import encode_prompted
from veiltune.errors import InputError

TEXT = "Ann Stone lives at 12 Elm Lane"
NAME, HOME = Span("name", 0, 9), Span("home", 19, 30)
SENTENCES = ["id=Ann Stone, id=Bob Reed, id=Zoë Ünal", "the phone of Ann Stone is 212-555-0101", "云川市 and Ann Stone"]


def value_at(encoder: Encoder, text: Sequenced, index: int) -> str:
    place = text.ranges[index]
    assert place is not None
    return encoder.decode(text.ids[place[0] : place[1]])


@pytest.mark.parametrize("begins", [False, True])
def test_a_sequence_is_a_training_example(begins: bool) -> None:
    for tokenizer in (causal_tokenizer(begins=begins), bpe_tokenizer(SENTENCES, 300, begins=begins)):
        encoder = Encoder(tokenizer, context=100)
        trained = encode_prompted(tokenizer, Prompted([""] * 3, SENTENCES), max_length=100)
        assert [text.ids for text in encoder.texts(SENTENCES)] == [row.input_ids for row in trained.examples]


def test_a_start_token_makes_the_first_token_scored() -> None:
    with_start, without = (Encoder(causal_tokenizer(begins=begins), context=64) for begins in (True, False))
    (one,), (other,) = (encoder.texts([TEXT], [[NAME, HOME]]) for encoder in (with_start, without))
    assert one.ids == [BOS, *other.ids] and one.ids[-1] == EOS
    assert one.ranges == ((1, 10), (20, 31))
    assert other.ranges == (None, (19, 30))  # nothing predicts the very first token
    assert (value_at(with_start, one, 0), value_at(without, other, 1)) == ("Ann Stone", "12 Elm Lane")
    assert (with_start.start, with_start.opening, without.start, without.opening) == ([BOS], [BOS], [], [EOS])


def test_a_text_longer_than_the_context_is_cut() -> None:
    (text,) = Encoder(causal_tokenizer(begins=True), context=26).texts([TEXT], [[NAME, HOME]])
    assert len(text.ids) == 26 and text.cut and text.ranges == ((1, 10), None)
    (whole,) = Encoder(causal_tokenizer(begins=True), context=32).texts([TEXT], [[HOME]])
    assert len(whole.ids) == 32 and not whole.cut and whole.ranges == ((20, 31),)
    (without_end,) = Encoder(causal_tokenizer(begins=True), context=31).texts([TEXT], [[HOME]])
    assert without_end.cut and without_end.ranges == ((20, 31),)
    assert repr(text) == "Sequenced(26 tokens, 2 spans)"


def test_a_token_that_reaches_over_the_border_belongs_to_the_value() -> None:
    tokenizer = bpe_tokenizer(["id=Ann id=Ann id=Ann"] * 50, 270, regex=False)
    encoder = Encoder(tokenizer, context=64)
    (text,) = encoder.texts(["id=Ann"], [[Span("name", 3, 6)]])
    pieces = [tokenizer.decode([token]) for token in text.ids[1:-1]]
    assert any("=A" in piece for piece in pieces), "the vocabulary must have such a token for this test"
    assert "Ann" in value_at(encoder, text, 0) and value_at(encoder, text, 0) != "Ann"
    before, behind = encoder.split("id=Ann", 3)
    place = text.ranges[0]
    assert place is not None
    assert before == text.ids[: place[0]] and behind == text.ids[place[0] : -1]


def test_ranges_hold_their_value_and_nothing_else() -> None:
    """Against a slow count: which characters does each token stand for?"""
    tokenizer = bpe_tokenizer(SENTENCES, 330)
    encoder, rng = Encoder(tokenizer, context=200), random.Random(0)
    for text in SENTENCES:
        offsets = tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][0]
        for _ in range(40):
            start, end = sorted(rng.sample(range(len(text) + 1), 2))
            (found,) = encoder.texts([text], [[Span("name", start, end)]])
            touched = [n for n, (a, b) in enumerate(offsets) if any(a <= c < b for c in range(start, end))]
            assert found.ranges == ((touched[0] + 1, touched[-1] + 2),)
            before, behind = encoder.split(text, start)
            assert before + behind == found.ids[:-1] and len(before) == 1 + touched[0]


def test_prompts_begin_as_texts_do_and_have_no_end() -> None:
    encoder = Encoder(causal_tokenizer(begins=True), context=64)
    assert encoder.prompt("Ann") == encoder.texts(["Ann"])[0].ids[:-1]
    assert encoder.decode([BOS, *encoder.prompt("Ann"), EOS]) == "Ann"
    assert encoder.texts([]) == []


class Slow:
    is_fast = False


@pytest.mark.parametrize(("flaw", "words"), [("slow", "fast tokenizer"), ("endless", "no end-of-text token")])
def test_a_tokenizer_that_will_not_do(flaw: str, words: str) -> None:
    tokenizer: Any = Slow() if flaw == "slow" else causal_tokenizer()
    if flaw == "endless":
        tokenizer.eos_token = None
    with pytest.raises(InputError, match=words):
        Encoder(tokenizer, context=8)
