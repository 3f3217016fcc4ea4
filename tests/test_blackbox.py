"""A black box tells what the model would: along records, step by step, for many endings, and what is made of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny import DECODERS, VOCAB, model_of, tiny_config, tiny_model
from tiny_text import BOS, EOS, causal_tokenizer
from veiltune.attacks.membership import TokenTrace
from veiltune.audit import blackbox, local_model
from veiltune.audit.blackbox import BlackBox, Tokens, Vectors, record_ids, spans, start_ids, told
from veiltune.audit.local_model import LocalModel
from veiltune.audit.sampling_text import greedy, sample
from veiltune.audit.tracing import Traced, kept_by_top_k, trace
from veiltune.errors import InputError, UnsupportedModelError

TOKENIZER = causal_tokenizer()


class Naive(BlackBox):
    """One prefix at a time through the model's own forward pass; everything else as the base class has it."""

    context, digest, name = 64, "0" * 64, "naive"

    def __init__(self, model: Any) -> None:
        self.model, self.vocabulary = model, model.config.vocab_size

    def next_token_log_probs(self, prefixes: Sequence[Tokens]) -> Vectors:
        with torch.inference_mode():
            rows = [self.model(input_ids=torch.tensor([list(p)])).logits[0, -1].log_softmax(-1) for p in prefixes]
        return torch.stack(rows).numpy()


class Answers(BlackBox):
    """Says what a test puts into it."""

    context, digest, name = 64, "0" * 64, "planted"

    def __init__(self, rule: Callable[[Tokens], Any], *, full: bool = True, top: int = 0, vocabulary: int = 4) -> None:
        self.rule, self.full_vectors, self.top_tokens, self.vocabulary = rule, full, top, vocabulary

    def next_token_log_probs(self, prefixes: Sequence[Tokens]) -> Vectors:
        return [self.rule(prefix) for prefix in prefixes]  # type: ignore[return-value]  # a careless box


def local(model: Any, **options: Any) -> LocalModel:
    return LocalModel(model, TOKENIZER, **options)


def texts(lengths: Sequence[int], *, seed: int = 0, vocabulary: int = VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, size=length).tolist() for length in lengths]


SEQUENCES = texts([5, 12, 2, 9, 30, 2, 17, 5])


