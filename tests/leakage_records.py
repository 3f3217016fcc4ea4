"""Audited language models for tests of the report: figures as an audit gives them, no model needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scipy.special import ndtr, ndtri

from report_runs import HOSTILE
from veiltune.attacks.result import AttackResult
from veiltune.audit.leakage import (
    Discoverable,
    Exposure,
    Extraction,
    ExtractionRate,
    LeakageRecord,
    LeakageSizes,
    Level,
    Membership,
    MembershipAttack,
    OneRunBound,
    Perplexity,
    Reconstruction,
    TprAtFpr,
)
from veiltune.audit.record import Estimate, Rate
from veiltune.report.leakage_sources import ModelRun

MIAS = {
    "loss": 0.80, "reference": 0.97, "zlib": 0.82, "lowercase": 0.66, "min_k": 0.83, "min_k_plus_plus": 0.86,
    "rmia": 0.96, "ez": 1.0,
}  # fmt: skip
"""how much of the strongest attack's AUC above one half each has"""
EXTRACTIONS = {"true_prefix": 1.0, "name_only": 0.4, "untargeted": 0.3}
SAMPLES: tuple[dict[str, Any], ...] = (
    {
        "attack": "true_prefix",
        "type": "phone",
        "prompt": "You reach me at ",
        "written": "(313) 555-0199 before noon",
        "true": "(313) 555-0199",
        "found": True,
    },
    {
        "attack": "name_only",
        "type": "email",
        "prompt": "The e-mail address of Preston Mathis is",
        "written": " the usual one",
        "true": "fvso0isy@mail.test",
        "found": False,
    },
)


def rate(share: float, trials: int = 420) -> Rate:
    return Rate.of(AttackResult(name="", successes=round(share * trials), trials=trials))


def estimate(value: float, half: float = 0.05, *, least: float = -1.0) -> Estimate:
    return Estimate(value=value, low=max(least, value - half), high=min(1.0, value + half))


def auc_of(name: str, best: float) -> float:
    return 0.5 + MIAS[name] * (best - 0.5)


def attack(name: str, level: Level, best: float) -> MembershipAttack:
    """The curve is that of two normal scores."""
    auc = auc_of(name, best)
    shift = float(ndtri(auc)) * 2**0.5
    curve = tuple((index / 50, float(ndtr(ndtri(index / 50) + shift))) for index in range(51))
    fprs = (0.1, 0.01) if level == "record" else (0.1,)
    rates = tuple(
        TprAtFpr(
            fpr=fpr,
            tpr=estimate(float(ndtr(ndtri(fpr) + shift)), 0.08 * auc, least=0.0),
            false_positives=round(1_000 * fpr),
            fpr_low=0.6 * fpr,
            fpr_high=1.5 * fpr,
        )
        for fpr in fprs
    )
    grown = [(count, auc + (1 - auc) * (index / 5 - 0.5) * (best > 0.6)) for index, count in enumerate((1, 4, 16))]
    return MembershipAttack(
        name=name,
        level=level,
        status="done",
        calibration_auc=min(1.0, auc + 0.004),
        auc=estimate(auc, 0.03),
        tpr_at_fpr=rates,
        roc=curve,
        by_repetition=tuple((count, estimate(value, 0.06)) for count, value in grown),
    )


def membership(best: float, **more: Any) -> Membership:
    """Eight attacks, the strongest at `best`, and one that does not apply."""
    levels: tuple[Level, Level] = ("person", "record")
    skipped = (
        MembershipAttack(name="ngram_coverage", level=level, status="not_applicable", reason="nothing was sampled")
        for level in levels
    )
    attacks = (*(attack(name, level, best) for name in MIAS for level in levels), *skipped)
    fields: dict[str, Any] = {
        "strongest": "ez",
        "auc": estimate(best, 0.03),
        "strongest_record": "reference",
        "blind": Estimate(value=0.512, low=0.401, high=0.623),
        "persons_in": 350,
        "persons_out": 350,
        "attacks": attacks,
    }
    return Membership(**fields | more)


