"""The command line on bad days: one line on standard error, the right exit code, nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from parties import Vendor, running_vendor
from report_runs import record as audit_record
from runs_helper import digests, make_texts, tune_config, write_csv, write_tables
from veiltune.cli import main
from veiltune.config import dump_toml
from veiltune.report.figures import estimate_with_interval, outwards
from veiltune.runs import RunFolder
from veiltune.terminal_audit import print_audit
from veiltune.vendor import pki
from veiltune.vendor.engine import LocalEngine
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
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`command("tune", ...)` as a shell would run it, but in this process."""
    monkeypatch.setenv("VEILTUNE_SETTLED", "1")

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["veiltune", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ended(code, *capsys.readouterr())

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


def nothing_made(config: Path) -> bool:
    """No run folder and no temporary file beside it."""
    expected = {"tune.toml", "train.csv", "eval.csv", "credentials"}
    return {path.name for path in config.parent.iterdir()} - {"other"} == expected


BAD_OPTIONS: dict[str, tuple[list[str], int, str]] = {
    "wrong text column": (["data.text_column=txet"], 2, "has no column 'txet'; did you mean 'text'?"),
    "wrong label column": (["data.label_column=lable"], 2, "has no column 'lable'; did you mean 'label'?"),
    "a file that is not there": (["data.train=nowhere.csv"], 2, "nowhere.csv does not exist"),
    "eta 0": (
        ["privacy.mechanism=d_chi", "privacy.eta=0"],
        2,
        "privacy.eta must be greater than or equal to 0.000000001, got 0",
    ),
    "eta below 0": (["privacy.mechanism=d_chi", "privacy.eta=-2.5"], 2, "privacy.eta must be greater than or equal to"),
    "no strength": (["privacy.mechanism=d_chi"], 2, "needs exactly one of eta, noise_to_norm, snr_db"),
    "cut below 0": (["split.cut_layer=-1"], 2, "split.cut_layer must be greater than or equal to 0, got -1"),
    "cut beyond the model": (["split.cut_layer=9"], 4, "cut_layer must be a whole number in [0, 4]"),
    "unknown key": (["privacy.etta=3"], 2, "unknown key 'privacy.etta'; did you mean 'eta'?"),
    "unknown section": (["trian.epochs=3"], 2, "unknown key 'trian'; did you mean 'train'?"),
    "unknown word": (["wire.dtype=fp64"], 2, "wire.dtype must be"),
    "vendor down": (["vendor.address=127.0.0.1:9"], 4, "no answer from the vendor at 127.0.0.1:9"),
    "no credentials": (["vendor.credentials=nowhere"], 2, "nowhere/tenant.crt is missing"),
    "plaintext to a TLS port": (["vendor.plaintext=true", "vendor.credentials="], 4, "no answer from the vendor"),
    "plaintext with credentials": (["vendor.plaintext=true"], 2, "has credentials, which plaintext does not use"),
    "another bundle than agreed": ([f"model.digest={'0' * 64}"], 2, f"expected was {'0' * 64}"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option(command: Callable[..., Ended], config: Path, name: str) -> None:
    options, code, words = BAD_OPTIONS[name]
    settings = [part for option in options for part in ("--set", option)]
    command("tune", config, "--set", "vendor.timeout_seconds=1", *settings).refused(code, words)
    assert nothing_made(config)


BAD_TABLES: dict[str, tuple[str, bytes, str]] = {
    "empty file": ("train", b"", "train.csv is empty"),
    "no rows": ("train", b"text,label\n", "train.csv has no rows"),
    "not UTF-8": ("train", "text,label\nnaïve,calm\n".encode("latin-1"), "train.csv is not UTF-8 (byte 13)"),
    "one class only": ("train", b"text,label\nab,calm\nba,calm\n", "at least two classes"),
    "an empty text": ("train", b"text,label\nab,calm\n,loud\n", "column 'text': row 2 is empty"),
    "a torn row": ("train", b"text,label\nab,calm\nba\n", "row 2 has 1 fields"),
    "empty evaluation": ("eval", b"", "eval.csv is empty"),
    "a label unseen in training": ("eval", b"text,label\nab,calm\nba,SECRET\n", "row 2 is none of the 2 classes"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table(command: Callable[..., Ended], config: Path, name: str) -> None:
    table, content, words = BAD_TABLES[name]
    (config.parent / f"{table}.csv").write_bytes(content)
    for arguments in ((), ("--dry-run",)):
        ended = command("tune", config, *arguments)
        ended.refused(2, words)
        assert "SECRET" not in ended.err
    assert nothing_made(config)


@pytest.mark.parametrize("cut_layer", [0, 1])
def test_a_text_longer_than_the_model(command: Callable[..., Ended], config: Path, cut_layer: int) -> None:
    write_csv(config.parent / "eval.csv", ["ab", "w" * 99], ["calm", "loud"])
    settings = ("--set", "data.max_length=200", "--set", f"split.cut_layer={cut_layer}")
    command("tune", config, *settings).refused(2, "a text has 101 tokens, the model takes 64; lower data.max_length")
    assert nothing_made(config)


def test_an_expired_certificate(
    command: Callable[..., Ended], config: Path, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class YearsAgo(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(UTC) - timedelta(days=400)

    monkeypatch.setattr(pki, "datetime", YearsAgo)
    expired = issue_tenant(vendor.state, "bygone", valid_days=30)
    command("tune", config, "--set", f"vendor.credentials={expired}").refused(2, "tenant.crt expired on", "enrolment")
    assert nothing_made(config)


def test_certificates_of_another_vendor(command: Callable[..., Ended], config: Path, vendor: Vendor) -> None:
    authority = config.parent / "other"
    create_authority(authority)
    foreign = issue_tenant(authority, "acme")
    settings = ("--set", "vendor.timeout_seconds=1", "--set", f"vendor.credentials={foreign}")
    command("tune", config, *settings).refused(4, "certificate", vendor.address)
    (foreign / "ca.crt").write_bytes((vendor.state / "ca.crt").read_bytes())  # trusts the vendor, unknown to it
    command("tune", config, *settings).refused(2, "tenant.crt was not signed by the authority")
    assert nothing_made(config)


def no_space(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("successes", [0, 1, 4, 12])
def test_a_full_disk_at_the_customer_and_then_room_again(
    command: Callable[..., Ended], config: Path, monkeypatch: pytest.MonkeyPatch, successes: int
) -> None:
    """Whatever was being written: one line, nothing torn, and the same command goes on when there is room."""
    left, honest, vendor_thread = [successes], os.fsync, "engine"

    def filling(descriptor: int) -> None:
        if not threading.current_thread().name.startswith(vendor_thread):
            if not left[0]:
                no_space()
            left[0] -= 1
        honest(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        ended = command("tune", config)
        assert (ended.code, ended.err.count("veiltune: ")) == (6, 1) and "Traceback" not in ended.err
        assert "No space left on device" in ended.err.splitlines()[-1]
    assert not list(config.parent.rglob(".tmp-*"))
    assert command("tune", config).code == 0
    assert RunFolder(config.parent / "run").read_json("summary.json")["releases"] == 24


def test_a_full_disk_at_other_places(
    command: Callable[..., Ended], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def database_full(*_: object) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    for target, fault in (
        ("veiltune.customer.remote.VendorClient._receive_files", no_space),
        ("veiltune.customer.opening.sqlite3.connect", database_full),
        ("veiltune.customer.outbox.Path.mkdir", no_space),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, fault)
            command("tune", config).refused(6, "cannot write")
        assert nothing_made(config)


def test_changed_data_on_resumption(command: Callable[..., Ended], config: Path) -> None:
    interrupt = ("--set", "train.batch_size=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veiltune.terminal.stop_on_interrupt", lambda: contextlib.nullcontext(lambda: True))
        assert command("tune", config, *interrupt).code == 130
    before = digests(config.parent / "run")
    texts, labels = make_texts(16, seed=3)
    write_csv(config.parent / "train.csv", texts, labels)
    command("tune", config, *interrupt).refused(3, "the training data has changed since run", "new run folder")
    assert digests(config.parent / "run") == before


def test_another_configuration_over_a_run(command: Callable[..., Ended], config: Path) -> None:
    assert command("tune", config).code == 0
    before = digests(config.parent / "run")
    for dry in ((), ("--dry-run",)):
        command("tune", config, "--set", "train.epochs=2", *dry).refused(2, "another configuration (train.epochs: ")
        command("tune", config, "--set", f"run={config}", *dry).refused(2, "is a file; name a folder as `run`")
    assert digests(config.parent / "run") == before


def test_a_bundle_that_was_tampered_with_on_its_way(
    command: Callable[..., Ended], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = LocalEngine.bottom_files

    def tampering(engine: LocalEngine, request: Any) -> list[tuple[str, bytes]]:
        return [(name, data[:-1] + bytes([data[-1] ^ 1])) if name.endswith(".safetensors") else (name, data)
                for name, data in honest(engine, request)]  # fmt: skip

    monkeypatch.setattr(LocalEngine, "bottom_files", tampering)
    command("tune", config).refused(2, "has an altered file 'bottom.safetensors'; fetch the bundle again")
    assert nothing_made(config)


def test_a_bundle_that_was_tampered_with_on_disk(command: Callable[..., Ended], config: Path) -> None:
    assert command("tune", config).code == 0
    run = config.parent / "run"
    (run / "bottom" / "tokenizer.json").write_text("{}")
    predict = ("predict", run, config.parent / "eval.csv", "--output", config.parent / "out.csv")
    command(*predict).refused(2, "has an altered file 'tokenizer.json'")
    manifest = run / "bottom" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("tiny", "evil").replace('"format": 1', '"format":  1'))
    command(*predict).refused(2, "expected was")
    assert not (config.parent / "out.csv").exists()


def test_a_dry_run_prints_the_plan_and_contacts_nobody(
    command: Callable[..., Ended], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> Any:
        raise AssertionError("a dry run opened a channel")

    monkeypatch.setattr(grpc, "secure_channel", no_network)
    monkeypatch.setattr(grpc, "insecure_channel", no_network)
    before = digests(config.parent)
    ended = command("tune", config, "--dry-run", "--set", "privacy.mechanism=d_chi", "--set", "privacy.eta=30")
    assert (ended.code, ended.err) == (0, "")
    for words in ("16 training texts once each", "d_chi, eta = 30", "DISCLOSED", "after 1 blocks", "SEEDED with 12"):
        assert words in ended.out
    assert digests(config.parent) == before


def test_prediction_refusals(command: Callable[..., Ended], config: Path) -> None:
    folder = config.parent
    predict = ("predict", folder / "run", folder / "eval.csv", "--output", folder / "out.csv")
    command(*predict).refused(2, "not the folder of a finished run")
    assert command("tune", config).code == 0
    command(*predict, "--text-column", "txt").refused(2, "has no column 'txt'; did you mean 'text'?")
    assert not (folder / "out.csv").exists()
    assert command(*predict).code == 0
    command(*predict).refused(2, "exists; name another file")


def test_models_lists_what_fits(command: Callable[..., Ended]) -> None:
    ended = command("models")
    assert (ended.code, ended.err) == (0, "")
    for words in ("minilm", "bert", "Apache-2.0"):
        assert words in ended.out


def test_vendor_folder(command: Callable[..., Ended], tmp_path: Path) -> None:
    state = tmp_path / "vendor"
    command("vendor", "init", "--state", state, "--host", "two words").refused(2, "a host must be a name")
    command("vendor", "init", "--state", state, "--address", "nowhere").refused(2, "address must be host:port")
    assert not state.exists()
    assert command("vendor", "init", "--state", state).code == 0
    before = digests(state)
    command("vendor", "init", "--state", state).refused(2, "exists and is not overwritten")
    command("vendor", "tenant", "add", "Acme Ltd", "--state", state).refused(2, "a tenant's name must be")
    command("vendor", "tenant", "add", "acme", "--days", 10**7, "--state", state).refused(2, "valid_days must be in")
    assert digests(state) == before and not (state / "tenants").exists()
    assert command("vendor", "tenant", "add", "acme", "--state", state).code == 0
    command("vendor", "tenant", "add", "acme", "--state", state).refused(2, "exists and is not overwritten")
    serve = ("vendor", "serve", state / "vendor.toml", "--set")
    command(*serve, f"model={tmp_path}").refused(2, "cannot load the model")
    command(*serve, "plaintext=true", "--set", "address=0.0.0.0:1").refused(2, "plaintext only on loopback")
    command(*serve, "database=nonsense").refused(2, "database or blobs names no store")
    command(*serve, "blobs=nonsense://here").refused(2, "database or blobs names no store")
    command(*serve, f"state={state / 'vendor.toml' / 'below'}").refused(6, "Not a directory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "jobs.sqlite").write_bytes(b"not a database" * 100)
    command(*serve, f"state={tmp_path / 'other'}").refused(6, "file is not a database")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune",), "Missing argument 'config'"),
        (("tnue",), "No such command 'tnue'"),
        (("tune", "x.toml", "--fast"), "No such option: --fast"),
        (("tune", "nowhere.toml"), "nowhere.toml does not exist"),
    ],
)
def test_usage(command: Callable[..., Ended], arguments: tuple[str, ...], words: str) -> None:
    command(*arguments).refused(2, words)


def test_a_second_ctrl_c_is_one_line_too(
    command: Callable[..., Ended], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("veiltune.customer.session.tune", interrupted)
    command("tune", config).refused(130, "stopped; the same command goes on from what is kept")


def test_help_is_no_refusal(command: Callable[..., Ended]) -> None:
    ended = command("tune", "--help")
    assert (ended.code, ended.err) == (0, "") and "--dry-run" in ended.out


def test_the_installed_command_and_the_module_are_the_same(tmp_path: Path) -> None:
    """In a process of its own, since it starts itself again for malloc's sake."""
    for start in (["-m", "veiltune"], [str(Path(sys.executable).parent / "veiltune")]):
        process = subprocess.run([sys.executable, *start, "tune", "nowhere.toml"], capture_output=True, text=True)
        Ended(process.returncode, process.stdout, process.stderr).refused(2, "nowhere.toml does not exist")


def test_audit_and_report_of_a_run(command: Callable[..., Ended], config: Path) -> None:
    folder = config.parent
    run, page = folder / "run", folder / "report.html"
    private, _ = make_texts(64, seed=7)
    public = [text for text in make_texts(500, seed=99)[0] if text not in private]
    (folder / "public.txt").write_text("\n".join(public))
    audit = ("audit", run, "--public", folder / "public.txt", "--preset", "quick")
    command(*audit).refused(2, "is not a run folder")
    command(*audit, "--fail-if", "perplexity > 0", "--device", "cpu").refused(
        2, "--fail-if, --device: only for a language"
    )
    command("audit", run, "--manifest", "m.jsonl", "--person", "who").refused(2, "--person: only for a split run")
    write_tables(folder, train=80, eval=8)
    (folder / "public.txt").write_text("\n".join(set(public) - set(make_texts(88, seed=7)[0])))
    assert command("tune", config, "--no-baseline").code == 0
    assert RunFolder(run).read_json("summary.json")["customer_alone_utility"] is None
    command("report", run, "-o", page).refused(2, "veiltune audit")
    command("audit", run).refused(2, "--public")
    command(*audit[:4], "--preset", "fast").refused(2, "preset must be one of quick, standard, full, got 'fast'")
    command("audit", run, "--public", folder / "train.csv").refused(2, "80 texts that the run released")
    command(*audit, "--attribute", "mood").refused(2, "has no column 'mood'")
    assert not (run / "attacks.json").exists()
    ended = command(*audit)
    assert ended.code == 0 and "strongest" in ended.out and "positive control" in ended.out
    ended = command("report", run, "-o", page, "--without-text")
    assert ended.code == 0 and page.read_text().startswith("<!doctype html>")
    command("report", run, "-o", run / "attacks.json").refused(2, "is not an HTML page")
    (folder / "empty.txt").write_text("\n\n")
    command("audit", run, "--public", folder / "empty.txt").refused(2, "empty.txt has no text")
    command("audit", run, "--public", folder).refused(2, "is a folder")
    command(*audit, "--person", "text").refused(2, "person", "attribute")
    before = page.read_bytes()
    (run / "attacks.json").write_text('{"format": 99}')
    command("report", run, "-o", page).refused(2, "attacks.json")
    assert page.read_bytes() == before


@pytest.mark.parametrize("seed", ["-2", "99999999999999999999"])
def test_a_seed_that_no_generator_takes(command: Callable[..., Ended], tmp_path: Path, seed: str) -> None:
    command("audit", "run", "--public", "public.txt", "--seed", seed).refused(2, "seed must be in [0,", seed)
    command("audit", "model", "--manifest", "m.json", "--seed", seed).refused(2, "seed must be in [0,", seed)
    command("demo", "--folder", tmp_path, "--seed", seed).refused(2, "seed must be in [0,", seed)
    assert not list(tmp_path.iterdir())


def test_a_demo_into_a_file(command: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    command("demo", "--folder", tmp_path / "file").refused(2, "is a file; name a folder")
    command("demo", "--folder", tmp_path / "file" / "below").refused(6, "cannot write")
    assert (tmp_path / "file").read_text() == "content"


def test_the_terminal_shows_the_wider_interval_and_every_attack_on_an_attribute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = audit_record(0.5)
    print_audit(record, Path("run"))
    shown = capsys.readouterr().out
    low, high = record.inversion.recovery.interval()
    assert " to ".join(outwards(low, high)) in shown and low < record.inversion.recovery.low
    (sex, _) = record.attributes
    assert all(f"AUC {estimate_with_interval(attack.auc)}" in shown for attack in sex.attacks if attack.auc)
