"""The model under audit: a run, a folder or an API; whatever does not fit is refused before it is asked."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from api_server import serve
from lm_helper import save_tiny
from tiny import tiny_model
from tiny_text import causal_tokenizer
from train_helper import classification_config, generation_config
from veiltune.audit.http_api import NextTokenApi
from veiltune.audit.lm.opening import Claim, open_models
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.session import audit_model
from veiltune.audit.local_model import LocalModel
from veiltune.config import TrainConfig, dump_toml, load_config
from veiltune.dp.session import train
from veiltune.errors import InputError
from veiltune.models.loading import load_base
from veiltune.runs import RunFolder


def options(folder: Path, model: str, **changes: Any) -> LeakageOptions:
    return LeakageOptions(**{"model": model, "manifest": folder / "m.jsonl", "output": folder / "audit"} | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished private run with its base beside it."""
    folder = tmp_path_factory.mktemp("opening")
    train(generation_config(folder, train={"steps": 2, "save_merged": True}))
    return folder / "run"


def test_a_run_folder_knows_its_base_its_claim_and_its_place(trained: Path) -> None:
    opened = open_models(options(trained.parent, str(trained), output=None))
    assert opened.folder == trained and opened.base_name == str(trained.parent / "tiny-llama")
    summary = RunFolder(trained).read_json("summary.json")
    assert opened.claim == Claim(summary["planned_epsilon"], summary["delta"], "example") and opened.claim.epsilon > 0
    assert opened.base is not None and opened.base.digest == load_base(opened.base_name).digest


def test_a_run_is_audited_as_it_was_fine_tuned(trained: Path) -> None:
    """The adapter on its base answers as the merged model does, and not as the base."""
    opened = open_models(options(trained.parent, str(trained)))
    merged = AutoModelForCausalLM.from_pretrained(trained / "merged")
    expected = LocalModel(merged, causal_tokenizer(begins=True)).next_token_log_probs([[2, 40, 41], [2]])
    assert opened.base is not None
    assert opened.target.next_token_log_probs([[2, 40, 41], [2]]) == pytest.approx(expected, abs=1e-4)
    assert abs(opened.base.next_token_log_probs([[2, 40, 41]]) - expected[0]).max() > 1e-3
    assert opened.target.digest != opened.base.digest


def test_a_manifest_of_another_text_is_refused(trained: Path) -> None:
    table = Path(load_config(TrainConfig, trained / "config.toml").data.train)
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    assert open_models(options(trained.parent, str(trained)), train_digest=digest).claim
    with pytest.raises(InputError, match="the manifest is of another text; name the manifest"):
        open_models(options(trained.parent, str(trained)), train_digest="0" * 64)


def test_an_unfinished_run_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match="holds a run that is not finished; the same `veiltune train` goes on"):
        open_models(options(tmp_path, str(tmp_path / "run")))


def test_a_classifier_is_refused_before_a_manifest_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(dump_toml(classification_config(tmp_path, tmp_path / "base")))
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"is a classifier, and this audit is of language models; .*privacy\.json"):
        audit_model(options(tmp_path, str(tmp_path / "run"), manifest=tmp_path / "nowhere"))


def test_the_users_claim_and_place_come_before_the_runs(trained: Path, tmp_path: Path) -> None:
    opened = open_models(options(tmp_path, str(trained), claimed_epsilon=3.0, delta=1e-6))
    assert opened.claim == Claim(3.0, 1e-6, "example") and opened.folder == tmp_path / "audit"
    assert not (tmp_path / "audit").exists()  # opening writes nothing


def test_a_run_without_privacy_claims_nothing(tmp_path: Path) -> None:
    free = {"disabled": True, "noise_multiplier": None}
    train(generation_config(tmp_path, privacy=free, noise_seed=None, train={"steps": 1}))
    assert open_models(options(tmp_path, str(tmp_path / "run"))).claim is None