def _rates(best: float, base: bool) -> tuple[ExtractionRate, ...]:
    rows: list[ExtractionRate] = []
    shapes: tuple[tuple[str, Any, float, float], ...] = (
        ("all", "cue_free", 1.0, 0.0),
        ("all", "all", 1.03, 0.02),
        ("name", "all", 0.9, 0.03),
        ("phone", "all", 0.8, 0.0),
        ("home", "all", 1.1, 0.0),
        ("work", "all", 1.05, 0.0),
        ("email", "cue_free", 0.9, 0.0),
        ("email", "derivable", 1.2, 0.31),
    )
    for name, strength in EXTRACTIONS.items():
        for type, cue, factor, chance in shapes:
            share = min(1.0, strength * factor * best + chance)
            emitted = type != "all" and cue != "derivable" and not (name == "untargeted" and type == "work")
            rows.append(
                ExtractionRate(
                    attack=name,
                    type=type,
                    cue=cue,
                    recall=rate(share, 420),
                    chance=rate(chance, 410),
                    excess=estimate(share - chance, 0.041),
                    base_recall=chance if base and name != "untargeted" else None,
                    precision=rate(share * 0.93, 97) if emitted else None,
                )
            )
    return tuple(rows)


def extraction(best: float, *, base: bool = True, **more: Any) -> Extraction:
    """Three attacks, the strongest with that excess recall."""
    fields: dict[str, Any] = {
        "strongest": "true_prefix",
        "excess_recall": estimate(best, 0.043 if best else 0.009),
        "recall": rate(best, 421),
        "chance": rate(0.0, 411),
        "rates": _rates(best, base),
        "discoverable": tuple(
            Discoverable(
                queries=queries,
                probability=probability,
                recall=rate(best * (1 - 0.8 / queries**0.3) * (1.4 - probability), 601),
                chance=rate(0.002 * (queries > 100), 602),
            )
            for probability in (0.5, 0.9)
            for queries in (1, 10, 100, 1_000, 10_000)
        ),
        "recall_at_100_errors": rate(0.9 * best, 423),
        "errors_curve": tuple((errors, best * (1 - 1 / (1 + errors / 20))) for errors in range(0, 141, 20)),
        "reconstruction": (
            Reconstruction(
                type="phone",
                candidates=100,
                top_1=rate(0.01 + 0.9 * best, 40),
                top_10=rate(0.1 + 0.85 * best, 40),
                chance_top_1=rate(0.025, 40),
                median_rank=2.5,
            ),
            Reconstruction(
                type="home", candidates=12, top_1=rate(0.1, 30), top_10=None, chance_top_1=None, median_rank=6.0
            ),
        ),
        "generated_tokens": 64_123,
    }
    return Extraction(**fields | more)


def exposures(most: float) -> tuple[Exposure, ...]:
    """Median bits rise from chance to `most`."""
    return tuple(
        Exposure(
            family=family,
            repetitions=repetitions,
            canaries=20,
            median_bits=min(9.97, middle),
            low=max(0.1, middle - 0.6),
            high=min(9.97, middle + 0.7),
            at_cap=20 if middle >= 9.97 else 0,
            cap_bits=9.97,
        )
        for family in ("pii", "random")
        for index, repetitions in enumerate((1, 2, 4, 8, 16, 32))
        for middle in [1 + (most - 1) * index / 5 * (1.1 if family == "random" else 1.0)]
    )


def bound(epsilon: float, claimed: float | None = None, **more: Any) -> OneRunBound:
    fields: dict[str, Any] = {
        "epsilon": epsilon,
        "confidence": 0.95,
        "delta": 1e-5,
        "canaries": 1_000,
        "included": 493,
        "guesses": 250,
        "correct": 211,
        "ceiling": 4.62,
        "claimed_epsilon": claimed,
        "claimed_unit": "person" if claimed else None,
        "exceeds_claim": claimed is not None and epsilon > claimed,
    }
    return OneRunBound(**fields | more)


def leakage(auc: float = 0.95, excess: float = 0.55, **more: Any) -> LeakageRecord:
    """The whole record; without arguments that of a model that was trained without defence."""
    leaks = excess > 0
    fields: dict[str, Any] = {
        "veiltune": "0.4.0",
        "created": "2026-01-31T12:00:00+00:00",
        "preset": "std",
        "seconds": 1_263.4,
        "seed": 17,
        "model": "runs/train/model",
        "model_digest": "ab12" * 16,
        "base": "gpt2",
        "manifest_digest": "cd34" * 16,
        "full_vectors": True,
        "sizes": LeakageSizes(
            persons_in=500, persons_out=501, records=3_702, tokens=345_678, calibration_pairs=150, context_cut=0
        ),
        "perplexity": Perplexity(carrier=21.37, personal=1_843.2, all=43.61, base_carrier=24.86),
        "membership": membership(auc),
        "extraction": extraction(excess),
        "exposure": exposures(9.5 if leaks else 1.1),
        "audited_epsilon": bound(2.31 if leaks else 0.0, None if leaks else 8.0),
        "notes": ("The API was asked twice for 3 of the texts.",),
    }
    return LeakageRecord(**fields | more)


