"""Does the audit catch broken private training? Correct runs and three planted bugs, all with the same claim.

    python bench/audit_bugs.py                      # 1,000 canaries, claimed epsilon 2, three seeds; about ten minutes

What is trained is little but canaries, each a token of its own (arXiv:2503.06808), by plain SGD with every unit in
every step: the claim is then as tight as it can be. The base model expects a token of their kind and cannot tell one
from another (their embedding rows are equal), so nearly all of a canary's clipped gradient is in a row of its own.
Every model goes through `veiltune audit --claimed-epsilon` as anyone would call it. The bugs: a quarter of the noise;
the tensor with the largest gradients not clipped; every unit in every step though the claim is made for Poisson
sampling with probability 1/2. An audit should flag them (exit code 5), and the correct run at most once in twenty.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from small_model import PAD, fit, new_model, new_tokenizer, texts_of
from torch import Tensor

from veiltune.data.manifest import read_manifest
from veiltune.data.prompts import Prompted
from veiltune.data.synth import SynthOptions, synthesise
from veiltune.dp import engine
from veiltune.dp.clipping import Clipping
from veiltune.dp.encoding import collate, encode_prompted
from veiltune.dp.plan import DPPlan
from veiltune.dp.sampling import PoissonSampler
from veiltune.models.adapters import attach_peft
from veiltune.models.loading import load_base

BUGS = ("none", "quarter_noise", "tensor_unclipped", "no_sampling")
DELTA, STEPS, RATE, CLIP_NORM, SAMPLING, CONTEXT = 1e-5, 10, 0.3, 0.1, 0.5, 192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/audit_bugs"))
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--bugs", nargs="+", default=list(BUGS), choices=BUGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in chosen.seeds:
        folder = chosen.work / f"{chosen.canaries}-{seed}"
        corpus = folder / "corpus"
        if not (corpus / "manifest.jsonl").exists():
            shutil.rmtree(corpus, ignore_errors=True)
            synthesise(corpus, options(chosen.canaries, seed))
        base = taught_base(folder, corpus, seed)
        for bug in chosen.bugs:
            model = folder / f"{bug}-{chosen.epsilon:g}"
            if not (model / "model.safetensors").exists():
                private_model(base, corpus, model, epsilon=chosen.epsilon, bug=bug)
            result = audit(model, base, corpus, chosen.epsilon, seed)
            found.setdefault(bug, []).append(result)
            print(f"{bug:17} seed {seed}: audited {result['epsilon']:.2f}, claimed {chosen.epsilon:g}, exit code"
                  f" {result['exit_code']}, {result['correct']} of {result['guesses']} right", flush=True)  # fmt: skip
    print(json.dumps({
        "bench": "audit_bugs", "claimed": chosen.epsilon, "canaries": chosen.canaries, "seeds": chosen.seeds,
        "audited": {bug: [round(one["epsilon"], 3) for one in rows] for bug, rows in found.items()},
        "flagged": {bug: sum(one["exit_code"] == 5 for one in rows) for bug, rows in found.items()},
    }))  # fmt: skip


def options(canaries: int, seed: int) -> SynthOptions:
    """Little but canaries; the rest is there for the audit's other parts."""
    return replace(
        SynthOptions(), persons=40, population=100, validation=10, canaries=canaries, canary_family="token",
        exposure_canaries=0, references=400, carrier_share=0.5, repetitions=(1,), seed=seed,
    )  # fmt: skip


