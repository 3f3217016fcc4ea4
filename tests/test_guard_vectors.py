"""What the guard does to a vector: against slow twins, with hand-sized numbers; generate, n-grams, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tiny import VOCAB, tiny_model
from tiny_text import causal_tokenizer
from veiltune.data import tables
from veiltune.errors import DataError, InputError
from veiltune.guard.answers import vectors_json
from veiltune.guard.budget import protection_table
from veiltune.guard.building import build_guard, protected_values, texts_of
from veiltune.guard.decoding import Guard, GuardProcessor
from veiltune.guard.folding import fold
from veiltune.guard.jobs import TextJob
from veiltune.guard.memfree import NgramFilter
from veiltune.guard.protected import ProtectedStrings
from veiltune.guard.vectors import Seal, Shape, Vector, best, normalised, unigram, without
from veiltune.guard.vocabulary import Vocabulary


def random_vector(rng: np.random.Generator, size: int, *, peaked: float = 1.0) -> Vector:
    return normalised(rng.normal(0.0, 3.0 * peaked, size).astype(np.float32))


def twin_sealed(vector: Vector, ids: list[int], shares: list[float]) -> list[float]:
    """Probabilities, one token at a time."""
    p = [float(np.exp(value)) for value in vector]
    told = {token: shares[token] / sum(shares) for token in ids}
    rest = 1.0 - sum(told.values())
    others = sum(p[i] for i in range(len(p)) if i not in told)
    return [told[i] if i in told else p[i] * rest / others for i in range(len(p))]


def test_sealing_is_that_of_the_twin_and_stays_a_distribution() -> None:
    rng = np.random.default_rng(0)
    for peaked in (0.3, 1.0, 3.0):
        for _ in range(100):
            shares, vector = rng.uniform(0.1, 1.0, 12), random_vector(rng, 12, peaked=peaked)
            ids = np.sort(rng.choice(12, rng.integers(1, 12), replace=False))
            sealed = np.exp(Seal(shares).of(vector, ids), dtype=np.float64)
            np.testing.assert_allclose(sealed, twin_sealed(vector, ids.tolist(), shares.tolist()), rtol=1e-4)
            assert sealed.sum() == pytest.approx(1.0, abs=1e-5) and (sealed > 0).all()
            among = np.exp(Seal(shares).among(vector, ids), dtype=np.float64)
            assert among.sum() == pytest.approx(1.0, abs=1e-5)
            left = np.setdiff1d(np.arange(12), ids)
            np.testing.assert_allclose(among[left], np.exp(vector[left]), rtol=1e-5)
            np.testing.assert_allclose(among[ids] / among[ids].sum(), shares[ids] / shares[ids].sum(), rtol=1e-4)


def test_ruling_out_is_that_of_the_twin() -> None:
    rng = np.random.default_rng(6)
    for peaked in (0.3, 1.0, 5.0):
        for _ in range(100):
            vector = random_vector(rng, 9, peaked=peaked)
            ids = rng.choice(9, rng.integers(0, 9), replace=False)
            chances = np.exp(vector.astype(np.float64))
            chances[ids] = 0.0
            found = np.exp(without(vector, ids), dtype=np.float64)
            np.testing.assert_allclose(found, chances / chances.sum(), rtol=1e-3, atol=1e-6)


def test_a_sealed_vector_does_not_show_which_sealed_token_the_model_preferred() -> None:
    """The preference among sealed tokens moved, even all of it: the told vectors are equal. Unsealed, they are not."""
    seal = Seal(np.array([1.0, 2.0, 3.0, 1.0, 1.0, 1.0]))
    one = np.log(np.array([0.90, 0.01, 0.01, 0.02, 0.02, 0.04], dtype=np.float32))
    other = np.log(np.array([0.02, 0.08, 0.10, 0.20, 0.20, 0.40], dtype=np.float32))
    sealed = np.array([0, 1, 2])
    np.testing.assert_allclose(seal.of(one, sealed), seal.of(other, sealed), atol=1e-5)
    assert np.abs(one - other).max() > 2


def test_sealing_certain_models() -> None:
    """Mass zero everywhere else: nothing becomes nan, nothing sealed becomes impossible."""
    sure = np.array([0.0, -np.inf, -np.inf, -np.inf], dtype=np.float32)
    seal = Seal(np.ones(4))
    for ids in ([0], [1], [0, 1], [0, 1, 2], [2], [0, 1, 2, 3]):
        sealed = seal.of(sure, np.array(ids))
        assert not np.isnan(sealed).any() and np.isfinite(sealed[ids]).all()
        assert np.exp(sealed, dtype=np.float64).sum() == pytest.approx(1.0, abs=1e-5)
    assert seal.of(sure, np.array([0]))[0] == pytest.approx(np.log(0.25))
    with pytest.raises(InputError):
        Seal(np.array([1.0, 0.0]))


def test_after_a_head_the_model_plays_no_part() -> None:
    """Two models that differ as much as can be are told alike as long as the withheld part is, and not after it."""
    rng = np.random.default_rng(8)
    vocabulary = Vocabulary([bytes([code]) for code in range(128)])
    guard = Guard(vocabulary, protected=ProtectedStrings(["x7k2m9qa"], vocabulary))
    one, other = random_vector(rng, 128), random_vector(rng, 128)
    alike = []
    for text in (b"x7k", b"X7-k2", b"x7k2m", b"x7k2zz", b"x7k2 m,9 Q", b"x7k2m9qa", b"x7k2zzzz"):
        state = guard.start(text)
        alike.append(bool(np.array_equal(guard.told(state, one), guard.told(state, other))))
    assert alike == [False, True, True, True, True, False, False]


def test_what_text_is_drawn_from_depends_on_heads_and_lengths_only() -> None:
    """Else somebody whose draws have known seeds reads off a flat vector which tokens are ruled out, so what is listed.

    Two lists with other endings draw alike at every state, and after a head so do two models.
    """
    rng = np.random.default_rng(9)
    vocabulary = Vocabulary([bytes([code]) for code in range(128)] + [b" Doe", b"oe", b" Dax", b"e Do"])
    one, other = (Guard(vocabulary, protected=ProtectedStrings([s], vocabulary)) for s in ("Jane Doe", "Jane Dax"))
    silent = {token for token in range(128) if not fold(chr(token))}
    for text in (b"Jan", b"Jane", b"Jane ", b"Jane D", b"jane.d-o", b"Jane Da", b"Jane Dxx", b"Jane Doe was"):
        state, vector = one.start(text), random_vector(rng, vocabulary.size)
        assert state == other.start(text)
        np.testing.assert_array_equal(one.drawn(state, vector), other.drawn(state, vector))
        if one.withholds(state):
            np.testing.assert_array_equal(
                one.drawn(state, vector), one.drawn(state, random_vector(rng, vocabulary.size))
            )
            assert set(np.flatnonzero(np.isfinite(one.drawn(state, vector)))) == silent
    with pytest.raises(InputError, match="no such token"):
        letters = Vocabulary([b"a", b"b"])
        guard = Guard(letters, protected=ProtectedStrings(["aaaaaaaa"], letters))
        guard.drawn(guard.start([0] * 4), np.log(np.array([0.5, 0.5], dtype=np.float32)))


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest_token_that_is_left(temperature: float) -> None:
    vector = normalised(np.array([1.0, 3.0, 2.0, -np.inf], dtype=np.float32))
    for top_p in (1.0, 0.9):
        assert TextJob([0], 1, temperature=temperature, top_p=top_p).draw(without(vector, np.array([1]))) == 2
    assert np.exp(Shape(temperature=temperature).of(vector)).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_shape_against_twins() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        vector = random_vector(rng, 20)
        vector[rng.integers(0, 20)] = vector[rng.integers(0, 20)]
        vector = normalised(vector)
        k = int(rng.integers(1, 21))
        assert best(vector, k).tolist() == np.argsort(-vector, kind="stable")[:k].tolist()
        assert not len(best(vector, 0))
        warm = np.exp(Shape(temperature=2.0).of(vector), dtype=np.float64)
        np.testing.assert_allclose(warm, np.exp(vector / 2) / np.exp(vector / 2).sum(), rtol=1e-4)
        cut = np.exp(Shape(top_k=k).of(vector), dtype=np.float64)
        assert (cut > 0).sum() == k and cut.sum() == pytest.approx(1.0, abs=1e-5)
        rounded = np.exp(Shape(decimals=2).of(vector), dtype=np.float64)
        assert rounded.sum() == pytest.approx(1.0, abs=1e-5)
        assert (rounded > 0).tolist() == (np.exp(vector).astype(float).round(2) > 0).tolist()
    flat = normalised(np.zeros(500, dtype=np.float32))
    assert np.exp(Shape(decimals=1).of(flat)).tolist() == [1.0, *[0.0] * 499]
    assert Shape().of(flat) is flat
    for wrong in ({"temperature": 0.0}, {"top_k": -1}, {"decimals": 13}):
        with pytest.raises(InputError):
            Shape(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="leaves no token"):
        without(flat, np.arange(500))
    with pytest.raises(InputError, match="not below"):
        unigram([[5]], 5)


def test_ngrams_have_no_false_negatives_and_about_the_stated_false_positives() -> None:
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, 1000, rng.integers(1, 60)).tolist() for _ in range(200)]
    ngrams = NgramFilter(texts, n=4, false_positive_rate=0.01, key=b"secret")
    inside = {tuple(text[i : i + 4]) for text in texts for i in range(len(text) - 3)}
    assert ngrams.count == sum(max(0, len(text) - 3) for text in texts)
    assert all(ngrams.repeats(gram[:3], [gram[3]])[0] for gram in inside)
    wrong = trials = 0
    for _ in range(200):
        before, candidates = rng.integers(0, 1000, 3).tolist(), rng.choice(1000, 100, replace=False)
        new = np.array([(*before, int(c)) not in inside for c in candidates])
        wrong += int(ngrams.repeats(before, candidates)[new].sum())
        trials += int(new.sum())
    assert 0.004 * trials < wrong < 0.02 * trials
    assert NgramFilter(texts, n=4, key=b"other").repeats([1, 2], [3]).tolist() == [False]
    with pytest.raises(InputError, match="no text has 70 tokens"):
        NgramFilter(texts, n=70)


def test_drawn_text_repeats_no_ngram() -> None:
    """A model that can only count repeats its training text, and with the filter it does not."""
    text, rng = list(range(30)), np.random.default_rng(3)
    ngrams = NgramFilter([text], n=5)
    vocabulary = Vocabulary([b" x"] * 30)
    for guard, repeats in ((Guard(vocabulary), True), (Guard(vocabulary, ngrams=ngrams, candidates=3), False)):
        ids, state = [0], guard.start([0])
        for _ in range(25):
            vector = np.full(30, -9.0, dtype=np.float32)
            vector[(ids[-1] + 1) % 30] = 0.0
            drawn = guard.drawn(state, normalised(vector))
            told = guard.told(state, normalised(vector))
            assert np.isfinite(told).all()
            ids.append(int(drawn.argmax()) if rng.random() < 0.9 else int(rng.integers(30)))
            state = guard.advance(state, ids[-1])
        found = any(ids[i : i + 5] == text[j : j + 5] for i in range(len(ids) - 4) for j in range(26))
        assert found == repeats


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_the_processor_never_says_it(beams: int, ends: bool) -> None:
    """A model that wants to say one text only, sampled and by beams, in a padded batch."""
    tokenizer, model = causal_tokenizer(), tiny_model("gpt2", "causal")
    a, b = (tokenizer.convert_tokens_to_ids(c) for c in "ab")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone() * 0.05)
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
        model.lm_head.bias[[a, b]] = 9.0
    vocabulary = Vocabulary.of(tokenizer, size=VOCAB)
    guard = Guard(vocabulary, protected=ProtectedStrings(["abbaab", "aaaaa", "bbbbb"], vocabulary))
    ids = torch.tensor([[0, a], [b, a]])
    texts = {}
    processor = GuardProcessor(guard, tokenizer.eos_token_id if ends else None)
    for name, processors in (("plain", []), ("guarded", [processor])):
        torch.manual_seed(0)
        settings = {"do_sample": beams == 1, "num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 40}
        made = model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            logits_processor=processors,
            pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
            **settings,
        )
        texts[name] = [fold(tokenizer.decode(row, skip_special_tokens=True)) for row in made]
    secrets = ("abbaab", "aaaaa", "bbbbb")
    assert any(secret in text for text in texts["plain"] for secret in secrets)
    assert not any(secret in text for text in texts["guarded"] for secret in secrets)
    if ends:
        assert made.shape[1] < 42  # all texts ended at a head
    with pytest.raises(InputError, match="eos_token_id"):
        GuardProcessor(guard, VOCAB)


def test_the_processor_agrees_with_reading_every_text_anew() -> None:
    rng = np.random.default_rng(4)
    tokenizer = causal_tokenizer()
    vocabulary = Vocabulary.of(tokenizer, size=VOCAB)
    guard = Guard(vocabulary, protected=ProtectedStrings(["abcabc", "cabbage"], vocabulary), shape=Shape(top_k=20))
    letters = tokenizer.convert_tokens_to_ids(list("abcge"))
    processor = GuardProcessor(guard)
    ids = torch.tensor(rng.choice(letters, (4, 1)))
    for _ in range(15):
        scores = torch.tensor(rng.normal(size=(4, VOCAB)), dtype=torch.float32)
        got = processor(ids, scores)
        for row, vector, found in zip(ids.tolist(), scores.log_softmax(-1).numpy(), got.numpy(), strict=True):
            np.testing.assert_array_equal(found, guard.drawn(guard.start(row), vector))
        order = torch.tensor(rng.integers(0, 4, 4))  # beams that change places
        ids = torch.cat([ids[order], torch.tensor(rng.choice(letters, (4, 1)))], dim=1)


def test_budget_table() -> None:
    rows = protection_table(np.log([0.9, 0.01]), [3, 40], p=0.9, budgets=(1, 10, 100, 1000))
    assert [row.by_sampling for row in rows] == [0.5, 0.5, 0.5, 1.0]  # 0.9 in one draw; 0.01 in 230
    assert [row.by_vectors for row in rows] == [0.0, 0.5, 1.0, 1.0]
    for wrong in ([3], [0, 1], []):
        with pytest.raises(InputError):
            protection_table(np.log([0.9, 0.01]), wrong)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Jane Doe\n\n12 Elm Street\n", encoding="utf-8")
    (tmp_path / "pii.csv").write_text("type,value\nname,Ann Leeson\n", encoding="utf-8")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "Jane Doe lives at 12 Elm Street."}) + "\n")
    assert protected_values(tmp_path / "names.txt") == ["Jane Doe", "12 Elm Street"]
    assert protected_values(tmp_path / "pii.csv") == ["Ann Leeson"]
    assert next(texts_of(tmp_path / "names.txt")) == "Jane Doe"
    tokenizer = causal_tokenizer()
    guard = build_guard(
        tokenizer,
        size=VOCAB,
        protect=[tmp_path / "names.txt", tmp_path / "pii.csv"],
        memfree=tmp_path / "train.jsonl",
        reference=tmp_path / "train.jsonl",
    )
    assert guard is not None and guard.protected is not None and guard.ngrams is not None
    assert guard.protected.count == 3 and guard.ngrams.count == 32 - 9
    assert build_guard(tokenizer, size=VOCAB) is None
    (tmp_path / "short.txt").write_text("Jane Doe\nBo\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"short\.txt: protected string 2 has a weight of 2 characters"):
        build_guard(tokenizer, size=VOCAB, protect=[tmp_path / "names.txt", tmp_path / "short.txt"])
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xe9")
    for path, message in (("bad.csv", "value"), ("empty.txt", "no string"), ("latin.txt", "UTF-8"), ("gone", "read")):
        with pytest.raises(InputError, match=message):
            protected_values(tmp_path / path)
    with pytest.raises(InputError, match="line 1"):
        list(texts_of(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError):
        protected_values(tmp_path / "bad.jsonl")  # no manifest


def test_a_manifest_protects_everybody_so_that_the_list_tells_nobody_who_is_in_the_training_text(
    tmp_path: Path,
) -> None:
    from dataclasses import replace

    from veiltune.data.manifest import read_manifest
    from veiltune.data.synth import PRESETS, synthesise

    synthesise(tmp_path / "corpus", replace(PRESETS["ci"], seed=0))
    values = set(protected_values(tmp_path / "corpus" / "manifest.jsonl"))
    manifest = read_manifest(tmp_path / "corpus" / "manifest.jsonl")
    assert {person.split for person in manifest.persons} >= {"in", "out"}
    assert all(value in values for person in manifest.persons for value in person.values.values())
    assert all(canary.secret in values for canary in manifest.canaries)
    assert len({canary.included for canary in manifest.canaries}) == 2


def test_a_vector_that_is_not_a_number_is_not_told() -> None:
    """JSON's null would say that the token has probability zero."""
    vector = np.array([[-0.5, np.nan, -np.inf]], dtype=np.float32)
    for probs in (False, True):
        with pytest.raises(ValueError, match="not a number"):
            vectors_json(vector, probs=probs)
    told = json.loads(vectors_json(vector[:, ::2], probs=False))["log_probs"]
    assert told == [[-0.5, None]] and json.loads(vectors_json(vector[:, 2:], probs=True)) == {"probs": [[0.0]]}


