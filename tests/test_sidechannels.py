"""What hangs on the noise besides the tokens: its scale, labels behind the scale, lengths, and noise used twice."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from veiltune.attacks import sidechannels
from veiltune.attacks.inversion import invert_by_nearest_embedding
from veiltune.attacks.ranking import roc_auc
from veiltune.attacks.sidechannels import (
    denoised_reference,
    labels_from_radius,
    noise_scale_from_special_tokens,
    noise_scale_scores,
    repeated_noise,
    replayed_differently,
    score_lengths,
    text_lengths,
)
from veiltune.errors import InputError
from veiltune.privatize.importance import ContributingTokens
from veiltune.privatize.mechanisms import Privatizer, make_privatizer
from veiltune.privatize.noise import sample_d_chi_noise

VOCAB, DIM, TEXTS, LENGTH = 400, 384, 120, 20


class Scene:
    """Texts whose class shows in some of their tokens, and what a vendor gets of them at a cut of 0."""

    def __init__(self, mechanism: str = "d_chi", noise_to_norm: float = 0.7) -> None:
        generator = torch.Generator().manual_seed(5)
        self.vocabulary = torch.nn.functional.normalize(torch.randn(VOCAB, DIM, generator=generator), dim=-1)
        self.vocabulary *= 1 + 0.1 * torch.rand(VOCAB, 1, generator=generator)
        self.labels = torch.randint(0, 2, (TEXTS,), generator=generator)
        ids = torch.randint(40, VOCAB, (TEXTS, LENGTH), generator=generator)
        telling = torch.rand(TEXTS, LENGTH, generator=generator) < 0.2
        words = torch.randint(0, 20, (TEXTS, LENGTH), generator=generator) + 20 * self.labels.unsqueeze(1)
        self.ids = torch.where(telling, words, ids)
        self.lengths = [LENGTH] * TEXTS
        self.privatizer: Privatizer = make_privatizer(
            mechanism, dim=DIM, reference_norm=1.05, noise_to_norm=noise_to_norm
        )
        assert self.privatizer.strength is not None
        self.eta = self.privatizer.strength.eta

    def contributing(self, variant: str) -> ContributingTokens:
        return ContributingTokens.fit(
            self.ids.tolist(), self.labels.tolist(), num_classes=2, vocab_size=VOCAB, variant=variant, top_fraction=0.05
        )

    def release(self, contributing: ContributingTokens | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Released rows and the multiplier that each had."""
        multipliers = torch.ones(TEXTS * LENGTH)
        if contributing is not None:
            pairs = zip(self.ids, self.labels.tolist(), strict=True)
            multipliers = torch.cat([contributing.multipliers(ids, label) for ids, label in pairs])
        clean, noise = self.vocabulary[self.ids.flatten()], torch.Generator().manual_seed(6)
        return self.privatizer.privatize(clean, generator=noise, multipliers=multipliers), multipliers

    def guess(self, values: torch.Tensor) -> torch.Tensor:
        return invert_by_nearest_embedding(values, self.vocabulary)[:, 0]


@pytest.mark.parametrize("mechanism", ["d_chi", "gaussian"])
@pytest.mark.parametrize("variant", ["budget", "top"])
def test_the_radius_shows_contributing_tokens(mechanism: str, variant: str) -> None:
    scene = Scene(mechanism)
    values, multipliers = scene.release(scene.contributing(variant))
    scores = noise_scale_scores(values, scene.vocabulary[scene.guess(values)])
    less_noise = multipliers > multipliers.min()
    assert roc_auc(scores, less_noise)[0] >= 0.99
    assert roc_auc(noise_scale_scores(values), less_noise)[0] >= 0.95  # not even a guess is needed


@pytest.mark.parametrize("mechanism", ["d_chi", "gaussian"])
def test_one_shared_scale_shows_nothing(mechanism: str) -> None:
    scene = Scene(mechanism)
    values, _ = scene.release(None)
    would_have = scene.contributing("budget").table.amax(0)[scene.ids.flatten()] > 0.6
    scores = noise_scale_scores(values, scene.vocabulary[scene.guess(values)])
    _, low, high = roc_auc(scores, would_have)
    assert low <= 0.5 <= high


