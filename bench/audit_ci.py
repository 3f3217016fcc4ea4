"""The leakage audit from nothing in minutes: a corpus, a small GPT-2 trained on it here, and what it gives away.

    python bench/audit_ci.py                                # undefended, preset ci
    python bench/audit_ci.py --runs undefended base         # and the base model before fine-tuning
    python bench/audit_ci.py --preset std --runs undefended base dp     # and epsilon 8 per person; an hour

A tokenizer and a base model are trained on the population (nobody of it is on either side of the audit), the base is
fine-tuned on the training text by `veiltune train`, and `veiltune audit` asks both. Each step is kept under --work and
the same command goes on. The last line is one JSON object: the figures of the first run, all runs under "runs".
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_model import fit, new_model, new_tokenizer, texts_of

from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm.gates import figures
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.session import audit_model
from veiltune.config import TrainConfig, parse_config
from veiltune.data.synth import PRESETS, synthesise
from veiltune.dp.session import train
from veiltune.models.loading import load_base

RUNS = ("undefended", "base", "dp")
VOCABULARY, WIDTH, BLOCKS, CONTEXT, RATE = 2048, 192, 3, 192, 3e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ci", choices=list(PRESETS))
    parser.add_argument("--work", type=Path, default=Path("runs/audit_ci"))
    parser.add_argument("--runs", nargs="+", default=["undefended"], choices=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-epochs", type=float, default=2.0)
    parser.add_argument("--epochs", type=float, default=16.0)
    parser.add_argument("--dp-steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    started = time.monotonic()
    folder = chosen.work / f"{chosen.preset}-{chosen.seed}"
    corpus = folder / "corpus"
    if not (corpus / "manifest.jsonl").exists():
        shutil.rmtree(corpus, ignore_errors=True)
        synthesise(corpus, replace(PRESETS[chosen.preset], seed=chosen.seed))
    base = base_model(folder, corpus, chosen)
    found = {}
    for name in chosen.runs:
        began = time.monotonic()
        found[name] = shown(audited(name, folder, corpus, base, chosen)) | {"seconds": time.monotonic() - began}
        print(name, json.dumps(found[name]), flush=True)
    print(json.dumps(found[chosen.runs[0]] | {"seconds": round(time.monotonic() - started, 1), "runs": found}))


def base_model(folder: Path, corpus: Path, chosen: argparse.Namespace) -> Path:
    """Trained on the population's text, from random weights."""
    base = folder / "base"
    if not (base / "model.safetensors").exists():
        texts = texts_of(corpus / "population.jsonl")
        tokenizer = new_tokenizer(texts, vocabulary=VOCABULARY)
        model = new_model(tokenizer, width=WIDTH, blocks=BLOCKS, context=CONTEXT, seed=chosen.seed)
        fit(model, tokenizer, texts, epochs=chosen.base_epochs, learning_rate=RATE, seed=chosen.seed)
        tokenizer.save_pretrained(base)
        model.save_pretrained(base)
    return base


def undefended_model(
    folder: Path, base: Path, corpus: Path, *, seed: int, epochs: float, rate: float = RATE, device: str = "cpu"
) -> Path:
    """Over-trained, each document for itself."""
    fine = folder / "undefended"
    if not (fine / "model.safetensors").exists():
        found = load_base(str(base))
        texts = texts_of(corpus / "train.jsonl")
        model = found.model.float().to(device)
        fit(model, found.tokenizer, texts, epochs=epochs, learning_rate=rate, seed=seed, context=CONTEXT)
        found.tokenizer.save_pretrained(fine)
        model.save_pretrained(fine)
    return fine


def audited(name: str, folder: Path, corpus: Path, base: Path, chosen: argparse.Namespace) -> LeakageRecord:
    """Trains what the name says and audits it."""
    options: dict[str, Any] = {"manifest": corpus / "manifest.jsonl", "preset": chosen.preset, "seed": chosen.seed}
    if name == "base":
        return audit_model(LeakageOptions(model=str(base), output=folder / "base-audit", **options))
    if name == "undefended":
        model = undefended_model(folder, base, corpus, seed=chosen.seed, epochs=chosen.epochs)
        return audit_model(LeakageOptions(model=str(model), base=str(base), output=model, **options))
    train(settings(folder / name, base, corpus, chosen))
    return audit_model(LeakageOptions(model=str(folder / name), **options))


def settings(run: Path, base: Path, corpus: Path, chosen: argparse.Namespace) -> TrainConfig:
    """Epsilon 8 for each person."""
    tree: dict[str, Any] = {
        "run": str(run),
        "model": {"name": str(base), "task": "generation"},
        "data": {
            "train": str(corpus / "train.jsonl"),
            "eval": str(corpus / "validation.jsonl"),
            "prompt_column": "",
            "target_column": "text",
            "person_column": "person",
            "max_length": CONTEXT,
        },
        "privacy": {"epsilon": 8.0, "clip_norm": 1.0},
        "train": {
            "method": "full",
            "batch_size": 1024,
            "steps": chosen.dp_steps,
            "learning_rate": 1e-3,
            "warmup_fraction": 0.05,
            "micro_batch": 32,
            "precision": "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32",
            "checkpoint_every": 5,
            "seed": chosen.seed,
            "threads": chosen.threads,
        },
    }
    return parse_config(TrainConfig, tree)


def shown(record: LeakageRecord) -> dict[str, Any]:
    values = figures(record)
    return {
        "auc": values["auc"],
        "auc_lower": values["auc_lower"],
        "auc_upper": values["auc_upper"],
        "attack": record.membership.strongest if record.membership else None,
        "excess_recall": values["excess_recall"],
        "excess_recall_lower": values["excess_recall_lower"],
        "excess_recall_upper": values["excess_recall_upper"],
        "extraction": record.extraction.strongest,
        "exposure_median_by_repetition": {
            f"{one.family}-{one.repetitions}": round(one.median_bits, 2) for one in record.exposure
        },
        "audited_epsilon": values["audited_epsilon"],
        "claimed_epsilon": values["claimed_epsilon"],
        "perplexity": values["perplexity"],
        "audit_seconds": record.seconds,
    }


if __name__ == "__main__":
    main()
