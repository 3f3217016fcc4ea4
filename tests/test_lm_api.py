"""The same audit over a real socket: whole vectors tell what a local model tells, the likeliest tokens less of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_server import Api, serve
from lm_helper import SMALL, save_tiny, write_short_manifest
from tiny import tiny_model
from tiny_text import causal_tokenizer
from veiltune.audit.http_api import open_api
from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.session import audit_model
from veiltune.audit.local_model import LocalModel
from veiltune.errors import VendorError

OWN = {"model", "model_digest", "created", "seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest, a random model and a random base."""
    folder = tmp_path_factory.mktemp("api")
    write_short_manifest(folder / "manifest.jsonl")
    save_tiny(folder / "model")
    save_tiny(folder / "base", seed=1)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veiltune.audit.lm.options.PRESETS", {"ci": SMALL})
    monkeypatch.setattr("veiltune.audit.lm.extraction.NAME_TOKENS", 6)
    quick = functools.partial(open_api, attempts=2, backoff=0.01, context=64)
    monkeypatch.setattr("veiltune.audit.lm.opening.open_api", quick)


@pytest.fixture
def api() -> Iterator[Api]:
    tokenizer = causal_tokenizer(begins=True)
    with serve(LocalModel(tiny_model("gpt2", "causal"), tokenizer), tokenizer, names="id") as running:
        yield running


def options(folder: Path, model: str, output: str, **changes: Any) -> LeakageOptions:
    fields = {"model": model, "manifest": folder / "manifest.jsonl", "base": str(folder / "base"), "preset": "ci"}
    return LeakageOptions(**fields | {"tokenizer": str(folder / "model"), "output": folder / output} | changes)


@pytest.fixture(scope="module")
def local(folder: Path) -> LeakageRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veiltune.audit.lm.options.PRESETS", {"ci": SMALL})
        patch.setattr("veiltune.audit.lm.extraction.NAME_TOKENS", 6)
        return audit_model(options(folder, str(folder / "model"), "local"))


def approximately(found: Any, expected: Any) -> bool:
    """Numbers may differ by what rounding moves in a ranking."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(approximately(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(approximately, found, expected))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, abs=5e-3, rel=1e-4))
    return bool(found == expected)


def test_whole_vectors_tell_the_same(folder: Path, local: LeakageRecord, api: Api) -> None:
    record = audit_model(options(folder, f"{api.url}/v1/next-token", "whole"))
    assert record.full_vectors and record.model_digest != local.model_digest
    found, expected = record.model_dump(mode="json", exclude=OWN), local.model_dump(mode="json", exclude=OWN)
    for one in (found, expected):
        for attack in one["membership"]["attacks"]:
            del attack["roc"]  # its points are thinned along the curve
    assert approximately(found, expected)
    expected["membership"]["auc"]["value"] += 0.02
    assert not approximately(found, expected)


def test_likeliest_tokens_alone_tell_less_and_it_is_said_what(folder: Path, local: LeakageRecord, api: Api) -> None:
    record = audit_model(options(folder, f"{api.url}/v1/completions", "top", api_model="m"))
    assert not record.full_vectors and record.membership is not None and local.membership is not None
    gone = {(one.name, one.level): one.reason for one in record.membership.attacks if one.status != "done"}
    assert set(gone) == {("min_k_plus_plus", "record"), ("min_k_plus_plus", "person")}
    assert all("full next-token vectors" in reason for reason in gone.values())
    assert all(one.auc is None and one.calibration_auc is None for one in record.membership.attacks if one.status != "done")
    shown = {(one.name, one.level): one.auc for one in record.membership.attacks}
    for one in local.membership.attacks:  # with echo the server tells the text's own tokens
        told = shown[one.name, one.level]
        if one.name in ("loss", "reference", "zlib", "min_k"):
            assert told is not None and one.auc is not None and told.value == pytest.approx(one.auc.value, abs=5e-3)
    assert any("min_k_plus_plus" in note and "likeliest" in note for note in record.notes)


def test_a_dead_api_is_one_line_and_the_same_call_goes_on(folder: Path, api: Api) -> None:
    """Dead after the records are read: what was read is not asked again, and the figures are those of one go."""
    asked = options(folder, f"{api.url}/v1/next-token", "dead")
    api.dies_after = 600
    with pytest.raises(VendorError, match=r"no answer|did not answer|attempts") as death:
        audit_model(asked)
    assert death.value.exit_code == 4 and "\n" not in str(death.value)
    assert not (folder / "dead" / "leakage.json").exists()
    kept = {path.name for path in (folder / "dead" / "private" / "leakage").glob("*.safetensors")}
    assert kept
    before, api.dies_after = len(api.questions), None
    resumed = audit_model(asked)
    once = audit_model(options(folder, f"{api.url}/v1/next-token", "once"))
    after, whole = len(api.questions), json.loads((folder / "once" / "leakage.json").read_text())
    assert 0 < before < after
    assert resumed.model_dump(mode="json", exclude=OWN) == {k: v for k, v in whole.items() if k not in OWN}