@pytest.mark.parametrize("family", DECODERS)
def test_every_way_of_asking_tells_the_same(family: str) -> None:
    model = tiny_model(family, "causal")
    box, slow = local(model, batch_tokens=40), Naive(model)
    assert (box.vocabulary, box.context) == (VOCAB, 64)
    for fast, naive in zip(box.along(SEQUENCES), slow.along(SEQUENCES), strict=True):
        assert fast.dtype == np.float32 and fast.shape == naive.shape
        assert np.allclose(fast, naive, atol=1e-4)
    assert np.allclose(box.next_token_log_probs(SEQUENCES), slow.next_token_log_probs(SEQUENCES), atol=1e-4)
    prefix, suffixes = SEQUENCES[1], [*texts([1, 4, 7, 1, 4, 2], seed=1), SEQUENCES[3]]
    by_hand = [
        sum(float(slow.next_token_log_probs([[*prefix, *tail[:i]]])[0, token]) for i, token in enumerate(tail))
        for tail in suffixes
    ]
    for way in (box, slow, local(model, batch_tokens=1)):
        assert np.allclose(way.suffix_log_probs(prefix, suffixes), by_hand, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_decoding_step_by_step_equals_asking_for_the_whole_prefix(family: str) -> None:
    model = tiny_model(family, "causal")
    cached, slow = local(model).decoder(SEQUENCES[:4]), Naive(model).decoder(SEQUENCES[:4])
    assert np.allclose(cached.log_probs, slow.log_probs, atol=1e-4)
    for step in range(5):
        for decoder in (cached, slow):
            decoder.append([step, 7, 90, 3])
        assert np.allclose(cached.log_probs, slow.log_probs, atol=1e-4)
    for decoder in (cached, slow):
        decoder.select([3, 1, 1])
    assert np.allclose(cached.log_probs, slow.log_probs, atol=1e-4)
    for decoder in (cached, slow):
        decoder.append([11, 12, 13])
    assert np.allclose(cached.log_probs, slow.log_probs, atol=1e-4)


def test_a_wrong_position_or_a_seen_padding_would_show() -> None:
    """The comparison above is not blind: a shift by one, or text on the padding's places, changes the vectors."""
    box = local(tiny_model("gpt2", "causal"))
    (vectors,) = box.along([SEQUENCES[1]])
    (shifted,) = box.along([[BOS, *SEQUENCES[1]]])
    assert np.abs(vectors - shifted[1:]).max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_bounds_and_window_change_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, "causal")
    wanted = [vectors for text in SEQUENCES for vectors in local(model).along([text])]
    monkeypatch.setattr(blackbox, "_VALUES_AT_ONCE", 3 * VOCAB)
    for batch_tokens in (1, 16, 10_000):
        box = local(model, batch_tokens=batch_tokens)
        last = [vectors[-1] for vectors in wanted]
        assert np.allclose(box.next_token_log_probs([text[:-1] for text in SEQUENCES]), last, atol=1e-5)
        pieces = list(box.parts(SEQUENCES))
        assert max(len(vectors) for _, _, vectors in pieces) == 3
        assert [(number, first) for number, first, _ in pieces] == [
            (number, first) for number, text in enumerate(SEQUENCES) for first, _ in spans(0, len(text) - 1, 3)
        ]
        for got, want in zip(box.along(SEQUENCES), wanted, strict=True):
            assert np.allclose(got, want, atol=1e-5)
        for way in (box, Naive(model)):
            late = [vectors for *_, vectors in way.parts([SEQUENCES[4]], start=20)]
            assert np.allclose(np.concatenate(late), wanted[4][20:], atol=1e-4)


def test_one_pass_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions computed are those of the records and a little padding; an ending costs its own length only."""
    box = local(tiny_model("llama", "causal"), batch_tokens=200)
    computed: list[int] = []
    inner = box._backbone.forward
    monkeypatch.setattr(
        box._backbone, "forward", lambda **inputs: computed.append(inputs["input_ids"].numel()) or inner(**inputs)
    )
    lengths = [length + 1 for length in range(10, 50)]
    trace(box, texts(lengths))
    assert sum(length - 1 for length in lengths) <= sum(computed) < 1.15 * sum(lengths)
    computed.clear()
    box.suffix_log_probs(SEQUENCES[4], texts([5] * 50))
    assert sum(computed) == 30 + 50 * 4
    computed.clear()
    decoder = box.decoder(SEQUENCES[:2])
    decoder.append([3, 4])
    assert computed == [2 * 12, 2]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by peft
def test_peft_half_precision_and_a_short_vocabulary() -> None:
    base = tiny_model("gpt2", "causal")
    plain = next(local(base).along([SEQUENCES[1]]))
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    assert np.abs(next(local(wrapped).along([SEQUENCES[1]])) - plain).max() > 1e-2
    assert np.allclose(
        next(local(wrapped).along([SEQUENCES[1]])), next(Naive(wrapped).along([SEQUENCES[1]])), atol=1e-4
    )
    rounded = next(local(base, bf16=True).along([SEQUENCES[1]]))
    assert 1e-5 < np.abs(rounded - plain).max() < 0.3
    assert np.allclose(np.exp(rounded.astype(np.float64)).sum(axis=1), 1.0, atol=1e-5)
    config = tiny_config("llama")
    config.vocab_size = 200  # padded: more rows than the tokenizer has ids
    assert local(model_of(config, "causal")).vocabulary == 200
    config = tiny_config("llama")
    config.vocab_size = 100
    with pytest.raises(InputError, match=r"the tokenizer has 128 ids and the model \S+ knows 100"):
        local(model_of(config, "causal"))
    for headless in (tiny_model("bert", "base"), tiny_model("gpt2", "base")):
        with pytest.raises(UnsupportedModelError, match="language model head"):
            local(headless)


def test_the_digest_is_of_the_weights() -> None:
    model = tiny_model("gpt2", "causal")
    first = local(model).digest
    assert first == local(copy.deepcopy(model), batch_tokens=3).digest
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert local(model).digest != first


def test_how_a_record_begins() -> None:
    """The tokenizer's own start token once, or eos where it begins with nothing; the first character is scored."""
    ids = TOKENIZER("ab", add_special_tokens=False)["input_ids"]
    assert record_ids(TOKENIZER, ["ab", ""]) == [[EOS, *ids], [EOS]]
    assert record_ids(causal_tokenizer(begins=True), ["ab"], end=True) == [[BOS, *ids, EOS]]
    assert start_ids(causal_tokenizer(begins=True)) == [BOS]
    bare = causal_tokenizer()
    bare.eos_token = None
    with pytest.raises(InputError, match="neither a start nor an end-of-text token"):
        start_ids(bare)


