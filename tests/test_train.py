"""`veiltune train`: whole runs on tiny models, what they write, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runs_helper import make_texts, write_csv
from tiny import tiny_model
from tiny_text import causal_tokenizer
from train_helper import classification_config, generation_config
from veiltune.cli import main
from veiltune.config import TrainConfig, dump_toml
from veiltune.data.prompts import Prompted
from veiltune.data.tables import read_table
from veiltune.dp.encoding import collate, encode_prompted
from veiltune.dp.evaluation import perplexity_score
from veiltune.dp.metrics import perplexity
from veiltune.dp.planning import dry_run
from veiltune.dp.preparing import remove_dropout
from veiltune.dp.reporting import TrainProgress, TrainReporter
from veiltune.dp.schedules import learning_rate_at
from veiltune.dp.session import train
from veiltune.errors import ConfigError, DataError, InputError, InterruptedRunError, PrivacyError, UnsupportedModelError
from veiltune.models.adapters import load_adapter
from veiltune.models.finished import load_run
from veiltune.models.loading import classifier_model, load_base
from veiltune.runs import RunFolder

FREE = {"disabled": True, "noise_multiplier": None}


class Heard(TrainReporter):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[TrainProgress] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def trained(self, progress: TrainProgress) -> None:
        self.steps.append(progress)


def run_of(config: TrainConfig) -> RunFolder:
    return RunFolder(config.run)


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run) / "adapter" / "adapter_model.safetensors")


def same_weights(one: TrainConfig, other: TrainConfig) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # by peft
def test_a_classifier_learns_without_privacy_and_loads_in_peft(tmp_path: Path, tiny_folder: Path) -> None:
    config = classification_config(tmp_path, tiny_folder, privacy=FREE, train={"evaluate_every": 5})
    summary = train(config)
    score = summary["scores"]["accuracy"]
    assert score["value"] > 90 and score["low"] < score["value"] <= score["high"]
    assert float(summary["claimed_epsilon"]) == float("inf") and summary["labels"] == ["calm", "loud"]
    lines = run_of(config).metrics()
    assert [line["step"] for line in lines if "evaluation" in line] == [5, 10, 12]
    assert accuracy_of_adapter(config, tiny_folder, with_peft=False) == pytest.approx(score["value"])
    assert accuracy_of_adapter(config, tiny_folder, with_peft=True) == pytest.approx(score["value"])


def accuracy_of_adapter(config: TrainConfig, base: Path, *, with_peft: bool) -> float:
    """What the saved adapter gives on the evaluation table, by other code than the run's."""
    adapter = Path(config.run) / "adapter"
    model: Any = classifier_model(load_base(str(base)), num_labels=2, seed=config.train.seed)
    if with_peft:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    else:
        load_adapter(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    table = read_table(config.data.eval, text_column="text", label_column="label")
    right = 0
    for text, label in zip(table.texts, table.labels or [], strict=True):
        with torch.no_grad():
            logits = model(**tokenizer([text], return_tensors="pt", truncation=True, max_length=24)).logits
        right += ["calm", "loud"][int(logits.argmax())] == label
    return 100 * right / len(table.texts)


def test_what_a_private_run_writes(tmp_path: Path, tiny_folder: Path) -> None:
    heard = Heard()
    config = classification_config(
        tmp_path, tiny_folder, noise_seed=None, privacy={"noise_multiplier": None, "epsilon": 2.0}
    )
    summary = train(config, reporter=heard)
    run = run_of(config)
    privacy = run.read_json("privacy.json")
    assert 1.9 < privacy["claimed_epsilon"] <= 2.0 and privacy["claimed_epsilon"] == summary["claimed_epsilon"]
    assert privacy["steps_taken"] == 12 and privacy["epsilon_of_steps_taken"] == privacy["claimed_epsilon"]
    assert "without noise" in privacy["not_covered"]["metrics.jsonl"]
    assert (run.path / "private").stat().st_mode & 0o777 == 0o700
    assert (run.path / "private" / "key").stat().st_mode & 0o777 == 0o600
    spent = [progress.epsilon for progress in heard.steps]
    assert spent == sorted(spent) and spent[-1] == privacy["claimed_epsilon"] and 0 < spent[0] < spent[-1]
    assert any("none was longer than 24 tokens" in line for line in heard.lines)
    texts = Path(config.data.train).read_text().splitlines()[1:]
    public = [path.read_text() for path in run.path.glob("*.json*")]
    assert not any(text.split(",")[0] in page for text in texts for page in public)


def test_the_key_comes_from_the_system_unless_seeded(tmp_path: Path, tiny_folder: Path) -> None:
    def run(name: str, seed: int | None) -> TrainConfig:
        config = classification_config(
            tmp_path, tiny_folder, run=str(tmp_path / name), noise_seed=seed, train={"steps": 2}
        )
        train(config)
        return config

    assert same_weights(run("a", 7), run("b", 7))
    assert not same_weights(run("c", None), run("d", None))
    privacy = run_of(run("b", 7)).read_json("privacy.json")
    assert (privacy["claimed_epsilon"], privacy["covered"]) == ("inf", "nothing")


def test_generation_learns_and_merges(tmp_path: Path) -> None:
    config = generation_config(
        tmp_path, privacy=FREE, train={"steps": 40, "learning_rate": 3e-2, "rank": 8, "save_merged": True}
    )
    before = train(generation_config(tmp_path, run=str(tmp_path / "idle"), train={"steps": 1, "learning_rate": 1e-9}))
    summary = train(config)
    learnt, idle = summary["scores"]["perplexity"], before["scores"]["perplexity"]
    assert learnt["high"] < idle["low"]
    assert set(summary["scores"]) == {"perplexity", "bleu", "rouge_l"}
    texts = json.loads((Path(config.run) / "private" / "generated.json").read_text())
    assert len(texts) == summary["scores"]["bleu"]["count"]
    merged: Any = AutoModelForCausalLM.from_pretrained(Path(config.run) / "merged")
    tokenizer = AutoTokenizer.from_pretrained(Path(config.run) / "merged")
    rows = [line.split("||") for line in Path(config.data.eval).read_text().splitlines()]
    prompted = Prompted([prompt for prompt, _ in rows], [target for _, target in rows])
    examples = encode_prompted(tokenizer, prompted, max_length=24).examples
    assert perplexity(merged, examples).value == pytest.approx(learnt["value"], rel=1e-4)


def test_plain_text_without_prompts_has_no_generation(tmp_path: Path) -> None:
    config = generation_config(tmp_path, train={"steps": 1})
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"target": "abc" * n}) + "\n" for n in range(1, 40)))
    data = {"format": "auto", "train": str(tmp_path / "plain.jsonl"), "eval": str(tmp_path / "plain.jsonl")}
    heard = Heard()
    config = generation_config(tmp_path, data=data | {"prompt_column": ""}, train={"steps": 1})
    assert set(train(config, reporter=heard)["scores"]) == {"perplexity"}
    assert "training table: 39 examples; 32 were longer than 24 tokens and were cut: the text keeps its beginning" in (
        heard.lines
    )


