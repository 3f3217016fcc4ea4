"""`veiltune demo`: vendor and customer as two processes on this machine, end to end, in minutes.

Synthetic support tickets (topic = label; names, e-mails and order numbers in the text) are classified by MiniLM, which
the vendor fine-tunes through mTLS without seeing them: once without noise, then with d_chi of two strengths at
two blocks. Then every run is audited: each attack of the suite on what crossed the wire, and one report of them all.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from veiltune._validate import in_range
from veiltune.audit.options import LARGEST_SEED, AuditOptions
from veiltune.audit.record import AttackRecord
from veiltune.audit.split import audit_run
from veiltune.config import TuneConfig, parse_config
from veiltune.customer.prediction import predict
from veiltune.customer.session import tune
from veiltune.data.tickets import make_tickets, write_tickets
from veiltune.errors import InputError, VendorUnreachableError
from veiltune.report.page import write_report
from veiltune.runs import RunFolder, atomic_write_bytes, storage_errors

NUM_TRAIN, NUM_EVAL = 1000, 400
CUT_LAYER = 2
NUM_PUBLIC = 2000
START_TIMEOUT_SECONDS = 120.0


def run_demo(folder: Path, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the demo below `folder`; returns the table that the command prints."""
    in_range(0, LARGEST_SEED, seed=seed)
    root = _fresh_folder(folder)
    say(f"writing {NUM_TRAIN} training and {NUM_EVAL} evaluation tickets (synthetic) to {root / 'data'}")
    write_tickets(root / "data", num_train=NUM_TRAIN, num_eval=NUM_EVAL, seed=seed)
    options = _attackers_means(root, seed)
    configs: dict[str, TuneConfig] = {}
    with vendor_process(root / "vendor", log=root / "vendor.log", say=say) as address:
        for name, privacy in _PRIVACY.items():
            say(f"tuning MiniLM through the wire: {name}")
            configs[name] = _config(root, name, address, seed, privacy)
            tune(configs[name])
        say("predicting the evaluation tickets again: known texts go out as the same bytes, no new release")
        predict(Path(configs[name].run), str(root / "data" / "eval.csv"), root / "predictions.csv")
    records = {}
    for name, config in configs.items():
        say(f"attacking what was sent: {name}")
        records[name] = audit_run(Path(config.run), options)
    page = root / "report.html"
    write_report([Path(config.run) for config in configs.values()], page)
    columns = [_column(config, records[name]) for name, config in configs.items()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return {"columns": list(configs), "rows": rows, "notes": _notes(root, page)}


_PRIVACY: dict[str, dict[str, object]] = {
    "no noise": {"mechanism": "none", "labels": "disclosed"},
    "d_chi 0.7": {"mechanism": "d_chi", "noise_to_norm": 0.7},
    "d_chi 2.5": {"mechanism": "d_chi", "noise_to_norm": 2.5},
}


@contextlib.contextmanager
def vendor_process(state: Path, *, log: Path, say: Callable[[str], None]) -> Iterator[str]:
    """A vendor in its own process, with an authority of its own and one tenant, `demo`; yields its address."""
    ready = state / "port"
    _veiltune("vendor", "init", "--state", str(state), "--address", "127.0.0.1:0")
    _veiltune("vendor", "tenant", "add", "demo", "--state", str(state))
    say(f"starting a vendor (MiniLM, mTLS) in its own process; its log is {log}")
    with log.open("wb") as output:
        command = [sys.executable, "-m", "veiltune", "vendor", "serve", str(state / "vendor.toml")]
        process = subprocess.Popen([*command, "--ready-file", str(ready)], stdout=output, stderr=output)
    try:
        yield f"127.0.0.1:{_wait_for_port(ready, process)}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _config(root: Path, name: str, address: str, seed: int, privacy: dict[str, object]) -> TuneConfig:
    tree = {
        "run": str(root / name.replace(" ", "-")),
        "vendor": {"address": address, "credentials": str(root / "vendor" / "tenants" / "demo")},
        "split": {"cut_layer": CUT_LAYER},
        "data": {
            "train": str(root / "data" / "train.csv"),
            "eval": str(root / "data" / "eval.csv"),
            "label_column": "topic",
        },
        "privacy": privacy,
        "train": {
            "epochs": 4,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "seed": seed,
            "precision": "bf16",
        },
    }
    return parse_config(TuneConfig, tree)


def _attackers_means(root: Path, seed: int) -> AuditOptions:
    """Public text for the attackers: tickets of other persons from the same templates, so a strong attacker's."""
    private = {ticket.text for ticket in make_tickets(NUM_TRAIN + NUM_EVAL, seed=seed)}
    public = [ticket.text for ticket in make_tickets(NUM_PUBLIC, seed=seed + 1_000_003)]
    lines = [text for text in public if text not in private]
    persons = {ticket.person for ticket in make_tickets(NUM_TRAIN, seed=seed)}
    atomic_write_bytes(root / "public.txt", "\n".join(lines).encode())
    atomic_write_bytes(root / "names.txt", "\n".join(sorted(persons)).encode())
    return AuditOptions(
        public=str(root / "public.txt"),
        preset="quick",
        attribute="condition",
        personal_terms=str(root / "names.txt"),
        seed=seed,
    )


def _column(config: TuneConfig, record: AttackRecord) -> dict[str, str]:
    summary = RunFolder(config.run).read_json("summary.json")
    strength, found = summary["strength"], record.inversion
    personal = next(group for group in found.groups if group.name == "personal")
    return {
        "utility (accuracy)": f"{summary['utility']:.3f}",
        "customer alone": f"{summary['customer_alone_utility']:.3f}",
        "empirical privacy": f"{found.empirical_privacy.value:.3f}",
        "... personal data": "-" if personal.rate is None else f"{1 - personal.rate.value:.3f}",
        "strongest attack": found.strongest,
        "noise / norm": "0" if strength is None else f"{strength['noise_to_norm']:.2f}",
        "eta": "-" if strength is None else f"{strength['eta']:.1f}",
        "labels": "disclosed" if config.privacy.labels == "disclosed" else f"epsilon {config.privacy.label_epsilon:g}",
        "seconds": f"{summary['seconds']:.0f}",
        "bytes up": f"{summary['bytes_up']:,}",
        "bytes down": f"{summary['bytes_down']:,}",
        "releases": f"{summary['releases']:,}",
    }


def _notes(root: Path, page: Path) -> list[str]:
    return [
        f"run folders and predictions.csv: {root}",
        "the customer alone: a small head on its two blocks, nothing sent; a run must beat that",
        "empirical privacy: the share of tokens that the strongest attack of the quick suite got wrong; an upper limit",
        f"the report: {page}",
    ]


def _fresh_folder(folder: Path) -> Path:
    root = folder / time.strftime("demo-%Y%m%d-%H%M%S")
    with storage_errors(root):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--folder {folder} is a file; name a folder")
        root.mkdir(parents=True)
    return root


def _veiltune(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "veiltune", *arguments], check=True, stdout=subprocess.DEVNULL)


def _wait_for_port(ready: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if ready.exists() and (text := ready.read_text()):
            return int(text)
        if process.poll() is not None:
            raise VendorUnreachableError(f"the vendor process ended with exit code {process.returncode}; see its log")
        time.sleep(0.1)
    raise VendorUnreachableError(f"the vendor was not ready after {START_TIMEOUT_SECONDS:.0f} seconds; see its log")
