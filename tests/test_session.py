"""Whole runs against a real vendor on loopback: every kind of split, mechanism and wire, the ledger, prediction."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from parties import Vendor, running_vendor
from runs_helper import digests, ledger_totals, make_texts, tune_config, write_csv, write_tables
from tiny import model_of, tiny_config
from veiltune.config import TuneConfig, dump_toml, load_config
from veiltune.customer.batching import encode_texts, epoch_batches, learning_rate_at, pad_ids, secret_order
from veiltune.customer.prediction import predict
from veiltune.customer.protection import protect_labels, run_secret
from veiltune.customer.remote import RemoteJob
from veiltune.customer.session import tune
from veiltune.data.tables import LabelSet, read_table
from veiltune.errors import InputError, InterruptedRunError, ProtocolError, RunInUseError
from veiltune.models.adapters import attach_peft, trainable_parameters
from veiltune.models.loading import classifier_model
from veiltune.models.split import split_model
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
STEPS = TRAIN // 8 * EPOCHS


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
FULL = {"split": {"bottom": "full"}, "train": {"learning_rate": 5e-3}}
LEARNING: dict[str, dict[str, Any]] = {
    "k = 0": {"split": {"cut_layer": 0}},
    "k = 0, after the embeddings block": {"split": {"cut_layer": 0, "cut_embeddings": "block"}},
    "k = 1": {},
    "bottom full": FULL,
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
    "randomised labels": {"privacy": {"labels": "randomized_response", "label_epsilon": 3.0}},
}
FINISHING: dict[str, dict[str, Any]] = {  # too little training, or too much noise, for a random model to learn
    "bitfit": {"train": {"method": "bitfit"}},
    "adapter": {"train": {"method": "adapter", "adapter_size": 8}},
    "d_chi": {"privacy": D_CHI},
    "d_chi, bottom full": FULL | {"privacy": D_CHI},
    "gaussian": {"privacy": {"mechanism": "gaussian", "snr_db": 15.0}},
}


@pytest.mark.parametrize("name", [*LEARNING, *FINISHING])
def test_a_run_leaves_a_complete_folder_and_a_true_count(configure: Callable[..., TuneConfig], name: str) -> None:
    config = configure(**(LEARNING | FINISHING)[name])
    summary = tune(config)
    run = Path(config.run)
    files = {"config.toml", "metrics.jsonl", "privacy.json", "summary.json", "private", "bottom", "bottom.digest"}
    assert {path.name for path in run.iterdir()} == files
    assert load_config(TuneConfig, run / "config.toml") == config
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["seeds"] == {"train": 0, "noise": 12}
    assert min(summary["bytes_up"], summary["bytes_down"], summary["trainable_parameters"]) > 0
    assert [line["step"] for line in RunFolder(run).metrics()] == list(range(1, STEPS + 1))
    if name in LEARNING:
        assert summary["utility"] >= 0.8 and losses(config)[-1] < 0.9 * losses(config)[0]
    each = 1 if config.split.bottom == "frozen" else EPOCHS  # an unfrozen bottom releases a text again at each step
    totals, stated = ledger_totals(run), privacy_of(config)["representations"]
    assert totals.examples == stated["examples_released"] == TRAIN + EVAL
    assert totals.max_releases_per_example == stated["max_releases_per_example"] == each
    assert totals.releases == stated["releases"] == summary["releases"] == TRAIN * each + EVAL


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
    assert "without noise" in privacy_of(open_labels)["representations"]["statement"]
    answers = D_CHI | {"labels": "randomized_response", "label_epsilon": 2.0}
    config = configure(run=f"{open_labels.run}-rr", noise_seed=None, privacy=answers, train={"epochs": 1})
    tune(config)
    labels = privacy_of(config)["labels"]
    assert (labels["mode"], labels["claimed_label_epsilon"]) == ("randomized_response", 2.0)
    assert labels["keep_probability"] == pytest.approx(math.exp(2) / (math.exp(2) + 1))
    assert privacy_of(config)["representations"]["composed_eta"] > 0
    seeded = configure(run=f"{open_labels.run}-seeded", noise_seed=4, privacy=answers, train={"epochs": 1})
    tune(seeded)
    assert privacy_of(seeded)["labels"]["claimed_label_epsilon"] == "inf"
    assert privacy_of(seeded)["representations"]["composed_eta"] == "inf"
    for part in ("labels", "representations"):
        assert "whoever knows noise_seed" in privacy_of(seeded)[part]["statement"]


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
        config = configure()
        write_csv(tmp_path / "train.csv", texts * 3, labels * 3)
        write_csv(tmp_path / "eval.csv", texts[:4], labels[:4])  # known from training
        assert tune(config)["releases"] == 12
        assert ledger_totals(Path(config.run)).max_releases_per_example == 1

    def test_an_unfrozen_bottom_counts_every_copy_of_a_text_in_every_epoch(
        self, configure: Callable[..., TuneConfig], tmp_path: Path
    ) -> None:
        texts, labels = make_texts(4, seed=1)
        config = configure(split={"bottom": "lora"}, train={"epochs": 2, "micro_batches": 2})
        write_csv(tmp_path / "train.csv", texts * 4, labels * 4)
        write_csv(tmp_path / "eval.csv", texts, labels)
        in_training = 2 * 4 * len(texts)  # copies in a batch have noise of their own
        assert tune(config)["releases"] == in_training + len(texts)  # the evaluation is one more for each


class TestPrediction:
    """`predict` over a finished run."""

    @pytest.fixture(params=["frozen", "lora"])
    def config(self, configure: Callable[..., TuneConfig], request: pytest.FixtureRequest) -> TuneConfig:
        privacy = {"mechanism": "d_chi", "noise_to_norm": 0.2}
        config = configure(privacy=privacy, split={"bottom": request.param, "head": "customer"}, train={"epochs": 2})
        tune(config)
        return config

    def test_known_texts_cost_nothing_and_new_ones_once(
        self, config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[bytes] = []
        honest = RemoteJob.predict

        def recording(job: RemoteJob, released: pb.Ragged) -> Tensor:
            sent.append(released.SerializeToString(deterministic=True))
            return honest(job, released)

        monkeypatch.setattr(RemoteJob, "predict", recording)
        run = Path(config.run)
        before, outbox = ledger_totals(run), digests(run / "private" / "outbox")
        strength = privacy_of(config)["representations"]["strength"]
        assert predict(run, config.data.eval, tmp_path / "known.csv") == EVAL
        assert ledger_totals(run) == before
        assert digests(run / "private" / "outbox") == outbox
        texts, labels = make_texts(5, seed=99)
        new = str(write_csv(tmp_path / "new.csv", texts, labels))
        predict(run, new, tmp_path / "first.csv")
        after, first_frames = ledger_totals(run), sent[1:]
        assert after.releases == before.releases + 5
        predict(run, new, tmp_path / "second.csv")
        assert ledger_totals(run) == after
        assert sent[1 + len(first_frames) :] == first_frames
        assert (tmp_path / "first.csv").read_bytes() == (tmp_path / "second.csv").read_bytes()
        stated = privacy_of(config)["representations"]
        assert (stated["releases"], stated["strength"]) == (after.releases, strength)

    def test_it_is_as_good_as_the_evaluation(self, config: TuneConfig, tmp_path: Path) -> None:
        predict(Path(config.run), config.data.eval, tmp_path / "out.csv")
        truth = read_table(config.data.eval, text_column="text", label_column="label").labels or []
        with (tmp_path / "out.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        right = [row["prediction"] == label for row, label in zip(rows, truth, strict=True)]
        assert sum(right) / len(right) == RunFolder(config.run).read_json("summary.json")["utility"]
        assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)

    def test_an_existing_output_is_left_alone(self, config: TuneConfig, tmp_path: Path) -> None:
        (tmp_path / "out.csv").write_text("precious")
        with pytest.raises(InputError, match="exists; name another file"):
            predict(Path(config.run), config.data.eval, tmp_path / "out.csv")
        assert (tmp_path / "out.csv").read_text() == "precious"


def test_prediction_refuses_an_unfinished_run(configure: Callable[..., TuneConfig], tmp_path: Path) -> None:
    config = configure()
    with pytest.raises(InterruptedRunError, match="stopped at step 1"):
        tune(config, stop=lambda: True)
    with pytest.raises(InputError, match="not the folder of a finished run"):
        predict(Path(config.run), config.data.eval, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_privacy_json_counts_what_a_stopped_run_and_a_failed_prediction_released(
    configure: Callable[..., TuneConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(privacy=D_CHI)
    with pytest.raises(InterruptedRunError, match="stopped at step 1"):
        tune(config, stop=lambda: True)
    assert privacy_of(config)["representations"]["releases"] == ledger_totals(Path(config.run)).releases == TRAIN
    tune(config)
    texts, _ = make_texts(40, seed=77)
    new = write_csv(tmp_path / "new.csv", texts, ["calm"] * 40)
    monkeypatch.setattr(RemoteJob, "predict", lambda *_: (_ for _ in ()).throw(ProtocolError("nonsense came back")))
    with pytest.raises(ProtocolError, match="nonsense"):
        predict(Path(config.run), str(new), tmp_path / "out.csv")
    counted = ledger_totals(Path(config.run)).releases
    assert privacy_of(config)["representations"]["releases"] == counted > TRAIN + EVAL


def test_a_bottom_that_is_fetched_again_must_be_the_same(configure: Callable[..., TuneConfig], tmp_path: Path) -> None:
    config = configure(train={"epochs": 1})
    tune(config)
    run = Path(config.run)
    shutil.rmtree(run / "bottom")
    assert predict(run, config.data.eval, tmp_path / "one.csv") == EVAL
    shutil.rmtree(run / "bottom")
    (run / "bottom.digest").write_text("0" * 64)
    with pytest.raises(InputError, match="expected was 0000"):
        predict(run, config.data.eval, tmp_path / "two.csv")
    assert not (run / "bottom").exists() and (run / "bottom.digest").read_text() == "0" * 64


def test_a_stopped_run_goes_on_and_a_finished_one_is_only_read(configure: Callable[..., TuneConfig]) -> None:
    whole = configure(train={"epochs": 1})
    tune(whole)
    config = whole.model_copy(update={"run": f"{whole.run}-again"})
    for _ in range(3):
        with pytest.raises(InterruptedRunError):
            tune(config, stop=lambda: True)
    summary = tune(config)
    assert losses(config) == losses(whole)
    before = digests(Path(config.run))
    assert tune(config) == summary
    assert digests(Path(config.run)) == before


def test_a_second_process_leaves_the_first_ones_folder_alone(configure: Callable[..., TuneConfig]) -> None:
    config = configure(train={"epochs": 1})
    with RunFolder.create(config.run, config=dump_toml(config)).held(), pytest.raises(RunInUseError):
        tune(config)
    assert (Path(config.run) / "config.toml").exists()
    assert tune(config)


def test_copies_of_a_text_have_label_answers_of_their_own(configure: Callable[..., TuneConfig], tmp_path: Path) -> None:
    """Equal answers for certain would tell that the labels are equal."""
    config = configure(privacy={"labels": "randomized_response", "label_epsilon": 1.0})
    differ = 0
    for number in range(200):
        secret, memo = number.to_bytes(32, "little"), tmp_path / f"memo-{number}"
        (one, other), _ = protect_labels([0, 0], [b"k", b"k"], num_classes=2, config=config, secret=secret, memo=memo)
        assert protect_labels([0, 0], [b"k", b"k"], num_classes=2, config=config, secret=secret, memo=memo)[0] == [
            one,
            other,
        ]
        differ += one != other
    p = math.e / (1 + math.e)
    assert binomtest(differ, 200, 2 * p * (1 - p)).pvalue > 1e-3 and differ > 40


TWINS: dict[str, dict[str, Any]] = {
    "k = 0": {"split": {"cut_layer": 0}},
    "k = 1": {},
    "head here, micro-batches": {"split": {"head": "customer"}, "train": {"micro_batches": 3}},
    "bottom full": FULL,
    "bottom lora, head here, micro-batches": LEARNING["bottom lora, head here, micro-batches"],
    "bitfit": FINISHING["bitfit"],
}


@pytest.mark.parametrize("sections", TWINS.values(), ids=TWINS.keys())
def test_without_noise_the_loss_curve_is_the_unsplit_models(
    vendor: Vendor, configure: Callable[..., TuneConfig], sections: dict[str, Any]
) -> None:
    config = configure(**sections)
    tune(config)
    assert losses(config) == pytest.approx(unsplit_losses(vendor, config), abs=1e-5)


def unsplit_losses(vendor: Vendor, config: TuneConfig) -> list[float]:
    """The slow twin: one process, one plain AdamW, whole batches, no wire, no ledger."""
    train = config.train
    table = read_table(config.data.train, text_column="text", label_column="label")
    assert table.labels is not None
    token_ids = encode_texts(vendor.engine.base.tokenizer, table.texts, max_length=config.data.max_length)
    classes = LabelSet.fit(table.labels).encode(table.labels)
    forward, parameters = unsplit_model(vendor, config)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=train.weight_decay)
    lengths = [len(ids) for ids in token_ids]
    order = secret_order(run_secret(Path(config.run) / "private", config.noise_seed), len(lengths))
    epochs = [
        epoch_batches(lengths, batch_size=train.batch_size, seed=train.seed, epoch=e, order=order)
        for e in range(train.epochs)
    ]
    batches = [batch for epoch in epochs for batch in epoch]
    curve = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate_at(
            step, total=len(batches), warmup_fraction=train.warmup_fraction, peak=train.learning_rate
        )
        logits = forward(*pad_ids([token_ids[i] for i in batch]))
        loss = nn.functional.cross_entropy(logits, torch.tensor([classes[i] for i in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def unsplit_model(vendor: Vendor, config: TuneConfig) -> tuple[Callable[[Tensor, Tensor], Tensor], list[nn.Parameter]]:
    """Bottom, trunk and head of one model in one process, and everything in it that trains."""
    train, split = config.train, config.split
    model = classifier_model(vendor.engine.base, num_labels=2, seed=train.seed)
    bottom, top = split_model(model, cut_layer=split.cut_layer)
    sizes: dict[str, Any] = {"rank": train.rank, "alpha": train.alpha, "seed": train.seed}
    attach_peft(top, method=train.method, **sizes)
    bottom.requires_grad_(False)
    if split.bottom != "frozen":
        attach_peft(bottom, method=split.bottom, **sizes)
    parameters = [*trainable_parameters(bottom).values(), *trainable_parameters(top).values()]
    return lambda ids, mask: top(bottom(ids, mask), mask), parameters