def taught_base(folder: Path, corpus: Path, seed: int) -> Path:
    """A base model that knows the canaries' form, from references only, which are never in the training text."""
    base = folder / "base"
    if not (base / "model.safetensors").exists():
        tokens = (corpus / "tokens.txt").read_text().split()
        texts = texts_of(corpus / "population.jsonl")
        taught = [
            canary.prefix + canary.secret
            for canary in read_manifest(corpus / "manifest.jsonl").canaries
            if canary.family == "token" and canary.purpose == "reference"
        ]
        tokenizer = new_tokenizer(texts, vocabulary=2048)
        model = new_model(tokenizer, width=128, blocks=4, context=CONTEXT, seed=seed)
        fit(model, tokenizer, texts, epochs=4, learning_rate=1e-3, seed=seed)
        tokenizer.add_tokens(tokens)
        model.resize_token_embeddings(len(tokenizer))
        fit(model, tokenizer, taught * 5, epochs=10, learning_rate=1e-3, batch=64, seed=seed)
        make_alike(model, tokenizer, tokens, like=[text.split()[-1] for text in taught])
        tokenizer.save_pretrained(base)
        model.save_pretrained(base)
    return base


def make_alike(model: Any, tokenizer: Any, tokens: list[str], *, like: list[str]) -> None:
    """Gives the embedding rows of all tokens the mean of some: the worst case for a claim about one of them."""
    rows = model.get_input_embeddings().weight.data
    rows[tokenizer.convert_tokens_to_ids(tokens)] = rows[tokenizer.convert_tokens_to_ids(like)].mean(dim=0)


def private_model(base: Path, corpus: Path, output: Path, *, epsilon: float, bug: str) -> None:
    found = load_base(str(base))
    attach_peft(found.model, method="full", seed=0)
    texts = texts_of(corpus / "train.jsonl")
    examples = encode_prompted(found.tokenizer, Prompted([""] * len(texts), texts), max_length=CONTEXT).examples
    share = SAMPLING if bug == "no_sampling" else 1.0
    plan = DPPlan.for_epsilon(
        epsilon, num_units=len(examples), expected_batch_size=share * len(examples), steps=STEPS, delta=DELTA,
        clip_norm=CLIP_NORM,
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in found.model.parameters() if p.requires_grad], lr=RATE)
    with planted(bug):
        _, optimizer, batches = engine.make_private(
            found.model, optimizer, examples, plan=plan, collate=partial(collate, pad_id=PAD), max_rows=64
        )
        for batch in batches:
            batch.backward()
            optimizer.step()
    found.tokenizer.save_pretrained(output)
    found.model.save_pretrained(output)


def audit(model: Path, base: Path, corpus: Path, epsilon: float, seed: int) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "veiltune", "audit", str(model), "--manifest", str(corpus / "manifest.jsonl"),
        "--base", str(base), "--output", str(model), "--preset", "ci", "--seed", str(seed),
        "--claimed-epsilon", str(epsilon), "--delta", str(DELTA),
    ]  # fmt: skip
    code = subprocess.run(command, check=False, capture_output=True).returncode
    bound = json.loads((model / "leakage.json").read_bytes())["audited_epsilon"]
    return {"exit_code": code, **{name: bound[name] for name in ("epsilon", "correct", "guesses")}}


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    """Breaks the training, and nothing of the claim."""
    right = engine.noisy_mean

    def quieter(total: Any, *, noise_multiplier: float, **rest: Any) -> Any:
        return right(total, noise_multiplier=noise_multiplier / 4, **rest)

    patches = {
        "none": contextlib.nullcontext(),
        "quarter_noise": mock.patch.object(engine, "noisy_mean", quieter),
        "tensor_unclipped": mock.patch.object(Clipping, "factors", one_unclipped(Clipping.factors)),
        "no_sampling": mock.patch.object(PoissonSampler, "draw", lambda self, step: np.arange(self._num_units)),
    }
    with patches[bug]:
        yield


def one_unclipped(right: Any) -> Any:
    def factors(self: Clipping, squared: dict[str, Tensor]) -> dict[str, Tensor]:
        result = dict(right(self, squared))
        largest = max(squared, key=lambda name: float(squared[name].sum()))
        return result | {largest: torch.ones_like(result[largest])}

    return factors


if __name__ == "__main__":
    main()