@pytest.mark.parametrize("method", ["adapter", "compacter", "bitfit", "rgp", "full"])
def test_every_method_stops_and_goes_on_to_the_same_result(tmp_path: Path, tiny_folder: Path, method: str) -> None:
    def config(name: str) -> TrainConfig:
        return classification_config(
            tmp_path,
            tiny_folder,
            run=str(tmp_path / name),
            train={
                "method": method,
                "steps": 6,
                "checkpoint_every": 2,
                **({"adapter_size": 8} if method in ("adapter", "compacter") else {}),
                "gradient_checkpointing": True,
            },
        )

    train(config("whole"))
    asked = iter([False, False, True])
    with pytest.raises(InterruptedRunError, match="stopped at step 3"):
        train(config("parts"), stop=lambda: next(asked))
    assert run_of(config("parts")).read_json("privacy.json")["steps_taken"] == 3
    heard = Heard()
    train(config("parts"), reporter=heard)
    assert [progress.step for progress in heard.steps] == [4, 5, 6]
    assert same_weights(config("whole"), config("parts"))


def test_persons_are_units(tmp_path: Path, tiny_folder: Path) -> None:
    texts, labels = make_texts(40, seed=3)
    lines = [f"{text},{label},p{row % 10}" for row, (text, label) in enumerate(zip(texts, labels, strict=True))]
    (tmp_path / "people.csv").write_text("\n".join(["text,label,author", *lines]) + "\n")
    people = {"train": str(tmp_path / "people.csv"), "person_column": "author"}
    config = classification_config(
        tmp_path, tiny_folder, data=people, privacy={"max_records": 2}, train={"batch_size": 4, "steps": 2}
    )
    assert "40 training examples of 10 persons (at most 4 each)" in dry_run(config)["data"]
    assert train(config)["unit"] == "person"
    plan = run_of(config).read_json("privacy.json")["plan"]
    assert (plan["num_units"], plan["max_records"]) == (10, 2)
    drawn = [line["size"] for line in run_of(config).metrics() if "size" in line]
    assert max(drawn) <= 10


