"""What a private step costs by method: MiniLM, 256 phrases of 16 tokens, AdamW included.

    python bench/dp_methods.py                      # three rounds on one thread, minutes

Each method has a process of its own in each round, private and not, and never two run at a time; the first step of a
process is dropped. Time is processor seconds; ratios are within a round, to LoRA without privacy, and their median is
shown. Memory is the growth of the peak resident set over the model as built. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

METHODS = ("lora", "adapter", "compacter", "bitfit", "rgp", "full")
ROWS, TOKENS, MICRO = 256, 16, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(measure(*chosen.child.split(","), bf16=chosen.precision == "bf16")))
        return
    cells: dict[str, list[dict[str, Any]]] = {}
    names = [f"{method},{privacy}" for method in METHODS for privacy in ("private", "plain")]
    for _ in range(chosen.rounds):
        for name in names:
            cells.setdefault(name, []).append(run_child(name, chosen))
    table = {name: summarised(rows, cells["lora,plain"]) for name, rows in cells.items()}
    print(f"{'method':20} {'trains':>8} {'s/step':>8} {'x LoRA plain':>13} {'MB':>7}")
    for name, row in table.items():
        print(f"{name:20} {row['share']:8.3%} {row['seconds']:8.2f} {row['ratio']:13.2f} {row['megabytes']:7.0f}")
    print(json.dumps({"bench": "dp_methods", "rounds": chosen.rounds, "precision": chosen.precision, "cells": table}))


def run_child(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, "--precision", chosen.precision]
    environment = os.environ | {"OMP_NUM_THREADS": str(chosen.threads), "TRANSFORMERS_VERBOSITY": "error"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return dict(json.loads(output.stdout.splitlines()[-1]))


def summarised(rows: list[dict[str, Any]], yardstick: list[dict[str, Any]]) -> dict[str, float]:
    ratios = [row["seconds"] / other["seconds"] for row, other in zip(rows, yardstick, strict=True)]
    return {
        "share": rows[0]["share"],
        "seconds": statistics.median(row["seconds"] for row in rows),
        "ratio": statistics.median(ratios),
        "megabytes": statistics.median(row["megabytes"] for row in rows),
    }


def measure(method: str, privacy: str, *, bf16: bool) -> dict[str, Any]:
    """Three steps of one method; the first is dropped."""
    import torch

    from veiltune.dp.encoding import Classified, collate
    from veiltune.dp.engine import DPEngine
    from veiltune.dp.losses import classification_losses
    from veiltune.dp.plan import DPPlan
    from veiltune.models.adapters import attach_peft, count_parameters, trainable_parameters
    from veiltune.models.loading import classifier_model, load_base

    model = classifier_model(load_base("minilm"), num_labels=2, seed=0)
    attach_peft(model, method=method, seed=0, rank=8)
    ids = torch.randint(1000, 20000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Classified(row, number % 2) for number, row in enumerate(ids)]
    sizes: dict[str, Any] = {"num_units": ROWS, "expected_batch_size": ROWS, "steps": 3}
    plan = (
        DPPlan.without_privacy(**sizes)
        if privacy == "plain"
        else DPPlan.for_noise(1.0, delta=1e-5, clip_norm=1.0, **sizes)
    )
    engine = DPEngine(
        model,
        examples,
        plan=plan,
        loss=classification_losses,
        collate=partial(collate, pad_id=0),
        key=bytes(32),
        max_rows=MICRO,
        bf16=bf16,
    )
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-4)
    before, peak = resident(), Peak()
    spent = []
    for number in range(3):
        started = time.process_time()
        engine.backward(number)
        optimizer.step()
        engine.finish_step()
        spent.append(time.process_time() - started)
    count = count_parameters(model)
    megabytes = (peak.stop() - before) / 1e6
    return {"seconds": min(spent[1:]), "megabytes": megabytes, "share": count.trainable / count.total}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Watches the resident set; the peak of the kernel would count the loading of the model."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest, self.ended = resident(), threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.highest = max(self.highest, resident())

    def stop(self) -> int:
        self.ended.set()
        self.join()
        return max(self.highest, resident())


if __name__ == "__main__":
    main()