def defended(**more: Any) -> LeakageRecord:
    """Of a model that gives nothing away."""
    return leakage(0.51, 0.0, **more)


def bare() -> LeakageRecord:
    """Of plain text and a list of secrets: no twins, no canaries, no base, an API that shows a few tokens."""
    whole = extraction(0.2, base=False)
    rates = tuple(row.model_copy(update={"chance": None, "excess": None}) for row in whole.rates)
    none = {"chance": None, "excess_recall": None, "recall_at_100_errors": None, "rates": rates}
    empty = {"discoverable": (), "errors_curve": (), "reconstruction": ()}
    return leakage(
        membership=None,
        extraction=whole.model_copy(update=none | empty),
        exposure=(),
        audited_epsilon=None,
        perplexity=None,
        base=None,
        full_vectors=False,
        notes=(),
    )


def run(record: LeakageRecord) -> ModelRun:
    """As the report loads it, without a folder."""
    return ModelRun(
        label="run", letter="A", record=record, training=None, training_note="", made=None, samples=(), sample_note=""
    )


def write_model(folder: Path, record: LeakageRecord, *, samples: Any = SAMPLES, **fields: Any) -> Path:
    """A folder with a leakage.json, as `veiltune audit --output` leaves it, and its path; `fields` spoil the record."""
    (folder / "private" / "leakage").mkdir(parents=True)
    content = json.loads(record.model_dump_json()) | fields
    (folder / "leakage.json").write_text(json.dumps(content))
    if samples is not None:
        (folder / "private" / "leakage" / "samples.json").write_text(json.dumps(samples))
    return folder


def write_training(folder: Path, planned: float | str, **made: Any) -> None:
    """What `veiltune train` leaves beside it, as far as the report reads it; `made` becomes its summary."""
    (folder / "config.toml").write_text('run = "x"\n[train]\nmethod = "full"\n[model]\nname = "gpt2"\n')
    content = {
        "planned_epsilon": planned,
        "delta": 1e-5,
        "unit": "person",
        "statement": {"claim": "as the accountant says", "noise": "Gaussian, noise_multiplier 1.7332"},
    }
    (folder / "privacy.json").write_text(json.dumps(content))
    if made:
        counts = {"trainable_parameters": 10, "total_parameters": 1000, "steps": 60}
        (folder / "summary.json").write_text(json.dumps({"method": "lora", "seconds": 90.4} | counts | made))


def write_hostile_model(folder: Path) -> Path:
    """A folder in which whatever others name is an attempt at markup."""
    found = membership(0.9)
    spoilt = found.attacks[0].model_copy(update={"name": HOSTILE, "reason": HOSTILE})
    failed = MembershipAttack(name="zz" + HOSTILE, level="person", status="failed", reason=HOSTILE)
    rows = extraction(0.5)
    rates = (
        *rows.rates,
        rows.rates[2].model_copy(update={"attack": HOSTILE, "type": HOSTILE}),
        rows.rates[2].model_copy(update={"type": HOSTILE}),
    )
    named = {
        name: HOSTILE
        for name in ("model", "base", "manifest_digest", "model_digest", "preset", "created", "veiltune", "guarded_by")
    }
    record = leakage(
        membership=found.model_copy(update={"attacks": (spoilt, failed, *found.attacks), "strongest": HOSTILE}),
        extraction=rows.model_copy(update={"rates": rates}),
        audited_epsilon=bound(2.0, 1.0, claimed_unit=HOSTILE),
        notes=(HOSTILE, "x" * 300),
        **named,
    )
    sample = {"attack": HOSTILE, "type": HOSTILE, "prompt": HOSTILE, "written": HOSTILE + "y", "true": HOSTILE}
    closing = "</bdi></dd></dl></ol><script>alert(3)</script>" + "z" * 300
    samples = [
        sample | {"found": True},
        sample | {"found": False},
        {key: closing for key in sample} | {"found": True},
    ]
    path = folder / ("<script>alert(2)<" + "&\"' $x$" + "y" * 80)
    write_model(path, record, samples=samples)
    write_training(path, 1.0)
    content = json.loads((path / "privacy.json").read_text())
    content["statement"] = {HOSTILE: HOSTILE}
    (path / "privacy.json").write_text(json.dumps(content))
    return path
