"""The command line on bad days: one line on standard error, the right exit code, nothing half-written."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from parties import Vendor, running_vendor
from runs_helper import digests, make_texts, tune_config, write_csv, write_tables
from veiltune.cli import main
from veiltune.config import dump_toml
from veiltune.vendor import pki
from veiltune.vendor.pki import create_authority, issue_tenant


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *words: str) -> None:
        """Exactly one line on standard error, with these words, and this exit code."""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("veiltune: "), self.err
        assert all(word in lines[0] for word in words), lines[0]
        assert self.code == code


@pytest.fixture(scope="module")
def vendor(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Vendor]:
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("bert", "base").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with running_vendor(folder / "vendor", folder / "model", tenants=("acme",), max_jobs_per_tenant=50) as running:
        yield running


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`command("tune", ...)` as a shell would run it, but in this process."""
    monkeypatch.setenv("VEILTUNE_SETTLED", "1")

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["veiltune", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture
def config(vendor: Vendor, tmp_path: Path) -> Path:
    """A good tune.toml over good tables, with a copy of the tenant's certificates."""
    write_tables(tmp_path, train=16, eval=8)
    shutil.copytree(vendor.state / "tenants" / "acme", tmp_path / "credentials")
    where = {"address": vendor.address, "credentials": str(tmp_path / "credentials"), "plaintext": False}
    path = tmp_path / "tune.toml"
    path.write_text(dump_toml(tune_config(tmp_path, vendor.address, vendor=where, train={"epochs": 1})))
    return path
