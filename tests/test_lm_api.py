"""The same audit over a real socket: whole vectors tell what a local model tells, the likeliest tokens less of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api_server import Api, serve
from lm_helper import SMALL, Habit, save_tiny, write_short_manifest
from tiny_text import causal_tokenizer
from veiltune.audit.http_api import open_api
from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.session import audit_model
from veiltune.errors import VendorError

OWN = {"model", "model_digest", "created", "seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest, and a random base with the tokenizer."""
    folder = tmp_path_factory.mktemp("api")
    write_short_manifest(folder / "manifest.jsonl", pairs=40, most=1, coins=32)
    save_tiny(folder / "base", seed=1)
    return folder


@contextlib.contextmanager
def smaller(**changes: Any) -> Iterator[pytest.MonkeyPatch]:
    """Fewer questions than any preset, and no patience with a dead server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veiltune.audit.lm.options.PRESETS", {"ci": replace(SMALL, generations=4, contexts=1)})
        patch.setattr("veiltune.audit.lm.extraction.NAME_TOKENS", 3)
        patch.setattr("veiltune.audit.lm.extraction.SLACK", 1)
        quick = functools.partial(open_api, attempts=2, backoff=0.01, context=64)
        patch.setattr("veiltune.audit.lm.opening.open_api", quick)
        patch.setattr("api_server._Handler.disable_nagle_algorithm", True)  # else each answer waits 40 ms
        yield patch


@contextlib.contextmanager
def served() -> Iterator[Api]:
    tokenizer = causal_tokenizer(begins=True)
    with smaller(), serve(Habit(), tokenizer, names="id") as running:
        yield running


def options(folder: Path, model: str, output: str, **changes: Any) -> LeakageOptions:
    fields = {"model": model, "manifest": folder / "manifest.jsonl", "base": str(folder / "base"), "preset": "ci"}
    return LeakageOptions(**fields | {"tokenizer": str(folder / "base"), "output": folder / output} | changes)


@pytest.fixture(scope="module")
def local(folder: Path) -> LeakageRecord:
    """Of the same box in this process."""
    with smaller() as patch:
        patch.setattr("veiltune.audit.lm.opening.open_api", lambda *_, **__: Habit())
        return audit_model(options(folder, "https://nowhere/v1/next-token", "local"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[LeakageRecord, int]:
    """Of the same box over a socket, and how many questions that took."""
    with served() as api:
        return audit_model(options(folder, f"{api.url}/v1/next-token", "whole")), len(api.questions)


def approximately(found: Any, expected: Any) -> bool:
    """Numbers may differ by what rounding moves in a ranking."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(approximately(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(approximately, found, expected))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, abs=5e-3, rel=1e-4))
    return bool(found == expected)


def test_whole_vectors_tell_the_same(local: LeakageRecord, whole: tuple[LeakageRecord, int]) -> None:
    assert whole[0].full_vectors and whole[0].model_digest != local.model_digest
    found, expected = (one.model_dump(mode="json", exclude=OWN) for one in (whole[0], local))
    for one in (found, expected):
        for attack in one["membership"]["attacks"]:
            del attack["roc"]  # its points are thinned along the curve
    assert approximately(found, expected)
    expected["membership"]["auc"]["value"] += 0.02
    assert not approximately(found, expected)


def test_likeliest_tokens_alone_tell_less_and_it_is_said_what(folder: Path, local: LeakageRecord) -> None:
    with served() as api:
        record = audit_model(options(folder, f"{api.url}/v1/completions", "top", api_model="m", base=""))
    assert not record.full_vectors and record.membership is not None and local.membership is not None
    gone = {(one.name, one.level): one for one in record.membership.attacks if one.status != "done"}
    assert {name for name, _ in gone} == {"min_k_plus_plus", "reference", "rmia", "ez"} and len(gone) == 8
    assert all(one.status == "not_applicable" and one.auc is None for one in gone.values())
    for (name, _), one in gone.items():
        assert ("full next-token vectors" if name == "min_k_plus_plus" else "--base") in one.reason
    (note,) = record.notes
    assert note.startswith("the API tells the 5 likeliest tokens only: ez, min_k_plus_plus, reference, rmia fall away")
    shown = {(one.name, one.level): one.auc for one in record.membership.attacks}
    for one in local.membership.attacks:  # with echo the server tells the text's own tokens
        told = shown[one.name, one.level]
        if one.name in ("loss", "zlib", "min_k", "lowercase"):
            assert told is not None and one.auc is not None and told.value == pytest.approx(one.auc.value, abs=5e-3)


def test_a_dead_api_is_one_line_and_the_same_call_goes_on(folder: Path, whole: tuple[LeakageRecord, int]) -> None:
    """Dead while the records are read: what was read is not asked again, and the figures are those of one go."""
    expected, questions = whole
    with served() as api:
        asked = options(folder, f"{api.url}/v1/next-token", "dead")
        api.dies_after = questions // 4
        with pytest.raises(VendorError, match=r"no answer from .* in 2 attempts .* repeat the command") as death:
            audit_model(asked)
        assert death.value.exit_code == 4 and "\n" not in str(death.value)
        assert not (folder / "dead" / "leakage.json").exists()
        assert (folder / "dead" / "private" / "leakage" / "model-records-0.safetensors").exists()
        api.dies_after = None
        resumed = audit_model(asked)
        assert len(api.questions) - questions < 0.1 * questions  # twice: what ten texts take
    assert resumed.model_dump(exclude=OWN) == expected.model_dump(exclude=OWN)
