"""Learned inverters: the linear one is Bayes' rule, context helps where there is some, and states survive."""

from __future__ import annotations

import inspect

import jaxtyping
import pytest
import torch
from torch import Tensor

from veiltune.attacks import learned
from veiltune.attacks.inversion import invert_by_map, invert_by_nearest_embedding, unigram_log_prior
from veiltune.attacks.learned import KINDS, Inverter, Kind, augmented_ids, train_inverter
from veiltune.attacks.sequences import batches_by_length, pad_texts, rows_of
from veiltune.errors import InputError
from veiltune.models.loading import load_base
from veiltune.models.split import BottomModel, split_model

VOCAB, DIM, LENGTH = 40, 12, 20
CONTEXT: tuple[Kind, ...] = ("window", "sequence")


def noise(seed: int, sigma: float) -> learned.Privatize:
    generator = torch.Generator().manual_seed(seed)
    return lambda values: values + sigma * torch.randn(values.shape, generator=generator)


@pytest.fixture
def vocabulary(generator: torch.Generator) -> Tensor:
    return torch.randn(VOCAB, DIM, generator=generator)


def zipf(count: int, seed: int) -> Tensor:
    rates = 1 / torch.arange(1.0, VOCAB + 1)
    return torch.multinomial(rates, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def chain(texts: int, seed: int) -> tuple[Tensor, list[int]]:
    """Texts in which each token but the first is the one before plus 1, 2 or 3 (mod V)."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (texts, LENGTH), generator=generator)
    steps[:, 0] = torch.randint(0, VOCAB, (texts,), generator=generator)
    return (steps.cumsum(1) % VOCAB).flatten(), [LENGTH] * texts


def accuracy(inverter: Inverter, values: Tensor, lengths: list[int], secret: Tensor) -> float:
    return float((inverter.guess(values, lengths)[:, 0] == secret).float().mean())


def test_linear_is_bayes_rule_where_the_model_is_exact(vocabulary: Tensor) -> None:
    """At cut 0 under Gaussian noise: as good as MAP with the true sigma, and better than the nearest embedding."""
    public, secret, sigma = zipf(20_000, 1), zipf(5_000, 2), 1.0
    inverter = train_inverter(
        "linear", vocabulary[public], public, [20_000], privatize=noise(3, sigma), word_embeddings=vocabulary, seed=0
    )
    values = noise(4, sigma)(vocabulary[secret])
    exact = invert_by_map(values, vocabulary, log_prior=unigram_log_prior(public, VOCAB), sigma=sigma)
    agreed = (inverter.guess(values, [5_000]) == exact).float().mean()
    nearest = (invert_by_nearest_embedding(values, vocabulary)[:, 0] == secret).float().mean()
    assert agreed > 0.95
    assert accuracy(inverter, values, [5_000], secret) > nearest + 0.05


def test_linear_undoes_any_linear_map_and_shared_scatter(vocabulary: Tensor, generator: torch.Generator) -> None:
    """The bottom may mix and widen the embeddings; noise that fills a few directions is looked around."""
    mix, loud = torch.randn(DIM, 3 * DIM, generator=generator), torch.randn(5, 3 * DIM, generator=generator)
    public, secret = zipf(8_000, 1), zipf(2_000, 2)

    def mechanism(values: Tensor) -> Tensor:
        return values + 20 * torch.randn(len(values), 5, generator=generator) @ loud

    inverter = train_inverter(
        "linear", vocabulary[public] @ mix + 7, public, [8_000], privatize=mechanism, word_embeddings=vocabulary, seed=0
    )
    values = mechanism(vocabulary[secret] @ mix + 7)
    nearest = (invert_by_nearest_embedding(values, vocabulary @ mix + 7)[:, 0] == secret).float().mean()
    assert accuracy(inverter, values, [2_000], secret) > 0.99
    assert nearest < 0.5


def test_tokens_never_seen_in_public_text_are_recovered(vocabulary: Tensor) -> None:
    public = zipf(8_000, 1) % (VOCAB // 2)
    secret = torch.arange(VOCAB // 2, VOCAB).repeat(10)
    mechanism = noise(3, 0.1)
    inverter = train_inverter(
        "linear", vocabulary[public], public, [8_000], privatize=mechanism, word_embeddings=vocabulary, seed=0
    )
    assert accuracy(inverter, mechanism(vocabulary[secret]), [len(secret)], secret) > 0.95


@pytest.mark.parametrize("kind", CONTEXT)
def test_context_helps_under_noise_and_only_context(kind: Kind, vocabulary: Tensor) -> None:
    sigma = 1.5
    (public, lengths), (secret, held) = chain(250, 1), chain(60, 2)
    linear, trained = (
        train_inverter(
            each,
            vocabulary[public],
            public,
            lengths,
            privatize=noise(3, sigma),
            word_embeddings=vocabulary,
            seed=0,
            passes=3 if each == "linear" else 6,
            bf16=False,
        )
        for each in ("linear", kind)
    )
    values = noise(4, sigma)(vocabulary[secret])
    assert accuracy(trained, values, held, secret) > accuracy(linear, values, held, secret) + 0.1
    shuffled = torch.randperm(len(secret), generator=torch.Generator().manual_seed(5))
    order = shuffled.argsort()
    broken = trained.guess(values[shuffled], held)[order, 0]  # planted: the same tokens without their neighbours
    assert float((broken == secret).float().mean()) < accuracy(linear, values, held, secret)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_log_probabilities_and_do_not_depend_on_the_other_texts(kind: Kind, vocabulary: Tensor) -> None:
    public, lengths = chain(30, 1)
    mechanism = noise(3, 0.5)
    inverter = train_inverter(
        kind,
        vocabulary[public],
        public,
        lengths,
        privatize=mechanism,
        word_embeddings=vocabulary,
        seed=0,
        passes=2,
        bf16=False,
    )
    values = mechanism(vocabulary[public[:60]])
    sizes = [5, 30, 1, 24]
    ids, scores = inverter.log_scores(values, sizes, VOCAB)
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(60))
    assert bool((scores.diff(dim=1) <= 0).all())
    alone, alone_scores = inverter.log_scores(values[5:35], [30], 3)
    assert torch.equal(alone, ids[5:35, :3])
    torch.testing.assert_close(alone_scores, scores[5:35, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives(kind: Kind, vocabulary: Tensor) -> None:
    public, lengths = chain(20, 1)
    before = torch.random.get_rng_state()
    arguments = {"privatize": lambda values: values, "word_embeddings": vocabulary, "seed": 5, "passes": 1}
    inverter = train_inverter(kind, vocabulary[public], public, lengths, **arguments)
    again = train_inverter(kind, vocabulary[public], public, lengths, **arguments)
    assert torch.equal(torch.random.get_rng_state(), before)
    state = inverter.state()
    assert all(torch.equal(value, again.state()[name]) for name, value in state.items())
    loaded = Inverter.from_state(kind, state, vocabulary)
    values = vocabulary[public]
    for one, other in zip(inverter.log_scores(values, lengths, 4), loaded.log_scores(values, lengths, 4), strict=True):
        assert torch.equal(one, other)


def test_training_stops_in_time(vocabulary: Tensor) -> None:
    public, lengths = chain(200, 1)
    calls: list[int] = []

    def mechanism(values: Tensor) -> Tensor:
        calls.append(len(values))
        return values

    train_inverter(
        "sequence",
        vocabulary[public],
        public,
        lengths,
        privatize=mechanism,
        word_embeddings=vocabulary,
        seed=0,
        passes=100_000,
        max_seconds=1.0,
    )
    assert 3 < len(calls) < 1000


def test_augmented_ids() -> None:
    ids = torch.tensor([1, 7, 8, 2]).repeat(5_000)
    new = augmented_ids(ids, 50, generator=torch.Generator().manual_seed(0), share=0.15, keep=[1, 2])
    special = (ids == 1) | (ids == 2)
    assert torch.equal(new[special], ids[special])
    assert not bool(torch.isin(new[~special], torch.tensor([1, 2])).any())
    changed = float((new != ids)[~special].float().mean())
    assert 0.13 < changed < 0.16
    assert len(new.unique()) == 50  # every id occurs now


def test_the_attack_is_not_given_the_truth() -> None:
    assert set(inspect.signature(Inverter.guess).parameters) == {"self", "values", "lengths", "top_k"}


def test_unusable_arguments_are_refused(vocabulary: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # lets wrong shapes reach our own refusal
    public = zipf(50, 1)
    good = {"privatize": noise(1, 1.0), "word_embeddings": vocabulary, "seed": 0}
    with pytest.raises(InputError, match="kind 'linea' is unknown; did you mean 'linear'"):
        Inverter.from_state("linea", {}, vocabulary)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lengths must be at least 1 each and sum to the number of rows, 50"):
        train_inverter("linear", vocabulary[public], public, [49], **good)
    with pytest.raises(InputError, match=r"token_ids must be in \[0, 40\)"):
        train_inverter("linear", vocabulary[public], public + VOCAB, [50], **good)
    with pytest.raises(InputError, match="train it again"):
        Inverter.from_state("linear", {}, vocabulary)
    inverter = train_inverter("linear", vocabulary[public], public, [50], **good)
    with pytest.raises(InputError, match=r"top_k must be in \[1, 40\]"):
        inverter.guess(vocabulary[public], [50], top_k=41)
    with pytest.raises(InputError, match="values have width 5"):
        inverter.guess(vocabulary[public][:, :5], [50])


# --- real weights -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _run(bottom: BottomModel, texts: list[list[int]]) -> tuple[Tensor, Tensor, list[int]]:
    lengths, flat = [len(ids) for ids in texts], torch.tensor([token for ids in texts for token in ids])
    values = torch.empty(len(flat), bottom.hidden_size)
    for group in batches_by_length(lengths, 2048):
        rows = rows_of(lengths, group)
        ids, mask = pad_texts(flat[rows], [lengths[i] for i in group])
        values[rows] = bottom(ids, mask.long())[mask]
    return values, flat, lengths


def test_minilm_without_noise_is_read_at_two_blocks(shared_data) -> None:  # type: ignore[no-untyped-def]
    """A smaller run of bench/attacks.py --depth: 9,000 public tokens instead of 100,000."""
    base = load_base("minilm")
    bottom, _ = split_model(base.model, cut_layer=2)
    lines = (shared_data / "wikitext2" / "valid.txt").read_text().splitlines()
    encode = lambda texts: base.tokenizer(texts, truncation=True, max_length=48)["input_ids"]  # noqa: E731
    public = encode([line for line in lines if len(line) > 200][:200])
    sentences = (shared_data / "sst2" / "stsa.binary.test").read_text(encoding="latin-1").splitlines()[:25]
    values, ids, lengths = _run(bottom, public)
    inverter = train_inverter(
        "linear", values, ids, lengths, privatize=torch.clone, word_embeddings=bottom.word_embeddings, seed=0, passes=1
    )
    secret, true, sizes = _run(bottom, encode([line[2:] for line in sentences]))
    real = ~torch.isin(true, torch.tensor(base.tokenizer.all_special_ids))
    hits = inverter.guess(secret, sizes)[:, 0] == true
    assert float(hits[real].float().mean()) > 0.98