def slow_trace(vectors: np.ndarray, tokens: Sequence[int], k: int) -> tuple[list[float], ...]:
    """Token by token from the definitions, in plain Python and double precision."""
    log_probs, means, deviations, hits, tops = [], [], [], [], []
    for row, token in zip(vectors.astype(np.float64).tolist(), tokens, strict=True):
        chances = [np.exp(value) for value in row]
        mean = sum(p * value for p, value in zip(chances, row, strict=True) if p)
        square = sum(p * value**2 for p, value in zip(chances, row, strict=True) if p)
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        log_probs.append(row[token])
        means.append(mean)
        deviations.append(max(square - mean**2, 0.0) ** 0.5)
        hits.append(best[0] == token)
        tops.append(row[token] - np.log(sum(chances[i] for i in best)) if token in best else -np.inf)
    return log_probs, means, deviations, hits, tops


@pytest.mark.parametrize(("vocabulary", "k"), [(128, 1), (128, 40), (128, 128), (20_000, 40)])
def test_a_trace_equals_its_definition(vocabulary: int, k: int) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocabulary, size=30)
    logits = np.round(rng.normal(size=(29, vocabulary)) * 3, 1)  # with ties, also at the border of the k
    logits[range(29), tokens[1:]] += np.linspace(0, 12, 29)  # from unlikely to nearly sure
    vectors = torch.from_numpy(logits).float().log_softmax(-1).numpy()
    box = Answers(lambda prefix: vectors[len(prefix) - 1], vocabulary=vocabulary)
    (traced,) = trace(box, [tokens.tolist()], top_k=k)
    wanted = slow_trace(vectors, tokens[1:].tolist(), k)
    parts = traced.trace
    got = (parts.log_probs, parts.means, parts.deviations, parts.hits, traced.top_k_log_probs)
    for values, slow in zip(got, wanted, strict=True):
        assert len(values) == 29
        assert np.allclose(values, slow, atol=1e-5, rtol=1e-5)
    assert parts.hits.dtype == np.bool_ and parts.means.dtype == np.float32
    assert traced.exact.all() and parts.hits.any() and not parts.hits.all()


def test_a_trace_of_hand_sized_numbers() -> None:
    vectors = np.log(np.array([0.5, 0.25, 0.25, 0.0]), where=[True, True, True, False], out=np.full(4, -np.inf))
    traced = trace(Answers(lambda prefix: vectors), [[0, 0, 1, 2, 3]], top_k=2)[0]
    half, mean = np.log(0.5), 1.5 * np.log(0.5)
    assert np.allclose(traced.trace.log_probs, [half, 2 * half, 2 * half, np.log(np.finfo(np.float32).eps)])
    assert np.allclose(traced.trace.means, mean)  # .5 log .5 + 2 * .25 log .25
    assert np.allclose(traced.trace.deviations, 0.5 * np.log(2))  # |log p - mean| is log(2) / 2 everywhere
    assert traced.trace.hits.tolist() == [True, False, False, False]
    assert np.allclose(np.exp(traced.top_k_log_probs), [2 / 3, 1 / 3, 0, 0])  # of the two equals the lower id stays
    assert traced.exact.tolist() == [True, True, True, False]  # probability zero: an upper limit stands


