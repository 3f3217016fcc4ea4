"""Private training runs for tests: tiny models, learnable tables, configurations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from runs_helper import write_tables
from tiny import tiny_model
from tiny_text import causal_tokenizer
from veiltune.config import TrainConfig, parse_config


def classification_config(folder: Path, base: Path, /, **sections: Any) -> TrainConfig:
    """A short run over the tables of a folder, with noise from a seed."""
    if not (folder / "train.csv").exists():
        write_tables(folder, train=64, eval=32)
    tree: dict[str, Any] = {
        "run": str(folder / "run"),
        "noise_seed": 11,
        "model": {"name": str(base), "task": "classification"},
        "data": {"train": str(folder / "train.csv"), "eval": str(folder / "eval.csv"), "max_length": 24},
        "privacy": {"noise_multiplier": 2.0},
        "train": {"steps": 12, "batch_size": 16, "learning_rate": 1e-2, "rank": 2, "threads": 1},
    }
    return _config(tree, sections)


def generation_config(folder: Path, **sections: Any) -> TrainConfig:
    """The same for a tiny Llama that learns to repeat a letter; E2E-style files."""
    model = folder / "tiny-llama"
    if not model.exists():
        tiny_model("llama", "causal").save_pretrained(model)
        causal_tokenizer(begins=True).save_pretrained(model)
        write_e2e(folder / "train.txt", 48, seed=1)
        write_e2e(folder / "eval.txt", 12, seed=2)
    tree: dict[str, Any] = {
        "run": str(folder / "run"),
        "noise_seed": 11,
        "model": {"name": str(model), "task": "generation"},
        "data": {
            "train": str(folder / "train.txt"),
            "eval": str(folder / "eval.txt"),
            "format": "e2e",
            "max_length": 24,
        },
        "privacy": {"noise_multiplier": 2.0},
        "train": {"steps": 8, "batch_size": 16, "learning_rate": 1e-2, "rank": 2, "threads": 1},
        "evaluation": {"max_new_tokens": 6},
    }
    return _config(tree, sections)


def write_e2e(path: Path, rows: int, *, seed: int) -> None:
    """Lines like ``k 3||kkk``."""
    rng = random.Random(seed)
    pairs = [(rng.choice("abcdefgh"), rng.randint(2, 5)) for _ in range(rows)]
    path.write_text("".join(f"{letter} {count}||{letter * count}\n" for letter, count in pairs))


def _config(tree: dict[str, Any], sections: dict[str, Any]) -> TrainConfig:
    for name, changes in sections.items():
        tree[name] = tree.get(name, {}) | changes if isinstance(changes, dict) else changes
    if tree["train"].get("method", "lora") not in ("lora", "rgp"):
        tree["train"]["rank"] = None
    tree = {name: _without_none(value) for name, value in tree.items() if value is not None}
    return parse_config(TrainConfig, tree)


def _without_none(value: Any) -> Any:
    return {key: inner for key, inner in value.items() if inner is not None} if isinstance(value, dict) else value
