"""Labels, and the vendor's model: the parts of an audit that are not about texts."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from veiltune.attacks.extraction import extract_top, score_fidelity
from veiltune.attacks.labels import (
    best_permutation,
    label_success_bound,
    labels_by_clustering,
    labels_by_direction,
    labels_by_norm,
    labels_from_output_gradients,
    score_labels,
)
from veiltune.audit.attempts import NotApplicableError, attempt
from veiltune.audit.observing import AuditedRun, dequantized, observed_views
from veiltune.audit.record import ExtractionPoint, Labels, Rate

QUERIES = (30, 100, 300, 1_000, 3_000)
MOST_CLUSTERED = 4_000  # texts
_LEAST_HELD_OUT = 50


def label_attacks(audited: AuditedRun, *, seed: int) -> Labels:
    """What the vendor learns of the labels from the gradients and outputs of the first epoch, and from releases."""
    config, classes = audited.config.privacy, len(audited.labels)
    true = torch.tensor(audited.true_labels)
    shares = (torch.bincount(true, minlength=classes) / len(true)).tolist()
    randomised = config.labels == "randomized_response"
    seen = _gradients(audited)
    at_logits = audited.config.split.head == "vendor"

    def exact() -> dict[str, Any]:
        if not at_logits:
            raise NotApplicableError("the head is the customer's: the vendor gets no gradient of logits")
        rows, gradients = _need(seen, "output_gradients")
        return _named(labels_from_output_gradients(gradients), true[rows], None)

    def by(cluster: Any, kind: str) -> dict[str, Any]:
        rows, vectors = _need(seen, kind)
        groups = cluster(vectors.float(), classes, seed=seed)
        middle = len(rows) // 2
        permutation = best_permutation(groups[:middle], true[rows[:middle]], classes)
        return _named(groups[middle:], true[rows[middle:]], permutation)

    def from_releases() -> dict[str, Any]:
        order = torch.randperm(len(true), generator=torch.Generator().manual_seed(seed))  # a table may be sorted
        rows = order[:MOST_CLUSTERED].tolist()
        pooled = torch.stack([views[0].mean(dim=0) for views in observed_views(audited, rows)])
        groups, middle = labels_by_clustering(pooled, classes, seed=seed), len(rows) // 2
        permutation = best_permutation(groups[:middle], true[rows[:middle]], classes)
        return _named(groups[middle:], true[rows[middle:]], permutation)

    where = "the output gradient" if at_logits else "the gradient at the hidden state before the customer's head"
    names = "; a few known labels to name the groups"
    attacks = (
        attempt("output_gradient", "labels from the output gradient", "the output gradient of each example", exact),
        attempt(
            "direction", "labels by the direction of the gradient", where + names,
            lambda: by(labels_by_direction, "output_gradients"),
        ),
        attempt(
            "norm", "labels by the length of the gradient", where + names,
            lambda: by(labels_by_norm, "output_gradients"),
        ),
        attempt(
            "cut_gradient", "labels by the direction of the cut gradient", "the gradient at the cut" + names,
            lambda: by(labels_by_direction, "cut_gradients"),
        ),
        attempt(
            "outputs", "labels by clustering the vendor's own outputs", "the vendor's outputs" + names,
            lambda: by(labels_by_clustering, "outputs"),
        ),
        attempt("releases", "labels by clustering releases", "pooled released vectors" + names, from_releases),
    )  # fmt: skip
    return Labels(
        mode="randomized_response" if randomised else "disclosed",
        num_classes=classes,
        majority=max(shares),
        bound=label_success_bound(shares, config.label_epsilon) if randomised else None,
        claimed_epsilon=config.label_epsilon if randomised else None,
        attacks=attacks,
    )


def extraction(audited: AuditedRun, *, seed: int) -> tuple[tuple[ExtractionPoint, ...], str]:
    """How well the customer could rebuild the vendor's top from the answers to the evaluation texts.

    Returns:
        Points, and why there are none.
    """
    answers = audited.run.private / "answers.safetensors"
    if not answers.exists():
        return (), "model extraction: the run kept no answers"
    if audited.config.split.head != "vendor":
        return (), "model extraction: the head is the customer's, so the vendor answers with hidden states"
    logits = load_file(answers)["logits"]
    held_out = max(_LEAST_HELD_OUT, len(logits) // 3)
    queries = [count for count in QUERIES if count <= len(logits) - held_out]
    if not queries:
        return (), f"model extraction needs at least {QUERIES[0] + _LEAST_HELD_OUT} evaluation texts"
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).tolist()
    inputs = [dequantized(audited.releaser.outbox.get([audited.eval_keys[i]])) for i in order]
    known, held = logits[order[:-held_out]], logits[order[-held_out:]]
    found = extract_top(inputs, known, queries=queries, held_out=held_out, seed=seed)
    points = [
        ExtractionPoint(queries=count, fidelity=Rate.of(score_fidelity(guess, held))) for count, guess in found.items()
    ]
    return tuple(points), ""


def _gradients(audited: AuditedRun) -> dict[str, Tensor]:
    """What the outbox kept of the first epoch, one row an example, in random order; the last one where it repeats."""
    kept = audited.releaser.outbox.gradients()
    if not kept:
        return {}
    joined = {name: torch.cat([part[name] for part in kept]) for name in kept[0] if name != "cut_gradients"}
    if "cut_gradients" in kept[0]:
        joined["cut_gradients"] = torch.cat([_summed(audited, part) for part in kept])
    last = {int(row): place for place, row in enumerate(joined["examples"].tolist())}
    places = torch.tensor(list(last.values()))
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]
    return {name: tensor[places] for name, tensor in joined.items()}


def _summed(audited: AuditedRun, part: dict[str, Tensor]) -> Tensor:
    """(B, H): the cut gradients of each text, summed over its tokens."""
    lengths = [len(audited.token_ids[row]) for row in part["examples"].tolist()]
    return torch.stack([text.float().sum(dim=0) for text in part["cut_gradients"].split(lengths)])


def _need(seen: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    if kind not in seen:
        frozen = kind == "cut_gradients"
        raise NotApplicableError(
            "the bottom is frozen: no gradient crosses the cut" if frozen else "the run kept no gradients"
        )
    return seen["examples"], seen[kind]


def _named(guesses: Tensor, secret: Tensor, permutation: Tensor | None) -> dict[str, Any]:
    return {"reported": Rate.of(score_labels(guesses, secret, "labels", permutation=permutation))}
