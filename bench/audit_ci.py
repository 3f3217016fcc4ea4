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
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm.gates import figures
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.session import audit_model
from veiltune.config import TrainConfig, parse_config
from veiltune.data.synth import PRESETS, synthesise
from veiltune.dp.session import train

RUNS = ("undefended", "base", "dp")
VOCABULARY, WIDTH, BLOCKS, CONTEXT = 2048, 128, 4, 192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ci", choices=list(PRESETS))
    parser.add_argument("--work", type=Path, default=Path("runs/audit_ci"))
    parser.add_argument("--runs", nargs="+", default=["undefended"], choices=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-epochs", type=float, default=4.0)
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=0)
    chosen = parser.parse_args()
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
    """Random weights, then the population's text."""
    begin = folder / "random"
    if not (begin / "model.safetensors").exists():
        tokenizer_of(corpus / "population.jsonl").save_pretrained(begin)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chosen.seed)
            config = GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=CONTEXT,
                bos_token_id=0, eos_token_id=1, pad_token_id=2,
            )  # fmt: skip
            GPT2LMHeadModel(config).save_pretrained(begin)
    train(settings(folder / "base", begin, corpus / "population.jsonl", corpus, chosen, epochs=chosen.base_epochs))
    return folder / "base" / "merged"


def tokenizer_of(text: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on text of nobody who is audited."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator((json.loads(line)["text"] for line in text.open()), trainer)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", pair=None, special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def audited(name: str, folder: Path, corpus: Path, base: Path, chosen: argparse.Namespace) -> LeakageRecord:
    """Trains what the name says and audits it."""
    options: dict[str, Any] = {"manifest": corpus / "manifest.jsonl", "preset": chosen.preset, "seed": chosen.seed}
    if name == "base":
        return audit_model(LeakageOptions(model=str(base), output=folder / "base-audit", **options))
    text = corpus / "train.jsonl"
    if name == "undefended":
        config = settings(folder / name, base, text, corpus, chosen, epochs=chosen.epochs)
    else:
        config = settings(folder / name, base, text, corpus, chosen, epsilon=8.0)
    train(config)
    return audit_model(LeakageOptions(model=str(folder / name), **options))


def settings(
    run: Path, model: Path, text: Path, corpus: Path, chosen: argparse.Namespace, *, epochs: float = 0.0,
    epsilon: float = math.inf,
) -> TrainConfig:  # fmt: skip
    private = math.isfinite(epsilon)
    tree: dict[str, Any] = {
        "run": str(run),
        "model": {"name": str(model), "task": "generation"},
        "data": {
            "train": str(text),
            "eval": str(corpus / "validation.jsonl"),
            "prompt_column": "",
            "target_column": "text",
            "person_column": "person",
            "max_length": CONTEXT,
        },
        "privacy": {"epsilon": epsilon, "clip_norm": 1.0} if private else {"disabled": True},
        "train": {
            "method": "full",
            "batch_size": 512 if private else 16,
            "learning_rate": 1e-3,
            "warmup_fraction": 0.05,
            "micro_batch": 32,
            "seed": chosen.seed,
            "precision": chosen.precision,
            "threads": chosen.threads,
            "save_merged": True,
        }
        | ({"steps": 60} if private else {"epochs": epochs}),
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
