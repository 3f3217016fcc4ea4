"""Utility of private fine-tuning: MiniLM on the phrases of SST-2, every method, epsilon 1, 3, 8 and infinity, 3 seeds.

Each cell is a run of `veiltune train` in a folder of its own under --work; the same command goes on where it stopped
(hours on two cores). Trained on GLUE's 67,349 phrases, scored on the 872 sentences of its development set. BERT's
pretrained pooler trains with the method full only. LoRA's steps, learning rate, schedule and clip norm were chosen at
epsilon 8 by 3,000 held-out training phrases, its rate without privacy likewise (docs/log.md has what was tried); the
other methods' rates follow from shorter looks of that kind. Exact gradients want smaller steps than noisy ones.
At --batch 4096, four times as many phrases in as many steps, LoRA loses little to epsilon 8 (docs/log.md).
Time and memory of a step are in `bench/dp_methods.py`: the seconds here are of a machine that does other things too.
Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

from veiltune.config import TrainConfig, parse_config
from veiltune.dp.session import train

LEARNING_RATES = {"lora": 1e-2, "adapter": 1e-2, "compacter": 2e-2, "bitfit": 2e-2, "rgp": 5e-3, "full": 2e-3}
WITHOUT_PRIVACY = {"lora": 5e-3, "adapter": 5e-3, "compacter": 1e-2, "bitfit": 1e-2, "rgp": 5e-4, "full": 3e-4}
EPSILONS = (8.0, math.inf, 3.0, 1.0)
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "sst2")
    parser.add_argument("--work", type=Path, default=Path("runs/sst2_dp"))
    parser.add_argument("--methods", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=list(EPSILONS))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=float, default=1024)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    chosen = parser.parse_args()
    if not chosen.data.is_dir():
        raise SystemExit(f"{chosen.data} is missing; name the folder of SST-2 with --data")
    table = training_table(chosen.data, chosen.work)
    rows = []
    for seed, method, epsilon in sorted(
        itertools.product(chosen.seeds, chosen.methods, chosen.epsilons), key=lambda cell: (cell[0], cell[1] != "lora")
    ):
        summary = train(settings(chosen, table, method, epsilon, seed))
        score = summary["scores"]["accuracy"]
        rows.append({"method": method, "epsilon": epsilon, "seed": seed, "accuracy": score["value"]} | cost(summary))
        print(f"{method:<10} epsilon {epsilon:<4g} seed {seed}: {score['value']:.2f}", flush=True)
    print(json.dumps(summarised(rows)))


def training_table(data: Path, work: Path) -> Path:
    """GLUE's training phrases, which the source keeps in two files, in one."""
    work.mkdir(parents=True, exist_ok=True)
    head, *lines = (data / "glue_train.tsv").read_text().splitlines()
    lines += (data / "glue_dev.tsv").read_text().splitlines()[1:]
    path = work / "train.tsv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def settings(chosen: argparse.Namespace, table: Path, method: str, epsilon: float, seed: int) -> TrainConfig:
    tree: dict[str, Any] = {
        "run": str(chosen.work / f"{method}-{epsilon:g}-{seed}"),
        "model": {"name": "minilm", "task": "classification"},
        "data": {
            "train": str(table),
            "eval": str(chosen.data / "glue_test.tsv"),
            "text_column": "sentence",
            "label_column": "label",
            "max_length": 64,
        },
        "privacy": {"disabled": True} if math.isinf(epsilon) else {"epsilon": epsilon, "delta": 1e-6, "clip_norm": 1.0},
        "train": {
            "method": method,
            "pooler": method == "full",
            "steps": chosen.steps,
            "batch_size": chosen.batch,
            "learning_rate": (WITHOUT_PRIVACY if math.isinf(epsilon) else LEARNING_RATES)[method],
            "schedule": "linear",
            "warmup_fraction": 0.1,
            "micro_batch": 48,
            "seed": seed,
            "precision": chosen.precision,
            "threads": chosen.threads,
            "checkpoint_every": 20,
        },
    }
    return parse_config(TrainConfig, tree)


def cost(summary: dict[str, Any]) -> dict[str, float]:
    return {
        "trainable_share": summary["trainable_parameters"] / summary["total_parameters"],
        "examples_per_second": summary["examples_per_second"],
        "noise_multiplier": summary["noise_multiplier"],
    }


def summarised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By method and epsilon: mean and all seeds; then the distance of LoRA at epsilon 8 from LoRA without privacy."""
    cells: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells[method] = {"trainable_share": mine[0]["trainable_share"]}
        for epsilon in dict.fromkeys(row["epsilon"] for row in mine):
            values = [row["accuracy"] for row in mine if row["epsilon"] == epsilon]
            cells[method][f"{epsilon:g}"] = {"mean": statistics.fmean(values), "seeds": values}
    lora = cells.get("lora", {})
    if "8" in lora and "inf" in lora:
        cells["lora_gap_at_8"] = lora["inf"]["mean"] - lora["8"]["mean"]
    return cells


if __name__ == "__main__":
    main()