def test_a_trace_where_only_some_are_told() -> None:
    vectors = np.log(np.array([0.4, np.nan, 0.3, np.nan]))
    (traced,) = trace(Answers(lambda prefix: vectors, full=False, top=2), [[0, 0, 2, 3]], top_k=2)
    assert np.allclose(np.exp(traced.trace.log_probs), [0.4, 0.3, 0.3])  # 3 is not told: at most .3 are left
    assert traced.exact.tolist() == [True, True, False]
    assert np.isnan(traced.trace.means).all() and np.isnan(traced.trace.deviations).all()
    assert traced.trace.hits.tolist() == [True, False, False]
    assert np.allclose(np.exp(traced.top_k_log_probs), [4 / 7, 3 / 7, 0])
    (fewer,) = trace(Answers(lambda prefix: vectors, full=False, top=2), [[0, 0, 2, 3]], top_k=3)
    assert np.isnan(fewer.top_k_log_probs).all()
    values, exact = told(np.log(np.array([[0.9, 0.099, np.nan]])).astype(np.float32), [2])
    assert np.exp(values) == pytest.approx([0.001], rel=1e-3) and not exact.any()  # the mass left is the lesser limit
    values, _ = told(np.log(np.array([[0.5, 0.1, np.nan]])).astype(np.float32), [2])
    assert np.exp(values) == pytest.approx([0.1])  # the smallest told is


def test_tracing_a_model_reports_progress_in_order() -> None:
    box = local(tiny_model("gpt2", "causal"), batch_tokens=30)
    done: list[int] = []
    traced = trace(box, SEQUENCES, progress=done.append)
    assert done == list(range(1, len(SEQUENCES) + 1))
    for one, text, vectors in zip(traced, SEQUENCES, box.along(SEQUENCES), strict=True):
        assert isinstance(one, Traced) and isinstance(one.trace, TokenTrace)
        assert np.allclose(one.trace.log_probs, vectors[range(len(text) - 1), text[1:]], atol=1e-5)
    assert trace(box, []) == []


@pytest.mark.parametrize("vocabulary", [50, 5000])
def test_the_k_most_likely(vocabulary: int) -> None:
    values = np.round(np.random.default_rng(0).normal(size=(20, vocabulary)), 1).astype(np.float32)
    values[:, 7] = -np.inf
    values[:5, 30:] = -np.inf  # as where a guard tells the most likely ones only
    for k in (1, 5, 40, vocabulary):
        slow = [sorted(sorted(range(vocabulary), key=lambda i, row=row: (-row[i], i))[:k]) for row in values]
        assert kept_by_top_k(values, k).tolist() == slow


def test_samples_follow_the_distribution_and_stop() -> None:
    chances = np.array([0.5, 0.3, 0.15, 0.05])
    box = Answers(lambda prefix: np.log(chances))
    drawn = sample(box, [[0]] * 4000, new_tokens=2, eos=None, seed=0, top_k=3, batch=500)
    counts = np.bincount(np.array(drawn).ravel(), minlength=4) / 8000
    kept = chances * [1, 1, 1, 0] / 0.95
    assert counts[3] == 0 and np.abs(counts - kept).max() < 4.5 * 0.5 / 8000**0.5
    assert np.abs(counts - chances).max() > 4.5 * 0.5 / 8000**0.5 / 2  # it would tell the untruncated one
    cooler = sample(box, [[0]] * 4000, new_tokens=1, eos=None, seed=0, top_k=None, temperature=0.5)
    counts = np.bincount(np.array(cooler).ravel(), minlength=4) / 4000
    assert np.abs(counts - chances**2 / (chances**2).sum()).max() < 4.5 * 0.5 / 4000**0.5
    ended = sample(box, [[0]] * 400, new_tokens=10, eos=0, seed=1, top_k=None)
    lengths = np.bincount([len(text) for text in ended], minlength=11)
    assert all(0 not in text for text in ended) and lengths[10] < 10 and 150 < lengths[0] < 250


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_samples_depend_on_the_seed_only(family: str) -> None:
    box = local(tiny_model(family, "causal"))
    prefixes = [[EOS]] * 5 + SEQUENCES
    options: dict[str, Any] = {"new_tokens": 12, "eos": 5}
    first = sample(box, prefixes, seed=3, batch=64, **options)
    assert first == sample(box, prefixes, seed=3, batch=1, **options)
    assert first == sample(box, prefixes, seed=3, batch=4, **options)
    assert first == sample(Naive(box_model(box)), prefixes, seed=3, **options)
    assert first != sample(box, prefixes, seed=4, **options)
    assert len({tuple(text) for text in first[:5]}) == 5  # one prefix, five draws


