"""The utility of Split-and-Privatize on SST-2 sentences: UA by cut, noise, contributing tokens and bottom, 3 seeds.

    python bench/sap_table.py --data DIR/sst2 --out bench-results            # hours; stop and start at will
    python bench/sap_table.py --data DIR/sst2 --out bench-quick --quick      # under 10 minutes, one seed

Every cell is a real run: a vendor process, mTLS, MiniLM, LoRA at the vendor; trained on the 6 920 training sentences,
utility = accuracy on the 1 821 test sentences under the same mechanism. No hyper-parameter was chosen on the test
set. The unsplit model is fine-tuned with the same hyper-parameters, batches and LoRA blocks for each cut. A cell that
is in OUT/cells.jsonl is not run again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import t as student_t

from veiltune.config import TuneConfig, parse_config
from veiltune.customer.baseline import customer_alone_utility
from veiltune.customer.batching import encode_texts, epoch_batches, learning_rate_at, pad_ids
from veiltune.customer.session import tune
from veiltune.demo import vendor_process
from veiltune.models.loading import classifier_model, load_base
from veiltune.models.split import split_model
from veiltune.wire.codec import unpad

CUTS = (0, 2)
STRENGTHS = (0.7, 1.5)  # mean noise norm / mean representation norm
TRAIN = {
    "epochs": 3,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "precision": "bf16",
    "checkpoint_every": 10_000,
    "threads": 1,
}
ALONE_OFF = {"customer_alone": False}  # measured once a cut and seed, not in every cell


@dataclass(frozen=True)
class Cell:
    """One run of the table."""

    cut: int
    noise_to_norm: float  # 0: no noise
    cti: str
    bottom: str  # frozen | full | unsplit | alone (nothing is sent)
    seed: int


def cells(seeds: list[int], *, quick: bool) -> Iterator[Cell]:
    """The table's runs, cheapest questions first."""
    for seed in seeds:
        for cut in CUTS:
            yield Cell(cut, 0.0, "off", "unsplit", seed)
            yield Cell(cut, 0.0, "off", "frozen", seed)
            yield Cell(cut, 0.0, "off", "alone", seed)
        yield Cell(0, 0.0, "off", "full", seed)
        for cut, bottom in ((2, "frozen"), (0, "frozen"), (0, "full")):
            for strength in STRENGTHS[: 1 if quick else None]:
                for cti in ("off", "budget", "top"):
                    yield Cell(cut, strength, cti, bottom, seed)


def write_tables(data: Path, folder: Path, *, limit: int | None, eval_limit: int | None) -> dict[str, str]:
    """SST-2 sentences as JSONL; returns the [data] section."""
    folder.mkdir(parents=True, exist_ok=True)
    section = {}
    for part, name, count in (("train", "stsa.binary.train", limit), ("eval", "stsa.binary.test", eval_limit)):
        lines = (data / name).read_text(encoding="latin-1").splitlines()[:count]
        rows = [json.dumps({"text": line[2:], "label": line[0]}) for line in lines]
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
        section[part] = str(folder / f"{part}.jsonl")
    return section


def split_cell(cell: Cell, section: dict[str, str], address: str, credentials: Path, run: Path) -> dict[str, Any]:
    """Runs a cell through the wire."""
    shutil.rmtree(run, ignore_errors=True)
    noisy = {"mechanism": "d_chi", "noise_to_norm": cell.noise_to_norm, "cti": cell.cti}
    tree = {
        "run": str(run),
        "vendor": {"address": address, "credentials": str(credentials)},
        "split": {"cut_layer": cell.cut, "bottom": cell.bottom},
        "data": section,
        "privacy": {"labels": "disclosed"} | (noisy if cell.noise_to_norm else {"mechanism": "none"}),
        "train": TRAIN | ALONE_OFF | {"seed": cell.seed},
    }
    summary = tune(parse_config(TuneConfig, tree))
    shutil.rmtree(run)
    return {"ua": summary["utility"], "eta": summary["strength"]["eta"] if summary["strength"] else None}


