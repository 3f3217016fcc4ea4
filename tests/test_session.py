"""Whole runs against a real vendor on loopback: every kind of split, mechanism and wire, the ledger, prediction."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from parties import Vendor, running_vendor
from runs_helper import digests, ledger_totals, make_texts, tune_config, write_csv, write_tables
from tiny import model_of, tiny_config
from veiltune.config import TuneConfig, load_config
from veiltune.customer.batching import encode_texts, epoch_batches, learning_rate_at, pad_ids
from veiltune.customer.prediction import predict
from veiltune.customer.remote import RemoteJob
from veiltune.customer.session import tune
from veiltune.customer.training import InterruptedRunError
from veiltune.data.tables import LabelSet, read_table
from veiltune.errors import InputError
from veiltune.models.adapters import attach_peft, trainable_parameters
from veiltune.models.loading import classifier_model
from veiltune.models.split import split_head, split_model
from veiltune.runs import RunFolder
from veiltune.wire import veiltune_pb2 as pb

SUMMARY_KEYS = {
    "utility",
    "utility_metric",
    "seconds",
    "examples_per_second",
    "bytes_up",
    "bytes_down",
    "releases",
    "trainable_parameters",
    "seeds",
}
TRAIN, EVAL, EPOCHS = 48, 16, 3


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Iterator[Vendor]:
    """A tiny BERT without dropout, so that an unsplit twin needs no shared randomness."""
    folder = tmp_path_factory.mktemp("session")
    config = tiny_config("bert")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model: PreTrainedModel = model_of(config, "base")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with running_vendor(folder / "vendor", folder / "model", max_jobs_per_tenant=50) as running:
        yield running


@pytest.fixture
def configure(vendor: Vendor, tmp_path: Path) -> Callable[..., TuneConfig]:
    """`configure(section={...})`: a short run over fresh tables."""
    write_tables(tmp_path, train=TRAIN, eval=EVAL)
    return lambda **sections: tune_config(tmp_path, vendor.address, **sections)


def losses(config: TuneConfig) -> list[float]:
    return [line["loss"] for line in RunFolder(config.run).metrics()]


def privacy_of(config: TuneConfig) -> Any:
    return RunFolder(config.run).read_json("privacy.json")


D_CHI = {"mechanism": "d_chi", "noise_to_norm": 0.2, "labels": "disclosed"}
RUNS: dict[str, dict[str, Any]] = {
    "k = 0": {"split": {"cut_layer": 0}},
    "k = 0, after the embeddings block": {"split": {"cut_layer": 0, "cut_embeddings": "block"}},
    "k = 1": {},
    "bottom full": {"split": {"bottom": "full"}},
    "bottom lora": {"split": {"bottom": "lora"}},
    "bottom lora, head here, micro-batches": {
        "split": {"bottom": "lora", "head": "customer"},
        "train": {"micro_batches": 3},
    },
    "head here": {"split": {"head": "customer"}},
    "micro-batches": {"train": {"micro_batches": 3}},
    "int8": {"wire": {"dtype": "int8"}},
    "bf16": {"wire": {"dtype": "bf16"}},
    "padded lengths": {"wire": {"pad_to": 8}},
    "bitfit": {"train": {"method": "bitfit"}},
    "adapter": {"train": {"method": "adapter", "adapter_size": 8}},
    "d_chi": {"privacy": D_CHI},
    "d_chi, bottom full": {"privacy": D_CHI, "split": {"bottom": "full"}},
    "gaussian": {"privacy": {"mechanism": "gaussian", "snr_db": 15.0}},
    "randomised labels": {"privacy": {"labels": "randomized_response", "label_epsilon": 3.0}},
}


@pytest.mark.parametrize("sections", RUNS.values(), ids=RUNS.keys())
def test_a_run_learns_and_leaves_a_complete_folder(
    configure: Callable[..., TuneConfig], sections: dict[str, Any]
) -> None:
    config = configure(**sections)
    summary = tune(config)
    run, steps = Path(config.run), math.ceil(TRAIN / 8) * EPOCHS
    assert {"config.toml", "metrics.jsonl", "privacy.json", "summary.json", "private"} <= {p.name for p in run.iterdir()}
    assert load_config(TuneConfig, run / "config.toml") == config
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["seeds"] == {"train": 0, "noise": 11}
    assert [line["step"] for line in RunFolder(run).metrics()] == list(range(1, steps + 1))
    assert summary["utility"] >= 0.8 and min(losses(config)[-6:]) < losses(config)[0]
    assert summary["bytes_up"] > 0 and summary["bytes_down"] > 0 and summary["trainable_parameters"] > 0
    frozen = config.split.bottom == "frozen"
    totals = ledger_totals(run)
    assert totals.examples == TRAIN + EVAL
    assert totals.max_releases_per_example == (1 if frozen else EPOCHS)
    assert totals.releases == summary["releases"] == (TRAIN if frozen else TRAIN * EPOCHS) + EVAL
    stated = privacy_of(config)["representations"]
    assert (stated["releases"], stated["max_releases_per_example"]) == (
        totals.releases,
        totals.max_releases_per_example,
    )


@pytest.mark.parametrize("cti", ["budget", "top"])
@pytest.mark.parametrize("bottom", ["frozen", "lora"])
def test_contributing_tokens(configure: Callable[..., TuneConfig], cti: str, bottom: str) -> None:
    config = configure(privacy=D_CHI | {"cti": cti}, split={"bottom": bottom}, train={"epochs": 1})
    tune(config)
    assert privacy_of(config)["contributing_tokens"]["mode"] == cti
    assert (Path(config.run) / "private" / "contributing.safetensors").exists()


def test_privacy_json_says_in_words_what_happens_to_labels(configure: Callable[..., TuneConfig]) -> None:
    open_labels = configure(train={"epochs": 1})
    tune(open_labels)
    assert privacy_of(open_labels)["labels"] == {
        "mode": "disclosed",
        "statement": "labels disclosed: the returned gradients reveal every label exactly",
    }
    config = configure(run=f"{open_labels.run}-rr", privacy={"labels": "randomized_response", "label_epsilon": 2.0})
    tune(config)
    labels = privacy_of(config)["labels"]
    assert (labels["mode"], labels["claimed_label_epsilon"]) == ("randomized_response", 2.0)
    assert labels["keep_probability"] == pytest.approx(math.exp(2) / (math.exp(2) + 1))


def test_noise_from_the_system_differs_from_run_to_run(configure: Callable[..., TuneConfig]) -> None:
    first = configure(noise_seed=None, privacy=D_CHI, train={"epochs": 1})
    second = first.model_copy(update={"run": f"{first.run}-2"})
    tune(first), tune(second)
    outboxes = [set(digests(Path(config.run) / "private" / "outbox").values()) for config in (first, second)]
    assert not outboxes[0] & outboxes[1]
    assert privacy_of(first)["randomness"] == "operating system CSPRNG"


class TestLedger:
    """Who is counted how often."""

    def test_duplicates_share_a_release(self, configure: Callable[..., TuneConfig], tmp_path: Path) -> None:
        texts, labels = make_texts(12, seed=1)
        write_csv(tmp_path / "train.csv", texts * 3, labels * 3)
        write_csv(tmp_path / "eval.csv", texts[:4], labels[:4])  # known from training
        config = configure_again(configure, tmp_path, texts * 3, labels * 3, texts[:4], labels[:4])
        assert tune(config)["releases"] == 12
        assert ledger_totals(Path(config.run)).max_releases_per_example == 1

    def test_an_unfrozen_bottom_counts_a_duplicate_once_a_step(
        self, configure: Callable[..., TuneConfig], tmp_path: Path
    ) -> None:
        texts, labels = make_texts(4, seed=1)
        config = configure_again(
            configure, tmp_path, texts * 4, labels * 4, texts, labels, split={"bottom": "lora"}, train={"epochs": 1}
        )
        summary = tune(config)
        batches = epoch_batches([len(text) + 2 for text in texts * 4], batch_size=8, seed=0, epoch=0)
        occurrences = sum(len({i % 4 for i in batch}) for batch in batches)
        assert summary["releases"] == occurrences + 4  # and once for the evaluation


def configure_again(
    configure: Callable[..., TuneConfig],
    folder: Path,
    texts: list[str],
    labels: list[str],
    eval_texts: list[str],
    eval_labels: list[str],
    **sections: Any,
) -> TuneConfig:
    write_csv(folder / "train.csv", texts, labels)
    write_csv(folder / "eval.csv", eval_texts, eval_labels)
    return configure(**sections)
