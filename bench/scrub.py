"""What `veiltune data scrub` finds, what it leaves, and how fast it looks.

    corpus      a synthetic corpus of `veiltune data synth`, of which the detector knows no word list: recall and
                precision by type on the spans of its manifest, exactly the same characters, before and after the look
                for known values; and how many of the persons' values stand anywhere in the scrubbed files
    planted     bank accounts and cards, which the corpus has none of, in its texts without personal data
    presidio    the data set of presidio-research (--data), by type; overlapping characters count, since its addresses
                are cut differently; with each of --detectors, and with an NER model if --ner names one
    speed       MB/s of one core: the four types e-mail, phone, IBAN and card, and everything

Intervals are Clopper and Pearson's at 95 %; documents about one person are not independent, so they are somewhat too
narrow. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from faker import Faker

from veiltune.attacks.intervals import clopper_pearson
from veiltune.data.detect import TYPES, Detector, DetectorOptions
from veiltune.data.manifest import Manifest, normalise, read_manifest
from veiltune.data.pseudonyms import Value
from veiltune.data.replacing import Replacer
from veiltune.data.scrub import ScrubOptions, scrub
from veiltune.data.surrogates import canonical
from veiltune.data.synth import PRESETS, synthesise

FILES = ("train", "population", "validation")
MANIFEST_TYPES = {"name": "name", "email": "email", "phone": "phone", "home": "address", "work": "address"}
PRESIDIO_TYPES = {
    "PERSON": "name",
    "STREET_ADDRESS": "address",
    "PHONE_NUMBER": "phone",
    "EMAIL_ADDRESS": "email",
    "CREDIT_CARD": "card",
    "IBAN_CODE": "iban",
    "US_SSN": "us_ssn",
    "IP_ADDRESS": "ip",
    "DOMAIN_NAME": "url",
}
FOUR = ("email", "phone", "iban", "card")
Spans = set[tuple[str, int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ci", choices=list(PRESETS))
    parser.add_argument("--locales", nargs="+", default=["en_US", "zh_CN"])
    parser.add_argument("--data", type=Path, help="synth_dataset_v2.json of presidio-research")
    parser.add_argument("--detectors", nargs="+", default=["patterns"], help="of patterns, presidio, both")
    parser.add_argument("--ner", default="", help="installed spaCy model")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    result: dict[str, Any] = {"preset": chosen.preset, "seed": chosen.seed}
    with tempfile.TemporaryDirectory() as folder:
        for locale in chosen.locales:
            options = replace(PRESETS[chosen.preset], seed=chosen.seed, locales=(locale,))
            summary = synthesise(Path(folder) / locale, options)
            manifest = read_manifest(summary.manifest)
            result[locale] = of_corpus(manifest, chosen.detectors, chosen.ner)
            result[locale]["left"] = left(manifest, Path(folder) / locale, Path(folder) / f"{locale}-scrubbed")
            print(f"{locale}: left of the values {json.dumps(result[locale]['left'])}")
            if locale == "en_US":
                texts = [record.text for record in manifest.records if not record.person]
                result["planted"] = of_planted(texts, chosen.seed)
                result["speed"] = speed([record.text for record in manifest.records], chosen.rounds)
    if chosen.data:
        result["presidio"] = of_presidio(json.loads(chosen.data.read_text()), chosen.detectors, chosen.ner)
    print(json.dumps(result))


def rates(pairs: Iterable[tuple[Spans, Spans]], *, exact: bool) -> dict[str, dict[str, list[float]]]:
    """Recall and precision with intervals, by type, of (true, found) spans."""
    hit, there, right, claimed = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for truth, found in pairs:
        for span in truth:
            there[span[0]] += 1
            hit[span[0]] += any(same(span, other, exact=exact) for other in found)
        for span in found:
            claimed[span[0]] += 1
            right[span[0]] += any(same(span, other, exact=exact) for other in truth)
    return {
        type: {
            "recall": share(hit[type], there[type]),
            **({"precision": share(right[type], claimed[type])} if claimed[type] else {}),
        }
        for type in TYPES
        if there[type]
    }


def same(a: tuple[str, int, int], b: tuple[str, int, int], *, exact: bool) -> bool:
    return a == b if exact else a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def share(count: int, of: int) -> list[float]:
    return [round(x, 5) for x in clopper_pearson(count, of)] + [of]


def show(title: str, table: dict[str, dict[str, list[float]]]) -> None:
    print(title)
    for type, row in table.items():
        cells = (f"{name} {v[0]:.4f} [{v[1]:.4f}, {v[2]:.4f}] of {v[3]:.0f}" for name, v in row.items())
        print(f"    {type:<8} " + "   ".join(cells))


def of_corpus(manifest: Manifest, detectors: Sequence[str], ner: str) -> dict[str, Any]:
    """Spans found, before and after values are looked for everywhere; records of persons outside the files too."""
    result: dict[str, Any] = {}
    truth = [{(MANIFEST_TYPES[s.type], s.start, s.end) for s in record.spans} for record in manifest.records]
    for kind, model in variants(detectors, ner):
        detector = Detector(DetectorOptions(detector=kind, ner=model))
        found = [[(f.start, f.end, f.type) for f in detector.find(record.text)] for record in manifest.records]
        values: dict[tuple[str, str], Value] = {}
        for record, spans in zip(manifest.records, found, strict=True):
            for start, end, type in spans:
                value = Value(type, record.text[start:end])
                values.setdefault((type, canonical(type, value.text)), value)
        replacer = Replacer(list(values.values()), {}, mode="mask")
        spread: list[Spans] = []
        for record, spans in zip(manifest.records, found, strict=True):
            _, places = replacer.replace(record.text, spans)
            spread.append({(place.key[0], place.start, place.end) for place in places})
        name = f"{kind}+{model}" if model else kind
        alone = [{(type, start, end) for start, end, type in spans} for spans in found]
        result[name] = {
            "found": rates(zip(truth, alone, strict=True), exact=True),
            "propagated": rates(zip(truth, spread, strict=True), exact=True),
        }
        for stage, table in result[name].items():
            show(f"{manifest.persons[0].locale}, {name}, {stage}", table)
    return result


def variants(detectors: Sequence[str], ner: str) -> list[tuple[str, str]]:
    return [(kind, model) for kind in detectors for model in dict.fromkeys(("", ner))]


def left(manifest: Manifest, source: Path, output: Path) -> dict[str, list[float]]:
    """Share of the values in the files that still stand anywhere in the scrubbed ones, by letters and digits."""
    scrub([source / f"{name}.jsonl" for name in FILES], output, ScrubOptions(person_column="person", contexts=0))
    texts = [
        [json.loads(line)["text"] for name in FILES for line in (folder / f"{name}.jsonl").open()]
        for folder in (source, output)
    ]
    result = {}
    for type in MANIFEST_TYPES:
        before, after = ("\n".join(normalise(text, type) for text in side) for side in texts)
        values = {normalise(person.values[type], type) for person in manifest.persons}
        there = [value for value in values if value in before]
        result[type] = share(sum(value in after for value in there), len(there))
    return result


def of_planted(texts: Sequence[str], seed: int) -> dict[str, Any]:
    """IBANs and cards of Faker in several writings, and numbers of the same length whose check digit is wrong."""
    fake, rng = Faker(["en_GB", "de_DE", "fr_FR", "es_ES", "it_IT", "nl_NL"]), random.Random(seed)
    fake.seed_instance(seed)
    detector, pairs, wrong = Detector(), [], 0
    for text in texts:
        type, value = ("iban", fake.iban()) if rng.random() < 0.5 else ("card", fake.credit_card_number())
        step = rng.choice((0, 4))
        spoilt = rng.random() < 0.3
        if spoilt:
            place = len(value) - 2
            value = (
                value[:place] + str((int(value[place]) + 1) % 10 if value[place].isdigit() else 7) + value[place + 1 :]
            )
        written = " ".join(value[i : i + step] for i in range(0, len(value), step)) if step else value
        start = text.index(" ") + 1
        whole = f"{text[:start]}{written}{rng.choice((' ', ', ', '. '))}{text[start:]}"
        found = {(f.type, f.start, f.end) for f in detector.find(whole)}
        pairs.append((set() if spoilt else {(type, start, start + len(written))}, found))
        wrong += spoilt
    table = rates(pairs, exact=True)
    show(f"planted, {wrong} with a wrong check digit", table)
    return table


def of_presidio(rows: list[dict[str, Any]], detectors: Sequence[str], ner: str) -> dict[str, Any]:
    result = {}
    for kind, model in variants(detectors, ner):
        detector = Detector(DetectorOptions(types=TYPES, detector=kind, ner=model))
        pairs = []
        started = time.process_time()
        for row in rows:
            truth = {
                (PRESIDIO_TYPES[span["entity_type"]], span["start_position"], span["end_position"])
                for span in row["spans"]
                if span["entity_type"] in PRESIDIO_TYPES
            }
            pairs.append((truth, {(f.type, f.start, f.end) for f in detector.find(row["full_text"])}))
        seconds = time.process_time() - started
        name = f"{kind}+{model}" if model else kind
        size = sum(len(row["full_text"].encode()) for row in rows)
        table = rates(pairs, exact=False)
        result[name] = {**table, "mb_per_s": round(size / seconds / 1e6, 3)}
        show(f"presidio-research, {name}, {size / seconds / 1e6:.2f} MB/s", table)
    return result


def speed(texts: Sequence[str], rounds: int) -> dict[str, float]:
    """MB/s of one core, the median of interleaved rounds."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    detectors = {"four": Detector(DetectorOptions(types=FOUR)), "all": Detector()}
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    for _ in range(rounds):
        for name, detector in detectors.items():
            started = time.process_time()
            for text in texts:
                detector.find(text)
            seconds[name].append(time.process_time() - started)
    result = {name: round(size / sorted(times)[len(times) // 2], 2) for name, times in seconds.items()}
    print("MB/s of a core: " + ", ".join(f"{name} {value}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
