"""Attribute inference on SynthPAI: sex and income of authors from what MiniLM's first two blocks release.

    python bench/attributes.py                        # under 8 minutes on two cores
    python bench/attributes.py --comments 800         # a quick look

By noise (none, and d_chi at two noise-to-norm ratios) and attack: accuracy and area under the ROC curve, macro over
classes, on authors that no attack was trained on. Beside them the training side's largest class and what a bag of
words of the clean text gets. Intervals take texts of one author as dependent: `auc` is the AUC of the class named,
DeLong's with groups. The noise is seeded so that the table can be repeated; a real run draws it from the system.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veiltune.attacks.attribute import (
    KINDS,
    attribute_auc,
    bag_of_words_ceiling,
    infer_attribute,
    majority_guess,
    score_attribute,
    split_by_person,
)
from veiltune.customer.batching import encode_texts, pad_ids
from veiltune.models.loading import classifier_model, load_base
from veiltune.models.split import split_model
from veiltune.privatize.mechanisms import make_privatizer
from veiltune.wire.codec import unpad

CUT, MAX_LENGTH, SEED = 2, 64, 0
STRENGTHS = (0.0, 0.7, 2.5)  # mean noise norm / mean representation norm
ATTRIBUTES = {"sex": ("female", "male"), "income_level": ("low", "middle", "high")}
SHARED = Path(__file__).parents[2] / "shared" / "data"


def read_comments(data: Path, limit: int) -> list[dict[str, str]]:
    """A sample of comments, the same for the same limit; "very high" incomes (10 authors) count as high."""
    with (data / "synthpai" / "comments_flat.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["text"].strip()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[:limit].tolist()
    sample = [rows[i] for i in sorted(order)]
    for row in sample:
        row["income_level"] = row["income_level"].removeprefix("very ")
    return sample


@torch.no_grad()
def clean_representations(texts: Sequence[str]) -> list[Tensor]:
    """(T, H) at the cut, one a text."""
    base = load_base("minilm")
    bottom, _ = split_model(classifier_model(base, num_labels=2, seed=SEED), cut_layer=CUT)
    ids = encode_texts(base.tokenizer, texts, max_length=MAX_LENGTH)
    order, found = sorted(range(len(ids)), key=lambda i: len(ids[i])), {}
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        padded, mask = pad_ids([ids[i] for i in batch])
        pieces = unpad(bottom(padded, mask), mask).split([len(ids[i]) for i in batch])
        found.update(zip(batch, pieces, strict=True))
    return [found[i] for i in range(len(ids))]


def release(clean: Sequence[Tensor], noise_to_norm: float) -> list[Tensor]:
    """Each text once, as a customer would."""
    if not noise_to_norm:
        return list(clean)
    flat = torch.cat(list(clean))
    norm = float(flat.norm(dim=-1).mean())
    privatizer = make_privatizer("d_chi", dim=flat.shape[1], reference_norm=norm, noise_to_norm=noise_to_norm)
    noisy = privatizer.privatize(flat, generator=torch.Generator().manual_seed(SEED + 1))
    return list(noisy.split([len(text) for text in clean]))


def picked(items: Sequence[Any], mask: Tensor) -> list[Any]:
    return [item for item, keep in zip(items, mask.tolist(), strict=True) if keep]


def scored(scores: Tensor, secret: Tensor, persons: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy and AUC by class, with intervals."""
    result = score_attribute(scores, secret, "attribute")
    aucs = attribute_auc(scores, secret, persons=persons)
    return {
        "accuracy": round(result.success_rate, 4),
        "auc": {classes[c]: [round(value, 4) for value in triple] for c, triple in aucs.items()},
    }


def measure(rows: list[dict[str, str]], clean: list[Tensor], attribute: str) -> list[dict[str, Any]]:
    """The table's rows of one attribute."""
    classes = ATTRIBUTES[attribute]
    labels = torch.tensor([classes.index(row[attribute]) for row in rows])
    persons, texts = [row["author"] for row in rows], [row["text"] for row in rows]
    test = split_by_person(persons, seed=SEED)
    known, owners, secret = picked(persons, ~test), picked(persons, test), labels[test]
    common: dict[str, Any] = {"num_classes": len(classes), "seed": SEED, "persons": known}
    blind = torch.nn.functional.one_hot(majority_guess(labels[~test], len(secret)), len(classes)).float()
    words = bag_of_words_ceiling(picked(texts, ~test), labels[~test], picked(texts, test), **common)
    table = [
        {"attack": "majority", **scored(blind, secret, owners, classes), "auc": {}},
        {"attack": "bag of words, clean text", **scored(words, secret, owners, classes)},
    ]
    for strength in STRENGTHS:
        released = release(clean, strength)
        for kind in KINDS:
            started = time.perf_counter()
            scores = infer_attribute(
                picked(released, ~test), labels[~test], picked(released, test), kind=kind, **common
            )
            table.append(
                {
                    "attack": kind,
                    "noise_to_norm": strength,
                    **scored(scores, secret, owners, classes),
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
            print_row(attribute, table[-1])
    for row in table[:2]:
        print_row(attribute, row)
    return [{"attribute": attribute, "texts": len(secret), "persons": len(set(owners)), **row} for row in table]


def print_row(attribute: str, row: dict[str, Any]) -> None:
    """One line in Markdown."""
    aucs = "; ".join(f"{name} {a:.3f} [{low:.3f}, {high:.3f}]" for name, (a, low, high) in row["auc"].items())
    noise = row.get("noise_to_norm", "-")
    print(f"| {attribute} | {noise} | {row['attack']} | {row['accuracy']:.3f} | {aucs} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder that has synthpai/comments_flat.csv")
    parser.add_argument("--comments", type=int, default=5000, help="at most so many, drawn at random")
    arguments = parser.parse_args()
    started = time.perf_counter()
    rows = read_comments(arguments.data, arguments.comments)
    clean = clean_representations([row["text"] for row in rows])
    print("| attribute | noise / norm | attack | accuracy | AUC of each class |\n|---|---|---|---|---|")
    table = [row for attribute in ATTRIBUTES for row in measure(rows, clean, attribute)]
    seconds = round(time.perf_counter() - started, 1)
    print(
        json.dumps({"bench": "attributes", "comments": len(rows), "cut_layer": CUT, "seconds": seconds, "rows": table})
    )


if __name__ == "__main__":
    main()