def test_a_model_folder_has_no_base_no_claim_and_no_place(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    opened = open_models(options(tmp_path, str(model)))
    assert (opened.base, opened.base_name, opened.claim) == (None, None, None)
    with pytest.raises(InputError, match=r"name a folder for leakage\.json with --output"):
        open_models(options(tmp_path, str(model), output=None))
    with_base = open_models(
        options(tmp_path, str(model), base=str(save_tiny(tmp_path / "base", seed=1)), claimed_epsilon=2.0)
    )
    assert with_base.base is not None and with_base.base.digest != with_base.target.digest
    assert with_base.claim == Claim(2.0, 1e-5, "example")


def test_models_that_cannot_be_asked(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="is no causal language model: it gives no next-token vectors"):
        open_models(options(tmp_path, str(tiny_folder)))
    with pytest.raises(InputError, match="is no causal language model"):
        open_models(options(tmp_path, str(save_tiny(tmp_path / "model")), base=str(tiny_folder)))
    with pytest.raises(InputError, match="cannot load the model"):
        open_models(options(tmp_path, str(tmp_path / "nowhere")))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    model, base = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "base")
    tokenizer: Any = causal_tokenizer(begins=True)
    vocabulary = (base / "tokenizer.json").read_text().replace('"a": ', '"\u4eff": ', 1)
    (base / "tokenizer.json").write_text(vocabulary)
    with pytest.raises(InputError, match="the model and its base have different tokenizers"):
        open_models(options(tmp_path, str(model), base=str(base)))
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match="has 128 tokens, its tokenizer 129; they do not belong together"):
        open_models(options(tmp_path, str(model)))


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="--device must be 'cpu' on this machine"):
        open_models(options(tmp_path, str(save_tiny(tmp_path / "model")), device="cuda"))


def test_an_api_is_asked_with_the_key_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = causal_tokenizer(begins=True)
    folder = save_tiny(tmp_path / "model")
    monkeypatch.setenv("AUDIT_KEY", "hush-hush")
    with serve(LocalModel(tiny_model("gpt2", "causal"), tokenizer), tokenizer) as api:
        asked = options(tmp_path, f"{api.url}/v1/next-token", tokenizer=str(folder), key_variable="AUDIT_KEY")
        with open_models(asked).target as box:
            assert isinstance(box, NextTokenApi) and box.vocabulary == 128
        assert {header["Authorization"] for header in api.seen_headers} == {"Bearer hush-hush"}
        monkeypatch.delenv("AUDIT_KEY")
        with pytest.raises(InputError, match="AUDIT_KEY must hold the API key") as refusal:
            open_models(asked)
        assert "hush" not in str(refusal.value)
        opened = open_models(replace(asked, key_variable="", base=str(folder)))
        with opened.target:
            assert opened.base is not None and opened.claim is None


def test_an_api_that_serves_a_run_has_its_tokenizer_its_base_and_its_claim(trained: Path) -> None:
    local = open_models(options(trained.parent, str(trained)))
    assert isinstance(local.target, LocalModel)
    with serve(local.target, local.tokenizer) as api:
        asked = options(trained.parent, f"{api.url}/v1/next-token", tokenizer=str(trained))
        opened = open_models(asked)
        with opened.target:
            assert opened.claim == local.claim and opened.base_name == local.base_name
            assert opened.folder == asked.output
        with pytest.raises(InputError, match="name a folder for leakage"):  # the run's is its own audit's
            open_models(replace(asked, output=None))


def test_an_api_with_another_models_tokenizer(tmp_path: Path) -> None:
    small = causal_tokenizer(begins=True)
    folder = save_tiny(tmp_path / "model")
    larger: Any = causal_tokenizer(begins=True)
    larger.add_tokens(["extra"])
    larger.save_pretrained(folder)
    with (
        serve(LocalModel(tiny_model("gpt2", "causal"), small), small) as api,
        pytest.raises(InputError, match="knows 128 tokens and the tokenizer 129"),
    ):
        open_models(options(tmp_path, f"{api.url}/v1/next-token", tokenizer=str(folder)))
