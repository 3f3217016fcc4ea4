"""Protected strings: the tables against a twin that decodes, folds and searches; any tokenisation, any state."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest

from tiny_text import causal_tokenizer
from veiltune.data.manifest import normalise
from veiltune.errors import InputError
from veiltune.guard.folding import fold, fold_all, folded, weight
from veiltune.guard.protected import ProtectedStrings
from veiltune.guard.trie import Automaton, Trie, ended
from veiltune.guard.vocabulary import Vocabulary, token_bytes


def shown(data: bytes) -> tuple[str, bool]:
    """The folded text of some bytes, and whether they end within a character: the obviously correct way."""
    text = fold(data.decode("utf-8", "replace"))
    waiting = any(
        data[-n:].decode("utf-8", "ignore") == "" and is_beginning(data[-n:]) for n in (1, 2, 3) if n <= len(data)
    )
    return text, waiting


def is_beginning(data: bytes) -> bool:
    """Whether more bytes could make one character of these."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start == 0
    return False


def twin_completing(strings: list[str], text: bytes, token: bytes) -> bool:
    before, after = shown(text)[0], shown(text + token)[0]
    return any(after[:end].endswith(s) for s in strings for end in range(len(before) + 1, len(after) + 1))


def tails_of(values: list[str], unknown: float) -> dict[str, int]:
    tails: dict[str, int] = {}
    for one in fold_all(values, unknown=unknown, shortest=2):
        head = one.text[: one.head]
        tails[head] = max(tails.get(head, 0), len(one.text) - one.head)
    return tails


def twin_sealed(tails: dict[str, int], text: bytes) -> int:
    """Characters still to withhold: the most that a head that ended somewhere in the text leaves."""
    told = shown(text)[0]
    left = [
        end + tail - len(told)
        for head, tail in tails.items()
        for end in range(len(head), len(told) + 1)
        if told[:end].endswith(head)
    ]
    return max([0, *left])


def twin_passes(tails: dict[str, int], text: bytes, token: bytes) -> bool:
    """Whether a head ends within the token's characters, and something follows it there."""
    before = shown(text)[0]
    after, waiting = shown(text + token)
    last = len(after) - (not waiting)
    return bool(token) and any(after[:end].endswith(head) for head in tails for end in range(len(before) + 1, last + 1))


def random_tokens(rng: random.Random, alphabet: str, count: int) -> list[bytes]:
    """Bytes of the alphabet one by one, random pieces of text, and pieces cut within characters."""
    singles = sorted({bytes([byte]) for c in alphabet for byte in c.encode()})
    tokens = [b"", *singles, b" ", b"-"]
    while len(tokens) < count:
        data = "".join(rng.choices(alphabet + " .", k=rng.randint(1, 4))).encode()
        lo = rng.randint(0, min(2, len(data) - 1))
        tokens.append(data[lo : rng.randint(lo + 1, len(data))])
    return tokens


@pytest.mark.parametrize("alphabet", ["abA", "ab1é", "王小明a", "ß५ab"])
@pytest.mark.parametrize("unknown", [0.0, 0.5])
def test_tables_are_those_of_the_twin(alphabet: str, unknown: float) -> None:
    rng = random.Random(f"{alphabet}{unknown}")
    passed = 0
    for _ in range(25):
        values = ["".join(rng.choices(alphabet, k=rng.randint(3, 6))) for _ in range(rng.randint(1, 6))]
        values += ["".join(rng.choices(alphabet + " -", k=5)) + alphabet[:2] for _ in range(2)]
        tokens = random_tokens(rng, alphabet, 45)
        guard = ProtectedStrings(values, Vocabulary(tokens), unknown=unknown, shortest=2)
        tails = tails_of(values, unknown)
        ids, state = [], guard.start([])
        for _ in range(12):
            text = b"".join(tokens[i] for i in ids)
            assert state == guard.start(ids)
            assert state.sealed == twin_sealed(tails, text)
            withheld = guard.withheld(state)
            if withheld is None:
                assert state.sealed
            else:
                passing = [i for i, token in enumerate(tokens) if twin_passes(tails, text, token)]
                assert withheld.tolist() == passing
                passed += len(passing)
            ids.append(rng.randrange(len(tokens)))
            state = guard.advance(state, ids[-1])
    assert passed > 15, passed


