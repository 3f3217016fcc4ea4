"""Whole runs for tests: learnable tables, configurations, and either party in a process of its own."""

from __future__ import annotations

import csv
import hashlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veiltune.config import TuneConfig, VendorConfig, dump_toml, parse_config
from veiltune.privatize.release import LedgerTotals, ReleaseLedger
from veiltune.runs import RunFolder

CLASSES = {"calm": "abcd", "loud": "wxyz"}  # each class writes with letters of its own: easy to learn
START_SECONDS = 90.0


def make_texts(count: int, *, seed: int, longest: int = 16) -> tuple[list[str], list[str]]:
    """Different texts of 4 to `longest` letters and their labels, the classes in turn."""
    rng, texts, labels = random.Random(seed), [], []
    while len(texts) < count:
        label = list(CLASSES)[len(texts) % len(CLASSES)]
        text = "".join(rng.choices(CLASSES[label], k=rng.randint(4, longest)))
        if text not in texts:
            texts.append(text)
            labels.append(label)
    return texts, labels


def write_csv(path: Path, texts: Sequence[str], labels: Sequence[str]) -> Path:
    """A table with the columns text and label."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return path


def write_tables(folder: Path, *, train: int = 48, eval: int = 16) -> None:
    """`train.csv` and `eval.csv`; no text is in both."""
    texts, labels = make_texts(train + eval, seed=7)
    write_csv(folder / "train.csv", texts[:train], labels[:train])
    write_csv(folder / "eval.csv", texts[train:], labels[train:])


def tune_config(folder: Path, address: str, **sections: Any) -> TuneConfig:
    """A short run over the tables of a folder, without noise unless `sections` say otherwise."""
    tree: dict[str, Any] = {
        "run": str(folder / "run"),
        "noise_seed": 11,
        "vendor": {"address": address, "plaintext": True, "timeout_seconds": 20.0},
        "split": {"cut_layer": 1},
        "data": {"train": str(folder / "train.csv"), "eval": str(folder / "eval.csv"), "max_length": 24},
        "privacy": {"mechanism": "none", "labels": "disclosed"},
        "train": {"epochs": 3, "batch_size": 8, "learning_rate": 3e-2, "rank": 4, "alpha": 8.0, "threads": 1},
        "wire": {"dtype": "fp32"},
    }
    for name, changes in sections.items():
        tree[name] = tree[name] | changes if isinstance(changes, dict) else changes
    return parse_config(TuneConfig, tree)


def ledger_totals(run: Path) -> LedgerTotals:
    """What the ledger of a run adds up to."""
    with closing(sqlite3.connect(run / "private" / "ledger.sqlite")) as connection:
        return ReleaseLedger(connection).totals()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def free_port() -> int:
    """A port that was free a moment ago, for a server that must come back at the same address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = START_SECONDS) -> None:
    """Polls quickly; fails with words."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.005)


@dataclass
class Process:
    """`python -m veiltune ...`, its output in files."""

    popen: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nothing is said."""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(30)

    def ended(self, *, seconds: float = START_SECONDS) -> int:
        """Waits for the end; returns the exit code."""
        return self.popen.wait(seconds)


def veiltune(*arguments: str, output: Path) -> Process:
    """Starts the command."""
    stdout, stderr = output.with_suffix(".out"), output.with_suffix(".err")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with stdout.open("ab") as out, stderr.open("ab") as err:
        popen = subprocess.Popen(
            [sys.executable, "-m", "veiltune", *arguments], stdout=out, stderr=err, env=environment
        )
    return Process(popen, stdout, stderr)


def start_vendor(folder: Path, model: Path, port: int) -> Process:
    """A plaintext vendor on loopback with its state in `folder`/vendor; ready when this returns."""
    state, ready = folder / "vendor", folder / "ready"
    tree = {"model": str(model), "address": f"127.0.0.1:{port}", "state": str(state), "plaintext": True, "threads": 1}
    (folder / "vendor.toml").write_text(dump_toml(parse_config(VendorConfig, tree)))
    ready.unlink(missing_ok=True)
    serve = ("vendor", "serve", str(folder / "vendor.toml"), "--ready-file", str(ready))
    process = veiltune(*serve, output=folder / "vendor-log")
    wait_until(lambda: ready.exists() or process.popen.poll() is not None, "the vendor to start")
    assert process.popen.poll() is None, process.stderr.read_text()
    return process


def start_customer(config: TuneConfig, folder: Path) -> Process:
    """`veiltune tune` over a configuration."""
    path = folder / "tune.toml"
    path.write_text(dump_toml(config))
    return veiltune("tune", str(path), output=folder / "customer-log")


def steps_logged(config: TuneConfig) -> int:
    """Lines of metrics.jsonl so far."""
    return len(RunFolder(config.run).metrics())


def adapters(state: Path) -> dict[str, str]:
    """Digest of every adapter tensor file below a vendor's state, without the job's random name."""
    found = sorted((state / "blobs" / "jobs").glob("*/adapter/*.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
