"""Unlearning: its losses by hand, whole runs on a model that knows its rows by heart, and what it refuses."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_helper import veiltune
from tiny_text import causal_tokenizer
from train_helper import generation_config
from veiltune.config import TrainConfig
from veiltune.config.defences import DefencesSection
from veiltune.dp.forgetting import forgetting_losses
from veiltune.dp.losses import causal_lm_losses
from veiltune.dp.session import train
from veiltune.dp.unlearning import UnlearnOptions, unlearn
from veiltune.errors import DataError, InputError, PrivacyError
from veiltune.runs import RunFolder


def rows_of(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh", k=16)) for _ in range(count)]


def by_heart(folder: Path, **sections: Any) -> TrainConfig:
    """A run that overfits 24 random rows, two a person."""
    for name, seed in (("train", 1), ("unseen", 2)):
        lines = [{"text": text, "person": f"p{n // 2}"} for n, text in enumerate(rows_of(24, seed))]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "unseen.jsonl"), "format": "jsonl"}
    data |= {"prompt_column": "", "target_column": "text", "person_column": "person"}
    privacy = sections.pop("privacy", {"disabled": True, "noise_multiplier": None})
    learning = {"method": "full", "steps": 60, "batch_size": 12, "learning_rate": 1e-2, "schedule": "constant"}
    return generation_config(folder, data=data, privacy=privacy, train=learning | sections.pop("train", {}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = by_heart(tmp_path_factory.mktemp("by-heart"))
    train(config)
    return Path(config.run)


def named(folder: Path, *persons: str) -> Path:
    path = folder / "persons.txt"
    path.write_text("\n".join(persons) + "\n")
    return path


def test_losses_are_those_of_the_formulae() -> None:
    log_probs = torch.tensor([-2.0, -9.0], requires_grad=True)
    reference = torch.tensor([-3.0, -3.0])
    found = forgetting_losses(log_probs, method="npo", reference=reference, beta=0.5)
    by_hand = [2 / 0.5 * math.log(1 + math.exp(0.5 * gain)) for gain in (1.0, -6.0)]
    assert found.tolist() == pytest.approx(by_hand)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([2 / (1 + math.exp(-0.5)), 2 / (1 + math.exp(3.0))])
    assert forgetting_losses(log_probs, method="ascent") is log_probs


def test_npo_near_beta_zero_is_ascent() -> None:
    log_probs = torch.tensor([-2.0, -9.0], requires_grad=True)
    forgetting_losses(log_probs, method="npo", reference=torch.zeros(2), beta=1e-6).sum().backward()  # type: ignore[no-untyped-call]
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("method", ["npo", "ascent"])
def test_named_rows_become_as_unlikely_as_unseen_and_others_stay(run: Path, tmp_path: Path, method: str) -> None:
    options = UnlearnOptions(method=method, steps=300, learning_rate=2e-3)
    found = unlearn(run, named(tmp_path, "p0", "p3"), tmp_path / "out", options)
    before, after = found["loss_before"], found["loss_after"]
    assert found["rows"] == 4
    assert before["forget"] < 1.0 < before["unseen"]
    assert found["no_likelier_than_unseen"]
    public = found["loss_public"]
    assert after["forget"] - public["forget"] >= after["unseen"] - public["unseen"]
    assert after["unseen"] > 1.5
    cost = 0.3 if method == "npo" else 1.2  # gradient ascent never fades, and takes the other rows along
    assert after["keep"] < min(before["keep"] + cost, after["unseen"] - 0.5)
    summary = RunFolder(tmp_path / "out").read_json("summary.json")
    assert summary["unlearning"]["method"] == method
    assert "p0" in (tmp_path / "out" / "private" / "forgotten.txt").read_text()
    assert not (tmp_path / "out" / "private" / "forgotten.txt").stat().st_mode & 0o077
    assert "p0" not in (tmp_path / "out" / "summary.json").read_text()


def test_what_is_forgotten_already_cannot_be_forgotten_again(run: Path, tmp_path: Path) -> None:
    """The rows are compared with themselves before training, for they may be harder than the unseen ones anyway."""
    persons = named(tmp_path, "p0", "p3")
    found = unlearn(run, persons, tmp_path / "out", UnlearnOptions(steps=300, learning_rate=2e-3))
    assert found["no_likelier_than_unseen"]
    with pytest.raises(DataError, match="there is nothing to forget"):
        unlearn(tmp_path / "out", persons, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_source_run_is_left_as_it_was(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    unlearn(run, named(tmp_path, "p1"), tmp_path / "out", UnlearnOptions(steps=2))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_command_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ["unlearn", run, named(tmp_path, "p2"), "-o", tmp_path / "out", "--steps", "3"]
    ended = veiltune(monkeypatch, capsys, *order)
    assert ended.code == 0
    assert "rows to forget" in ended.out
    assert "nothing is proven" in ended.out
    again = veiltune(monkeypatch, capsys, *order)
    assert again.code == 2
    assert "exists; name a new folder" in again.err


def test_a_run_with_a_claim_is_refused(tmp_path: Path) -> None:
    config = by_heart(tmp_path, privacy={"noise_multiplier": 2.0}, train={"steps": 2})
    train(config)
    with pytest.raises(PrivacyError, match="claim of privacy"):
        unlearn(config.run, named(tmp_path, "p0"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_lost_the_rows_it_learnt_is_refused(tmp_path: Path) -> None:
    """Scrubbed anew they would have other surrogates."""
    config = by_heart(tmp_path, train={"steps": 1})
    config = config.model_copy(update={"defences": DefencesSection(scrub="mask")})
    train(config)
    shutil.rmtree(Path(config.run) / "private" / "data")
    with pytest.raises(InputError, match="lost private/data"):
        unlearn(config.run, named(tmp_path, "p0"), tmp_path / "out")
    assert not (Path(config.run) / "private" / "data").exists()


def test_rows_to_keep_do_not_teach_what_the_defences_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Personal data and goldfish gaps have no loss in training, so they have none when others' rows are kept."""
    config = by_heart(tmp_path)
    lines = [{"text": f"{'abcdefghijkl'[n]}ear write ann@old.org", "person": f"p{n}"} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config.model_copy(update={"defences": DefencesSection(mask_personal=True, goldfish=4, goldfish_context=2)})
    tokenizer, learnt = causal_tokenizer(begins=True), {}

    def watched(name: str) -> Any:
        def losses(model: Any, batch: Any) -> Any:
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
                if "write" in tokenizer.decode(ids).replace(" ", ""):
                    told = [int(i) if j != -100 else 0 for i, j, k in zip(ids, labels, mask, strict=True) if k]
                    learnt.setdefault(name, set()).add("".join(tokenizer.decode([i]) if i else "_" for i in told))
            return causal_lm_losses(model, batch)

        return losses

    for module in ("preparing", "unlearning"):
        monkeypatch.setattr(f"veiltune.dp.{module}.causal_lm_losses", watched(module))
    train(config)
    monkeypatch.setattr("veiltune.dp.unlearning._excess", lambda *_: 1.0)
    unlearn(config.run, named(tmp_path, "p0"), tmp_path / "out", UnlearnOptions(steps=2))
    assert learnt["preparing"] == learnt["unlearning"] and len(learnt["unlearning"]) > 1
    assert not any("@" in text or "old" in text for text in learnt["unlearning"])
    shutil.rmtree(Path(config.run) / "private")
    with pytest.raises(InputError, match="lost private/key"):
        unlearn(config.run, named(tmp_path, "p0"), tmp_path / "again")


@pytest.mark.parametrize(
    ("persons", "options", "error", "says"),
    [
        (["p0", "nobody"], {}, DataError, "1 of 2 named persons"),
        ([""], {}, DataError, "names nobody"),
        ([f"p{n}" for n in range(12)], {}, DataError, "every row"),
        (["p0"], {"method": "npq"}, InputError, "method"),
        (["p0"], {"steps": 0}, InputError, "steps"),
        (["p0"], {"learning_rate": 0.0}, InputError, "learning_rate"),
        (["p0"], {"beta": 0.0}, InputError, "beta"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    run: Path, tmp_path: Path, persons: list[str], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        unlearn(run, named(tmp_path, *persons), tmp_path / "out", UnlearnOptions(**options))
    assert not (tmp_path / "out").exists()
