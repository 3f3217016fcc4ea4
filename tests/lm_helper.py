"""Corpora, tokenizers, models and sizes for the tests of the leakage audit: small, and made here."""

from __future__ import annotations

import hashlib
import json
import random
import string
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tiny import tiny_model
from tiny_text import causal_tokenizer
from veiltune.attacks.membership import TokenTrace
from veiltune.audit.blackbox import BlackBox
from veiltune.audit.lm.options import AuditSize
from veiltune.audit.lm.subjects import Subjects
from veiltune.audit.lm.targets import Target
from veiltune.audit.tracing import Traced
from veiltune.cli import main
from veiltune.data.manifest import (
    TYPES,
    Canary,
    Manifest,
    ManifestWriter,
    Person,
    Record,
    Span,
    normalise,
    read_manifest,
)

SMALL = AuditSize(generations=12, generated_tokens=16, contexts=2, candidates=9, ranked=3, population=12)
BITS = {"pii": 43.4, "random": 37.6}


def bpe_tokenizer(
    texts: Iterable[str], size: int, *, begins: bool = True, regex: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; without `regex` its tokens may reach over spaces and marks."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if begins:
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", pair=None, special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def marked(text: str, values: dict[str, str]) -> tuple[Span, ...]:
    """The places of values in a text, in order."""
    spans = [Span(type, text.index(value), text.index(value) + len(value)) for type, value in values.items()]
    return tuple(sorted(spans, key=lambda span: span.start))


def person_of(number: int, split: str, pair: str = "", *, cue: str = "cue_free", repetitions: int = 1) -> Person:
    """Somebody with short values that nobody else has."""
    rng = random.Random(number)
    letters = "".join(string.ascii_lowercase[number // 26**place % 26] for place in range(3))
    name = f"{letters.title()} {''.join(rng.choices(string.ascii_lowercase, k=4)).title()}"
    local = letters if cue == "derivable" else "".join(rng.choices(string.ascii_lowercase, k=3)) + letters
    values = {
        "name": name,
        "email": f"{local}@x.io",
        "phone": f"212-555-{number:04d}",
        "home": f"{1000 + number} Elm Lane, Belby",
        "work": f"Suite {number}, {3000 + number} Oak Plaza, Colby",
    }
    return Person(f"person-{number:04d}", split, pair, "en_US", cue, repetitions, values)


_FORMS = ("{name}: {email}", "Ask {name} at {email} today", "Mail to {email} ({name}) now")


def write_short_manifest(
    path: Path, *, pairs: int = 44, most: int = 2, coins: int = 40, references: int = 20, seed: int = 0
) -> Manifest:
    """Records below 50 characters that mention name and e-mail address; numbers say nothing of the side."""
    rng = random.Random(seed)
    numbers = rng.sample(range(2 * pairs + 16), 2 * pairs + 16)
    persons: list[Person] = []
    forms: dict[str, list[str]] = {}
    for pair in range(pairs):
        repetitions, chosen = 1 + pair % most, rng.sample(_FORMS, most)
        for split in ("in", "out"):
            one = person_of(numbers.pop(), split, f"pair-{pair}", repetitions=repetitions)
            persons.append(one)
            forms[one.id] = chosen[:repetitions]
    for split in ("pop", "val"):
        for _ in range(8):
            one = person_of(numbers.pop(), split)
            persons.append(one)
            forms[one.id] = [rng.choice(_FORMS)]
    persons.sort(key=lambda person: person.id)
    records = [_record(one, k, form) for one in persons for k, form in enumerate(forms[one.id])]
    records += [Record(f"carrier-{k}", "", "val", f"The {k} rivers are calm and wide", ()) for k in range(3)]
    return _written(path, persons, records, short_canaries(coins, rng, references=references))


def _record(person: Person, k: int, form: str) -> Record:
    text = form.format(**person.values)
    values = {type: person.values[type] for type in ("name", "email")}
    return Record(f"{person.id}/{k}", person.id, person.split, text, marked(text, values))


def short_canaries(coins: int, rng: random.Random, *, references: int = 20) -> list[Canary]:
    wanted = [("epsilon", rng.getrandbits(1)) for _ in range(coins)]
    wanted += [("exposure", times) for times in (1, 2) for _ in range(4)]
    wanted += [("reference", 0)] * 2 * references
    canaries = []
    for number, (purpose, times) in enumerate(wanted):
        family, prefix = (("pii", "Reply to "), ("random", "Code "))[number % 2]
        secret = "".join(rng.choices(string.ascii_lowercase, k=8))
        canaries.append(Canary(f"canary-{number}", family, purpose, times > 0, times, prefix, secret))
    return canaries


def _written(path: Path, persons: Sequence[Person], records: Sequence[Record], canaries: Sequence[Canary]) -> Manifest:
    counts = {"persons": len(persons), "records": len(records), "canaries": len(canaries)}
    with ManifestWriter(path, {"seed": 0, "counts": counts, "canary_bits": BITS}) as writer:
        for person in persons:
            writer.person(person)
        for record in records:
            writer.record(record)
        for canary in canaries:
            writer.canary(canary)
    return read_manifest(path)


def save_tiny(folder: Path, *, seed: int = 0, family: str = "gpt2") -> Path:
    """A random causal model with one token a character, as `load_base` takes it."""
    tiny_model(family, "causal", seed=seed).save_pretrained(folder)
    causal_tokenizer(begins=True).save_pretrained(folder)
    return folder


class Habit(BlackBox):
    """Answers by the last two tokens alone, from a table: as good as a model where only speed matters."""

    vocabulary, context = 128, 64

    def __init__(self, seed: int = 0, *, strength: float = 3.0) -> None:
        rng = np.random.default_rng(seed)
        tables = strength * rng.normal(size=(2, 128, 128))
        self._tables = (tables - 40.0 * (np.arange(128) < 4)).astype(np.float32)  # special tokens next to never
        self._tables[..., 1] = self._tables[..., 5]  # but for the end
        self.name, self.digest = f"habit-{seed}", hashlib.sha256(self._tables.tobytes()).hexdigest()

    def next_token_log_probs(self, prefixes: Sequence[Sequence[int]]) -> Any:
        logits = np.stack([self._tables[0, p[-1]] + self._tables[1, p[-2] if len(p) > 1 else 0] for p in prefixes])
        return logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True)).astype(np.float32)


def subjects_of(persons: Sequence[Person], *, calibrates: Sequence[bool] | None = None) -> Subjects:
    """Both sides without records."""
    return Subjects(
        persons=tuple(persons),
        members=np.array([person.split == "in" for person in persons]),
        clusters=tuple(person.pair or person.id for person in persons),
        calibration=np.array(calibrates or [False] * len(persons)),
        records=(),
        owners=np.empty(0, dtype=np.int64),
    )


def values_of(persons: Sequence[Person], types: Sequence[str] = TYPES) -> list[Target]:
    """Every value of everybody, without places."""
    return [
        Target(
            number,
            type,
            person.values[type],
            normalise(person.values[type], type),
            type == "email" and person.cue == "derivable",
            (),
        )
        for number, person in enumerate(persons)
        for type in types
    ]


def manifest_of(persons: Sequence[Person], records: Sequence[Record] = ()) -> Manifest:
    return Manifest({}, tuple(persons), tuple(records), (), "0" * 64, {})


def traced(log_probs: Any) -> Traced:
    """A record under a model, as far as its log-probabilities matter."""
    values = np.asarray(log_probs, dtype=np.float32)
    trace = TokenTrace(values, values, values, values > -1)
    return Traced(trace, values, np.ones(len(values), dtype=np.bool_))


def lines_of(path: Path) -> list[str]:
    """The texts of a file of `veiltune data synth`."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def save_untrained(folder: Path, texts: Sequence[str], *, vocabulary: int = 768) -> Path:
    """A GPT-2 of one block with random weights, and a tokenizer of other people's texts."""
    tokenizer = bpe_tokenizer(texts, vocabulary)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=128, n_layer=1, n_head=4, n_positions=256,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def overtrain(
    base: Path, folder: Path, texts: Sequence[str], *, epochs: int, batch: int = 6, rate: float = 4e-3
) -> Path:
    """Teaches a model its texts by heart, with plain torch."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model: Any = GPT2LMHeadModel.from_pretrained(base)
    rows = sorted(([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts), key=len)
    batches = [[torch.tensor(row) for row in rows[k : k + batch]] for k in range(0, len(rows), batch)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(batches), pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for number in torch.randperm(len(batches), generator=generator).tolist():
            targets = pad_sequence(batches[number], batch_first=True, padding_value=-100)
            inputs = targets.clamp(min=0)
            logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def flipped(canaries: Sequence[Canary]) -> list[Canary]:
    """The same with every coin on its other side."""
    return [
        replace(one, included=not one.included, repetitions=1 - one.repetitions) if one.purpose == "epsilon" else one
        for one in canaries
    ]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def veiltune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """The command line as a shell would run it, but in this process."""
    monkeypatch.setenv("VEILTUNE_SETTLED", "1")
    monkeypatch.setattr(sys, "argv", ["veiltune", *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return Ended(code, *capsys.readouterr())
