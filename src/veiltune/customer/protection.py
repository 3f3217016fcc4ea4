"""What a run protects and how: the secret, the strength of the noise, the labels, and the words that say so."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from veiltune.config import TuneConfig
from veiltune.customer.batching import encode_texts, pad_ids
from veiltune.errors import PrivacyError
from veiltune.models.bundle import Bundle
from veiltune.privatize.importance import ContributingTokens
from veiltune.privatize.labels import flip_matrix, keep_probability, randomize_labels
from veiltune.privatize.mechanisms import Privatizer, make_privatizer
from veiltune.privatize.release import LedgerTotals
from veiltune.randomness import SecureGenerator
from veiltune.runs import atomic_write_bytes

# Written for this purpose and public: the reference norm is measured on it, never on the customer's own text.
CALIBRATION_TEXTS = (
    "The train to the coast leaves every morning at half past seven.",
    "I ordered two lamps last week and only one of them arrived.",
    "Nobody expected the second half of the film to be this good.",
    "Please send the corrected invoice to our office before Friday.",
    "A small garden behind the house is full of tomatoes and beans.",
    "What is the fastest way to get from the airport to the museum?",
    "The new update makes my phone slow and drains the battery.",
    "Scientists measured the temperature of the lake for ten years.",
    "He was tired, but the story was too exciting to put down.",
    "Our team lost the match in the last minute, which was painful.",
    "The soup needs more salt and a little bit of lemon juice.",
    "She asked whether the meeting could be moved to Thursday.",
)
LONG_NORM = 3.0  # times the reference norm; a token that long has less than a third of the noise asked for
NORM_BATCH = 32
_SEEDED = "nothing is protected: whoever knows noise_seed draws the same noise and takes it away"


def run_secret(private: Path, noise_seed: int | None) -> bytes:
    """The 32 bytes that all noise of a run derives from: drawn once from the operating system, or by a test's seed."""
    path = private / "secret"
    if not path.exists():
        fresh = os.urandom(32) if noise_seed is None else hashlib.sha256(f"seed {noise_seed}".encode()).digest()
        atomic_write_bytes(path, fresh, mode=0o600)
    return path.read_bytes()


@torch.no_grad()
def reference_norm(bundle: Bundle) -> float:
    """Mean L2 norm of a token's representation at the cut, over public sentences."""
    token_ids = encode_texts(bundle.tokenizer, CALIBRATION_TEXTS, max_length=64)
    ids, mask = pad_ids(token_ids)
    norms = bundle.bottom.eval()(ids, mask).float().norm(dim=-1)
    return float(norms[mask.bool()].mean())


@torch.no_grad()
def long_token_share(
    clean: Callable[[Sequence[Sequence[int]]], Tensor],
    token_ids: Sequence[Sequence[int]],
    *,
    special_ids: Collection[int],
    reference_norm: float,
) -> float:
    """Share of tokens whose clean vector is more than `LONG_NORM` reference norms long, special tokens left out.

    The vendor sends the bottom that the reference norm is measured with, so what is measured on public sentences is
    held against the customer's own. Models have such tokens of themselves (attention sinks, in SmolLM2 up to 6 %).

    Args:
        clean: Sequences -> (N, H), one after the other.
        token_ids: Own sequences.
        special_ids: Token ids that are no secret.
        reference_norm: Of public sentences.
    """
    special, long, count = torch.tensor(sorted(special_ids)), 0, 0
    ordered = sorted(token_ids, key=len)
    for start in range(0, len(ordered), NORM_BATCH):
        batch = ordered[start : start + NORM_BATCH]
        own = ~torch.isin(torch.tensor([token for ids in batch for token in ids]), special)
        norms = clean(batch).norm(dim=-1)[own]
        long, count = long + int((norms > LONG_NORM * reference_norm).sum()), count + len(norms)
    return long / max(count, 1)


def privatizer_for(config: TuneConfig, *, dim: int, reference_norm: float) -> Privatizer:
    """The mechanism of the config, its strength in all three measures."""
    privacy = config.privacy
    return make_privatizer(
        privacy.mechanism,
        dim=dim,
        reference_norm=reference_norm,
        eta=privacy.eta,
        noise_to_norm=privacy.noise_to_norm,
        snr_db=privacy.snr_db,
    )


