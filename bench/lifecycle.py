"""The life cycle, stage by stage: what each preset of defences costs, and what it leaves to find.

    python bench/lifecycle.py --quick                   # one seed, preset ci, minutes
    python bench/lifecycle.py --seeds 0 1 2             # 400 persons a side, hours
    python bench/lifecycle.py --model smollm2 --device cuda --workers 1     # with a public model; days without a GPU

A tokenizer and a base model are trained on the population (nobody of it is on either side of the audit), or a public
model is the base. `none` is full
fine-tuning by the plain loop of `audit_ci.py`; `light`, `standard` and `dp` are LoRA by `veiltune train` with that
preset, the first two with as many visits of each person as `none` makes of each document. `standard` and `dp` are
audited through the guard, whose list has the values of all persons, in the training text or not. Each run is kept under
--work and the same command goes on. Runs have a process and a thread each, two at a time on two cores.

Ratios of time and memory are of one step on GPT-2's shape against plain HF + PEFT (`dp_step.py`), since the runs here
differ in how many rows they keep; the overhead of an answer is `guard.py`'s. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import audit_ci
import dp_step
import guard as guard_bench
import tomli_w
import torch

from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm.gates import figures
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.session import audit_model
from veiltune.config import TrainConfig, parse_config
from veiltune.data.synth import PRESETS, synthesise
from veiltune.dp.session import train
from veiltune.models.loading import load_base

CORPUS = replace(PRESETS["ci"], persons=400, population=250, exposure_canaries=2, carrier_share=0.5)
STAGES = ("none", "light", "standard", "dp")
#: By how long a run and its audit take: workers that begin with the longest end together.
LONGEST_FIRST = ("dp", "light", "none", "standard")
RATES = {"none": (audit_ci.RATE, 3e-4), "light": (5e-3, 1e-3), "standard": (5e-3, 1e-3), "dp": (3e-3, 1e-3)}
GUARDED: dict[str, dict[str, Any]] = {"standard": {"top_k": 50, "decimals": 3}, "dp": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 100 persons a side, fewer visits")
    parser.add_argument("--work", type=Path, default=Path("runs/lifecycle"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--epochs", type=float, default=16.0)
    parser.add_argument("--model", default="", help="public model to begin with, such as smollm2")
    parser.add_argument("--device", default="cpu", help="of training and audit")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.seeds, chosen.epochs = [0], min(chosen.epochs, 10.0)
    started = time.monotonic()
    one_thread()
    costs = step_costs(rounds=2 if chosen.quick else 5)
    costs["inference"] = guard_bench.overhead()
    with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        list(pool.map(partial(prepared, chosen), chosen.seeds))
        cells = list(itertools.product(chosen.stages, chosen.seeds))
        cells.sort(key=lambda cell: LONGEST_FIRST.index(cell[0]))
        done = dict(zip(cells, pool.map(partial(one_run, chosen), cells), strict=True))
    rows = {stage: [done[stage, seed] for seed in chosen.seeds] for stage in chosen.stages}
    found = {stage: summarised(stage, rows[stage], rows.get("none", []), costs) for stage in chosen.stages}
    for stage, row in found.items():
        print(stage, json.dumps(row), flush=True)
    print(json.dumps(found | {"seeds": chosen.seeds, "seconds": round(time.monotonic() - started, 1)}))


def one_thread() -> None:
    torch.set_num_threads(1)


def prepared(chosen: argparse.Namespace, seed: int) -> tuple[Path, Path]:
    """Folders of the seed's corpus and base model."""
    folder = folder_of(chosen, seed)
    corpus = folder / "corpus"
    if not (corpus / "manifest.jsonl").exists():
        shutil.rmtree(corpus, ignore_errors=True)
        synthesise(corpus, replace(PRESETS["ci"] if chosen.quick else CORPUS, seed=seed))
    if not chosen.model:
        return corpus, audit_ci.base_model(folder, corpus, argparse.Namespace(seed=seed, base_epochs=6.0))
    base = folder / "base"
    if not (base / "model.safetensors").exists():
        public = load_base(chosen.model)
        public.tokenizer.save_pretrained(base)
        public.model.save_pretrained(base)
    return corpus, base


def folder_of(chosen: argparse.Namespace, seed: int) -> Path:
    size = "quick" if chosen.quick else "full"
    return Path(chosen.work) / "-".join([size, *([Path(chosen.model).name] if chosen.model else []), str(seed)])


def one_run(chosen: argparse.Namespace, cell: tuple[str, int]) -> dict[str, Any]:
    """Trains and audits a stage with a seed."""
    stage, seed = cell
    corpus, base = prepared(chosen, seed)
    run = folder_of(chosen, seed) / stage
    began = time.monotonic()
    if stage == "none":
        audit_ci.undefended_model(
            run, base, corpus, seed=seed, epochs=chosen.epochs, rate=rate_of(chosen, stage), device=chosen.device
        )
        run = run / "undefended"
    else:
        train(settings(stage, run, base, corpus, seed, chosen))
    trained = time.monotonic() - began
    record = audit_model(
        LeakageOptions(
            model=str(run),
            base=str(base),
            manifest=corpus / "manifest.jsonl",
            output=run,
            preset="ci",
            seed=seed,
            guard=guard_file(stage, run, corpus),
            device=chosen.device,
        )
    )
    row = shown(record) | {"training_seconds": round(trained, 1), "audit_seconds": record.seconds}
    print(stage, "seed", seed, json.dumps(row), flush=True)
    return row


