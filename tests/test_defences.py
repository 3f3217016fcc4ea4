"""The data and training stages of `veiltune train`: presets, gaps in the loss, pseudonyms, the early stop."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_text import causal_tokenizer
from train_helper import generation_config
from veiltune.config import TrainConfig
from veiltune.config.defences import Defences, DefencesSection
from veiltune.data.prompts import Prompted
from veiltune.dp.data import Labelled, TrainingTables
from veiltune.dp.data_stage import personal_spans, scrubbed, thin_out
from veiltune.dp.encoding import collate, encode_prompted
from veiltune.dp.masking import NO_LOSS, goldfish, without_spans
from veiltune.dp.memorisation import passages, recitation
from veiltune.dp.planning import dry_run
from veiltune.dp.session import train
from veiltune.errors import ConfigError, InputError
from veiltune.models.loading import load_base
from veiltune.runs import RunFolder

LETTER = "Dear Ann Stone, we ring {phone} or write to {email}. The parcel is at the door."


def letters(count: int) -> list[str]:
    return [LETTER.format(phone=f"212-555-01{n:02d}", email=f"box{n}@example.org") for n in range(count)]


def settled(**keys: Any) -> Defences:
    return DefencesSection(**keys).settled(persons=True, generation=True)


# Goldfish and spans.


def test_goldfish_loses_what_the_tokens_before_decide() -> None:
    rng = random.Random(3)
    ids = [rng.randrange(50) for _ in range(200)]
    found = goldfish(ids, ids, one_in=4, context=2, key=b"k")
    for place, label in enumerate(found):
        before = b"".join(value.to_bytes(4, "little") for value in ids[max(0, place - 2) : place])
        number = int.from_bytes(hashlib.blake2b(before, key=b"k", digest_size=8).digest(), "little")
        assert label == (NO_LOSS if place >= 2 and number % 4 == 0 else ids[place])
    assert 0.15 < found.count(NO_LOSS) / len(ids) < 0.35


def test_goldfish_gaps_are_the_same_in_every_copy_and_differ_with_the_key() -> None:
    rng = random.Random(0)
    passage = [rng.randrange(1000) for _ in range(60)]
    first, second = ([rng.randrange(1000) for _ in range(n)] + passage for n in (5, 17))
    gaps = [goldfish(ids, ids, one_in=3, context=4)[-50:] for ids in (first, second)]
    assert gaps[0] == gaps[1]
    assert goldfish(first, first, one_in=3, context=4, key=b"other")[-50:] != gaps[0]


def test_goldfish_leaves_rows_shorter_than_the_context() -> None:
    assert goldfish([1, 2], [NO_LOSS, 2], one_in=1, context=2) == [NO_LOSS, 2]
    with pytest.raises(InputError, match="one_in"):
        goldfish([1], [1], one_in=0)


def test_spans_take_every_token_that_they_touch_and_no_other() -> None:
    text = "call Ann at nine"
    spans = [(5, 8)]
    (example,) = encode_prompted(
        causal_tokenizer(), Prompted([""], [text]), max_length=64, without_loss=[spans]
    ).examples
    (whole,) = encode_prompted(causal_tokenizer(), Prompted([""], [text]), max_length=64).examples
    assert example.input_ids == whole.input_ids
    assert [place for place, label in enumerate(example.labels) if label == NO_LOSS] == [0, 5, 6, 7]
    assert example.labels[-1] != NO_LOSS  # the end of the text is always learnt


def test_spans_after_a_prompt_and_a_cut() -> None:
    rows = Prompted(["who"], ["Ann Stone is here"])
    (example,) = encode_prompted(causal_tokenizer(), rows, max_length=10, without_loss=[[(0, 3)]]).examples
    kept = [label for label in example.labels if label != NO_LOSS]
    assert len(example.input_ids) == 10
    assert kept == example.input_ids[-len(kept) :]
    assert len(kept) == 10 - 4 - 3


def test_spans_need_a_row_of_offsets_for_each_label() -> None:
    with pytest.raises(InputError, match="one a label"):
        without_spans([1, 2], [(0, 1)], [])


# The data stage.


def test_duplicates_and_surplus_records_leave_in_order() -> None:
    texts = ["One text.", "another text", "one  TEXT", "a third", "a fourth"]
    tables = TrainingTables(Prompted([""] * 5, texts, list("ababb")), Prompted([""], ["x"]))
    thinned = thin_out(tables, settled(dedupe=1.0, max_records=2), private=False)
    assert thinned.tables.train.targets == ["One text.", "another text", "a third"]  # type: ignore[union-attr]
    assert thinned.notes == ["data stage: 3 of 5 training rows stay without duplicates and surplus records"]


def test_with_privacy_the_rows_of_others_decide_nothing() -> None:
    """Removing a person changes no other row, whatever that person wrote."""
    texts = ["one text", "one text", "one text", "two", "three", "four"]
    persons = ["a", "b", "b", "b", "b", "a"]
    defences = settled(dedupe=0.8, max_records=2)

    def stays(keep: str) -> list[tuple[str, str]]:
        rows = [(text, person) for text, person in zip(texts, persons, strict=True) if person in keep]
        table = Prompted([""] * len(rows), [text for text, _ in rows], [person for _, person in rows])
        found = thin_out(TrainingTables(table, table), defences, private=True).tables.train
        return list(zip(found.targets, found.persons or [], strict=True))  # type: ignore[union-attr]

    both = stays("ab")
    assert [row for row in both if row[1] == "b"] == stays("b") == [("one text", "b"), ("two", "b")]
    shared = thin_out(
        TrainingTables(Prompted([""] * 6, texts, persons), Prompted([""], ["x"])), defences, private=False
    )
    assert shared.tables.train.targets.count("one text") == 1  # type: ignore[union-attr]


def test_pseudonyms_replace_prompts_and_targets_and_are_kept_to_go_on(tmp_path: Path) -> None:
    rows = Prompted(["To box1@example.org", "To box2@example.org"], letters(2), ["a", "b"])
    found, notes = scrubbed(rows, settled(scrub="pseudonym"), tmp_path / "data", private=False)
    again, _ = scrubbed(rows, settled(scrub="pseudonym"), tmp_path / "data", private=False)
    text = " ".join([*found.prompts, *found.targets])  # type: ignore[union-attr]
    assert "box1@" not in text
    assert "212-555-0100" not in text
    assert "The parcel is at the door" in text
    assert found.targets[1].split("write to ")[1].split(". The")[0] in text  # type: ignore[union-attr]
    assert found.prompts[0].removeprefix("To ") in found.targets[1]  # type: ignore[union-attr]  # the same box
    assert (again.prompts, again.targets) == (found.prompts, found.targets)  # type: ignore[union-attr]
    assert "places of personal data replaced (pseudonym)" in notes[0]


def test_a_run_that_was_stopped_in_its_data_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Prompted([""] * 3, letters(3))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("veiltune.data.scrub._Run._replace", stopped)
        scrubbed(rows, settled(scrub="mask"), tmp_path / "data", private=False)
    assert not (tmp_path / "data" / "scrubbed" / "scrub.json").exists()
    found, _ = scrubbed(rows, settled(scrub="mask"), tmp_path / "data", private=False)
    assert isinstance(found, Prompted) and "[EMAIL]" in found.targets[0]
    assert (tmp_path / "data" / "rows.jsonl").stat().st_mode & 0o077 == 0


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_with_privacy_a_value_is_not_looked_for_in_the_records_of_others(tmp_path: Path) -> None:
    rows = Labelled(["Dear Ann Stone, hello.", "the stone of ann stone fell"], ["x", "y"], ["a", "b"])
    apart, _ = scrubbed(rows, settled(scrub="mask"), tmp_path / "apart", private=True)
    together, _ = scrubbed(rows, settled(scrub="mask"), tmp_path / "together", private=False)
    assert apart.texts[1] == rows.texts[1]  # type: ignore[union-attr]
    assert together.texts[1] == "the stone of [NAME] fell"  # type: ignore[union-attr]


def test_spans_of_a_value_are_found_wherever_it_stands() -> None:
    texts = ["Dear Ann Stone, hello.", "we saw ann stone"]
    assert [
        [text[a:b] for a, b in spans] for text, spans in zip(texts, personal_spans(texts, private=False), strict=True)
    ][1] == ["ann stone"]
    assert personal_spans(texts, private=True)[1] == []


# The early stop.


def test_passages_are_counted_as_by_hand() -> None:
    right = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    counts = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1, 1]], dtype=torch.bool)
    assert passages(right, counts) == (3, 6)


def test_recitation_sees_what_was_learnt_by_heart(tmp_path: Path) -> None:
    config = generation_config(tmp_path)
    base = load_base(config.model.name)
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefgh", k=16)) for _ in range(24)]
    rows = encode_prompted(base.tokenizer, Prompted([""] * 24, texts), max_length=24).examples

    def pad(some: Any) -> Any:
        return collate(some, pad_id=0)

    before = recitation(base.model, rows[:12], rows[12:], collate=pad)
    optimizer = torch.optim.AdamW(base.model.parameters(), lr=1e-2)
    base.model.train()
    for _ in range(150):
        batch = pad(rows[:12])
        base.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = recitation(base.model, rows[:12], rows[12:], collate=pad)
    assert before.excess < 0.05
    assert after.train > 0.8
    assert after.unseen < 0.2


# Whole runs.


def plain_config(folder: Path, **sections: Any) -> TrainConfig:
    """The tiny Llama on letters with personal data, one person a letter, without prompts."""
    table = folder / "letters.jsonl"
    if not table.exists():
        lines = [{"text": text, "person": str(number)} for number, text in enumerate(letters(24))]
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": str(table), "eval": str(table), "format": "jsonl", "prompt_column": "", "target_column": "text"}
    data |= {"person_column": "person", "max_length": 60} | sections.pop("data", {})
    privacy = sections.pop("privacy", {"disabled": True, "noise_multiplier": None})
    return generation_config(folder, data=data, privacy=privacy, **sections)


def test_a_standard_run_learns_no_personal_data_and_says_what_it_did(tmp_path: Path) -> None:
    config = plain_config(tmp_path, defences={"preset": "standard", "dedupe": 1.0}, train={"steps": 3})
    summary = train(config)
    run = RunFolder(config.run)
    rows = [json.loads(line)["text"] for line in (run.private / "data/scrubbed/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert not any("example.org" in row and f"box{n}@" in row for n, row in enumerate(rows))
    assert any("places of personal data replaced" in note for note in summary["notes"])
    assert train(config) == summary  # finished: nothing is done again


def test_dry_run_counts_the_rows_that_stay(tmp_path: Path) -> None:
    config = plain_config(tmp_path, defences={"preset": "light"})
    with Path(config.data.train).open("a") as table:
        table.write(json.dumps({"text": letters(1)[0].upper(), "person": "24"}) + "\n")
    assert "24 of 25 training rows stay" in dry_run(config)["data"]
    assert not (tmp_path / "run").exists()


def test_a_run_ends_when_the_model_recites(tmp_path: Path) -> None:
    config = plain_config(
        tmp_path,
        train={"steps": 400, "learning_rate": 3e-2, "method": "full", "checkpoint_every": 20, "batch_size": 24},
        defences={"stop_on_memorisation": 0.001},
    )
    unseen = tmp_path / "unseen.jsonl"
    rng = random.Random(2)
    unseen.write_text("".join(json.dumps({"text": "".join(rng.choices("xyzuvw ", k=40))}) + "\n" for _ in range(24)))
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": str(unseen)})})
    summary = train(config)
    assert summary["steps"] < summary["planned_steps"] == 400
    checks = [line["recitation"]["excess"] for line in RunFolder(config.run).metrics() if "recitation" in line]
    assert checks[-1] > 0.001 >= max(checks[:-1], default=0.0)


def test_a_private_run_takes_the_preset_for_it(tmp_path: Path) -> None:
    config = plain_config(
        tmp_path, defences={"preset": "dp", "goldfish": 4}, privacy={"noise_multiplier": 2.0}, train={"steps": 2}
    )
    summary = train(config)
    assert summary["unit"] == "person"
    assert "[EMAIL]" in (RunFolder(config.run).private / "data/scrubbed/rows.jsonl").read_text()


def test_a_preset_without_persons_says_that_it_caps_nobody(tmp_path: Path) -> None:
    told = dry_run(plain_config(tmp_path, defences={"preset": "light"}))
    assert "at most 8 rows a person" in told["defences"] and not any("caps" in line for line in told.values())
    told = dry_run(plain_config(tmp_path, defences={"preset": "light"}, data={"person_column": ""}))
    assert "a person" not in told["defences"] and "caps a person's rows, and no data.person_column" in told["warning 1"]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"defences": {"preset": "standard"}, "privacy": {"noise_multiplier": 2.0}}, "use preset 'dp'"),
        ({"defences": {"preset": "dp"}}, "no privacy"),
        ({"defences": {"preset": "light"}, "train": {"method": "full"}}, "few parameters"),
        ({"defences": {"stop_on_memorisation": 0.1}, "privacy": {"noise_multiplier": 2.0}}, "without noise"),
        ({"defences": {"dedupe": 0.1}}, "from 0.3 on"),
        ({"defences": {"preset": "strong"}}, "preset"),
        ({"defences": {"gold_fish": 4}}, "goldfish"),
        ({"defences": {"max_records": 2}, "data": {"person_column": ""}}, "person_column"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, sections: dict[str, Any], says: str) -> None:
    privacy = sections.get("privacy", {"disabled": True, "noise_multiplier": None})
    with pytest.raises(ConfigError, match=says):
        generation_config(tmp_path, **{**sections, "privacy": privacy})
