"""Does the audit catch broken private training? Correct runs and three planted bugs, all with the same claim.

    python bench/audit_bugs.py                      # 1,000 canaries, claimed epsilon 2, three seeds; about 15 minutes

Runs of `veiltune train` on a corpus that is mostly canaries, every unit in every step, so that the claim is as tight as
it can be; then `veiltune audit` as anyone would call it. The bugs: a quarter of the noise; one tensor that is not
clipped; every unit in every step though the claim is made for Poisson sampling with probability 1/8. An audit should
flag them (audited above claimed, exit code 5) and must not flag the correct run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from audit_ci import base_model
from torch import Tensor

from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.session import audit_model
from veiltune.config import TrainConfig, parse_config
from veiltune.data.synth import SynthOptions, synthesise
from veiltune.dp import engine
from veiltune.dp.clipping import Clipping
from veiltune.dp.sampling import PoissonSampler
from veiltune.dp.session import train

BUGS = ("none", "quarter_noise", "tensor_unclipped", "no_sampling")
SAMPLING = 1 / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/audit_bugs"))
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bugs", nargs="+", default=list(BUGS), choices=BUGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--base-epochs", type=float, default=2.0)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=0)
    chosen = parser.parse_args()
    found: dict[str, list[float]] = {}
    for seed in chosen.seeds:
        folder = chosen.work / f"{chosen.canaries}-{seed}"
        corpus = folder / "corpus"
        if not (corpus / "manifest.jsonl").exists():
            synthesise(corpus, corpus_options(chosen.canaries, seed))
        base = base_model(folder, corpus, argparse.Namespace(**vars(chosen) | {"seed": seed}))
        for bug in chosen.bugs:
            run = folder / f"{bug}-{chosen.epsilon:g}-{chosen.steps}-{chosen.learning_rate:g}"
            with planted(bug):
                train(settings(run, base, corpus, chosen, seed, poisson=bug == "no_sampling"))
            record = audit_model(
                LeakageOptions(model=str(run), manifest=corpus / "manifest.jsonl", preset="ci", seed=seed)
            )
            bound = record.audited_epsilon
            assert bound is not None
            found.setdefault(bug, []).append(bound.epsilon)
            verdict = "flagged" if bound.exceeds_claim else "not flagged"
            print(f"{bug:17} seed {seed}: audited {bound.epsilon:.2f}, claimed {bound.claimed_epsilon:.2f}, {verdict}"
                  f" ({bound.correct} of {bound.guesses} right)", flush=True)  # fmt: skip
    flagged = {bug: sum(value > chosen.epsilon for value in values) for bug, values in found.items()}
    print(json.dumps({"bench": "audit_bugs", "claimed": chosen.epsilon, "canaries": chosen.canaries,
                      "audited": found, "flagged": flagged, "seeds": chosen.seeds}))  # fmt: skip


def corpus_options(canaries: int, seed: int) -> SynthOptions:
    """Little but canaries."""
    return replace(
        SynthOptions(), persons=40, population=60, validation=10, canaries=canaries, exposure_canaries=0,
        references=200, carrier_share=0.1, repetitions=(1,), seed=seed,
    )  # fmt: skip


def settings(
    run: Path, base: Path, corpus: Path, chosen: argparse.Namespace, seed: int, *, poisson: bool
) -> TrainConfig:
    units = len({json.loads(line)["person"] for line in (corpus / "train.jsonl").open()})
    tree: dict[str, Any] = {
        "run": str(run),
        "model": {"name": str(base), "task": "generation"},
        "data": {
            "train": str(corpus / "train.jsonl"),
            "eval": str(corpus / "validation.jsonl"),
            "prompt_column": "",
            "target_column": "text",
            "person_column": "person",
        },
        "privacy": {"epsilon": chosen.epsilon, "delta": 1e-5},
        "train": {
            "method": "full",
            "steps": chosen.steps,
            "batch_size": units * (SAMPLING if poisson else 1),
            "learning_rate": chosen.learning_rate,
            "schedule": "constant",
            "micro_batch": 64,
            "seed": seed,
            "precision": chosen.precision,
            "threads": chosen.threads,
        },
    }
    return parse_config(TrainConfig, tree)


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    """Breaks the training, and nothing of the claim."""
    with contextlib.ExitStack() as patches:
        if bug == "quarter_noise":
            right = engine.noisy_mean
            patches.enter_context(
                mock.patch.object(
                    engine, "noisy_mean",
                    lambda total, *, noise_multiplier, **rest: right(
                        total, noise_multiplier=noise_multiplier / 4, **rest
                    ),
                )
            )  # fmt: skip
        if bug == "tensor_unclipped":
            patches.enter_context(mock.patch.object(Clipping, "factors", _one_unclipped(Clipping.factors)))
        if bug == "no_sampling":
            patches.enter_context(mock.patch.object(PoissonSampler, "draw", _draw_all))
        yield


def _one_unclipped(right: Any) -> Any:
    def factors(self: Clipping, squared: dict[str, Tensor]) -> dict[str, Tensor]:
        result = dict(right(self, squared))
        largest = max(squared, key=lambda name: float(squared[name].sum()))
        return result | {largest: torch.ones_like(result[largest])}

    return factors


def _draw_all(self: Any, step: int) -> Any:
    return np.arange(self._num_units)


if __name__ == "__main__":
    main()