def test_every_token_that_would_complete_a_string_is_withheld() -> None:
    rng, completing = random.Random(5), 0
    for _ in range(20):
        values = ["".join(rng.choices("abc1", k=rng.randint(3, 7))) for _ in range(5)]
        tokens = random_tokens(rng, "abc1", 40)
        guard = ProtectedStrings(values, Vocabulary(tokens), shortest=2)
        strings = [one.text for one in fold_all(values, shortest=2)]
        state, text = guard.start([]), b""
        for _ in range(20):
            withheld = guard.withheld(state)
            ends = [i for i, token in enumerate(tokens) if twin_completing(strings, text, token)]
            assert withheld is None or set(ends) <= set(withheld.tolist())
            completing += len(ends)
            chosen = rng.randrange(len(tokens))
            state, text = guard.advance(state, chosen), text + tokens[chosen]
    assert completing > 50


def test_what_is_withheld_depends_on_heads_and_lengths_only() -> None:
    """Two sets with other ends answer alike at every state, so the answer tells nothing of the ends."""
    rng = random.Random(7)
    tokens = random_tokens(rng, "abcdef", 60)
    one = ProtectedStrings(["abcdefab", "fedcbaba"], Vocabulary(tokens))
    other = ProtectedStrings(["abcdaaaa", "fedcffff"], Vocabulary(tokens))
    assert one.nbytes == other.nbytes
    for _ in range(300):
        ids = [tokens.index(bytes([c])) for c in rng.choice([b"", b"abc", b"abcd", b"fedc", b"fedcba", b"abcdaaa"])]
        ids += [rng.randrange(len(tokens)) for _ in range(rng.randint(0, 3))]
        first, second = one.start(ids), other.start(ids)
        a, b = one.withheld(first), other.withheld(second)
        assert (a is None and b is None) or (a is not None and b is not None and a.tolist() == b.tolist())
        assert first == second


def test_no_string_comes_out_of_a_model_that_wants_to_say_it() -> None:
    """Drawn from the likeliest tokens left, whatever the tokens: the text never holds a protected string."""
    rng = random.Random(3)
    values = ["王小明同学", "jane.doe@example.org", "+1 (212) 555-0123"]
    alphabet = "王小明同学jane.doe@example.org 2125550123"
    tokens = random_tokens(rng, alphabet, 200) + [v.encode() for v in values] + [b"JANE", b"Doe@", b"-0123"]
    vocabulary = Vocabulary(tokens)
    guard = ProtectedStrings(values, vocabulary)
    strings = [one.text for one in fold_all(values)]
    stopped = 0
    for start in range(60):
        state, text = guard.start([]), b""
        wanted = values[start % 3].upper().encode() if start % 2 else values[start % 3].replace("", " ").encode()
        for _ in range(80):
            withheld = guard.withheld(state)
            left = sorted(
                set(range(len(tokens))) - set(withheld.tolist()) if withheld is not None else vocabulary.silent
            )
            rest = wanted[len(text) :]
            stopped += any(i not in left for i, token in enumerate(tokens) if token and rest.startswith(token))
            fits = [i for i in left if tokens[i] and rest.startswith(tokens[i])]
            chosen = rng.choice(fits or left)
            text += tokens[chosen]
            state = guard.advance(state, chosen)
        assert not any(s in fold(text.decode("utf-8", "replace")) for s in strings)
    assert stopped >= 50


def test_what_counts_as_equal_in_the_manifest_is_equal_here() -> None:
    rng = random.Random(1)
    pool = "aAéÉe\u0301ßẞｱア한\u1112\u1161\u11abﬁ①\uff12\u0663 ,.-'ǅᾳ\u03b1\u0345Åå王"
    same = 0
    for _ in range(4000):
        one = "".join(rng.choices(pool, k=3))
        other = rng.choice([one.upper(), one.casefold(), *(unicodedata.normalize(f, one) for f in ("NFC", "NFKD"))])
        if normalise(one, "name") == normalise(other, "name"):
            same += 1
            assert fold(one) == fold(other)
    assert same > 2000
    assert fold("ann") != fold("anm")