def test_a_finished_run_is_not_trained_again(tmp_path: Path, tiny_folder: Path) -> None:
    config = classification_config(tmp_path, tiny_folder, train={"steps": 2})
    summary, heard = train(config), Heard()
    assert train(config, reporter=heard) == summary
    assert heard.steps == [] and any("finished before" in line for line in heard.lines)


@pytest.fixture
def stopped(tmp_path: Path, tiny_folder: Path) -> Callable[..., TrainConfig]:
    """A run that was stopped after its first step; `stopped(section=...)` is its configuration, changed."""

    def config(**sections: Any) -> TrainConfig:
        return classification_config(tmp_path, tiny_folder, **sections)

    with pytest.raises(InterruptedRunError):
        train(config(), stop=lambda: True)
    return config


def test_a_changed_plan_is_refused_with_a_diff(stopped: Callable[..., TrainConfig]) -> None:
    with pytest.raises(PrivacyError, match=r"another plan \(noise_multiplier: 2\.0 in the run, 2\.5 now\)"):
        train(stopped(privacy={"noise_multiplier": 2.5}))


def test_a_changed_configuration_is_refused_with_a_diff(stopped: Callable[..., TrainConfig]) -> None:
    changes = r"train\.rank: 2 in the run, 3 now; train\.learning_rate: 0\.01 in the run, 0\.02 now"
    with pytest.raises(ConfigError, match=changes):
        train(stopped(train={"rank": 3, "learning_rate": 2e-2}))


def test_a_dry_run_says_that_the_run_folder_is_another_runs(stopped: Callable[..., TrainConfig]) -> None:
    assert dry_run(stopped())["run folder"]
    with pytest.raises(PrivacyError, match="begun with another plan"):
        dry_run(stopped(privacy={"noise_multiplier": 2.5}))
    with pytest.raises(ConfigError, match=r"train\.rank: 2 in the run, 3 now"):
        dry_run(stopped(train={"rank": 3}))


def test_changed_data_are_refused(stopped: Callable[..., TrainConfig]) -> None:
    config = stopped()
    path = Path(config.data.train)
    texts, labels = make_texts(64, seed=99)
    write_csv(path, texts, labels)
    with pytest.raises(PrivacyError, match="training data or the key has changed"):
        train(config)
    write_csv(path, texts[:-1], labels[:-1])
    with pytest.raises(PrivacyError, match="num_units: 64 in the run, 63 now"):
        train(config)


@pytest.mark.parametrize("what", ["weights", "configuration", "tokenizer"])
def test_a_changed_model_is_refused(stopped: Callable[..., TrainConfig], tiny_folder: Path, what: str) -> None:
    if what == "weights":
        tiny_model("bert", "base", seed=5).save_pretrained(tiny_folder)
    else:
        path = tiny_folder / ("config.json" if what == "configuration" else "tokenizer.json")
        content = json.loads(path.read_text())
        if what == "configuration":
            content["layer_norm_eps"] = 0.1
        else:
            words = content["model"]["vocab"]
            words["a"], words["b"] = words["b"], words["a"]
        path.write_text(json.dumps(content))
    with pytest.raises(PrivacyError, match=r"base model .* has changed"):
        train(stopped())