def unsplit_cell(cell: Cell, section: dict[str, str]) -> dict[str, Any]:
    """Plain Hugging Face + PEFT on the blocks above the cut, with the same batches and schedule."""
    base = load_base("minilm")
    model = classifier_model(base, num_labels=2, seed=cell.seed)
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        target_modules=["query", "value"],
        layers_to_transform=list(range(cell.cut, model.config.num_hidden_layers)),
        layers_pattern="layer",
        modules_to_save=["pooler"],  # the classifier is saved by itself; the split's task head has the pooler too
    )
    torch.manual_seed(cell.seed)
    model = get_peft_model(model, config).train()
    (train_ids, train_labels), (eval_ids, eval_labels) = (_encoded(base, section[part]) for part in ("train", "eval"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.01)
    lengths = [len(ids) for ids in train_ids]
    total, step = -(-len(lengths) // TRAIN["batch_size"]) * TRAIN["epochs"], 0
    for epoch in range(TRAIN["epochs"]):
        for batch in epoch_batches(lengths, batch_size=TRAIN["batch_size"], seed=cell.seed, epoch=epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, total=total, warmup_fraction=0.06, peak=TRAIN["learning_rate"])
            loss = torch.nn.functional.cross_entropy(_logits(model, [train_ids[i] for i in batch]), train_labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([_logits(model, eval_ids[i : i + 64]).argmax(-1) for i in range(0, len(eval_ids), 64)])
    return {"ua": float((predicted == eval_labels).float().mean()), "eta": None}


@torch.no_grad()
def _clean(bottom: Any, token_ids: Any) -> torch.Tensor:
    ids, mask = pad_ids(token_ids)
    return unpad(bottom(ids, mask), mask)


def alone_cell(cell: Cell, section: dict[str, str]) -> dict[str, Any]:
    """The customer's own pooling head on the bottom it holds."""
    base = load_base("minilm")
    bottom, _ = split_model(classifier_model(base, num_labels=2, seed=cell.seed), cut_layer=cell.cut)
    (train_ids, train_labels), (eval_ids, eval_labels) = (_encoded(base, section[part]) for part in ("train", "eval"))
    utility = customer_alone_utility(
        lambda token_ids: _clean(bottom, token_ids),
        train_ids,
        train_labels.tolist(),
        eval_ids,
        eval_labels.tolist(),
        num_classes=2,
        seed=cell.seed,
    )
    return {"ua": utility, "eta": None}


def _encoded(base: Any, path: str) -> tuple[list[list[int]], torch.Tensor]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    ids = encode_texts(base.tokenizer, [row["text"] for row in rows], max_length=128)
    return ids, torch.tensor([int(row["label"]) for row in rows])


def _logits(model: Any, token_ids: list[list[int]]) -> torch.Tensor:
    ids, mask = pad_ids(token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.float()


def read_cells(ledger: Path) -> dict[Cell, dict[str, Any]]:
    """The finished cells."""
    results = [json.loads(line) for line in ledger.read_text().splitlines()]
    return {Cell(r["cut"], r["noise_to_norm"], r["cti"], r["bottom"], r["seed"]): r for r in results}


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean UA of each row with a 95 % t-interval over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["bottom"], result["cut"], result["noise_to_norm"], result["cti"]), []).append(result)
    rows = []
    for (bottom, cut, noise, cti), group in groups.items():
        scores = [result["ua"] for result in group]
        half = (
            student_t.ppf(0.975, len(scores) - 1) * statistics.stdev(scores) / math.sqrt(len(scores))
            if len(scores) > 1
            else math.nan
        )
        rows.append(
            {
                "bottom": bottom,
                "cut_layer": cut,
                "noise_to_norm": noise,
                "cti": cti,
                "eta": group[0]["eta"],
                "ua": round(statistics.mean(scores), 4),
                "ua_half_width": None if math.isnan(half) else round(half, 4),
                "seeds": sorted(result["seed"] for result in group),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table in Markdown."""
    print("| bottom | k | noise / norm | eta | CTI | UA (mean ± 95 %) | seeds |\n|---|---|---|---|---|---|---|")
    for row in rows:
        eta = "-" if row["eta"] is None else f"{row['eta']:.1f}"
        half = "" if row["ua_half_width"] is None else f" ± {row['ua_half_width']:.4f}"
        print(
            f"| {row['bottom']} | {row['cut_layer']} | {row['noise_to_norm']} | {eta} | {row['cti']} "
            f"| {row['ua']:.4f}{half} | {len(row['seeds'])} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of stsa.binary.train and stsa.binary.test")
    parser.add_argument("--out", type=Path, default=Path("bench-results/sap_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="several processes may share OUT")
    parser.add_argument("--sentences", type=int, help="training sentences; all 6 920 if not given")
    parser.add_argument("--from-end", action="store_true", help="last cell first, for a second process that shares OUT")
    parser.add_argument("--clean", action="store_true", help="only the cells without noise, to compare with unsplit")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, one strength, 800 training and 600 test sentences"
    )
    arguments = parser.parse_args()
    out, quick = arguments.out, arguments.quick
    torch.set_num_threads(1)
    section = write_tables(
        arguments.data, out / "data", limit=800 if quick else arguments.sentences, eval_limit=600 if quick else None
    )
    ledger = out / "cells.jsonl"
    ledger.touch()
    vendor = out / f"vendor-{time.time_ns()}"
    with vendor_process(vendor, log=vendor.with_suffix(".log"), say=print) as address:
        wanted = list(cells(arguments.seeds[: 1 if quick else None], quick=quick))
        for cell in reversed(wanted) if arguments.from_end else wanted:
            if arguments.clean and (cell.noise_to_norm or cell.bottom in ("alone", "full")):
                continue
            if cell in read_cells(ledger):
                continue  # done by an earlier start, or by a process that shares OUT
            started = time.perf_counter()
            if cell.bottom == "unsplit":
                result = unsplit_cell(cell, section)
            elif cell.bottom == "alone":
                result = alone_cell(cell, section)
            else:
                result = split_cell(cell, section, address, vendor / "tenants" / "demo", out / f"run-{vendor.name}")
            result = asdict(cell) | result | {"seconds": round(time.perf_counter() - started, 1)}
            with ledger.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    shutil.rmtree(vendor)
    rows = summarise(list(read_cells(ledger).values()))
    print_table(rows)
    gaps = [
        round(100 * (split["ua"] - whole["ua"]), 2)
        for split in rows
        for whole in rows
        if (split["bottom"], split["noise_to_norm"], whole["bottom"]) == ("frozen", 0.0, "unsplit")
        and split["cut_layer"] == whole["cut_layer"]
    ]
    print(
        json.dumps(
            {
                "bench": "sap_table",
                "quick": quick,
                "sentences": 800 if quick else arguments.sentences or 6920,
                "train": TRAIN,
                "split_minus_unsplit_points": gaps,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
