"""What a finished run of private training is good for: predictions, a plain checkpoint, a model to go on with."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from lm_helper import veiltune as command
from runs_helper import make_texts, write_csv
from train_helper import classification_config, generation_config
from veiltune import load_run
from veiltune.config import TrainConfig
from veiltune.dp.prediction import predict_classes
from veiltune.dp.session import train
from veiltune.errors import InputError, InterruptedRunError, StorageError
from veiltune.models.finished import merge_run
from veiltune.runs import RunFolder, new_folder

FREE = {"disabled": True, "noise_multiplier": None}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., PreTrainedModel], tokenizer: Any
) -> TrainConfig:
    folder = tmp_path_factory.mktemp("finished")
    for part in (tiny_model("bert", "base"), tokenizer):
        part.save_pretrained(folder / "base")
    config = classification_config(folder, folder / "base", privacy=FREE)
    train(config)
    return config


def rows_of(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def texts_of(config: TrainConfig) -> tuple[list[str], list[str]]:
    rows = rows_of(config.data.eval)
    return [row["text"] for row in rows], [row["label"] for row in rows]


def slowly(model: Any, tokenizer: Any, text: str) -> tuple[str, float]:
    """One text by itself, cut as the run cuts."""
    with torch.inference_mode():
        inputs = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
        probabilities = model(**inputs).logits[0].softmax(-1)
    best = int(probabilities.argmax())
    return model.config.id2label[best], float(probabilities[best])


def test_predictions_are_those_of_the_model_one_by_one(finished: TrainConfig, tmp_path: Path) -> None:
    assert predict_classes(Path(finished.run), finished.data.eval, tmp_path / "out.csv") == 32
    rows = rows_of(tmp_path / "out.csv")
    found, (texts, labels) = load_run(finished.run), texts_of(finished)
    for row, text in zip(rows, texts, strict=True):
        name, probability = slowly(found.model, found.tokenizer, text)
        assert row["prediction"] == name and float(row["probability"]) == pytest.approx(probability, abs=1e-5)
    right = sum(row["prediction"] == label for row, label in zip(rows, labels, strict=True))
    scores = RunFolder(finished.run).read_json("summary.json")["scores"]
    assert 100 * right / 32 == pytest.approx(scores["accuracy"]["value"])


def test_a_merged_classifier_is_a_plain_one(finished: TrainConfig, tmp_path: Path) -> None:
    merge_run(finished.run, tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer, found = AutoTokenizer.from_pretrained(tmp_path / "merged"), load_run(finished.run)
    for text in texts_of(finished)[0][:6]:
        name, probability = slowly(plain, tokenizer, text)
        assert (name, pytest.approx(probability, abs=1e-5)) == slowly(found.model, found.tokenizer, text)
    assert plain.config.id2label == {0: "calm", 1: "loud"}
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_merged_language_model_is_that_of_save_merged(tmp_path: Path) -> None:
    config = generation_config(tmp_path, train={"steps": 2, "save_merged": True})
    train(config)
    merge_run(config.run, tmp_path / "merged")
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "merged", Path(config.run) / "merged")
    )
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(InputError, match="learnt to write texts, not classes; serve it"):
        predict_classes(Path(config.run), config.data.eval, tmp_path / "out.csv")


def test_refusals(finished: TrainConfig, tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists; name a new folder"):
        merge_run(finished.run, tmp_path / "there")
    with pytest.raises(InputError, match="not the folder of a finished `veiltune train`"):
        merge_run(tmp_path / "there", tmp_path / "merged")
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(InputError, match="exists; name another file"):
        predict_classes(Path(finished.run), finished.data.eval, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine"
    adapter = classification_config(tmp_path, tiny_folder, train={"steps": 1, "method": "adapter"})
    train(adapter)
    with pytest.raises(InputError, match="method 'adapter' adds layers"):
        merge_run(adapter.run, tmp_path / "merged")
    stopped = classification_config(tmp_path, tiny_folder, run=str(tmp_path / "stopped"))
    with pytest.raises(InterruptedRunError):
        train(stopped, stop=lambda: True)
    with pytest.raises(InputError, match="not finished"):
        load_run(stopped.run)
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(tmp_path: Path, tiny_folder: Path, tiny_model: Callable[..., PreTrainedModel]) -> None:
    config = classification_config(tmp_path, tiny_folder, train={"steps": 1})
    train(config)
    tiny_model("bert", "base", seed=5).save_pretrained(tiny_folder)
    with pytest.raises(InputError, match=r"is not the one that .* began with"):
        load_run(config.run)


def test_a_new_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "new") as part:
        (part / "file").write_text("x")
        _ = 1 / 0
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(tmp_path / "a" / "new") as part:
        (part / "file").write_text("x")
    assert (tmp_path / "a" / "new" / "file").read_text() == "x"


def test_the_commands(
    finished: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, _ = make_texts(5, seed=3)
    write_csv(tmp_path / "new.csv", texts, ["?"] * 5)
    ended = command(
        monkeypatch, capsys, "predict", finished.run, tmp_path / "new.csv", "--output", tmp_path / "predicted.csv"
    )
    assert ended.code == 0 and "5 predictions in" in ended.out
    ended = command(monkeypatch, capsys, "merge", finished.run, "--output", tmp_path / "merged")
    assert ended.code == 0 and (tmp_path / "merged" / "config.json").is_file()
    ended = command(monkeypatch, capsys, "merge", finished.run, "--output", tmp_path / "merged")
    assert ended.code == 2 and "exists" in ended.err
    ended = command(monkeypatch, capsys, "predict", tmp_path, tmp_path / "new.csv", "--output", tmp_path / "no.csv")
    assert ended.code == 2 and "not the folder of a finished run" in ended.err


def test_a_disk_that_cannot_be_written(finished: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        merge_run(finished.run, tmp_path / "file" / "merged")