def test_tables_are_read_as_tables_and_lines_end_at_line_ends_only(tmp_path: Path) -> None:
    """A table taken line by line holds other tokens than the training text, so the filter would let passages pass."""
    texts = ['Dear "Ann", she said,\nthat all is well', "one line\u2028and its rest"]
    plain = ["no quote, no tab", "one line\u2028and its \x85 rest"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([str(i), text] for i, text in enumerate(texts))])
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.JSONL").write_text("\n".join([*lines, ""]), encoding="utf-8")
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.JSONL", "a.parquet"):
        assert list(texts_of(tmp_path / name)) == texts
    (tmp_path / "a.tsv").write_text("text\tid\n" + "".join(f"{text}\t1\n" for text in plain), encoding="utf-8")
    (tmp_path / "a.txt").write_bytes("\r\n".join([*plain, ""]).encode())
    assert list(texts_of(tmp_path / "a.tsv")) == list(texts_of(tmp_path / "a.txt")) == plain
    assert protected_values(tmp_path / "a.txt") == plain
    (tmp_path / "b.csv").write_text("id,body\n1,Secret\n")
    with pytest.raises(InputError, match="has no column 'text'"):
        list(texts_of(tmp_path / "b.csv"))


def test_a_cell_that_is_too_long_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "long.csv").write_text("value\n" + "ab" * 70_000 + "\n")
    assert [len(value) for value in protected_values(tmp_path / "long.csv")] == [140_000]
    monkeypatch.setattr(tables, "_LONGEST_FIELD", 130_000)
    with pytest.raises(InputError, match="field larger than field limit") as refusal:
        protected_values(tmp_path / "long.csv")
    assert "abab" not in str(refusal.value) and "\n" not in str(refusal.value)
