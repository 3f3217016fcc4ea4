"""Side channels of a run: what its releases tell besides tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veiltune.attacks.averaging import averaged_eta
from veiltune.attacks.labels import score_labels
from veiltune.attacks.ranking import MIN_PER_CLASS, roc_auc, roc_curve
from veiltune.attacks.sidechannels import (
    denoised_reference,
    labels_from_radius,
    noise_scale_from_special_tokens,
    noise_scale_scores,
    repeated_noise,
    replayed_differently,
    score_lengths,
    text_lengths,
)
from veiltune.audit.attempts import NotApplicableError, attempt
from veiltune.audit.record import Attack, Estimate, Rate
from veiltune.audit.scene import Scene
from veiltune.customer.outbox import Outbox
from veiltune.privatize.mechanisms import DChi, Gaussian


class SideChannels:
    """The attacks, given an inverter's guesses.

    Args:
        scene: Of the audit.
        guesses: (N,) token ids, one for every position.
    """

    def __init__(self, scene: Scene, guesses: Tensor) -> None:
        self._scene, self._guesses = scene, guesses
        self._reference: Tensor | None = None

    def run(self) -> tuple[Attack, ...]:
        """Every side channel, in the order of the report."""
        sees = "the released vectors, and guesses of their tokens by the strongest inversion attack on all"
        return (
            attempt("radius", "contributing tokens by the radius of their noise", sees, self._radius),
            attempt("radius_labels", "labels by the radius of the noise", f"{sees}; the table of scales", self._labels),
            attempt("length", "length of each text", "the number of vectors of each text", self._lengths),
            attempt("special_tokens", "strength of the noise from special tokens", sees, self._strength),
            attempt("repeated_noise", "the same noise on two texts", "released and clean vectors", self._repeated),
            attempt("replay", "asking for the same text again", "the bytes of two requests", self._replay),
        )

    def _residuals(self) -> Tensor:
        """Released vectors minus the clean vectors of the guessed texts, which the attacker computes himself."""
        self._law()
        if self._reference is None:
            texts = [piece.tolist() for piece in self._guesses.split(list(self._scene.lengths))]
            begins = self._beginning()
            self._reference = self._scene.adversary.clean([[*begins, *text[len(begins) :]] for text in texts])
        return self._scene.values - self._reference

    def _law(self) -> str:
        privatizer = self._scene.audited.releaser.privatizer
        if isinstance(privatizer, DChi | Gaussian):
            return privatizer.name
        raise NotApplicableError("the run adds no noise")

    def _radius(self) -> dict[str, Any]:
        """Three ways to rank positions by their noise; the best on the calibration half is reported on the other."""
        scene, adversary = self._scene, self._scene.adversary
        ways = {"guesses": noise_scale_scores(scene.values, scene.values - self._residuals())}
        ways["norm"] = noise_scale_scores(scene.values)
        if len(adversary.public_clean) > 4 * scene.values.shape[1]:
            noised = adversary.privatize(adversary.public_clean)
            denoised = denoised_reference(scene.values, adversary.public_clean, noised)
            ways["denoised"] = noise_scale_scores(scene.values, denoised)
        half = scene.truth.real & scene.truth.calibration
        chosen = max(ways, key=lambda way: self._ranking(ways[way], half)[0])
        other = scene.truth.real & ~scene.truth.calibration
        value, low, high = self._ranking(ways[chosen], other)
        scaled = scene.audited.releaser.contributing is not None
        reason = "" if scaled else "noise is shared: what is ranked are the tokens, not their noise"
        return {
            "auc": Estimate(value=value, low=low, high=high),
            "roc": roc_curve(ways[chosen][other], scene.groups["contributing"][other], points=51),
            "reason": reason,
            "settings": {"way": chosen},
        }

    def _ranking(self, scores: Tensor, among: Tensor) -> tuple[float, float, float]:
        numbers = _text_numbers(self._scene.lengths)[among]
        kinds, texts = self._scene.groups["contributing"][among], numbers.tolist()
        if min(len(numbers[side].unique()) for side in (kinds, ~kinds)) < MIN_PER_CLASS:
            raise NotApplicableError(
                f"a ranking needs {MIN_PER_CLASS} texts with contributing tokens and {MIN_PER_CLASS} with others"
            )
        return roc_auc(scores[among], kinds, groups=texts)

    def _labels(self) -> dict[str, Any]:
        scene = self._scene
        fitted, privatizer = scene.audited.releaser.contributing, scene.audited.releaser.privatizer
        if fitted is None or bool((fitted.table == fitted.table[:1]).all()):
            raise NotApplicableError("the noise does not depend on the label")
        assert isinstance(privatizer, DChi | Gaussian)
        radii = torch.linalg.vector_norm(self._residuals(), dim=-1)
        law = privatizer.name if scene.views == 1 else Gaussian.name  # of a mean of several releases
        found = labels_from_radius(
            radii, self._guesses, scene.lengths, fitted.table,
            eta=averaged_eta(privatizer.eta, scene.views), dim=privatizer.dim, law=law,
        )  # fmt: skip
        labels = torch.tensor(scene.audited.true_labels)[scene.rows]
        return {"reported": Rate.of(score_labels(found, labels, "radius_labels"))}

    def _lengths(self) -> dict[str, Any]:
        scene = self._scene
        config, tokenizer = scene.audited.config, scene.audited.bundle.tokenizer
        sent = torch.tensor(scene.lengths)
        if not config.wire.pad_to:
            return {"reported": Rate.of(score_lengths(sent, sent)), "reason": "lengths are sent as they are"}
        pad = int(tokenizer.pad_token_id)
        true = torch.tensor([_unpadded(ids, pad) for ids in scene.token_ids])
        found = text_lengths(self._guesses, scene.lengths, pad)
        blind = score_lengths(_commonest_lengths(scene.lengths, scene.public.token_ids, pad), true).success_rate
        settings = {"pad_to": config.wire.pad_to, "blind_guess": blind}
        return {"reported": Rate.of(score_lengths(found, true)), "settings": settings}

    def _strength(self) -> dict[str, Any]:
        scene, privatizer = self._scene, self._scene.audited.releaser.privatizer
        slots = self._first_slots()
        clean = (scene.values - self._residuals())[slots]
        eta, low, high = noise_scale_from_special_tokens(scene.values[slots], clean, law=self._law())
        assert isinstance(privatizer, DChi | Gaussian)
        true = privatizer.eta * scene.views**0.5 * float(scene.multipliers[slots].mean())
        return {
            "reason": "the strength of a mechanism is no secret; this shows that an attacker need not be told",
            "settings": {"eta_found": eta, "eta_low": low, "eta_high": high, "eta_true": true},
        }

    def _repeated(self) -> dict[str, Any]:
        """A check of the run rather than an attack: the noise itself, at the first position of every text."""
        self._law()
        scene, slots = self._scene, self._first_slots()
        noise = (scene.values - scene.adversary.clean(scene.token_ids))[slots]
        return {"reported": Rate.of(repeated_noise(noise))}

    def _replay(self) -> dict[str, Any]:
        scene, audited = self._scene, self._scene.audited
        if not audited.frozen:
            raise NotApplicableError("a trainable bottom releases each text anew in every epoch; see repeated releases")
        keys = [audited.keys[row] for row in scene.rows]
        before = _bytes(audited.releaser.outbox, keys)
        totals = audited.releaser.ledger.totals()
        audited.releaser.prepare(scene.token_ids, None, part="replay")
        after = _bytes(audited.releaser.outbox, keys)
        fresh = audited.releaser.ledger.totals().releases - totals.releases
        result = replayed_differently(before, after)
        return {"reported": Rate.of(result), "settings": {"new_releases": fresh}}

    def _beginning(self) -> tuple[int, ...]:
        """The special tokens that every text begins with."""
        adversary = self._scene.adversary
        return adversary.template[: adversary.position]

    def _first_slots(self) -> Tensor:
        """(B,) the first position of each text, whose token the attacker knows."""
        if not self._beginning():
            raise NotApplicableError("this tokenizer begins no text with a special token")
        return torch.tensor([0, *self._scene.lengths[:-1]]).cumsum(0)


def _text_numbers(lengths: Sequence[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def _unpadded(ids: Sequence[int], pad: int) -> int:
    return sum(token != pad for token in ids)


def _commonest_lengths(sent: Sequence[int], public: Sequence[Sequence[int]], pad: int) -> Tensor:
    """(B,) a guess by the number of vectors alone: the commonest length of public texts that take as many."""
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for ids in public:
        counts[len(ids)][_unpadded(ids, pad)] += 1
    return torch.tensor([counts[size].most_common(1)[0][0] if counts[size] else size for size in sent])


def _bytes(outbox: Outbox, keys: Sequence[bytes]) -> list[bytes]:
    return [outbox.get([key]).values.view(torch.uint8).numpy().tobytes() for key in keys]