def test_a_denoiser_does_instead_of_guesses(generator: torch.Generator) -> None:
    """Clean vectors of very different length in few directions: the norm alone is blurred, what is left is not."""
    axes = torch.randn(12, 96, generator=generator)

    def released(count: int, multipliers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clean = torch.randn(count, 12, generator=generator) @ axes * torch.rand(count, 1, generator=generator)
        privatizer = make_privatizer("d_chi", dim=96, reference_norm=20.0, noise_to_norm=0.5)
        return clean, privatizer.privatize(clean, generator=generator, multipliers=multipliers)

    public = released(2000, torch.ones(2000))
    less_noise = torch.rand(1500, generator=generator) < 0.1
    _, values = released(1500, torch.where(less_noise, 2.0, 1.0))
    reference = denoised_reference(values, *public)
    assert roc_auc(noise_scale_scores(values, reference), less_noise)[0] > 0.99
    assert roc_auc(noise_scale_scores(values), less_noise)[0] < 0.95  # planted: the norm alone
    _, shared = released(1500, torch.ones(1500))
    _, low, high = roc_auc(noise_scale_scores(shared, denoised_reference(shared, *public)), less_noise)
    assert low <= 0.5 <= high
    # the fit is least squares on centred columns
    inputs, outputs = (part.double() - part.double().mean(0) for part in (public[1], public[0]))
    slow = torch.linalg.lstsq(inputs, outputs).solution
    expected = (values.double() - public[1].double().mean(0)) @ slow + public[0].double().mean(0)
    assert torch.allclose(reference.double(), expected, atol=1e-3)


def test_a_scale_chosen_by_the_label_tells_the_label() -> None:
    scene = Scene()
    contributing = scene.contributing("budget")
    values, _ = scene.release(contributing)
    guesses = scene.guess(values)
    radii = -noise_scale_scores(values, scene.vocabulary[guesses])
    found = labels_from_radius(radii, guesses, scene.lengths, contributing.table, eta=scene.eta, dim=DIM)
    assert torch.equal(found, scene.labels)
    garbled = torch.rand(len(guesses), generator=torch.Generator().manual_seed(7)) < 0.3
    wrong = torch.where(garbled, (guesses + 57) % VOCAB, guesses)  # three guesses in ten are wrong
    radii = -noise_scale_scores(values, scene.vocabulary[wrong])
    found = labels_from_radius(radii, wrong, scene.lengths, contributing.table, eta=scene.eta, dim=DIM)
    assert float((found == scene.labels).float().mean()) > 0.9


def test_without_label_dependent_scale_the_label_stays_hidden() -> None:
    scene = Scene()
    values, _ = scene.release(None)
    guesses = scene.guess(values)
    radii = -noise_scale_scores(values, scene.vocabulary[guesses])
    agreeing = torch.ones(2, VOCAB)
    found = labels_from_radius(radii, guesses, scene.lengths, agreeing, eta=scene.eta, dim=DIM)
    assert not found.any()  # every class ties


@pytest.mark.parametrize("law", ["d_chi", "gaussian"])
def test_label_likelihood_equals_the_slow_twin(law: str, generator: torch.Generator) -> None:
    dim, eta, wrong = 12, 4.0, 0.05
    table = torch.rand(3, 9, generator=generator) * 3 + 0.3
    guesses = torch.randint(0, 9, (60,), generator=generator)
    radii = torch.rand(60, generator=generator) * 6 + 0.5
    lengths = [7, 13, 1, 19, 20]

    def density(log_radius: float, scale: float) -> float:
        radius = math.exp(log_radius)
        if law == "d_chi":
            return float(stats.gamma(dim, scale=1 / scale).pdf(radius)) * radius
        return float(stats.chi(dim, scale=math.sqrt(dim + 1) / scale).pdf(radius)) * radius

    expected, start = [], 0
    for length in lengths:
        totals = [0.0] * 3
        for i in range(start, start + length):
            for label in range(3):
                fit = density(math.log(radii[i]), eta * float(table[label, guesses[i]]))
                totals[label] += math.log((1 - wrong) * fit + wrong / 8.0)
        expected.append(totals.index(max(totals)))
        start += length
    assert labels_from_radius(radii, guesses, lengths, table, eta=eta, dim=dim, law=law).tolist() == expected
    wrong_scale = labels_from_radius(radii, guesses, lengths, table, eta=3 * eta, dim=dim, law=law)
    assert wrong_scale.tolist() != expected  # planted


def test_a_token_without_noise_counts_for_the_class_that_sends_it_so() -> None:
    table = torch.tensor([[math.inf, 1.0], [1.0, 1.0]])
    radii, guesses = torch.tensor([0.0, 9.6, 9.6]), torch.tensor([0, 1, 0])
    assert labels_from_radius(radii, guesses, [2, 1], table, eta=10.0, dim=96).tolist() == [0, 1]


# --- lengths ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from([0, 0, 5, 6]), min_size=1, max_size=9), min_size=1, max_size=4))
@settings(deadline=None)
def test_length_is_the_best_cut(texts: list[list[int]]) -> None:
    def slow(text: list[int]) -> int:
        def fit(n: int) -> int:
            return sum(token != 0 for token in text[:n]) + sum(token == 0 for token in text[n:])

        return max(range(len(text) + 1), key=lambda n: (fit(n), n))

    flat = torch.tensor([token for text in texts for token in text])
    assert text_lengths(flat, [len(text) for text in texts], 0).tolist() == [slow(text) for text in texts]


@pytest.mark.parametrize(("noise_to_norm", "exact"), [(0.7, True), (60.0, False)])
def test_padding_is_found_where_tokens_are(noise_to_norm: float, exact: bool) -> None:
    scene = Scene(noise_to_norm=noise_to_norm)
    true = torch.randint(3, LENGTH + 1, (TEXTS,), generator=torch.Generator().manual_seed(8))
    scene.ids[torch.arange(LENGTH) >= true.unsqueeze(1)] = 399
    result = score_lengths(text_lengths(scene.guess(scene.release(None)[0]), scene.lengths, 399), true)
    assert (result.success_rate == 1.0) == exact
    assert exact or result.success_rate < 0.3


# --- the noise itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", ["d_chi", "gaussian"])
def test_known_slots_tell_the_scale(law: str) -> None:
    generator, inside, errors = torch.Generator().manual_seed(9), 0, []
    privatizer = make_privatizer(law, dim=48, reference_norm=1.0, eta=20.0)
    clean = torch.randn(40, 48, generator=generator)
    for _ in range(200):
        values = privatizer.privatize(clean, generator=generator)
        eta, low, high = noise_scale_from_special_tokens(values, clean, law=law)
        inside += low <= 20.0 <= high
        errors.append(abs(eta / 20.0 - 1))
        assert not low <= 26.0 <= high  # planted
    assert stats.binomtest(inside, 200, 0.95).pvalue > 1e-3
    assert max(errors) < 0.09  # 40 * 48 coordinates: sd of about 1 / sqrt(1920) = 2.3 %


def test_a_published_broken_sampler_shows_in_the_scale() -> None:
    """Gamma(H, 1 / eta) drawn for every coordinate: 18 times too much noise."""
    generator = torch.Generator().manual_seed(10)
    radius = torch.distributions.Gamma(48.0, 20.0).sample((40, 48))
    broken = radius * (2 * torch.rand(40, 48, generator=generator) - 1)
    _, _, high = noise_scale_from_special_tokens(broken, torch.zeros(40, 48))
    assert high < 20.0 / 3


def test_no_noise_is_an_infinite_eta() -> None:
    assert noise_scale_from_special_tokens(torch.ones(3, 4), torch.ones(3, 4)) == (math.inf,) * 3


def test_repeated_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = sample_d_chi_noise((300, 64), eta=5.0, generator=torch.Generator().manual_seed(11))
    assert repeated_noise(sound).successes == 0
    one_for_all = sound[:1] * torch.rand(300, 1, generator=torch.Generator().manual_seed(12))  # planted, also rescaled
    assert repeated_noise(one_for_all).success_rate == 1.0
    some = sound.clone()
    some[[17, 250]] = -some[3] + 0.1 * some[[17, 250]]  # planted: three rows alike, one with the other sign
    assert repeated_noise(some).successes == 3
    monkeypatch.setattr(sidechannels, "_BLOCK", 7)
    assert repeated_noise(some).successes == 3 and repeated_noise(one_for_all).success_rate == 1.0


def test_chance_does_not_look_like_repetition() -> None:
    generator = torch.Generator().manual_seed(13)
    found = sum(repeated_noise(torch.randn(60, 8, generator=generator)).successes > 0 for _ in range(300))
    assert found <= 4  # expected .3


def test_changed_replays_are_counted() -> None:
    assert replayed_differently([b"x"] * 5, [b"x"] * 5).successes == 0
    assert replayed_differently([b"x"] * 5, [b"x", b"y", b"x", b"x", b"z"]).successes == 2


def test_unusable_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids, table = torch.zeros(5, dtype=torch.long), torch.ones(2, 3)
    with pytest.raises(InputError, match="lengths add up to 4, but there are 5 radii"):
        labels_from_radius(torch.ones(5), ids, [4], table, eta=1.0, dim=3)
    with pytest.raises(InputError, match="law 'laplace' is unknown"):
        labels_from_radius(torch.ones(5), ids, [5], table, eta=1.0, dim=3, law="laplace")
    with pytest.raises(InputError, match="wrong_share must be in"):
        labels_from_radius(torch.ones(5), ids, [5], table, eta=1.0, dim=3, wrong_share=0.0)
    with pytest.raises(InputError, match=r"at least 4 public vectors, .* of width 4; got \(3, 4\)"):
        denoised_reference(torch.zeros(5, 4), torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(InputError, match="lengths add up to 6"):
        text_lengths(ids, [6], 0)
    with pytest.raises(InputError, match="guesses are for 5 texts, the secret has 2"):
        score_lengths(ids, torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="at least one vector"):
        noise_scale_from_special_tokens(torch.zeros(0, 4), torch.zeros(0, 4))
    with pytest.raises(InputError, match=r"got shape \(1, 4\)"):
        repeated_noise(torch.zeros(1, 4))
    with pytest.raises(InputError, match="same texts, got 1 and 2"):
        replayed_differently([b""], [b"", b""])
