"""`veiltune demo`: vendor and customer as two processes on this machine, end to end, in minutes.

Synthetic support tickets (topic = label; names, e-mails and order numbers in the text) are classified by MiniLM, which
the vendor fine-tunes through mTLS without seeing them: once without noise, then with d_chi of two strengths at
two blocks. Each time an attacker inverts what crossed the wire.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.attacks.inversion import invert_by_nearest_embedding, score_token_recovery
from veiltune.attacks.result import AttackResult
from veiltune.config import TuneConfig, parse_config
from veiltune.customer.batching import encode_texts
from veiltune.customer.opening import make_releaser
from veiltune.customer.prediction import predict
from veiltune.customer.protection import run_secret
from veiltune.customer.session import tune
from veiltune.data.tables import read_table
from veiltune.data.tickets import write_tickets
from veiltune.errors import VendorUnreachableError
from veiltune.models.bundle import Bundle, read_bundle
from veiltune.runs import RunFolder

NUM_TRAIN, NUM_EVAL = 1000, 400
CUT_LAYER = 2
ATTACKED_TEXTS = 100
START_TIMEOUT_SECONDS = 120.0


def run_demo(folder: Path, *, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the demo below `folder`; returns the table that the command prints."""
    root = _fresh_folder(folder)
    say(f"writing {NUM_TRAIN} training and {NUM_EVAL} evaluation tickets (synthetic) to {root / 'data'}")
    write_tickets(root / "data", num_train=NUM_TRAIN, num_eval=NUM_EVAL, seed=seed)
    with vendor_process(root / "vendor", log=root / "vendor.log", say=say) as address:
        columns: dict[str, dict[str, str]] = {}
        alone: float | None = None
        for name, privacy in _PRIVACY.items():
            say(f"tuning MiniLM through the wire: {name}")
            config = _config(root, name, address, seed, privacy, customer_alone=alone is None)
            summary = tune(config)
            columns[name] = _column(config, summary)
            alone = alone if alone is not None else summary["customer_alone_utility"]  # the same for every strength
        say("predicting the evaluation tickets again: known texts go out as the same bytes, no new release")
        predict(Path(config.run), str(root / "data" / "eval.csv"), root / "predictions.csv")
    return {"columns": list(columns), "rows": _rows(list(columns.values())), "notes": _notes(root, alone)}


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


def attack_run(config: TuneConfig) -> AttackResult:
    """Nearest-neighbour inversion of the first releases in a run's outbox.

    The attacker knows the bottom model: it runs every token of the vocabulary alone through it and guesses, for each
    vector that crossed the wire, the token whose vector is nearest. A weak attack at deeper cuts: a floor of what
    leaks, not a bound (stronger attackers: `veiltune audit`).
    """
    run = RunFolder(config.run)
    bundle = read_bundle(run.path / "bottom")
    releaser = make_releaser(config, bundle, run, run_secret(run.private, config.noise_seed))
    texts = read_table(config.data.train, text_column=config.data.text_column).texts[:ATTACKED_TEXTS]
    token_ids = encode_texts(bundle.tokenizer, texts, max_length=config.data.max_length)
    released = releaser.outbox.get([releaser.key(ids) for ids in token_ids])
    secret = torch.tensor([token for ids in token_ids for token in ids])
    real = ~torch.isin(secret, torch.tensor(bundle.tokenizer.all_special_ids))
    guesses = invert_by_nearest_embedding(released.values.float()[real], token_codebook(bundle))
    return score_token_recovery(guesses, secret[real])


@torch.no_grad()
def token_codebook(bundle: Bundle) -> Tensor:
    """(V, H): what each token of the vocabulary looks like at the cut, on its own between the special tokens."""
    vocabulary = torch.arange(len(bundle.bottom.word_embeddings))
    template = list(bundle.tokenizer("a")["input_ids"])
    position = next(i for i, token in enumerate(template) if token not in bundle.tokenizer.all_special_ids)
    rows = []
    for chunk in vocabulary.split(2048):
        ids = torch.tensor(template).repeat(len(chunk), 1)
        ids[:, position] = chunk
        rows.append(bundle.bottom.eval()(ids, torch.ones_like(ids))[:, position].float())
    return torch.cat(rows)


def _config(
    root: Path, name: str, address: str, seed: int, privacy: dict[str, object], *, customer_alone: bool
) -> TuneConfig:
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
            "customer_alone": customer_alone,
        },
    }
    return parse_config(TuneConfig, tree)


def _column(config: TuneConfig, summary: dict[str, Any]) -> dict[str, str]:
    attack = attack_run(config)
    strength = summary["strength"]
    return {
        "utility (accuracy)": f"{summary['utility']:.3f}",
        "empirical privacy": f"{attack.empirical_privacy:.3f}",
        "noise / norm": "0" if strength is None else f"{strength['noise_to_norm']:.2f}",
        "eta": "-" if strength is None else f"{strength['eta']:.1f}",
        "labels": "disclosed" if config.privacy.labels == "disclosed" else f"epsilon {config.privacy.label_epsilon:g}",
        "seconds": f"{summary['seconds']:.0f}",
        "bytes up": f"{summary['bytes_up']:,}",
        "bytes down": f"{summary['bytes_down']:,}",
        "releases": f"{summary['releases']:,}",
    }


def _rows(columns: list[dict[str, str]]) -> list[list[str]]:
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _notes(root: Path, alone: float | None) -> list[str]:
    return [
        f"run folders and predictions.csv: {root}",
        f"the customer alone (a small head on its two blocks, nothing sent) reaches {alone:.3f}: a run must beat that",
        f"empirical privacy: the share of tokens that ONE weak attacker (nearest neighbour, {ATTACKED_TEXTS} texts) got"
        " wrong; a learned inverter gets more of them right",
    ]


def _fresh_folder(folder: Path) -> Path:
    root = folder / time.strftime("demo-%Y%m%d-%H%M%S")
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
