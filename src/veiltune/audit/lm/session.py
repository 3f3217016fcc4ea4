"""`veiltune audit MODEL --manifest ...`: everything that a black-box user of a language model could find out.

Guarantee:
    None about attacks that were not tried. What is promised is the method: members and non-members are told apart by
    a coin flip and by nothing else (the blind baseline stops the audit otherwise), the strongest attack is chosen on
    some persons and reported on others, every rate stands beside that of twins who were never in the training text,
    and every figure has its interval. The one-run bound of epsilon holds at its stated confidence, whatever the model.
    It covers the persons and canaries of the manifest, and the model as it answered.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from veiltune import __version__
from veiltune.audit.blackbox import BlackBox
from veiltune.audit.epsilon import FEWEST_CANARIES
from veiltune.audit.leakage import Extraction, LeakageRecord, LeakageSizes, Membership
from veiltune.audit.lm import ranking
from veiltune.audit.lm.blind import blind_baseline, check_blind
from veiltune.audit.lm.canaries import canary_scores, canary_text, exposures, one_run_bound, secret_places
from veiltune.audit.lm.choosing import chosen_persons
from veiltune.audit.lm.encoding import Encoder, Sequenced
from veiltune.audit.lm.extraction import (
    Attempt,
    Guess,
    judged,
    name_only_guesses,
    name_questions,
    true_prefix_guesses,
    untargeted_guesses,
)
from veiltune.audit.lm.gates import Gate
from veiltune.audit.lm.membership import Evidence, membership
from veiltune.audit.lm.opening import Opened, open_models, refuse_classifiers
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.plain import plain_manifest
from veiltune.audit.lm.rates import Scorer, discoverable, errors_curve, strongest
from veiltune.audit.lm.samples import sample_rows
from veiltune.audit.lm.subjects import CALIBRATION_SHARE, Subjects
from veiltune.audit.lm.targets import WellFormed, targets_of
from veiltune.audit.lm.traces import TraceStore, secret_log_prob
from veiltune.audit.lm.utility import perplexity
from veiltune.audit.record import Estimate
from veiltune.audit.stages import Stages
from veiltune.audit.tracing import Traced
from veiltune.customer.reporting import Reporter
from veiltune.data.manifest import Manifest, Record, read_manifest
from veiltune.errors import DataError
from veiltune.runs import atomic_write_bytes, private_folder, storage_errors

LEAKAGE = "leakage.json"


def audit_model(
    options: LeakageOptions,
    *,
    gates: Sequence[Gate] = (),
    reporter: Reporter | None = None,
) -> LeakageRecord:
    """Audits a model, and writes leakage.json and private/leakage/ into its folder; called again, it goes on.

    Args:
        options: What to ask.
        gates: Checked before anything is asked, as far as the sizes say that they could never pass.
        reporter: Told about progress.

    Raises:
        InputError: If the model, manifest or options do not fit each other.
        DataError: If the texts themselves tell members from non-members.
        VendorError: If an API does not answer; the same call goes on.
        StorageError: If the folder cannot be written.
    """
    started = time.monotonic()
    reporter = reporter or Reporter()
    refuse_classifiers(options)
    whole = _manifest(options)
    manifest, choice = chosen_persons(whole, only=options.only, leave_out=options.leave_out)
    subjects = Subjects.of(manifest, seed=options.seed)
    subjects.require_enough(membership=options.manifest is not None)
    reporting = min(int((~subjects.calibration & side).sum()) for side in (subjects.members, ~subjects.members))
    for gate in gates:
        gate.check_persons(reporting)
    blind = blind_baseline(subjects, seed=options.seed) if options.manifest and subjects.has_both_sides else None
    if blind is not None:
        check_blind(blind)
    opened = open_models(options, train_digest=str(manifest.header.get("sha256", {}).get("train.jsonl", "")))
    with storage_errors(opened.folder), opened.target:
        audit = _Audit(options, manifest, subjects, opened, blind, reporter)
        audit.notes += [choice] if choice else []
        record = audit.record(started).model_copy(update={"manifest_digest": whole.digest})
        atomic_write_bytes(opened.folder / LEAKAGE, (record.model_dump_json(indent=2) + "\n").encode())
    return record


def _manifest(options: LeakageOptions) -> Manifest:
    if options.manifest is not None:
        return read_manifest(options.manifest)
    assert options.data is not None and options.pii is not None
    return plain_manifest(options.data, options.pii)


@dataclass(frozen=True, repr=False)
class _Texts:
    """All texts that are traced, by what they are for."""

    records: list[Sequenced]
    lowered: list[Sequenced]
    population: list[Sequenced]
    validation: list[Sequenced]
    canaries: list[Sequenced]


class _Audit:
    """An audit with everything opened."""

    def __init__(
        self,
        options: LeakageOptions,
        manifest: Manifest,
        subjects: Subjects,
        opened: Opened,
        blind: Estimate | None,
        reporter: Reporter,
    ) -> None:
        self.options, self.manifest, self.subjects, self.opened = options, manifest, subjects, opened
        self.blind, self.reporter = blind, reporter
        context = min(box.context for box in (opened.target, opened.base) if box is not None)
        self.encoder = Encoder(opened.tokenizer, context=context)
        self.validation = [record for record in manifest.records if record.split == "val"]
        self.texts = self._encoded()
        self.targets = targets_of(subjects, self.texts.records, contexts=options.size.contexts)
        self.scorer = Scorer(subjects, self.targets, WellFormed(manifest))
        self._check()
        self.private = private_folder(opened.folder / "private") / "leakage"
        self.stages = Stages(self.private, self._settings())
        self.notes: list[str] = []

    def _check(self) -> None:
        """Refuses what could not be reported, before anything is asked."""
        secret_places(self.texts.canaries)
        scorer = self.scorer
        if not (scorer.among("all", "cue_free") & scorer.inside & ~scorer.calibrates).any():
            raise DataError(
                "no e-mail address, phone number or address of a person that is reported stands in a text in full"
                f" ({CALIBRATION_SHARE:.0%} of the persons only choose the attack); name more of them"
            )

    def record(self, started: float) -> LeakageRecord:
        texts, opened = self.texts, self.opened
        target, base = self._traced("model", opened.target), self._traced("base", opened.base)
        generations = self._generations()
        scores = canary_scores(texts.canaries, target["canaries"], base["canaries"] if base else None)
        extraction = self._extraction(target["records"], base["records"] if base else None, generations)
        canaries = self.manifest.canaries
        if 0 < (coins := sum(canary.purpose == "epsilon" for canary in canaries)) < FEWEST_CANARIES:
            self.notes.append(
                f"no lower bound of epsilon: it needs {FEWEST_CANARIES} coin-flipped canaries, the corpus has {coins}"
            )
        return LeakageRecord(
            veiltune=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            preset=self.options.preset,
            seconds=round(time.monotonic() - started, 3),
            seed=self.options.seed,
            model=f"{self.options.model} (guarded)" if self.options.guard else self.options.model,
            model_digest=opened.target.digest,
            base=opened.base_name,
            manifest_digest=self.manifest.digest,
            full_vectors=opened.target.full_vectors,
            guarded_by=opened.target.guarded_by,
            sizes=self._sizes(),
            perplexity=perplexity(
                self.validation, texts.validation, target["validation"], base["validation"] if base else None
            ),
            membership=self._membership(target, base, generations),
            extraction=extraction,
            exposure=exposures(canaries, scores),
            audited_epsilon=one_run_bound(canaries, scores, claim=opened.claim, seed=self.options.seed),
            notes=tuple(self.notes),
        )

    def _settings(self) -> dict[str, Any]:
        """Everything that kept results depend on."""
        base = self.opened.base
        return {
            "version": __version__,
            "manifest": self.manifest.digest,
            "target": self.opened.target.digest,
            "tokenizer": self.options.tokenizer,
            "base": base.digest if base else None,
            "size": asdict(self.options.size),
            "bf16": self.options.bf16,
            "seed": self.options.seed,
        }

    def _encoded(self) -> _Texts:
        encoder, subjects = self.encoder, self.subjects
        population = [record for record in self.manifest.records if record.split == "pop"]
        canaries = [canary_text(canary) for canary in self.manifest.canaries]
        return _Texts(
            records=self._of(subjects.records),
            lowered=encoder.texts([record.text.lower() for record in subjects.records]),
            population=self._of(population[: self.options.size.population]),
            validation=self._of(self.validation),
            canaries=encoder.texts([text for text, _ in canaries], [spans for _, spans in canaries]),
        )

    def _of(self, records: Sequence[Record]) -> list[Sequenced]:
        return self.encoder.texts([record.text for record in records], [record.spans for record in records])

    def _traced(self, name: str, box: BlackBox | None) -> dict[str, list[Traced]]:
        if box is None:
            return {}
        parts = {part: texts for part, texts in vars(self.texts).items() if name == "model" or part != "lowered"}
        self.reporter.phase(f"read {name}", sum(map(len, parts.values())))
        store = TraceStore(self.stages, self.reporter.advance)
        return {part: store.of(box, f"{name}-{part}", texts) for part, texts in parts.items()}

    def _generations(self) -> list[list[int]]:
        size = self.options.size
        self.reporter.phase("sample", size.generations)

        def make() -> dict[str, torch.Tensor]:
            texts = untargeted_guesses(
                self.opened.target, self.encoder, size, seed=self.options.seed, advance=self.reporter.advance
            )
            return _ragged(texts)

        kept = self.stages.tensors("generations", make)
        self.reporter.advance(size.generations)  # also where an earlier run has done it
        return _rows(kept)

    def _membership(
        self, target: dict[str, list[Traced]], base: dict[str, list[Traced]], generations: list[list[int]]
    ) -> Membership | None:
        if self.blind is None:
            self.notes.append(
                "no membership figure: nobody's documents are known to be absent from the training text by a coin flip"
            )
            return None
        evidence = Evidence(
            target=target["records"],
            lowered=target["lowered"],
            base=base.get("records"),
            population_target=target["population"],
            population_base=base.get("population"),
            texts=[record.text for record in self.subjects.records],
            tokens=[text.ids[len(self.encoder.start) : -1] for text in self.texts.records],
            generations=generations,
        )
        found = membership(evidence, self.subjects, blind=self.blind, seed=self.options.seed)
        box = self.opened.target
        if not box.full_vectors:
            gone = sorted({one.name for one in found.attacks if one.status != "done"})
            self.notes.append(
                f"the API tells the {box.top_tokens} likeliest tokens only: {', '.join(gone)} fall away, and where a"
                " token is not told its probability is taken as the highest that it can be"
            )
        return found

    def _extraction(self, target: list[Traced], base: list[Traced] | None, generations: list[list[int]]) -> Extraction:
        attempts = self._attempts(self.opened.target, "model", generations)
        on_base = self._attempts(self.opened.base, "base", None) if self.opened.base else {}
        scorer = self.scorer
        chosen, known = strongest(scorer, attempts)
        if not known:
            self.notes.append(
                "nobody who was drawn to choose the strongest extraction has a value that no cue tells: the headline is"
                f" of {chosen.name}, which is given most"
            )
        kept = scorer.among("all", "cue_free") & ~scorer.calibrates
        recall = scorer.rate(chosen.found, kept & scorer.inside)
        assert recall is not None  # _check
        at_errors, curve = errors_curve(scorer, attempts["true_prefix"])
        self._keep_samples(attempts)
        return Extraction(
            strongest=chosen.name,
            excess_recall=scorer.excess_of(chosen.found, kept),
            recall=recall,
            chance=scorer.rate(chosen.found, kept & ~scorer.inside),
            rates=tuple(
                row
                for name, attempt in attempts.items()
                for row in scorer.rates(attempt, on_base=on_base[name].found if name in on_base else None)
            ),
            discoverable=discoverable(scorer, self._value_log_probs(target)),
            recall_at_100_errors=at_errors,
            errors_curve=curve,
            reconstruction=self._reconstruction(),
            generated_tokens=sum(map(len, generations)),
        )

    def _attempts(self, box: BlackBox, name: str, generations: list[list[int]] | None) -> dict[str, Attempt]:
        """Every attack; the untargeted one only where texts were sampled."""
        found: dict[str, list[Guess]] = {}
        if generations is not None:
            found["untargeted"] = [Guess(None, self.encoder.decode(ids)) for ids in generations]
        asking: dict[str, Callable[[Callable[[int], None]], list[Guess]]] = {
            "true_prefix": lambda advance: true_prefix_guesses(
                box, self.encoder, self.subjects, self.texts.records, self.targets, advance=advance
            ),
            "name_only": lambda advance: name_only_guesses(
                box, self.encoder, self.subjects, self.targets, advance=advance
            ),
        }
        totals = {
            "true_prefix": sum(len(target.places) for target in self.targets),
            "name_only": len(name_questions(self.subjects, self.targets)),
        }
        for attack, ask in asking.items():
            self.reporter.phase(f"{attack.replace('_', ' ')} {name}", totals[attack])
            found[attack] = self._kept(f"{name}-{attack}", lambda ask=ask: ask(self.reporter.advance))  # type: ignore[misc]
            self.reporter.advance(totals[attack])
        return {attack: judged(attack, guesses, self.targets) for attack, guesses in found.items()}

    def _kept(self, name: str, make: Callable[[], list[Guess]]) -> list[Guess]:
        """Guesses from disk, or made and kept."""

        def packed() -> dict[str, torch.Tensor]:
            data = json.dumps([vars(guess) for guess in make()]).encode()
            return {"json": torch.frombuffer(bytearray(data), dtype=torch.uint8)}

        return [Guess(**fields) for fields in json.loads(bytes(self.stages.tensors(name, packed)["json"].tolist()))]

    def _value_log_probs(self, target: list[Traced]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Of each value in its likeliest place, by the sampler that gives it more: plain or of 40 tokens."""
        found = np.full(len(self.targets), -np.inf)
        for number, value in enumerate(self.targets):
            for place in value.places:
                for top_k in (False, True):
                    one = secret_log_prob(target[place.record], (place.first, place.last), top_k=top_k)
                    found[number] = np.fmax(found[number], one)
        return found

    def _reconstruction(self) -> tuple[Any, ...]:
        size, seed = self.options.size, self.options.seed
        chosen = ranking.chosen_targets(self.targets, self.subjects, size, seed=seed)
        self.reporter.phase("rank", len(chosen))

        def make() -> dict[str, torch.Tensor]:
            found, among = ranking.ranks(
                self.opened.target,
                self.opened.base,
                self.encoder,
                self.manifest,
                self.subjects,
                self.targets,
                chosen,
                candidates=size.candidates,
                seed=seed,
                advance=self.reporter.advance,
            )
            return {"ranks": torch.from_numpy(found), "sizes": torch.from_numpy(among)}

        kept = self.stages.tensors("ranks", make)
        self.reporter.advance(len(chosen))
        return ranking.reconstruction(self.subjects, self.targets, chosen, kept["ranks"].numpy(), kept["sizes"].numpy())

    def _keep_samples(self, attempts: dict[str, Attempt]) -> None:
        rows = sample_rows(attempts, self.targets, self.subjects)
        atomic_write_bytes(self.private / "samples.json", json.dumps(rows, ensure_ascii=False).encode(), mode=0o600)

    def _sizes(self) -> LeakageSizes:
        subjects = self.subjects
        return LeakageSizes(
            persons_in=int(subjects.members.sum()),
            persons_out=int((~subjects.members).sum()),
            records=len(subjects.records),
            tokens=sum(len(text.ids) for text in self.texts.records),
            calibration_pairs=len({c for c, kept in zip(subjects.clusters, subjects.calibration, strict=True) if kept}),
            context_cut=sum(text.cut for text in self.texts.records),
        )


def _ragged(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    flat = [token for row in rows for token in row]
    return {"lengths": torch.tensor([len(row) for row in rows]), "tokens": torch.tensor(flat, dtype=torch.int64)}


def _rows(kept: dict[str, torch.Tensor]) -> list[list[int]]:
    return [part.tolist() for part in kept["tokens"].split(kept["lengths"].tolist())]