@pytest.mark.parametrize(
    ("value", "unknown", "text", "head"),
    [
        ("Jennifer Smith", 0.5, "jennifersmith", 9),  # the given name
        ("jane.doe@example.com", 0.5, "janedoeexamplecom", 5),
        ("x7k2m9qa@example.com", 0.25, "x7k2m9qaexamplecom", 6),
        ("+86 138 0013 8000", 0.5, "13800138000", 5),
        ("(212) 555-0123", 0.5, "2125550123", 5),
        ("王小明", 0.5, "王小明", 2),
        ("Christopher Li", 0.0, "christopherli", 12),
        ("12 Elm Street, Springfield", 0.5, "12elmstreetspringfield", 11),
        ("al@acme-industries.com", 0.5, "alacmeindustriescom", 4),
        ("anna@example.com", 0.5, "annaexamplecom", 4),
        ("ed.k@firm.com", 0.9, "edkfirmcom", 4),
        ("王@example.com", 0.5, "王examplecom", 3),
        ("al@acme-industries.com", 0.0, "alacmeindustriescom", 18),
    ],
)
def test_heads(value: str, unknown: float, text: str, head: int) -> None:
    one = folded(value, unknown=unknown)
    assert (one.text, one.head) == (text, head)


def test_refusals_do_not_show_the_string() -> None:
    for values in (["Anna Lee", "..."], ["Anna Lee", "Bo"], ["Anna Lee", ""]):
        with pytest.raises(InputError, match="protected string 2") as refusal:
            fold_all(values)
        assert "Bo" not in str(refusal.value)
    with pytest.raises(InputError, match="unknown must be"):
        fold_all(["Anna Lee"], unknown=1.0)
    with pytest.raises(InputError, match="sorted"):
        Trie(["b", "a"])


def test_automaton_and_common_walk_against_searching() -> None:
    rng = random.Random(9)
    for _ in range(60):
        strings = sorted({"".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(8)})
        worths = [rng.randint(1, 9) for _ in strings]
        automaton, text, state = Automaton(strings, worths), "", 0
        for _ in range(30):
            text += rng.choice("abc")
            state = automaton.step(state, ord(text[-1]))
            expected = max([0, *(w for s, w in zip(strings, worths, strict=True) if text.endswith(s))])
            assert automaton.worth[state] == expected
        others = sorted({"".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(9)})
        rows = [r for lo, hi in ended(automaton, 0, Trie(others)) for r in range(lo, hi)]
        right = [r for r, o in enumerate(others) if any(o.startswith(s) and len(o) > len(s) for s in strings)]
        assert sorted(rows) == right and len(set(rows)) == len(rows)


def test_bytes_of_tokenizers() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["王小明 Ann Lee 12 Elm"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    tokens = token_bytes(tokenizer)
    for text in ("王小明 naïve Ann", "x\u00a0y\n\t"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(tokens[i] for i in ids) == text.encode()
    assert tokens[0] == b""
    words = causal_tokenizer()
    assert token_bytes(words)[words.convert_tokens_to_ids("a")] == b"a"


def test_more_tokens_than_the_model_knows() -> None:
    assert Vocabulary([b"a"], size=9).size == 9
    with pytest.raises(InputError, match="do not fit"):
        Vocabulary([b"a", b"b"], size=1)


def test_a_large_set_is_fast_enough() -> None:
    """A bound that a table built token by token could not keep; the bench measures."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    values = ["".join(rng.choice(letters, 12)) for _ in range(5000)]
    tokens = [bytes([c]) for c in range(128)] + ["".join(rng.choice(letters, 3)).encode() for _ in range(5000)]
    guard = ProtectedStrings(values, Vocabulary(tokens))
    assert guard.count == 5000 and guard.build_seconds < 10
    state = guard.read(values[0][:5].encode())
    starting = [i for i, token in enumerate(tokens) if token.decode().startswith(values[0][5]) and len(token) > 1]
    assert starting and set(starting) <= set(guard.withheld(state).tolist())


def test_four_characters_of_any_string_may_show_and_the_last_never() -> None:
    """Else a short local part of an e-mail address seals the text after every `a`."""
    rng, short = random.Random(11), 0
    for _ in range(3000):
        value = "".join(rng.choices("ab1王-. @@", k=rng.randint(5, 14)))
        try:
            (one,) = fold_all([value], unknown=rng.choice([0.0, 0.25, 0.5, 0.9, 0.99]))
        except InputError:
            continue
        assert 0 < one.head < len(one.text)
        assert weight(one.text[: one.head]) >= 4 or one.head == len(one.text) - 1, value
        short += 0 < weight(fold(value.partition("@")[0])) < 5
    assert short > 500
