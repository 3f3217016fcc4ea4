"""The parts of an audit that need no run: scoring, controls, personal data, public text, stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from veiltune.attacks.averaging import average_views
from veiltune.attacks.result import AttackResult
from veiltune.audit import scoring
from veiltune.audit.attempts import NotApplicableError, attempt
from veiltune.audit.channels import SideChannels
from veiltune.audit.practice import practice_noise
from veiltune.audit.presets import PRESETS
from veiltune.audit.public import LEAST_TOKENS, read_public
from veiltune.audit.record import Rate
from veiltune.audit.scoring import Truth, tokens_needed
from veiltune.audit.stages import Stages
from veiltune.audit.suite import INVERSIONS, Adversary
from veiltune.audit.tagging import PersonalTagger, read_terms
from veiltune.errors import DataError, InputError, VeiltuneError
from veiltune.privatize.mechanisms import DChi, Gaussian

TEXTS, LENGTH = 60, 10


@pytest.fixture
def truth(generator: torch.Generator) -> Truth:
    """60 texts of 10 tokens out of 20, the first and last of each special."""
    ids = torch.randint(2, 20, (TEXTS * LENGTH,), generator=generator)
    place = torch.arange(len(ids)) % LENGTH
    special = (place == 0) | (place == LENGTH - 1)
    ids[special] = 1
    return Truth(ids=ids, lengths=(LENGTH,) * TEXTS, real=~special, calibration=scoring.halves([LENGTH] * TEXTS))


def guesses_with(truth: Truth, share: float, generator: torch.Generator) -> Tensor:
    """Guesses of which about this share is right and the rest surely wrong."""
    right = torch.rand(len(truth.ids), generator=generator) < share
    return torch.where(right, truth.ids, truth.ids + 100)


def test_the_strongest_attack_is_chosen_on_one_half_and_reported_on_the_other(
    truth: Truth, generator: torch.Generator
) -> None:
    steady = guesses_with(truth, 0.5, generator) == truth.ids
    lucky = truth.calibration.clone()  # all right where it chooses, all wrong where it is reported
    everywhere = {name: torch.ones_like(lucky) for name in ("steady", "lucky")}
    hits = {"steady": steady, "lucky": lucky}
    group = scoring.group_rate("all", "", hits, everywhere, truth, truth.real, seed=0)
    assert group.attack == "lucky" and group.rate is not None and group.rate.successes == 0


def test_special_tokens_do_not_count(truth: Truth) -> None:
    rate = truth.rate(~truth.real, truth.real, seed=0)
    assert rate is not None and rate.successes == 0 and rate.trials == TEXTS * (LENGTH - 2)


def test_texts_that_hang_together_have_a_wider_interval_than_their_tokens_alone(truth: Truth) -> None:
    whole_texts = (torch.arange(TEXTS) % 2 == 0).repeat_interleave(LENGTH)
    rate = truth.rate(whole_texts, truth.real, seed=0)
    assert rate is not None and rate.by_text is not None
    assert rate.by_text[1] - rate.by_text[0] > 1.5 * (rate.high - rate.low)
    privacy = scoring.privacy_of(rate)
    assert privacy.low == pytest.approx(1 - rate.by_text[1]) and privacy.value == pytest.approx(1 - rate.value)


def test_too_few_tokens_give_a_number_that_would_do_instead_of_a_rate(truth: Truth) -> None:
    few = truth.real & (torch.arange(len(truth.ids)) < 40)
    hits = {"nearest": truth.real}
    group = scoring.group_rate("rare", "", hits, {"nearest": torch.ones_like(few)}, truth, few, seed=0)
    assert group.rate is None and group.needed == 2 * tokens_needed()


def test_an_attack_on_a_few_texts_does_not_hide_a_kind_of_tokens(truth: Truth) -> None:
    few = (torch.arange(len(truth.ids)) // LENGTH) % 30 < 10  # ten texts of each half: 80 tokens, 104 are needed
    hits = {"linear": truth.ids % 2 == 0, "optimize": few}
    attempted = {"linear": torch.ones_like(few), "optimize": few}
    group = scoring.group_rate("personal", "", hits, attempted, truth, truth.real, seed=0)
    assert group.attack == "linear" and group.rate is not None
    alone = scoring.group_rate("personal", "", {"optimize": few}, {"optimize": few}, truth, truth.real, seed=0)
    assert alone.rate is None and alone.needed == 2 * tokens_needed()


def test_tokens_needed_is_the_least_number_that_does() -> None:
    def width(trials: int) -> float:
        low, high = AttackResult(name="x", successes=trials // 2, trials=trials).interval()
        return high - low

    assert width(tokens_needed(0.1)) <= 0.2 < width(tokens_needed(0.1) - 1)


def test_shuffled_control_passes_at_chance_and_fails_on_a_scorer_that_leaks(truth: Truth) -> None:
    honest = scoring.shuffled_control(truth.ids, truth, truth.real, "nearest", seed=0)
    assert honest.passed and honest.rate.value == pytest.approx(honest.expected, abs=0.05)
    constant = Truth(torch.ones_like(truth.ids), truth.lengths, truth.real, truth.calibration)
    assert scoring.shuffled_control(constant.ids, constant, truth.real, "nearest", seed=0).expected == 1.0
    blocks = torch.arange(len(truth.ids)) // 2 + 5  # 300 tokens in pairs, never right when shuffled
    planted = Truth(blocks, truth.lengths, torch.ones_like(truth.real), truth.calibration)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    leaking = scoring.shuffled_control(blocks[order], planted, planted.real, "nearest", seed=0)  # knows the shuffle
    assert not leaking.passed


def test_shuffled_control_fails_if_the_scoring_of_the_audit_knows_the_tokens(
    truth: Truth, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    guesses = guesses_with(truth, 0.5, generator)
    assert scoring.shuffled_control(guesses, truth, truth.real, "nearest", seed=0).passed
    monkeypatch.setattr(Truth, "hits", lambda self, guesses: guesses == truth.ids)  # planted: whatever it is given
    control = scoring.shuffled_control(guesses, truth, truth.real, "nearest", seed=0)
    assert not control.passed and control.rate.value > 0.4


def test_positive_control_fails_for_attackers_who_cannot_read(truth: Truth, generator: torch.Generator) -> None:
    blind = {"nearest": guesses_with(truth, 0.3, generator) == truth.ids}
    assert not scoring.positive_control(blind, truth, truth.real, least=0.9, seed=0).passed
    reads = blind | {"linear": truth.real}
    control = scoring.positive_control(reads, truth, truth.real, least=0.9, seed=0)
    assert control.passed and control.attack == "linear"


def test_frequency_bins_part_the_tokens(truth: Truth, generator: torch.Generator) -> None:
    per_100k = torch.tensor([0.0, 0.0] + [0.0] * 3 + [0.9] * 3 + [9.5] * 6 + [50.0] * 6)  # 0.9: 9 in a million
    hits = guesses_with(truth, 0.5, generator) == truth.ids
    bins = scoring.by_frequency(hits, truth, truth.real, per_100k, seed=0)
    trials = {b.label: b.rate.trials if b.rate else 0 for b in bins}
    edges = {"never": (2, 5), "less than 1": (5, 8), "1 to under 10": (8, 14), "10 to under 100": (14, 20)}
    real = truth.ids[truth.real]
    expected = {label: int(((real >= low) & (real < high)).sum()) for label, (low, high) in edges.items()}
    assert trials == expected | {"100 to under 1,000": 0, "1,000 or more": 0}
    assert sum(trials.values()) == int(truth.real.sum()) and trials["never"] > 0 < trials["less than 1"]


@pytest.mark.parametrize("contributing", [3.0, torch.inf])
def test_map_uses_the_noise_of_contributing_tokens_and_the_class_that_it_follows(
    generator: torch.Generator, contributing: float
) -> None:
    """Half of the tokens have little noise in texts of one class, the other half in those of the other."""
    vocab, width, texts, length = 200, 48, 40, 25
    codebook = torch.randn(vocab, width, generator=generator) / width**0.5
    table = torch.full((2, vocab), 0.6)
    table[0, : vocab // 2] = table[1, vocab // 2 :] = contributing
    secret = torch.randint(vocab, (texts * length,), generator=generator)
    classes = (torch.arange(texts) % 2).repeat_interleave(length)
    law = DChi(eta=25.0, dim=width, reference_norm=1.0)
    values = practice_noise(law, views=1, seed=1, multipliers=table[classes, secret])(codebook[secret])
    adversary = Adversary(
        bottom=SimpleNamespace(releases_words=True, word_embeddings=codebook, hidden_size=width),  # type: ignore[arg-type]
        clean=lambda ids: codebook,
        template=(0,),
        position=0,
        special_ids=frozenset(),
        public_ids=[list(range(vocab))],
        public_clean=codebook,
        privatize=lambda clean: clean,
        eta=law.eta,
        sigma=None,
        multipliers=table,
        seed=0,
        _made={"codebook": codebook},
    )

    def read(adversary: Adversary) -> float:
        found = INVERSIONS["map"].run(adversary, values, [length] * texts, PRESETS["quick"])
        return float((found.ids[:, 0] == secret).float().mean())

    assert read(adversary) > read(replace(adversary, multipliers=None)) + 0.02


def test_an_attack_that_crashes_is_failed_and_has_no_rate() -> None:
    def crash() -> dict[str, object]:
        raise RuntimeError("the private text")

    entry = attempt("a", "A", "sees", crash)
    assert entry.status == "failed" and entry.reported is None and "private text" not in entry.model_dump_json()
    refused = attempt("a", "A", "sees", lambda: (_ for _ in ()).throw(InputError("needs 9 texts")))
    assert refused.status == "failed" and refused.reason == "needs 9 texts"
    absent = attempt("a", "A", "sees", lambda: (_ for _ in ()).throw(NotApplicableError("no gradients")))
    assert absent.status == "not_applicable" and absent.reported is None
    rate = Rate.of(AttackResult(name="a", successes=1, trials=2))
    assert attempt("a", "A", "sees", lambda: {"reported": rate}).reported == rate


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mail me at a.b+c@x.example.org now", ["a.b+c@x.example.org"]),
        ("call (212) 555-0134 today", ["(212) 555-0134"]),
        ("order AB-12345 and 90210", ["AB-12345", "90210"]),
        ("see www.ada.org/x", ["www.ada.org/x"]),
        ("Ada Ray and ADA RAY, not Adamant Rays", ["Ada Ray", "ADA RAY"]),
        ("two of 12 eggs", []),
    ],
)
def test_personal_data_is_found_by_form_and_by_term(text: str, found: list[str]) -> None:
    spans = PersonalTagger(["Ada Ray"]).spans(text)
    outermost = {text[a:b].strip() for a, b in spans}
    assert set(found) <= outermost and (found or not outermost)


def test_personal_tokens_are_those_that_touch_a_find(tokenizer: PreTrainedTokenizerFast) -> None:
    tagger = PersonalTagger(["bc"])
    text = "a bc d"
    length = len(tokenizer(text)["input_ids"])
    tags = tagger.tag(tokenizer, text, length=length + 2)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert len(tags) == length + 2 and tags == [a < 4 and b > 2 and a < b for a, b in offsets] + [False, False]


def test_terms_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "terms").write_text("Ada Ray\n\n Bo \n")
    assert read_terms(tmp_path / "terms") == ("Ada Ray", "Bo")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"\xe9")
    for name, word in (("empty", "0 terms"), ("latin", "UTF-8"), ("absent", "cannot be read")):
        with pytest.raises(DataError, match=word):
            read_terms(tmp_path / name)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., object]:
    def go(content: str, *, name: str = "public.txt", private: list[str] | None = None, most: int = 10**6) -> object:
        (tmp_path / name).write_text(content)
        return read_public(
            str(tmp_path / name),
            lambda texts: [[1] * len(text.split()) for text in texts],
            text_column="text",
            private=private or ["secret words"],
            max_tokens=most,
            seed=0,
        )

    return go


def test_public_text_is_read_up_to_the_limit(read: Callable[..., object]) -> None:
    lines = "\n".join(f"word {i} and more" for i in range(1000))
    public = read(lines, most=2500)
    assert 2500 <= public.num_tokens < 2504 and public.source == "public.txt"  # type: ignore[attr-defined]
    table = read("text\n" + lines, name="public.csv")
    assert table.num_tokens == 4000  # type: ignore[attr-defined]


def test_public_text_with_private_texts_in_it_is_refused_with_their_number(read: Callable[..., object]) -> None:
    lines = "\n".join(f"word {i} and more" for i in range(1000))
    with pytest.raises(DataError, match="has 2 texts that the run released"):
        read(lines + "\nSecret  words\nsecret words", private=["secret WORDS"])


def test_too_little_public_text_is_refused(read: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"has 3 tokens.*{LEAST_TOKENS:,}"):
        read("one two three")
    with pytest.raises(DataError, match="cannot be read"):
        read_public(
            str(tmp_path / "no.txt"), lambda t: [], text_column="text", private=[], max_tokens=1, seed=0
        )  # fmt: skip


def test_a_stage_is_made_once_for_the_same_settings(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"x": torch.tensor([len(made)])}

    for settings, expected in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2), ({"a": 1}, 3)):
        assert Stages(tmp_path / "audit", settings).tensors("one", make)["x"].item() == expected
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700


def test_a_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "audit", {})

    def crash() -> dict[str, Tensor]:
        raise VeiltuneError("no")

    with pytest.raises(VeiltuneError):
        stages.tensors("one", crash)
    assert {path.name for path in (tmp_path / "audit").iterdir()} == {"settings"}


@pytest.mark.parametrize("mechanism", [DChi, Gaussian])
def test_labels_behind_the_radius_of_an_average_are_read_at_its_strength(
    mechanism: type[DChi | Gaussian], generator: torch.Generator
) -> None:
    """A trainable bottom's texts are released in every epoch, so the noise that is measured is that of a mean."""
    views, dim, labels = 9, 64, [0, 1] * 20
    table = torch.tensor([[1.0, 1.0], [1.0, 2.0]])  # token 1 has half the noise in class 1
    ids = torch.ones(len(labels) * 5, dtype=torch.long)
    multipliers = torch.tensor([table[label, 1] for label in labels for _ in range(5)])
    privatizer = mechanism(dim=dim, eta=4.0, reference_norm=1.0)
    clean = torch.zeros(len(ids), dim)
    released = [privatizer.privatize(clean, generator=generator, multipliers=multipliers) for _ in range(views)]
    scene = SimpleNamespace(
        audited=SimpleNamespace(
            releaser=SimpleNamespace(contributing=SimpleNamespace(table=table), privatizer=privatizer),
            true_labels=labels,
        ),
        adversary=SimpleNamespace(special_ids=frozenset(), clean=lambda token_ids: clean),
        lengths=(5,) * len(labels),
        rows=list(range(len(labels))),
        token_ids=ids.view(-1, 5).tolist(),
        truth=SimpleNamespace(ids=ids),
        values=average_views(released),
        views=views,
    )
    channels = SideChannels(scene, ids)  # type: ignore[arg-type]
    channels._reference = clean
    assert channels._labels()["reported"].value > 0.95