def rate_of(chosen: argparse.Namespace, stage: str) -> float:
    """A public model has learnt already and wants smaller steps."""
    of_small, of_public = RATES[stage]
    return of_public if chosen.model else of_small


def settings(stage: str, run: Path, base: Path, corpus: Path, seed: int, chosen: argparse.Namespace) -> TrainConfig:
    with (corpus / "train.jsonl").open(encoding="utf-8") as lines:
        persons = len({json.loads(line)["person"] for line in lines})
    private = stage == "dp"
    tree: dict[str, Any] = {
        "run": str(run),
        "model": {"name": str(base), "task": "generation"},
        "data": {
            "train": str(corpus / "train.jsonl"),
            "eval": str(corpus / "validation.jsonl"),
            "prompt_column": "",
            "target_column": "text",
            "person_column": "person",
            "max_length": audit_ci.CONTEXT,
        },
        "privacy": {"epsilon": 8.0} if private else {"disabled": True},
        "defences": {"preset": stage},
        "train": {
            "method": "lora",
            "rank": 16,
            **({} if chosen.model else {"targets": ["c_attn", "c_proj", "c_fc"]}),
            "batch_size": 512 if private else 16,
            "steps": 40 if private else math.ceil(chosen.epochs * persons / 16),
            "learning_rate": rate_of(chosen, stage),
            "warmup_fraction": 0.05,
            "checkpoint_every": 20 if private else 100,
            "seed": seed,
            "precision": "bf16" if chosen.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32",
            "threads": 1,
            "device": chosen.device,
        },
    }
    return parse_config(TrainConfig, tree)


def guard_file(stage: str, run: Path, corpus: Path) -> Path | None:
    """The stage's guard.toml, beside its run; None where there is no guard."""
    if stage not in GUARDED:
        return None
    files = {"protect": {"files": [str(corpus / "manifest.jsonl")]}}
    path = run.parent / f"{stage}-guard.toml"
    path.write_text(
        tomli_w.dumps(files | {"vector": {"reference": str(corpus / "population.jsonl"), **GUARDED[stage]}})
    )
    return path


def shown(record: LeakageRecord) -> dict[str, Any]:
    values = figures(record)
    names = ("auc", "auc_lower", "auc_upper", "tpr_at_1_percent", "recall", "excess_recall")
    names += ("excess_recall_lower", "excess_recall_upper", "audited_epsilon", "claimed_epsilon", "perplexity")
    precision = record.extraction.overall_precision
    return {name: values[name] for name in names} | {
        "precision": precision.value if precision else None,
        "base_perplexity": record.perplexity.base_carrier if record.perplexity else None,
        "attack": record.membership.strongest if record.membership else None,
        "extraction": record.extraction.strongest,
    }


def summarised(
    stage: str, rows: list[dict[str, Any]], none: list[dict[str, Any]], costs: dict[str, Any]
) -> dict[str, Any]:
    """Means over seeds, limits of the means, and every seed."""
    found: dict[str, Any] = {}
    for name, value in rows[0].items():
        values = [row[name] for row in rows if isinstance(row[name], int | float)]
        found[name] = sum(values) / len(values) if len(values) == len(rows) else value
    for name in ("auc", "excess_recall"):
        found[f"{name}_lower"], found[f"{name}_upper"] = limits_of_mean(rows, name)
    ratios = [row["perplexity"] / other["perplexity"] for row, other in zip(rows, none, strict=False)] or [math.nan]
    kind = "dp" if stage == "dp" else "free"
    return found | {
        "perplexity_ratio": sum(ratios) / len(ratios),
        "memory_ratio": 1.0 if stage == "none" else costs[kind]["memory"],
        "time_ratio": 1.0 if stage == "none" else costs[kind]["time"],
        "inference_overhead_upper": costs["inference"]["overhead_upper"] if stage in GUARDED else 0.0,
        "by_seed": rows,
    }


def limits_of_mean(rows: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """95 % limits of the mean over seeds, each of which has limits of its own and persons of its own.

    Source: MOVER, Zou and Donner 2008, "Construction of confidence limits about effect measures".
    """
    mean = sum(row[name] for row in rows) / len(rows)
    below = math.hypot(*(row[name] - row[f"{name}_lower"] for row in rows)) / len(rows)
    above = math.hypot(*(row[f"{name}_upper"] - row[name] for row in rows)) / len(rows)
    return mean - below, mean + above


def step_costs(*, rounds: int) -> dict[str, Any]:
    """Time and memory of a step as ratios to plain HF + PEFT, interleaved; see `dp_step.py`."""
    names = ["plain", "ours_non_private", "ours"]
    arguments = argparse.Namespace(device="cpu", quick=False, rounds=rounds, threads=1)
    rows = dp_step.run_suite("lora", names, arguments)
    return {
        kind: {
            "time": dp_step.middle(dp_step.time_ratios(rows, name, "plain")),
            "memory": dp_step.memory_ratio(rows, name),
        }
        for kind, name in (("free", "ours_non_private"), ("dp", "ours"))
    }


if __name__ == "__main__":
    main()
