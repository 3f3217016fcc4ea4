"""The plan of a corpus: who is in it, how often, and which document comes where; texts are made when asked for.

What stays in memory are the persons' values, the canaries and a number a document, not the texts.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from veiltune._validate import in_range, one_of, positive_int, refusal
from veiltune.data import carriers, fillers, templates, templates_zh
from veiltune.data.canaries import make_canaries
from veiltune.data.expansion import count_words, expand, fields, fill, seeded
from veiltune.data.manifest import CUES, TYPES, Person, Record
from veiltune.data.people import LOCALES, PHONE_STYLES, People
from veiltune.errors import InputError

TEXT_FILES = {"train": "in", "population": "pop", "validation": "val"}  # name of the file: split of its persons
REPETITIONS = (1, 2, 4, 8, 16, 32)
MOST_REPETITIONS = 64
_ATTEMPTS = 100
_TEMPLATES = {"en_US": templates.TEMPLATES, "zh_CN": templates_zh.TEMPLATES}
_FILLERS = {"en_US": fillers.FILLERS, "zh_CN": templates_zh.FILLERS}
_TOPICS = {"en_US": carriers.TOPICS, "zh_CN": templates_zh.TOPICS}
_JOINT = {"en_US": " ", "zh_CN": ""}
_DOCUMENT, _CARRIER, _CANARY = range(3)


@dataclass(frozen=True, kw_only=True)
class SynthOptions:
    """How large a corpus is and what is in it.

    >>> SynthOptions(persons=0)
    Traceback (most recent call last):
        ...
    veiltune.errors.InputError: persons must be a whole number of at least 1, got 0

    Attributes:
        persons: Number of twins: so many persons are in the training text and so many are not.
        population: Persons of population.jsonl.
        validation: Persons of validation.jsonl.
        canaries: Canaries whose inclusion a coin decides.
        canary_family: Of these: "random" letters, or a "token" each, which the tokenizer must be given (tokens.txt).
        exposure_canaries: Canaries that are always included, for each number of insertions and family.
        references: Secrets that are never included, for each family.
        carrier_share: Least share of the words of each file that is in texts without personal data.
        locales: Languages of persons and texts, in equal parts.
        repetitions: Numbers of documents a person can have, in equal parts.
        exposure_repetitions: Numbers of insertions of the exposure canaries.
        seed: The same seed and options give the same bytes.

    Raises:
        InputError: If a value is out of range.
    """

    persons: int = 550
    population: int = 250
    validation: int = 100
    canaries: int = 1000
    canary_family: str = "random"
    exposure_canaries: int = 20
    references: int = 1000
    carrier_share: float = 0.7
    locales: tuple[str, ...] = ("en_US",)
    repetitions: tuple[int, ...] = REPETITIONS
    exposure_repetitions: tuple[int, ...] = REPETITIONS
    seed: int = 0

    def __post_init__(self) -> None:
        positive_int(persons=self.persons)
        positive_int(population=self.population)
        positive_int(validation=self.validation)
        one_of(("random", "token"), canary_family=self.canary_family)
        for name in ("canaries", "exposure_canaries", "references", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise refusal(name, "a whole number of at least 0", value)
        in_range(0.0, 0.95, carrier_share=self.carrier_share)
        for name in ("repetitions", "exposure_repetitions"):
            values = getattr(self, name)
            if (
                not values
                or len(set(values)) < len(values)
                or any(v not in range(1, MOST_REPETITIONS + 1) for v in values)
            ):
                raise refusal(name, f"different whole numbers from 1 to {MOST_REPETITIONS}", values)
        for locale in self.locales:
            one_of(LOCALES, locale=locale)
        if not self.locales or len(set(self.locales)) < len(self.locales):
            raise refusal("locales", f"one or more of {', '.join(LOCALES)}, each once", self.locales)


PRESETS: dict[str, SynthOptions] = {
    "ci": SynthOptions(
        persons=100,
        population=100,
        validation=40,
        canaries=200,
        exposure_canaries=5,
        references=200,
        repetitions=(1, 2, 4, 8),
    ),
    "std": SynthOptions(),
    "full": SynthOptions(persons=1500, population=500, validation=200, canaries=2000, exposure_canaries=50),
}


@dataclass(repr=False)
class _Unit:
    """Twins (the one that is in first) or a single person; documents differ within it."""

    key: str
    persons: tuple[Person, ...]
    attempts: dict[int, int] = field(default_factory=dict)  # of the documents that were not good at once


class Corpus:
    """A planned corpus.

    Args:
        options: The whole corpus follows from them.

    Attributes:
        options: As given.
        persons: Sorted by id.
        canaries: Sorted by id.
        words: Of each file (see `TEXT_FILES`): words of texts about persons, of canaries and of carriers.
        documents: The same, of lines.

    Raises:
        InputError: If more persons are asked for than the word lists have room for.
    """

    def __init__(self, options: SynthOptions) -> None:
        self.options = options
        self.words = {name: {"persons": 0, "canaries": 0, "carriers": 0} for name in TEXT_FILES}
        self.documents = {name: dict(counts) for name, counts in self.words.items()}
        people = People(options.seed)
        self._units = self._draw_units(people)
        self.persons = tuple(sorted((p for unit in self._units for p in unit.persons), key=lambda person: person.id))
        self.canaries = make_canaries(
            people,
            seed=options.seed,
            epsilon=options.canaries,
            exposure={times: options.exposure_canaries for times in options.exposure_repetitions},
            references=options.references,
            locales=options.locales,
            family_for_epsilon=options.canary_family,
        )
        self._orders: dict[str, array[int]] = {name: array("q") for name in TEXT_FILES}
        self._plan_documents(people)
        self._plan_canaries(people)
        self._plan_carriers(people)
        for name, order in self._orders.items():
            seeded(options.seed, "order", name).shuffle(order)

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """The (text, unit of privacy) of one of `TEXT_FILES`, in its order."""
        for code in self._orders[name]:
            kind, index, k = code & 3, code >> 8, code >> 2 & 63
            if kind == _DOCUMENT:
                unit = self._units[index]
                yield fill(self._expansion(unit, k), unit.persons[0].values)[0], unit.persons[0].id
            elif kind == _CANARY:
                yield self.canaries[index].prefix + self.canaries[index].secret, self.canaries[index].id
            else:
                yield self._carrier(index)[0], _carrier_id(index)

    def records(self) -> Iterator[Record]:
        """Every document about a person, by person, then the carriers of "val"."""
        owners = {person.id: unit for unit in self._units for person in unit.persons}
        for person in self.persons:
            for k in range(person.repetitions):
                text, spans = fill(self._expansion(owners[person.id], k), person.values)
                yield Record(f"{person.id}/{k:02d}", person.id, person.split, text, spans)
        for index in sorted(code >> 8 for code in self._orders["validation"] if code & 3 == _CARRIER):
            yield Record(_carrier_id(index), "", "val", self._carrier(index)[0], ())

    def _draw_units(self, people: People) -> list[_Unit]:
        """Everybody, with repetitions, cue and locale in equal parts and numbers at random."""
        options = self.options
        sizes = {"pair": options.persons, "pop": options.population, "val": options.validation}
        numbers = list(range(2 * options.persons + options.population + options.validation))
        seeded(options.seed, "numbers").shuffle(numbers)
        ids = (f"person-{number:06d}" for number in numbers)
        units = []
        for kind, size in sizes.items():
            cells = itertools.cycle(itertools.product(options.repetitions, CUES, options.locales))
            for index, (repetitions, cue, locale) in zip(range(size), cells, strict=False):
                key = f"{kind}-{index:06d}"
                rng = seeded(options.seed, "unit", key)
                style, splits = rng.randrange(PHONE_STYLES), [kind]
                if kind == "pair":
                    splits = ["in", "out"] if rng.getrandbits(1) else ["out", "in"]
                persons = []
                for split in splits:
                    id = next(ids)
                    values = people.draw(id, locale=locale, cue=cue, style=style)
                    pair = key if kind == "pair" else ""
                    persons.append(Person(id, split, pair, locale, cue, repetitions, values))
                units.append(_Unit(key, tuple(sorted(persons, key=lambda person: person.split))))
        return units

    def _plan_documents(self, people: People) -> None:
        """Finds for each document the first attempt without anybody else's values and different from the others."""
        names = {split: name for name, split in TEXT_FILES.items()}
        for index, unit in enumerate(self._units):
            first, seen = unit.persons[0], set[str]()
            for k in range(first.repetitions):
                for attempt in range(_ATTEMPTS):
                    unit.attempts[k] = attempt
                    expansion = self._expansion(unit, k)
                    texts = [fill(expansion, person.values)[0] for person in unit.persons]
                    owned = zip(texts, unit.persons, strict=True)
                    if expansion not in seen and not any(people.index.foreign(t, (p.id,)) for t, p in owned):
                        break
                else:
                    raise InputError("no document free of other persons' values was found; ask for fewer persons")
                if attempt == 0:
                    del unit.attempts[k]
                seen.add(expansion)
                self._put(names[first.split], "persons", texts[0], index << 8 | k << 2 | _DOCUMENT)

    def _plan_canaries(self, people: People) -> None:
        for index, canary in enumerate(self.canaries):
            for _ in range(canary.repetitions):
                self._put("train", "canaries", canary.prefix + canary.secret, index << 8 | _CANARY)

    def _plan_carriers(self, people: People) -> None:
        """Adds texts without personal data, none twice, until they have their share of the words of each file."""
        share = self.options.carrier_share
        seen: set[bytes] = set()
        index = 0
        for name, words in self.words.items():
            others = words["persons"] + words["canaries"]
            while words["carriers"] * (1.0 - share) < others * share:
                text, _ = self._carrier(index)
                digest = hashlib.sha256(text.encode()).digest()[:8]
                if digest not in seen and not people.index.foreign(text):
                    seen.add(digest)
                    self._put(name, "carriers", text, index << 8 | _CARRIER)
                index += 1

    def _put(self, name: str, kind: str, text: str, code: int) -> None:
        self._orders[name].append(code)
        self.words[name][kind] += count_words(text)
        self.documents[name][kind] += 1

    def _expansion(self, unit: _Unit, k: int) -> str:
        """Document k of a unit, with the places of personal values still open: twins share it."""
        locale = unit.persons[0].locale
        chosen = _choose_templates(self.options.seed, unit.key, locale, unit.persons[0].repetitions)
        rng = seeded(self.options.seed, "document", unit.key, k, unit.attempts.get(k, 0))
        return expand(chosen[k], rng, _FILLERS[locale])

    def _carrier(self, index: int) -> tuple[str, str]:
        """A text without personal data, and its locale."""
        rng = seeded(self.options.seed, "carrier", index)
        locale = rng.choice(self.options.locales)
        topic = rng.choice(_TOPICS[locale])
        kept = sorted(rng.sample(range(len(topic)), rng.randint(*carriers.SENTENCES_PER_TEXT)))
        return expand(_JOINT[locale].join(topic[i] for i in kept), rng, _FILLERS[locale]), locale


def _choose_templates(seed: int, key: str, locale: str, count: int) -> list[str]:
    """Templates for one unit's documents: each once before any comes again; two or more mention every type."""
    rng = seeded(seed, "templates", key)
    known = list(_TEMPLATES[locale])
    rng.shuffle(known)
    if count > 1:
        rest = [t for t in known[1:] if fields(known[0]) | fields(t) == set(TYPES)]
        known.remove(rest[0])
        known.insert(1, rest[0])
    return [known[k % len(known)] for k in range(count)]


def _carrier_id(index: int) -> str:
    return f"carrier-{index:06d}"