def box_model(box: LocalModel) -> Any:
    """A model of the same weights through its own forward pass."""

    def forward(input_ids: torch.Tensor) -> Any:
        hidden = box._backbone(input_ids=input_ids).last_hidden_state
        return type("Output", (), {"logits": box._head(hidden)})

    forward.config = box._config  # type: ignore[attr-defined]
    return forward


def test_greedy_is_the_models_own_and_its_confidence_is_the_suffixs() -> None:
    model = tiny_model("llama", "causal")
    box = local(model)
    endless = greedy(box, SEQUENCES, new_tokens=6, eos=None)
    eos = endless[4].tokens[3]  # of the longest prefix, which is the first of its batch: it ends before the others
    assert sum(eos in text.tokens for text in endless) < len(endless)
    found = greedy(box, SEQUENCES, new_tokens=6, eos=eos, batch=3)
    for prefix, text in zip(SEQUENCES, found, strict=True):
        own = model.generate(
            torch.tensor([prefix]),
            attention_mask=torch.ones(1, len(prefix), dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
        assert text.tokens == [token for token in own[0, len(prefix) :].tolist() if token != eos]
        if text.tokens:
            assert text.log_prob == pytest.approx(box.suffix_log_probs(prefix, [text.tokens])[0], abs=1e-4)
    assert len({len(text.tokens) for text in found}) > 1


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ([0.25, 0.25, np.nan, 0.25], "is not a number"),
        ([0.5, 0.2, 0.1, 0.1], r"must add up to 1, got 0\.9"),
        ([0.5, 0.4, 0.1, 0.1], r"must add up to 1, got 1\.1"),
        ([1.5, 0.4, 0.1, 0.1], "must be at most 0"),
        ([np.inf, 0.4, 0.1, 0.1], "must be at most 0"),
        ([0.0, 0.0, 0.0, 0.0], "every token probability zero"),
        ([0.5, 0.5], "vectors of (4 log-probabilities|one length)"),
    ],
)
def test_what_is_no_distribution_is_refused(planted: list[float], message: str) -> None:
    with np.errstate(divide="ignore"):
        vector = np.log(np.array(planted))
    box = Answers(lambda prefix: vector if len(prefix) > 1 else np.log([0.4, 0.3, 0.2, 0.1]))
    for ask in (
        lambda: list(box.along([[0, 1, 2]])),
        lambda: trace(box, [[0, 1, 2]]),
        lambda: box.suffix_log_probs([0], [[1, 2]]),
        lambda: box.decoder([[0]]).append([1]),
        lambda: greedy(box, [[0]], new_tokens=2, eos=None),
    ):
        with pytest.raises(InputError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_diverged_model_is_refused_and_rounding_is_not() -> None:
    model = tiny_model("gpt2", "causal")
    box = local(model)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    for ask in (
        lambda: trace(box, SEQUENCES),
        lambda: box.next_token_log_probs(SEQUENCES),
        lambda: box.decoder(SEQUENCES),
        lambda: box.suffix_log_probs([1], [[2, 3]]),
    ):
        with pytest.raises(InputError, match="diverged"):
            ask()
    rounded = Answers(lambda prefix: np.round(np.log([0.4, 0.3, 0.2, 0.1]), 3))
    assert next(rounded.along([[0, 1]])).max() < 0
    above = Answers(lambda prefix: [5e-5, -12.0, -12.0, -12.0])
    assert next(above.along([[0, 1]])).max() == 0.0  # rounding of the arithmetic


@pytest.mark.parametrize(
    "make", [lambda: local(tiny_model("gpt2", "causal")), lambda: Naive(tiny_model("gpt2", "causal"))]
)
def test_unusable_questions_are_refused(make: Callable[[], BlackBox]) -> None:
    box = make()
    for ask, message in (
        (lambda: list(box.along([[1, 2], [1]])), r"sequence 2 must have 2 to 65 tokens .* got 1"),
        (lambda: list(box.along([[1] * 66])), "2 to 65 tokens .* got 66"),
        (lambda: list(box.along([[1, VOCAB]])), r"outside 0\.\.127: the tokenizer is not that of"),
        (lambda: box.suffix_log_probs([], [[1]]), "1 to 64 tokens"),
        (lambda: box.suffix_log_probs([1], [[1], []]), "sequence 2 must have 1 to 64 tokens"),
        (lambda: box.suffix_log_probs([1] * 60, [[1] * 6]), "1 to 5 tokens"),
        (lambda: box.decoder([[]]), "1 to 64 tokens"),
        (lambda: box.decoder([[1], [2]]).append([1]), "append takes 2 token ids"),
        (lambda: box.decoder([[1], [2]]).append([1, 128]), "append takes 2 token ids"),
        (lambda: box.decoder([[1] * 64]).append([1]), r"fills the context of 64|1 to 64 tokens"),
        (lambda: greedy(box, [[1] * 60], new_tokens=6, eos=None), "60 tokens and 6 new ones exceed the context of 64"),
        (lambda: sample(box, [[1]], new_tokens=0, eos=None, seed=0), "new_tokens must be"),
        (lambda: sample(box, [[1]], new_tokens=1, eos=None, seed=-1), "seed must be"),
        (lambda: sample(box, [[1]], new_tokens=1, eos=None, seed=0, temperature=0.0), "temperature must be"),
        (lambda: sample(box, [[1]], new_tokens=1, eos=None, seed=0, top_k=0), "top_k must be"),
        (lambda: trace(box, [[1, 2]], top_k=0), "top_k must be"),
    ):
        with pytest.raises(InputError, match=message):
            ask()
    with pytest.raises(InputError, match="outside"):
        box._accepted([np.array([0.5, 1.0])], least=1, most=5)  # type: ignore[list-item]
    assert len(greedy(box, [[1] * 60], new_tokens=5, eos=None)[0].tokens) == 5  # the last one needs no position
    assert greedy(box, [], new_tokens=5, eos=None) == [] and list(box.along([])) == []
    assert box.suffix_log_probs([1], []).shape == (0,)


def test_a_sampler_needs_the_tokens_that_it_keeps() -> None:
    vector = np.log(np.array([0.4, np.nan, 0.3, np.nan]))
    box = Answers(lambda prefix: vector, full=False, top=2)
    drawn = sample(box, [[0]] * 50, new_tokens=1, eos=None, seed=0, top_k=2)
    assert {text[0] for text in drawn} == {0, 2}
    with pytest.raises(InputError, match="tells the 2 most likely tokens only, top_k is 3"):
        sample(box, [[0]], new_tokens=1, eos=None, seed=0, top_k=3)
    assert greedy(box, [[0]], new_tokens=2, eos=None)[0].tokens == [0, 0]


def test_batches_hold_what_they_may() -> None:
    ids = [[0] * length for length in (3, 9, 4, 20, 1)]
    batches = list(local_model._batches(ids, 18))
    assert sorted(row for rows in batches for row in rows) == [0, 1, 2, 3, 4]
    assert batches == [[3], [1], [2, 0, 4]] or all(
        len(rows) == 1 or len(rows) * max(len(ids[row]) for row in rows) <= 18 for rows in batches
    )
    assert list(local_model._windows(ids, 13)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