def test_the_same_configuration_goes_on(stopped: Callable[..., TrainConfig]) -> None:
    """The refusals above come from the changes."""
    assert train(stopped())["steps"] == 12


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "smaller than a batch": ({"train": {"batch_size": 65}}, InputError, "the table is smaller than a batch"),
    "out of reach": (
        {"privacy": {"noise_multiplier": None, "epsilon": 1e-4}, "train": {"steps": 5000}},
        PrivacyError,
        "epsilon must be at least",
    ),
    "encoder asked to write": (
        {"model": {"task": "generation"}, "data": {"prompt_column": "label", "target_column": "text"}},
        UnsupportedModelError,
        "is an encoder",
    ),
    "no such target": ({"train": {"targets": ["nowhere"]}}, InputError, "nowhere"),
    "no CUDA": ({"train": {"device": "cuda:9"}}, InputError, "CUDA"),
    "bad bottleneck": ({"train": {"method": "compacter", "adapter_size": 6}}, InputError, "multiple of phm_dim"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_nothing(tmp_path: Path, tiny_folder: Path, name: str) -> None:
    if name == "no CUDA" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    sections, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        train(classification_config(tmp_path, tiny_folder, **sections))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"):
        train(classification_config(tmp_path, tiny_folder))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_tensorboard_is_optional(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    config = classification_config(tmp_path, tiny_folder, report={"tensorboard": True}, train={"steps": 1})
    with pytest.raises(InputError, match="pip install tensorboard"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_tensorboard_writes_events(tmp_path: Path, tiny_folder: Path) -> None:
    pytest.importorskip("tensorboard")
    config = classification_config(tmp_path, tiny_folder, report={"tensorboard": True}, train={"steps": 2})
    train(config)
    (events,) = (Path(config.run) / "tensorboard").iterdir()
    assert b"clipped_share" in events.read_bytes() and b"eval/accuracy" in events.read_bytes()


def test_more_epsilon_than_a_plan_can_have_is_said(tmp_path: Path, tiny_folder: Path) -> None:
    privacy = {"noise_multiplier": None, "epsilon": 1e9}
    assert "epsilon 1e+09 was asked for" in str(dry_run(classification_config(tmp_path, tiny_folder, privacy=privacy)))
    privacy["epsilon"] = 8.0
    assert "was asked for" not in str(dry_run(classification_config(tmp_path, tiny_folder, privacy=privacy)))


def test_texts_too_long_to_be_generated_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    config = generation_config(tmp_path, evaluation={"max_new_tokens": 63})
    with pytest.raises(InputError, match=r"max_new_tokens must be at most 62, since .* takes 64 tokens"):
        train(config)
    assert not run_of(config).metrics()


def test_what_was_trained_is_saved_before_it_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = generation_config(tmp_path, train={"steps": 2})
    with monkeypatch.context() as patch, pytest.raises(InputError, match="no scores today"):
        patch.setattr("veiltune.dp.evaluation.Evaluator.generated", fails)
        train(config)
    assert weights(config)
    assert train(config)["steps"] == 2


def fails(*_: Any, **__: Any) -> None:
    raise InputError("no scores today")


def test_a_length_without_room_for_text(tmp_path: Path, tiny_folder: Path) -> None:
    """[CLS] and [SEP] alone would be a run on nothing."""
    with pytest.raises(InputError, match="room beside the 2 tokens"):
        train(classification_config(tmp_path, tiny_folder, data={"max_length": 2}))
    assert not (tmp_path / "run").exists()


def test_the_classes_are_said_to_be_outside_the_claim(tmp_path: Path, tiny_folder: Path) -> None:
    config = classification_config(tmp_path, tiny_folder, noise_seed=None, train={"steps": 2})
    train(config)
    privacy = run_of(config).read_json("privacy.json")
    assert "one person" in privacy["not_covered"]["the classes"] and privacy["covered"].endswith("made from it alone")
    assert "which classes" in dry_run(config)["does not cover"]


def test_classes_that_are_named_before_the_table_is_read(tmp_path: Path, tiny_folder: Path) -> None:
    """Their order is the user's, one may have no row, and nothing of the model's shape comes from the table."""
    named = {"classes": ["loud", "silent", "calm"]}
    config = classification_config(tmp_path, tiny_folder, data=named, train={"steps": 2})
    assert "3 classes" in dry_run(config)["data"] and "which classes" not in str(dry_run(config))
    summary = train(config)
    assert summary["labels"] == ["loud", "silent", "calm"]
    assert "the classes" not in run_of(config).read_json("privacy.json")["not_covered"]
    model = load_run(run_of(config).path).model
    assert model.config.id2label == {0: "loud", 1: "silent", 2: "calm"}


@pytest.mark.parametrize("table", ["train", "eval"])
def test_a_label_that_is_none_of_the_named_classes(tmp_path: Path, tiny_folder: Path, table: str) -> None:
    config = classification_config(tmp_path, tiny_folder, data={"classes": ["calm", "loud"]})
    path = Path(config.model_dump()["data"][table])
    path.write_text(path.read_text() + "abba,SECRET\n")
    rows = len(path.read_text().splitlines()) - 1
    with pytest.raises(DataError, match=rf"{table}.csv: .* row {rows} is none of the 2 classes in data.classes"):
        train(config)


def test_a_dry_run_reads_the_table_and_loads_no_model(tmp_path: Path, tiny_folder: Path) -> None:
    config = classification_config(tmp_path, tiny_folder, model={"name": "nowhere"})
    (tmp_path / "train.toml").write_text(dump_toml(config))
    code = (
        "import sys; from veiltune.config import TrainConfig, load_config; from veiltune.dp.planning import dry_run\n"
        "lines = dry_run(load_config(TrainConfig, sys.argv[1]))\n"
        "assert 'torch' not in sys.modules; print(lines['claim'], lines['unit'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "train.toml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "noise_seed is set" in done.stdout and "one example of 64" in done.stdout
    assert not (tmp_path / "run").exists()
    claim = dry_run(classification_config(tmp_path, tiny_folder, noise_seed=None))["claim"]
    assert claim.startswith("claimed epsilon ") and "add/remove one example, PLD" in claim


def test_the_interval_of_perplexity(tmp_path: Path) -> None:
    model = tiny_model("gpt2", "causal")
    words = ["k 3", "a 2", "b 12", "c 5", "d 9"]
    examples = encode_prompted(
        causal_tokenizer(), Prompted(words * 4, [word[0] * 5 for word in words] * 4), max_length=30
    ).examples
    batches = lambda rows: collate(rows, pad_id=0)  # noqa: E731
    score = perplexity_score(model, examples, collate=batches, batch_size=3)
    plain = perplexity(model, examples)
    assert score.value == pytest.approx(plain.value, rel=1e-5) and score.count == 20
    assert score.low < score.value < score.high
    assert score.value != pytest.approx(plain.value * 1.001, rel=1e-5)
    singles = [perplexity(model, [example]) for example in examples]
    by_hand = slow_interval([single.mean_loss * single.tokens for single in singles], [s.tokens for s in singles])
    assert (score.low, score.high) == pytest.approx(by_hand, rel=0.02)


def slow_interval(losses: list[float], tokens: list[int]) -> tuple[float, float]:
    rng, found = np.random.default_rng(3), []
    for _ in range(3000):
        rows = rng.integers(0, len(losses), len(losses))
        found.append(np.exp(sum(losses[i] for i in rows) / sum(tokens[i] for i in rows)))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def test_schedules() -> None:
    def rates(schedule: str, warmup: float) -> list[float]:
        return [
            learning_rate_at(step, total=10, peak=2.0, schedule=schedule, warmup_fraction=warmup) for step in range(10)
        ]

    assert rates("constant", 0.0) == [2.0] * 10
    assert rates("linear", 0.0) == pytest.approx([2.0 - 0.2 * step for step in range(10)])
    assert rates("constant", 0.5) == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, *[2.0] * 5])
    cosine = rates("cosine", 0.2)
    assert max(cosine) == pytest.approx(2.0) and cosine[2:] == sorted(cosine[2:], reverse=True)
    assert cosine[6] == pytest.approx(1.0) and cosine[-1] > 0
    with pytest.raises(InputError, match="unknown"):
        rates("linera", 0.0)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_no_dropout_is_left_in_train_mode(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(4, 10)[None]
    with torch.no_grad():
        quiet = model.eval()(input_ids=ids).logits
        if family in ("bert", "gpt2"):
            assert not torch.equal(model.train()(input_ids=ids).logits, quiet)  # there was some
        remove_dropout(model)
        assert torch.equal(model.train()(input_ids=ids).logits, quiet)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`command(config, *options)`: code, output and errors of `veiltune train`, in this process."""
    monkeypatch.setenv("VEILTUNE_SETTLED", "1")

    def run(config: TrainConfig, *options: str) -> tuple[int, str, str]:
        path = Path(config.run).with_suffix(".toml")
        path.write_text(dump_toml(config))
        monkeypatch.setattr(sys, "argv", ["veiltune", "train", str(path), *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def test_the_command(command: Callable[..., tuple[int, str, str]], tmp_path: Path, tiny_folder: Path) -> None:
    config = classification_config(tmp_path, tiny_folder, noise_seed=None, train={"steps": 2, "batch_size": 4})
    code, out, _ = command(config, "--dry-run")
    assert code == 0 and "add/remove one example" in out and "does not cover" in out
    assert not Path(config.run).exists()
    code, out, err = command(config)
    assert code == 0, err
    assert "accuracy" in out and "claimed epsilon" in out and "protects nothing" not in out
    assert "none was longer than 24 tokens" in err
    code, out, _ = command(config)
    assert code == 0 and "accuracy" in out


def test_the_command_refuses_in_one_line(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, tiny_folder: Path
) -> None:
    config = classification_config(tmp_path, tiny_folder)
    out_of_reach = ["privacy.noise_multiplier=", "privacy.epsilon=1e-4", "train.steps=5000"]
    for options, expected, words in (
        (out_of_reach, 3, "allow more epsilon"),
        (["train.batch_size=100"], 2, "smaller than a batch"),
        (["train.rnak=2"], 2, "did you mean 'rank'?"),
    ):
        code, _, err = command(config, *[part for option in options for part in ("--set", option)])
        lines = err.splitlines()
        assert code == expected and len(lines) == 1 and lines[0].startswith("veiltune: ") and words in lines[0], err
        assert not Path(config.run).exists()
