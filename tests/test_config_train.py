"""The keys of train.toml: what is read, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from veiltune.config import BudgetSection, FineTuningSection, TablesSection, TrainConfig, dump_toml, load_config
from veiltune.data.prompts import FORMATS
from veiltune.dp.plan import CLIPPINGS
from veiltune.dp.schedules import SCHEDULES
from veiltune.errors import ConfigError
from veiltune.models.adapters import METHODS

MINIMAL = """
[model]
name = "minilm"
task = "classification"
[data]
train = "train.csv"
eval = "eval.csv"
[privacy]
epsilon = 3.0
[train]
epochs = 2
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(MINIMAL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message of the refusal, always one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults(path: Path) -> None:
    config = load_config(TrainConfig, path)
    assert (config.privacy.clip_norm, config.privacy.clipping, config.privacy.delta) == (1.0, "flat", None)
    assert (config.train.method, config.train.epochs, config.train.steps) == ("lora", 2.0, None)
    assert config.noise_seed is None and config.data.person_column == ""


def test_dump_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, path, ["noise_seed=7", 'train.targets=["query", "value"]', "data.separator='|'"])
    (tmp_path / "dumped.toml").write_text(dump_toml(config))
    assert load_config(TrainConfig, tmp_path / "dumped.toml") == config


def test_a_runs_own_file_spells_out_defaults_that_mean_nothing_there(path: Path, tmp_path: Path) -> None:
    for method in get_args(FineTuningSection.model_fields["method"].annotation):
        free = ["privacy.epsilon=", "privacy.disabled=true", f"train.method={method}"]
        config = load_config(TrainConfig, path, free)
        (tmp_path / "dumped.toml").write_text(dump_toml(config))
        assert load_config(TrainConfig, tmp_path / "dumped.toml") == config
    for scrub in ("defences.scrub=mask", "defences.preset=dp"):
        assert load_config(TrainConfig, path, ["defences.known=known.csv", scrub]).settled_defences().known


def test_a_run_without_privacy_and_one_of_so_many_steps(path: Path) -> None:
    config = load_config(
        TrainConfig, path, ["privacy.epsilon=", "privacy.disabled=true", "train.epochs=", "train.steps=5"]
    )
    assert config.privacy.disabled and config.train.steps == 5
    assert load_config(TrainConfig, path, ["data.person_column=author", "privacy.max_records=4"]).privacy.max_records


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy.noise_multiplier=1"], "privacy needs exactly one of epsilon, noise_multiplier, disabled = true, got epsilon, noise_multiplier"),  # noqa: E501
        (["privacy.disabled=true"], "privacy needs exactly one of epsilon, noise_multiplier, disabled = true, got epsilon, disabled = true"),  # noqa: E501
        (["privacy.epsilon="], "privacy needs exactly one of epsilon, noise_multiplier, disabled = true, got none of them"),  # noqa: E501
        (["privacy.epsilon=0"], "privacy.epsilon must be greater than 0, got 0"),
        (["privacy.delta=1"], "privacy.delta must be less than 1, got 1"),
        (["privacy.clip_norm=inf"], "privacy.clip_norm must be less than or equal to 1000000, got inf"),
        (["privacy.clipping=ghost"], "privacy.clipping must be 'flat', 'per_layer' or 'automatic', got 'ghost'"),
        (["privacy.epsilom=3"], "unknown key 'privacy.epsilom'; did you mean 'epsilon'?"),
        (["train.epsilon=4"], "unknown key 'train.epsilon'; did you mean 'privacy.epsilon'?"),
        (["rank=4"], "unknown key 'rank'; did you mean 'train.rank'?"),
        (["train.max_records=2"], "did you mean 'privacy.max_records' or 'defences.max_records'?"),
        (["train.steps=5"], "train needs exactly one of epochs and steps, got both; an empty value, as in --set train.epochs=, takes a key out"),  # noqa: E501
        (["train.rank=4", "train.epochs="], "train.toml with --set: train needs exactly one of epochs"),
        (["train.epochs="], "train needs exactly one of epochs and steps, got neither"),
        (["train.method=prefix"], "train.method must be"),
        (["train.method=adapter", "train.save_merged=true"], "has save_merged, but method 'adapter' adds layers"),
        (["data.format=e2e"], "data.format e2e has prompts and targets and no persons"),
        (["privacy.max_records=4"], "privacy.max_records is of a person, and data.person_column names none"),
        (["privacy.epsilon=", "privacy.disabled=true", "privacy.delta=1e-5"], "has delta, which means nothing without noise"),  # noqa: E501
        (["privacy.epsilon=", "privacy.disabled=true", "privacy.clip_norm=2"], "privacy has clip_norm, and disabled = true clips nothing"),  # noqa: E501
        (["privacy.epsilon=", "privacy.disabled=true", "privacy.clipping=per_layer"], "privacy has clipping, and disabled = true"),  # noqa: E501
        (["train.method=adapter", 'train.targets=["query"]'], "train has targets, which is for method lora, and method is adapter; remove it"),  # noqa: E501
        (["train.method=full", "train.alpha=32"], "train has alpha, which is for method lora, and method is full"),
        (["train.method=bitfit", "train.rank=4"], "train has rank, which is for method lora or rgp"),
        (["train.adapter_size=8"], "train has adapter_size, which is for method adapter or compacter"),
        (["train.phm_dim=8"], "train has phm_dim, which is for method compacter, and method is lora"),
        (["defences.known=known.csv"], "has defences.known, which only a scrub looks for; set defences.scrub"),
        (["defences.known=known.csv", "defences.preset=dp", "defences.scrub=off"], "has defences.known, which only a"),
        (['data.classes=["a"]'], "data.classes must have at least 2 items, not 1, got ['a']"),
        (['data.classes=["a", "b", "a"]'], "data has a class twice in classes; name each once"),
        (['data.classes=["a", "b"]', "model.task=generation"], "data.classes are of a classification; remove them"),
        (["train.device=gpu"], "train.device must match pattern"),
        (["model.task=translation"], "model.task must be 'classification' or 'generation'"),
    ],
)  # fmt: skip
def test_refusals(path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(path, *overrides)


def test_a_misspelt_section_is_named_before_the_one_that_is_missing(path: Path) -> None:
    path.write_text(MINIMAL.replace("[privacy]", "[privcy]"))
    assert refusal(path) == f"{path}: unknown key 'privcy'; did you mean 'privacy'?"
    path.write_text(MINIMAL.replace("[privacy]\nepsilon = 3.0\n", ""))
    assert refusal(path) == f"{path}: privacy is missing; add the section [privacy]"


def test_the_choices_are_those_of_the_code() -> None:
    def choices(section: type, name: str) -> set[str]:
        return set(get_args(section.model_fields[name].annotation))  # type: ignore[attr-defined]

    assert choices(FineTuningSection, "method") == set(METHODS) - {"none"}
    assert choices(FineTuningSection, "schedule") == set(SCHEDULES)
    assert choices(BudgetSection, "clipping") == set(CLIPPINGS)
    assert choices(TablesSection, "format") == set(FORMATS)
