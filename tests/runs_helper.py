"""Whole runs for tests: learnable tables, configurations, and either party in a process of its own."""

from __future__ import annotations

import csv
import hashlib
import json
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
        "noise_seed": 12,
        "vendor": {"address": address, "plaintext": True, "timeout_seconds": 20.0},
        "split": {"cut_layer": 1},
        "data": {"train": str(folder / "train.csv"), "eval": str(folder / "eval.csv"), "max_length": 24},
        "privacy": {"mechanism": "none", "labels": "disclosed"},
        "train": {
            "epochs": 3,
            "batch_size": 8,
            "learning_rate": 3e-2,
            "rank": 4,
            "alpha": 8.0,
            "threads": 1,
            "customer_alone": False,
        },
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
    """SHA-256 of every file below a folder, by relative path; SQLite's side files, which come and go, aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm")))
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


class Stage:
    """Processes of both parties over one folder; what still runs at the end of a test is killed."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._processes, port = folder, list[Process](), free_port()
        self.address, self.state = f"127.0.0.1:{port}", folder / "vendor"
        tree = {"model": str(model), "address": self.address, "state": str(self.state), "plaintext": True, "threads": 1}
        (folder / "vendor.toml").write_text(dump_toml(parse_config(VendorConfig, tree)))

    def vendor(self) -> Process:
        """A plaintext vendor on loopback, ready when this returns; a second one takes up the first one's state."""
        ready = self._folder / "ready"
        ready.unlink(missing_ok=True)
        process = self.run("vendor", "serve", str(self._folder / "vendor.toml"), "--ready-file", str(ready))
        wait_until(lambda: ready.exists() or process.popen.poll() is not None, "the vendor to start")
        assert process.popen.poll() is None, process.stderr.read_text()
        return process

    def customer(self, config: TuneConfig) -> Process:
        """`veiltune tune` over a configuration."""
        path = self._folder / f"{Path(config.run).name}.toml"
        path.write_text(dump_toml(config))
        return self.run("tune", str(path))

    def run(self, *arguments: str) -> Process:
        """Starts the command."""
        stdout, stderr = (self._folder / f"process-{len(self._processes)}.{name}" for name in ("out", "err"))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "veiltune", *arguments]
        with stdout.open("wb") as out, stderr.open("wb") as err:
            process = Process(subprocess.Popen(command, stdout=out, stderr=err, env=environment), stdout, stderr)
        self._processes.append(process)
        return process

    def clear(self) -> None:
        """Kills what still runs."""
        for process in self._processes:
            if process.popen.poll() is None:
                process.kill()


def steps_logged(config: TuneConfig) -> int:
    """Lines of metrics.jsonl so far."""
    return len(RunFolder(config.run).metrics())


def adapter_of(config: TuneConfig, state: Path) -> dict[str, str]:
    """Digests of the tensor files that a vendor exported for a run."""
    job = json.loads((Path(config.run) / "private" / "job.json").read_text())["job"]
    found = digests(state / "blobs" / "jobs" / job / "adapter")
    return {name: digest for name, digest in found.items() if name.endswith(".safetensors")}
