"""The corpus holds what its manifest says, tells nothing of who is in, and is the same whenever it is made."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from veiltune.attacks.ranking import roc_auc
from veiltune.data import carriers, templates, templates_zh
from veiltune.data.canaries import make_canaries, secret_bits
from veiltune.data.corpus import Corpus
from veiltune.data.expansion import count_words, expand, fields, fill, seeded
from veiltune.data.fillers import FILLERS
from veiltune.data.manifest import TYPES, Manifest, ManifestWriter, Person, Record, normalise, read_manifest
from veiltune.data.people import People, invent
from veiltune.data.synth import PRESETS, SynthOptions, SynthSummary, synthesise
from veiltune.errors import InputError, StorageError

SMALL = SynthOptions(
    persons=80, population=20, validation=12, canaries=60, exposure_canaries=1, references=30, repetitions=(1, 2, 4, 8)
)
TINY = replace(SMALL, persons=6, population=3, validation=3, canaries=4, references=3, exposure_repetitions=(1, 2))
FILES = ("train", "population", "validation")


class Made:
    """A corpus on disk, read back."""

    def __init__(self, folder: Path, options: SynthOptions) -> None:
        self.folder, self.options = folder, options
        self.summary: SynthSummary = synthesise(folder, options)
        self.manifest: Manifest = read_manifest(self.summary.manifest)
        self.lines = {
            name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in FILES
        }
        self.persons = {person.id: person for person in self.manifest.persons}
        self.records: dict[str, list[Record]] = defaultdict(list)
        for record in self.manifest.records:
            self.records[record.person].append(record)

    def split(self, name: str) -> list[Person]:
        return [person for person in self.manifest.persons if person.split == name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("corpus") / "small", SMALL)


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Made:
    options = replace(SMALL, persons=24, population=4, validation=4, locales=("en_US", "zh_CN"), repetitions=(2, 32))
    return Made(tmp_path_factory.mktemp("corpus") / "both", options)


@pytest.mark.parametrize("which", ["made", "chinese"])
def test_files_hold_what_the_manifest_says(which: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(which)
    for name, split in (("train", "in"), ("population", "pop"), ("validation", "val")):
        lines = [(line["text"], line["person"]) for line in made.lines[name]]
        assert all(line.keys() == {"text", "person"} for line in made.lines[name])
        about = [line for line in lines if line[1].startswith("person-")]
        expected = [(record.text, p.id) for p in made.split(split) for record in made.records[p.id]]
        assert sorted(about) == sorted(expected)
    assert {r.id: r.text for r in made.records[""]} == {
        line["person"]: line["text"] for line in made.lines["validation"] if line["person"].startswith("carrier-")
    }
    inserted = Counter((line["text"], line["person"]) for line in made.lines["train"] if "canary" in line["person"])
    assert inserted == {(c.prefix + c.secret, c.id): c.repetitions for c in made.manifest.canaries if c.included}
    assert made.summary.digest == made.manifest.digest
    assert made.summary.persons == {split: len(made.split(split)) for split in ("in", "out", "pop", "val")}


@pytest.mark.parametrize("which", ["made", "chinese"])
def test_every_document_mentions_its_person(which: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(which)
    for person in made.manifest.persons:
        records = made.records[person.id]
        assert len(records) == person.repetitions and {record.split for record in records} == {person.split}
        mentioned = [{span.type for span in record.spans} for record in records]
        assert all("name" in types and 2 <= len(types) <= 5 for types in mentioned)
        assert person.repetitions == 1 or set.union(*mentioned) == set(TYPES)
        for record in records:  # every place is known
            for type, value in person.values.items():
                found = [match.start() for match in re.finditer(re.escape(value), record.text)]
                assert found == [span.start for span in record.spans if span.type == type]


@pytest.mark.parametrize("which", ["made", "chinese"])
def test_nobody_is_in_a_text_of_somebody_else(which: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(which)
    values = [(normalise(v, t), p.id) for p in made.manifest.persons for t, v in p.values.items()]
    assert len({value for value, _ in values}) == len(values)
    texts = [(line["text"], line["person"]) for name in FILES for line in made.lines[name]]
    texts += [(record.text, p.id) for p in made.split("out") for record in made.records[p.id]]
    texts += [(canary.prefix + canary.secret, canary.id) for canary in made.manifest.canaries]
    for text, owner in texts[:: 1 if which == "made" else 4]:
        plain = normalise(text, "name")
        assert not [1 for value, id in values if value in plain and id != owner]


@pytest.mark.parametrize("which", ["made", "chinese"])
def test_no_text_comes_twice(which: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(which)
    texts = [line["text"] for name in FILES for line in made.lines[name] if "canary" not in line["person"]]
    texts += [record.text for person in made.split("out") for record in made.records[person.id]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("which", ["made", "chinese"])
def test_twins_differ_in_their_values_only(which: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(which)
    twins = {person.pair: person for person in made.split("out")}
    assert len(twins) == made.options.persons
    for person in made.split("in"):
        twin = twins[person.pair]
        assert (person.locale, person.cue, person.repetitions) == (twin.locale, twin.cue, twin.repetitions)
        assert not set(person.values.values()) & set(twin.values.values())
        assert [blank(record) for record in made.records[person.id]] == [blank(r) for r in made.records[twin.id]]


def blank(record: Record) -> str:
    text = record.text
    for span in reversed(record.spans):
        text = f"{text[: span.start]}<{span.type}>{text[span.end :]}"
    return text


@pytest.mark.parametrize("which", ["made", "chinese"])
def test_most_words_are_in_carriers(which: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(which)
    for name in FILES:
        words: Counter[str] = Counter()
        for line in made.lines[name]:
            words[line["person"].split("-")[0]] += count_words(line["text"])
        share = words["carrier"] / words.total()
        assert 0.7 <= share < 0.72
        assert sum(made.summary.words[name].values()) == words.total()
        if name == "train":
            assert made.summary.carrier_share == pytest.approx(share)
            assert made.summary.canary_share == pytest.approx(words["canary"] / words.total())


def test_repetitions_and_cues_come_in_equal_parts(made: Made, chinese: Made) -> None:
    for split in ("in", "out"):
        assert set(Counter((p.repetitions, p.cue) for p in made.split(split)).values()) == {10}
        parts = Counter((p.repetitions, p.cue, p.locale) for p in chinese.split(split))
        assert set(parts.values()) == {3} and len(parts) == 8


def blind(texts: list[str], members: np.ndarray, pairs: list[str]) -> tuple[float, float, float]:
    """AUC, with interval, of a classifier that has never seen the model nor the pairs that it judges.

    One half learns and the other is judged. Scores of a cross-validation depend on each other (what pair A teaches
    about B, B teaches about A), so their interval would be too narrow.
    """
    learns = np.isin(pairs, sorted(set(pairs))[::2])
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0))
    model.fit(np.array(texts)[learns], members[learns])
    scores = model.decision_function(np.array(texts)[~learns])
    return roc_auc(scores, members[~learns], groups=np.array(pairs)[~learns].tolist())


def test_a_blind_classifier_cannot_tell_who_is_in(made: Made) -> None:
    records = [record for person in (*made.split("in"), *made.split("out")) for record in made.records[person.id]]
    texts, members = [r.text for r in records], np.array([r.split == "in" for r in records])
    pairs = [made.persons[record.person].pair for record in records]
    _, low, high = blind(texts, members, pairs)
    assert low <= 0.5 <= high and high - low < 0.25
    rng = random.Random(0)
    marked = [
        f"{text} Indeed." if member and rng.random() < 0.6 else text
        for text, member in zip(texts, members, strict=True)
    ]
    assert blind(marked, members, pairs)[1] > 0.55  # planted: a word that members' texts have more often


def test_ids_and_order_tell_nothing(made: Made) -> None:
    assert sorted(p.id for p in made.manifest.persons) == [p.id for p in made.manifest.persons]
    bare = replace(SMALL, persons=40, canaries=0, exposure_canaries=0, references=0, repetitions=(1,), carrier_share=0)
    covered = 0
    for seed in range(30):
        twins = [person for person in Corpus(replace(bare, seed=seed)).persons if person.pair]
        numbers = [int(person.id.split("-")[1]) for person in twins]
        _, low, high = roc_auc(numbers, [person.split == "in" for person in twins])
        covered += low <= 0.5 <= high
    assert binomtest(covered, 30, 0.95, alternative="less").pvalue > 0.001
    carrier = [line["person"].startswith("carrier") for line in made.lines["train"]]
    _, low, high = roc_auc(range(len(carrier)), carrier)
    assert low <= 0.5 <= high
    assert roc_auc(range(len(carrier)), sorted(carrier))[1] > 0.5  # planted: documents first, then carriers


def test_a_fair_coin_decides_which_twin_is_in() -> None:
    corpus = Corpus(replace(SMALL, persons=400, repetitions=(1,), carrier_share=0.0))
    twins: dict[str, list[Person]] = defaultdict(list)
    for person in corpus.persons:
        if person.pair:
            twins[person.pair].append(person)
    smaller_in = sum(pair[0].split == "in" for pair in twins.values())  # by id, which is drawn apart
    assert binomtest(smaller_in, 400).pvalue > 0.001
    assert binomtest(400, 400).pvalue < 0.001  # planted: always the first


def test_canaries_are_included_by_fair_coins_of_their_own() -> None:
    made = make_canaries(
        People(0), seed=0, epsilon=1601, exposure={1: 3, 32: 2}, references=40, locales=("en_US", "zh_CN")
    )
    epsilon = [canary for canary in made if canary.purpose == "epsilon"]
    coins = [canary.included for canary in epsilon if canary.family == "random"]
    assert len(coins) == len(epsilon) == 1601 and binomtest(sum(coins), 1601).pvalue > 0.001
    runs = sum(a == b for a, b in itertools.pairwise(coins))
    assert binomtest(runs, 1600).pvalue > 0.001  # a coin does not depend on the one before
    for family in ("pii", "random"):
        times = Counter(c.repetitions for c in made if c.family == family and c.purpose == "exposure")
        assert times == {1: 3, 32: 2}
        references = [c for c in made if c.family == family and c.purpose == "reference"]
        assert len(references) == 40 and not any(c.included for c in references)
    assert binomtest(int(0.6 * 800), 800).pvalue < 0.001  # planted: an unfair coin
    assert {c.repetitions for c in epsilon} == {0, 1}
    _, low, high = roc_auc([int(c.id.split("-")[1]) for c in epsilon], [c.included for c in epsilon])
    assert low <= 0.5 <= high and len({c.prefix + c.secret for c in made}) == len(made)
    assert {c.family for c in made[:40]} == {"pii", "random"}  # their numbers are mixed


def test_secrets_are_uniform() -> None:
    made = make_canaries(People(3), seed=3, epsilon=0, exposure={1: 0}, references=600, locales=("en_US",))
    random_letters = "".join(c.secret for c in made if c.family == "random").replace(" ", "")
    addresses = [re.fullmatch(r"([a-z0-9]{8})@([a-z.]+)", c.secret) for c in made if c.family == "pii"]
    locals_, domains = zip(*(match.groups() for match in addresses if match), strict=True)
    assert len(random_letters) == 600 * 20 and len(locals_) == 600
    for drawn, bits in ((random_letters, secret_bits()["random"] / 20), ("".join(locals_), math.log2(36))):
        counts = list(Counter(drawn).values())
        assert len(counts) == round(2**bits) and chisquare(counts).pvalue > 0.001
        assert chisquare([c + (c > np.median(counts)) * 0.15 * c for c in counts]).pvalue < 0.001  # planted
    assert secret_bits()["pii"] == pytest.approx(8 * math.log2(36) + math.log2(len(set(domains))))


def test_references_have_the_prefixes_of_canaries(made: Made, chinese: Made) -> None:
    names = {c.id: re.search("[A-Z][a-z]+ [A-Z][a-z]+", c.prefix) for c in made.manifest.canaries if c.family == "pii"}
    assert len({match[0] for match in names.values() if match}) == len(names)  # everybody of their own
    for corpus in (made, chinese):
        frames = defaultdict(set)
        for canary in corpus.manifest.canaries:
            frame = re.sub(r"[A-Z][a-z]+ [A-Z][a-z]+|^[^\w\s]", "", canary.prefix)
            frames[canary.family, canary.purpose == "reference"].add(frame if corpus is made else len(frame) > 0)
        assert len(frames["random", True]) == 1 and frames["random", True] == frames["random", False]
        assert frames["pii", True] & frames["pii", False]
        assert len(frames["pii", True]) >= (6 if corpus is made else 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_seed_decides(tmp_path: Path) -> None:
    script = (
        "import sys; from veiltune.data.synth import SynthOptions, synthesise;"
        f"synthesise(sys.argv[1], SynthOptions(**{asdict(TINY)}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "apart")], check=True, env=environment)
    synthesise(tmp_path / "same", TINY)
    synthesise(tmp_path / "other", replace(TINY, seed=1))
    same, other = contents(tmp_path / "same"), contents(tmp_path / "other")
    assert contents(tmp_path / "apart") == same and len(same) == 4
    assert all(other[name] != same[name] for name in same)


def test_chinese_texts_are_chinese(chinese: Made) -> None:
    for person in chinese.manifest.persons:
        for record in chinese.records[person.id]:
            characters = len(re.findall("[\u4e00-\u9fff]", record.text))
            assert (characters > 40) == (person.locale == "zh_CN") and (characters == 0) == (person.locale == "en_US")
    words: Counter[bool] = Counter()
    for line in chinese.lines["train"]:
        words[bool(re.search("[\u4e00-\u9fff]", line["text"]))] += count_words(line["text"])
    assert 0.4 < words[True] / words.total() < 0.65


@pytest.mark.parametrize(("texts", "least"), [(templates.TEMPLATES, 60), (templates_zh.TEMPLATES, 20)])
def test_templates(texts: tuple[str, ...], least: int) -> None:
    assert len(set(texts)) == len(texts) >= least
    locale, words = ("en_US", FILLERS) if least == 60 else ("zh_CN", templates_zh.FILLERS)
    for number, template in enumerate(texts):
        assert "name" in fields(template) and 2 <= len(fields(template)) <= 5
        assert sum(fields(template) | fields(other) == set(TYPES) for other in texts) >= 1
        for seed in range(5):
            person = invent(random.Random(seed), locale=locale, cue="cue_free")
            text, _ = fill(expand(template, seeded(number, seed), words), person)
            assert 60 <= count_words(text) <= 140 if locale == "zh_CN" else 60 <= count_words(text) <= 120
            assert not re.search(r"[\[\]{}|]|  |^\s|\s$|[.!?] [a-z]", text)
    assert len({expand(texts[0], seeded(n), words) for n in range(200)}) > 190


@pytest.mark.parametrize("topics", [carriers.TOPICS, templates_zh.TOPICS])
def test_carriers_hardly_repeat(topics: tuple[tuple[str, ...], ...]) -> None:
    """The wordings alone, without numbers and names of things, are more than a million."""
    outcomes = 0.0
    for topic in topics:
        choices = [math.prod(part.count("|") + 1 for part in re.findall(r"\[([^\]]*)\]", s)) for s in topic]
        sums = np.zeros(len(topic) + 1)
        sums[0] = 1.0  # elementary symmetric polynomials: ways to choose k sentences and word them
        for number in choices:
            sums[1:] += number * sums[:-1].copy()
        outcomes += sums[slice(carriers.SENTENCES_PER_TEXT[0], carriers.SENTENCES_PER_TEXT[1] + 1)].sum()
        assert not set(TYPES) & set(re.findall(r"\{(\w+)\}", " ".join(topic)))
    assert outcomes > 1e6


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    def measured(repetitions: int, keep: bool = False) -> tuple[int, int]:
        """Peak memory and size of the files."""
        options = replace(TINY, persons=8, population=1, validation=1, repetitions=(repetitions,), carrier_share=0.5)
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        tracemalloc.start()
        try:
            if keep:
                texts = [line for name in FILES for line in Corpus(options).lines(name)]
                return tracemalloc.get_traced_memory()[1], sum(len(text) for text, _ in texts)
            synthesise(folder, options)
            return tracemalloc.get_traced_memory()[1], sum(len(content) for content in contents(folder).values())
        finally:
            tracemalloc.stop()

    synthesise(tmp_path / "first", TINY)  # fills the caches
    for keep in (False, True):
        (small, little), (large, much) = measured(1, keep), measured(24, keep)
        assert much - little > 1e5
        assert (large - small < 0.25 * (much - little)) != keep  # planted: all texts in a list


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="must be a new or empty folder; name another one"):
        synthesise(tmp_path, SMALL)
    with pytest.raises(InputError, match="must be a new or empty folder"):
        synthesise(tmp_path / "note", SMALL)
    assert contents(tmp_path) == {"note": b"mine"}


def test_nothing_stays_of_a_corpus_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(ManifestWriter, "canary", full)
    for folder in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(StorageError, match=r"cannot write .*: No space left on device"):
            synthesise(folder, TINY)
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"] and not contents(tmp_path / "empty")
    monkeypatch.undo()
    assert synthesise(tmp_path / "empty", TINY).persons == {"in": 6, "out": 6, "pop": 3, "val": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"persons": 0}, "persons must be a whole number of at least 1, got 0"),
        ({"population": -1}, "population must be a whole number of at least 1, got -1"),
        ({"validation": 1.5}, "validation must be a whole number"),
        ({"canaries": -1}, "canaries must be a whole number of at least 0, got -1"),
        ({"seed": True}, "seed must be a whole number of at least 0, got True"),
        ({"carrier_share": 1.0}, r"carrier_share must be in \[0.0, 0.95\], got 1.0"),
        ({"repetitions": ()}, "repetitions must be different whole numbers from 1 to 64"),
        ({"repetitions": (1, 65)}, "repetitions must be different whole numbers from 1 to 64"),
        ({"exposure_repetitions": (2, 2)}, "exposure_repetitions must be different whole numbers"),
        ({"locales": ("en",)}, "locale 'en' is unknown"),
        ({"locales": ()}, "locales must be one or more of en_US, zh_CN"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SynthOptions(**options)  # type: ignore[arg-type]


def test_presets_are_of_the_stated_sizes() -> None:
    ci, std, full = (PRESETS[name] for name in ("ci", "std", "full"))
    assert [o.persons for o in (ci, std, full)] == [100, 550, 1500]
    assert [o.canaries for o in (ci, std, full)] == [200, 1000, 2000]
    corpus = Corpus(ci)
    assert 80_000 < sum(corpus.words["train"].values()) < 200_000
    assert corpus.words["train"]["canaries"] < 0.1 * sum(corpus.words["train"].values())
