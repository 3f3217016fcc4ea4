"""`veiltune audit`: the suite on what really crossed the wire of a split run, and attacks.json.

Guarantee:
    None about attackers that were not tried: empirical privacy is an upper limit of what a run protects. What is
    promised is the method: the strongest attack is chosen on one half of the texts and reported on the other, every
    rate has an exact interval, attackers never share noise with the run, and two controls show that the suite reads
    what is not protected and that its scoring is at chance where there is nothing to read. It covers the texts that
    were sampled and the attacks that the record lists as done.
"""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from veiltune import __version__
from veiltune.audit.attributes import attribute_attacks, check_attribute
from veiltune.audit.bounds import Distances, label_bound, representation_bounds
from veiltune.audit.channels import SideChannels
from veiltune.audit.inverting import guesses_of_all, report_inversion, run_suite
from veiltune.audit.observing import open_run
from veiltune.audit.options import AuditOptions
from veiltune.audit.presets import PRESETS
from veiltune.audit.record import Attack, AttackRecord, Bound, Labels, Sizes
from veiltune.audit.scene import Scene, build_scene
from veiltune.audit.sections import extraction, label_attacks
from veiltune.audit.stages import Stages
from veiltune.audit.suite import Guesses
from veiltune.customer.reporting import Reporter
from veiltune.errors import InputError
from veiltune.runs import atomic_write_bytes, storage_errors

SAMPLE_TEXTS = 12


def audit_run(path: Path, options: AuditOptions, *, reporter: Reporter | None = None) -> AttackRecord:
    """Attacks a run's releases and writes attacks.json, and for the report's text panel private/audit/sample.json.

    Interrupted, it goes on after the last finished attack when called again with the same options.

    Args:
        path: The run folder.
        options: See `AuditOptions`.
        reporter: Told about progress.

    Raises:
        InputError: If the run, the public text or an option cannot be used; attacks.json is not written.
    """
    started = time.monotonic()
    if options.preset not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {options.preset!r}")
    if options.person and not options.attribute:
        raise InputError(f"person {options.person!r} parts texts for an attribute, and no attribute is named; name one")
    preset, reporter = PRESETS[options.preset], reporter or Reporter()
    with open_run(path) as audited, storage_errors(path):
        scene = build_scene(audited, options, preset)
        check_attribute(scene)  # refused before the attacks take their time
        stages = Stages(audited.run.private / "audit", _settings(scene))
        guesses, entries = run_suite(scene, stages, reporter)
        inversion, controls, strongest = report_inversion(scene, guesses, entries, stages, reporter)
        reporter.phase("the rest", 4)
        channels = SideChannels(scene, guesses_of_all(scene, guesses)).run()
        reporter.advance(1)
        labels = label_attacks(audited, seed=options.seed)
        reporter.advance(2)
        attributes = attribute_attacks(scene)
        reporter.advance(3)
        points, why_none = extraction(audited, seed=options.seed)
        reporter.advance(4)
        record = AttackRecord(
            veiltune=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            preset=preset.name,
            seconds=round(time.monotonic() - started, 1),
            seed=options.seed,
            public_source=scene.public.source,
            sizes=_sizes(scene),
            inversion=inversion,
            controls=controls,
            side_channels=channels,
            labels=labels,
            attributes=attributes,
            extraction=points,
            bounds=tuple(_bounds(scene, labels)),
            notes=tuple(_notes(scene, inversion.attacks, why_none)),
        )
        _write_sample(scene, guesses[strongest], strongest)
        audited.run.write_json("attacks.json", record.model_dump(mode="json"))
    return record


def _settings(scene: Scene) -> dict[str, object]:
    """What kept guesses depend on; the columns and terms that only count them are not among it."""
    releases = [scene.audited.keys[row].hex() for row in scene.rows]
    kept = {"public": scene.public.digest, "version": __version__, "bottom": scene.audited.bundle.digest}
    return asdict(scene.preset) | kept | {"seed": scene.options.seed, "releases": releases, "views": scene.views}


def _sizes(scene: Scene) -> Sizes:
    real = scene.truth.real
    return Sizes(
        texts=len(scene.rows),
        tokens=int(real.sum()),
        calibration_texts=len(scene.rows) // 2,
        reported_texts=len(scene.rows) - len(scene.rows) // 2,
        public_texts=len(scene.public.token_ids),
        public_tokens=scene.public.num_tokens,
        unseen_token_share=float((scene.per_100k[scene.truth.ids[real]] == 0).float().mean()),
    )


def _bounds(scene: Scene, labels: Labels) -> list[Bound]:
    adversary, audited = scene.adversary, scene.audited
    distances = Distances.between(adversary.codebook, adversary.public_flat, seed=scene.options.seed)
    found = representation_bounds(
        audited.releaser.privatizer,
        distances,
        num_releases=max(1, audited.releaser.ledger.totals().max_releases_per_example),
        clean=adversary.public_clean,
        commonest=float(scene.per_100k.max()) / 1e5,
        scaled=audited.config.privacy.cti != "off",
    )
    if labels.bound is not None and labels.claimed_epsilon is not None:
        found.append(label_bound(labels.claimed_epsilon, labels.bound))
    return found


def _notes(scene: Scene, attacks: tuple[Attack, ...], why_none: str) -> list[str]:
    failed = [attack.name for attack in attacks if attack.status == "failed"]
    notes = [
        "empirical privacy is an upper limit: an attacker who was not tried may read more",
        "special tokens are left out of every rate; the public text was taken to be like the private one",
    ]
    if failed:
        notes.append(f"attacks that failed ({', '.join(failed)}) are not counted: the strongest may be stronger")
    if scene.views > 1:
        notes.append(f"each text was released {scene.views} times; attackers saw the mean of all releases")
    if not scene.audited.frozen:
        notes.append(
            "bidirectional (BiSR) needs the vendor's top model, which a customer does not hold; in classification the"
            " cut gradient follows from the release and the label, so it adds nothing about the text"
        )
    if scene.audited.releaser.contributing is not None:
        notes.append("attackers were given the list of contributing tokens, since the radius gives it away")
    return notes + ([why_none] if why_none else [])


def _write_sample(scene: Scene, guesses: Guesses, attack: str) -> None:
    """A few reported texts, token by token, in the private folder: the only output with words in it."""
    tokenizer, truth = scene.audited.bundle.tokenizer, scene.truth
    recovered = truth.hits(guesses.ids[:, 0])
    columns: tuple[Tensor, ...] = (truth.ids, recovered, ~truth.real, scene.groups["personal"], guesses.attempted)
    texts = []
    for ids, found, special, personal, tried in zip(*(c.split(list(truth.lengths)) for c in columns), strict=True):
        if bool(tried.any()):
            texts.append(
                {
                    "tokens": tokenizer.convert_ids_to_tokens(ids.tolist()),
                    "recovered": found.tolist(),
                    "special": special.tolist(),
                    "personal": personal.tolist(),
                }
            )
    content = {"attack": attack, "texts": texts[len(texts) // 2 :][:SAMPLE_TEXTS]}
    path = scene.audited.run.private / "audit" / "sample.json"
    atomic_write_bytes(path, json.dumps(content).encode(), mode=0o600)