def protect_labels(
    labels: Sequence[int], keys: Sequence[bytes], *, num_classes: int, config: TuneConfig, secret: bytes, memo: Path
) -> tuple[list[int], Tensor | None]:
    """The labels that the loss will see, and the flip matrix that corrects it.

    Randomised response is drawn once per example, by a generator derived from the run's secret, and kept: every epoch
    and every resumption sees the same answer, so the guarantee does not compose over epochs.

    Args:
        labels: The true classes.
        keys: Release key of each example; copies of a text get answers of their own, or whether these agree would
            tell whether their labels do.
        num_classes: C.
        config: Says `disclosed` or `randomized_response` and its epsilon.
        secret: The run's secret.
        memo: File that keeps the answers.
    """
    if config.privacy.labels == "disclosed":
        return list(labels), None
    epsilon = config.privacy.label_epsilon
    if memo.exists():
        kept = load_file(memo)["labels"].tolist()
        if len(kept) != len(labels):
            raise PrivacyError(
                f"the run has {len(kept)} protected labels for now {len(labels)} examples; start a new run folder"
            )
        return kept, flip_matrix(num_classes, epsilon)
    root = SecureGenerator(secret)
    drawn = [
        int(
            randomize_labels(
                torch.tensor([label]),
                num_classes=num_classes,
                epsilon=epsilon,
                generator=root.derive("label", key, label, copy),
            )
        )
        for key, label, copy in zip(keys, labels, _copies(keys), strict=True)
    ]
    atomic_write_bytes(memo, save({"labels": torch.tensor(drawn)}), mode=0o600)
    return drawn, flip_matrix(num_classes, epsilon)


def _copies(keys: Sequence[bytes]) -> list[int]:
    """How many earlier examples have the same key, of each."""
    seen: Counter[bytes] = Counter()
    found = []
    for key in keys:
        found.append(seen[key])
        seen[key] += 1
    return found


def contributing_tokens(
    config: TuneConfig, token_ids: Sequence[Sequence[int]], labels: Sequence[int], *, num_classes: int, vocab_size: int
) -> ContributingTokens | None:
    """The token importance of the config, fitted on the protected labels; None if it is off."""
    privacy = config.privacy
    if privacy.cti == "off":
        return None
    return ContributingTokens.fit(
        token_ids,
        labels,
        num_classes=num_classes,
        vocab_size=vocab_size,
        variant=privacy.cti,
        top_fraction=privacy.cti_top_fraction,
        top_multiplier=privacy.cti_top_multiplier,
        at_inference=privacy.cti_at_inference,
    )


def statement(
    config: TuneConfig,
    privatizer: Privatizer,
    totals: LedgerTotals,
    *,
    finished_model: object,
    long_tokens: object,
    num_classes: int,
) -> dict[str, object]:
    """privacy.json: what was released how often, what that is claimed to protect, and what it does not."""
    frozen, seeded = config.split.bottom == "frozen", config.noise_seed is not None
    claim = privatizer.claim(num_releases=max(totals.max_releases_per_example, 1), scaled=config.privacy.cti != "off")
    return {
        "representations": (_without_bounds(claim) if seeded and privatizer.strength else claim)
        | {
            "cut_layer": config.split.cut_layer,
            "cut_embeddings": config.split.cut_embeddings,
            "examples_released": totals.examples,
            "releases": totals.releases,
            "max_releases_per_example": totals.max_releases_per_example,
            "tokens": totals.tokens,
            "share_of_tokens_with_less_than_a_third_of_the_noise": long_tokens if config.privacy.cti == "off" else None,
            "bottom": config.split.bottom,
            "replay": "each text once, the same bytes ever after"
            if frozen
            else "a new release of each text in every epoch",
        },
        "contributing_tokens": _contributing_statement(config),
        "labels": _label_statement(config, num_classes),
        "finished_model": finished_model,
        "lengths": f"vectors in multiples of {config.wire.pad_to}; padding can be read as words can"
        if config.wire.pad_to
        else "shown exactly",
        "randomness": "operating system CSPRNG"
        if config.noise_seed is None
        else f"noise_seed {config.noise_seed}: for tests only, protects nothing",
        "adversary": "the vendor, who holds the bottom model and sees every release; others see TLS",
    }


def _without_bounds(claim: dict[str, object]) -> dict[str, object]:
    """The claim of noise that a seed makes: none."""
    return {name: math.inf if name.startswith("composed") else value for name, value in claim.items()} | {
        "statement": _SEEDED
    }


def _label_statement(config: TuneConfig, num_classes: int) -> dict[str, object]:
    if config.privacy.labels == "disclosed":
        return {
            "mode": "disclosed",
            "statement": "labels disclosed: the returned gradients reveal every label exactly",
        }
    epsilon, seeded = config.privacy.label_epsilon, config.noise_seed is not None
    return {
        "mode": "randomized_response",
        "claimed_label_epsilon": math.inf if seeded else epsilon,
        "unit": "one example's label, replace-one",
        "keep_probability": keep_probability(num_classes, epsilon),
        "statement": _SEEDED
        if seeded
        else "each label was randomised once; all epochs are post-processing of that draw",
    }


def _contributing_statement(config: TuneConfig) -> dict[str, object]:
    if config.privacy.cti == "off":
        return {"mode": "off"}
    return {
        "mode": config.privacy.cti,
        "at_inference": config.privacy.cti_at_inference,
        "statement": "positions of contributing tokens are disclosed by the radius of their noise; their list was"
        " fitted on the training texts without noise, so no d_chi bound holds between differently scaled tokens",
    }
