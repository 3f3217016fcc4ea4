"""Embedding inversion in an audit: every attack of the suite, the strongest of them, controls, repeated releases."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from veiltune.attacks.inversion import invert_by_nearest_embedding
from veiltune.attacks.sequences import rouge_l
from veiltune.audit import scoring
from veiltune.audit.attempts import NotApplicableError, failure
from veiltune.audit.record import Attack, Control, Inversion, RepeatedRelease
from veiltune.audit.scene import Scene, fresh_noise
from veiltune.audit.stages import Stages
from veiltune.audit.suite import INVERSIONS, Guesses, InversionAttack
from veiltune.customer.reporting import Reporter
from veiltune.errors import PrivacyError, StorageError

POSITIVE_LEAST = 0.9  # of the tokens that attackers must read where there is no noise


def run_suite(scene: Scene, stages: Stages, reporter: Reporter) -> tuple[dict[str, Guesses], dict[str, Attack]]:
    """Runs every inversion attack; what failed or does not apply has an entry with the reason and no guesses."""
    guesses: dict[str, Guesses] = {}
    entries: dict[str, Attack] = {}
    reporter.phase("inversion", len(INVERSIONS))
    for number, (name, attack) in enumerate(INVERSIONS.items(), start=1):
        entry = Attack(name=name, title=attack.title, sees=attack.sees, status="done")
        try:
            kept = stages.tensors(f"inversion-{name}", partial(_attack, scene, attack))
        except NotApplicableError as error:
            entries[name] = entry.model_copy(update={"status": "not_applicable", "reason": str(error)})
        except StorageError:
            raise  # the disk is full: nothing is wrong with the attack
        except Exception as error:
            entries[name] = entry.model_copy(update={"status": "failed", "reason": failure(error)})
        else:
            guesses[name] = Guesses(kept["ids"], kept["attempted"])
            entries[name] = _scored(scene, entry, guesses[name], float(kept["seconds"]))
        reporter.advance(number)
    if not any(bool(guess.attempted.all()) for guess in guesses.values()):
        raise PrivacyError("every inversion attack on all texts failed, so nothing can be said about the releases")
    return guesses, entries


def report_inversion(
    scene: Scene, guesses: dict[str, Guesses], entries: dict[str, Attack], stages: Stages, reporter: Reporter
) -> tuple[Inversion, tuple[Control, Control], str]:
    """The strongest attack by the calibration half, groups, frequencies, repeated releases and both controls."""
    truth, seed = scene.truth, scene.options.seed
    hits, attempted = _hits(scene, guesses), {name: guess.attempted for name, guess in guesses.items()}
    enough = scoring.with_enough_tokens(attempted, truth.real, truth)
    strongest = scoring.best_attack({name: hits[name] for name in enough}, attempted, truth.real & truth.calibration)
    assert strongest is not None
    reported = truth.real & ~truth.calibration & attempted[strongest]
    recovery = truth.rate(hits[strongest], reported, seed=seed)
    assert recovery is not None
    reporter.phase("controls", 2)
    clean = stages.tensors("positive", lambda: _without_noise(scene))
    positive = scoring.positive_control(
        {name: truth.hits(ids) for name, ids in clean.items()}, truth, truth.real, least=POSITIVE_LEAST, seed=seed
    )
    shuffled = scoring.shuffled_control(guesses[strongest].ids[:, 0], truth, reported, strongest, seed=seed)
    reporter.advance(2)
    inversion = Inversion(
        strongest=strongest,
        recovery=recovery,
        empirical_privacy=scoring.privacy_of(recovery),
        attacks=tuple(entries.values()),
        groups=tuple(
            scoring.group_rate(name, scene.described[name], hits, attempted, truth, mask, seed=seed)
            for name, mask in scene.groups.items()
        ),
        by_frequency=tuple(scoring.by_frequency(hits[strongest], truth, reported, scene.per_100k, seed=seed)),
        repeated=_repeated(scene, stages, reporter),
    )
    return inversion, (positive, shuffled), strongest


def guesses_of_all(scene: Scene, guesses: dict[str, Guesses]) -> Tensor:
    """(N,) token ids by the strongest of the attacks that tried every position."""
    whole = {name: guess for name, guess in guesses.items() if bool(guess.attempted.all())}
    attempted = {name: guess.attempted for name, guess in whole.items()}
    truth = scene.truth
    chosen = scoring.best_attack(_hits(scene, whole), attempted, truth.real & truth.calibration)
    assert chosen is not None
    return whole[chosen].ids[:, 0]


def _hits(scene: Scene, guesses: dict[str, Guesses]) -> dict[str, Tensor]:
    return {name: scene.truth.hits(guess.ids[:, 0]) for name, guess in guesses.items()}


def _attack(scene: Scene, attack: InversionAttack) -> dict[str, Tensor]:
    started = time.monotonic()
    found = attack.run(scene.adversary, scene.values, scene.lengths, scene.preset)
    seconds = torch.tensor(time.monotonic() - started)
    return {"ids": found.ids, "attempted": found.attempted, "seconds": seconds}


def _scored(scene: Scene, entry: Attack, guesses: Guesses, seconds: float) -> Attack:
    truth, seed = scene.truth, scene.options.seed
    hits, among = truth.hits(guesses.ids[:, 0]), truth.real & guesses.attempted
    other = among & ~truth.calibration
    in_five = (guesses.ids[:, :5] == truth.ids.unsqueeze(1)).any(dim=1)
    counts = [int(part.sum()) for part in other.split(list(truth.lengths))]
    return entry.model_copy(
        update={
            "seconds": round(seconds, 2),
            "calibration": truth.rate(hits, among & truth.calibration, seed=seed),
            "reported": truth.rate(hits, other, seed=seed),
            "reported_top5": truth.rate(in_five, other, seed=seed) if guesses.ids.shape[1] >= 5 else None,
            "rouge_l": rouge_l(guesses.ids[other, 0], truth.ids[other], counts),
        }
    )


def _without_noise(scene: Scene) -> dict[str, Tensor]:
    """The quick attackers of the suite on clean vectors of the same texts."""
    adversary = scene.adversary
    values = adversary.clean(scene.token_ids)
    bare = replace(
        adversary, privatize=lambda clean: clean, eta=None, sigma=None, _made={"codebook": adversary.codebook}
    )
    linear = bare.inverter("linear", passes=1).guess(values, scene.lengths, top_k=1)
    return {"nearest": invert_by_nearest_embedding(values, adversary.codebook)[:, 0], "linear": linear[:, 0]}


def _repeated(scene: Scene, stages: Stages, reporter: Reporter) -> tuple[RepeatedRelease, ...]:
    """What fresh noise at every release would have given away: the texts released again here, seen by nobody."""
    if scene.adversary.eta is None and scene.adversary.sigma is None:
        return ()
    reporter.phase("repeated", len(scene.preset.repeats))
    curve = []
    for number, count in enumerate(scene.preset.repeats, start=1):
        found = stages.tensors(f"repeated-{count}", partial(_averaged, scene, count))
        for name, ids in found.items():
            rate = scene.truth.rate(scene.truth.hits(ids), scene.truth.real & ~scene.truth.calibration, seed=0)
            assert rate is not None
            curve.append(RepeatedRelease(releases=count, attack=name, rate=rate))
        reporter.advance(number)
    return tuple(curve)


def _averaged(scene: Scene, count: int) -> dict[str, Tensor]:
    adversary, audited, seed = scene.adversary, scene.audited, scene.options.seed
    values = fresh_noise(audited, scene.token_ids, views=count, seed=seed + 2)(adversary.clean(scene.token_ids))
    practised = replace(
        adversary,
        privatize=fresh_noise(audited, scene.public.token_ids, views=count, seed=seed + 3),
        _made={"codebook": adversary.codebook},
    )
    linear = practised.inverter("linear", passes=1).guess(values, scene.lengths, top_k=1)
    return {"nearest": invert_by_nearest_embedding(values, adversary.codebook)[:, 0], "linear": linear[:, 0]}
