"""Split against unsplit: the same model, data, batches and steps; two processes on loopback mTLS against one process.

    python bench/split_throughput.py                       # synthetic tickets
    python bench/split_throughput.py --data DIR/sst2       # SST-2 sentences

The two runs alternate, so that a machine whose speed drifts slows both. The split run's time counts privatizing and
uploading. The unsplit run is plain Hugging Face + PEFT: LoRA on the same blocks, the same length-sorted batches,
padding and precision, all cores. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from veiltune.config import TuneConfig, parse_config
from veiltune.customer.batching import encode_texts, epoch_batches, learning_rate_at, pad_ids
from veiltune.customer.reporting import Reporter
from veiltune.customer.session import tune
from veiltune.data.tables import LabelSet, read_table
from veiltune.data.tickets import write_tickets
from veiltune.demo import vendor_process
from veiltune.models.loading import classifier_model, load_base
from veiltune.runs import RunFolder

CUT_LAYER = 2


class PhaseClock(Reporter):
    """When each phase began."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}

    def phase(self, name: str, total: int) -> None:
        self.began[name] = time.perf_counter()


def split_run(config: TuneConfig) -> dict[str, Any]:
    """Seconds from the first representation to the last update, and what crossed."""
    clock = PhaseClock()
    summary = tune(config, reporter=clock)
    metrics = RunFolder(config.run).metrics()
    training = clock.began["evaluate"] - clock.began["train"]
    return {
        "seconds": clock.began["evaluate"] - clock.began["privatize"],
        "overhead": 1 - summary["vendor_busy_seconds"] / training,
        "upload_bytes": metrics[0]["bytes_up"],
        "training_bytes": metrics[-1]["bytes_up"]
        + metrics[-1]["bytes_down"]
        - metrics[0]["bytes_up"]
        - metrics[0]["bytes_down"],
        "counted_steps": len(metrics) - 1,
        "utility": summary["utility"],
    }


def unsplit_run(config: TuneConfig) -> dict[str, Any]:
    """The same fine-tuning by Hugging Face and PEFT in this process."""
    train = config.train
    base = load_base("minilm")
    table = read_table(config.data.train, text_column=config.data.text_column, label_column=config.data.label_column)
    labels = LabelSet.fit(table.labels or [])
    targets = torch.tensor(labels.encode(table.labels or []))
    model = classifier_model(base, num_labels=len(labels), seed=train.seed)
    blocks = list(range(CUT_LAYER, model.config.num_hidden_layers))
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS",
            r=train.rank,
            lora_alpha=train.alpha,
            lora_dropout=train.dropout,
            target_modules=["query", "value"],
            layers_to_transform=blocks,
            layers_pattern="layer",
            modules_to_save=["pooler"],  # the classifier is saved by itself; the split's task head has the pooler too
        ),
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=train.weight_decay)
    token_ids = encode_texts(base.tokenizer, table.texts, max_length=config.data.max_length)
    lengths = [len(ids) for ids in token_ids]
    total = -(-len(lengths) // train.batch_size) * train.epochs
    started, step = time.perf_counter(), 0
    for epoch in range(train.epochs):
        for batch in epoch_batches(lengths, batch_size=train.batch_size, seed=train.seed, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(
                    step, total=total, warmup_fraction=train.warmup_fraction, peak=train.learning_rate
                )
            ids, mask = pad_ids([token_ids[i] for i in batch])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=train.precision == "bf16"):
                logits = model(input_ids=ids, attention_mask=mask).logits
            torch.nn.functional.cross_entropy(logits.float(), targets[batch]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    return {"seconds": time.perf_counter() - started}


def write_data(folder: Path, data: str | None, examples: int) -> dict[str, str]:
    """Training and evaluation tables of the wanted size; returns the [data] section."""
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        write_tickets(folder, num_train=examples, num_eval=100, seed=0)
        return {"train": str(folder / "train.csv"), "eval": str(folder / "eval.csv"), "label_column": "topic"}
    section = {}
    for part, name, count in (("train", "stsa.binary.train", examples), ("eval", "stsa.binary.dev", 100)):
        lines = (Path(data) / name).read_text(encoding="latin-1").splitlines()[:count]
        rows = [json.dumps({"text": line[2:], "label": line[0]}) for line in lines]
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
        section[part] = str(folder / f"{part}.jsonl")
    return section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of SST-2 (stsa.binary.*); synthetic tickets if not given")
    parser.add_argument("--examples", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    split, unsplit = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        section = write_data(root / "data", arguments.data, arguments.examples)
        with vendor_process(root / "vendor", log=root / "vendor.log", say=print) as address:
            for number in range(arguments.rounds):
                tree = {
                    "run": str(root / f"run{number}"),
                    "vendor": {"address": address, "credentials": str(root / "vendor" / "tenants" / "demo")},
                    "split": {"cut_layer": CUT_LAYER},
                    "data": section,
                    "privacy": {"mechanism": "d_chi", "noise_to_norm": 0.7, "labels": "disclosed"},
                    "train": {
                        "epochs": 3,
                        "precision": arguments.precision,
                        "checkpoint_every": 100,
                        "customer_alone": False,
                    },
                }
                config = parse_config(TuneConfig, tree)
                split.append(split_run(config))
                unsplit.append(unsplit_run(config))
                print(f"round {number}: split {split[-1]['seconds']:.1f} s, unsplit {unsplit[-1]['seconds']:.1f} s")
        tokens = sum(
            len(ids)
            for ids in encode_texts(
                load_base("minilm").tokenizer, read_table(section["train"], text_column="text").texts, max_length=128
            )
        )
    ratios = [u["seconds"] / s["seconds"] for s, u in zip(split, unsplit, strict=True)]
    shown = 3 * arguments.examples
    result = {
        "bench": "split_throughput",
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "examples_per_second": round(shown / statistics.median(s["seconds"] for s in split), 1),
        "unsplit_examples_per_second": round(shown / statistics.median(u["seconds"] for u in unsplit), 1),
        "overhead": round(statistics.median(s["overhead"] for s in split), 4),
        "bytes_per_token": round(split[0]["upload_bytes"] / tokens, 2),
        "bytes_per_example_epoch": round(split[0]["training_bytes"] / (split[0]["counted_steps"] * 32), 2),
        "hidden_size": 384,
        "tokens": tokens,
        "precision": arguments.precision,
        "examples": arguments.examples,
        "epochs": 3,
        "rounds": arguments.rounds,
        "seed": 0,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
