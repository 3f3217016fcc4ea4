"""Audited run folders for tests of the report: figures as an audit of MiniLM gives them, no model needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scipy.stats import norm

from veiltune.attacks.result import AttackResult
from veiltune.audit.record import (
    Attack,
    AttackRecord,
    Attribute,
    Bound,
    Control,
    Estimate,
    ExtractionPoint,
    FrequencyBin,
    Group,
    Inversion,
    Labels,
    Rate,
    RepeatedRelease,
    Sizes,
)
from veiltune.config import TuneConfig, dump_toml, parse_config
from veiltune.runs import RunFolder

TEXTS = (
    "[CLS] my order 48 ##12 ##9 never arrived , please call jan ##ine wei ##land back [SEP]",
    "[CLS] the lamp broke after two days and i want my money back [SEP]",
    "[CLS] can you send the invoice to ma ##rek . no ##wak at example . org before friday ? [SEP]",
)
PERSONAL = {"48", "##12", "##9", "jan", "##ine", "wei", "##land", "ma", "##rek", "no", "##wak", "example", "org"}


def rate(share: float, trials: int = 4_000, *, by_text: bool = True) -> Rate:
    """A rate near a share, its bootstrap over texts somewhat wider than the exact interval."""
    result = AttackResult(name="", successes=round(share * trials), trials=trials)
    low, high = result.interval()
    return Rate.of(result, (max(0.0, low - 0.01), min(1.0, high + 0.012)) if by_text else None)


def attack(name: str, title: str, share: float | None, *, trials: int = 4_000, **more: Any) -> Attack:
    """A finished attack with that success, or one that failed."""
    if share is None:
        return Attack(name=name, title=title, sees="released vectors", status="failed", **more)
    figures = {"calibration": rate(min(1.0, share + 0.004), trials), "reported": rate(share, trials)} | more
    return Attack(name=name, title=title, sees="released vectors and the bottom model", status="done", **figures)


def roc(auc: float) -> tuple[tuple[float, float], ...]:
    """The curve of two normal scores with that area."""
    shift = norm.ppf(auc) * 2**0.5
    points = [index / 40 for index in range(41)]
    return tuple((x, float(norm.sf(norm.isf(x) - shift)) if 0 < x < 1 else x) for x in points)


def ranked(name: str, title: str, share: float, auc: float, *, trials: int = 600) -> Attack:
    """A finished attack that also ranks; like those of an audit it has no calibration half."""
    estimate = Estimate(value=auc, low=auc - 0.03, high=min(1.0, auc + 0.03))
    return attack(name, title, share, trials=trials, calibration=None, auc=estimate, roc=roc(auc))


def inversion(best: float) -> Inversion:
    """Seven attacks, the strongest at `best`, one failed and one that does not apply."""
    recovery = rate(best)
    return Inversion(
        strongest="learned_sequence",
        recovery=recovery,
        empirical_privacy=Estimate(
            value=1 - recovery.value, low=max(0.0, 1 - best - 0.02), high=min(1.0, 1 - best + 0.02)
        ),
        attacks=(
            attack("nearest", "nearest embedding", 0.28 * best, seconds=3.1),
            attack("map", "nearest embedding with unigram prior", 0.63 * best, seconds=4.4),
            attack("learned_linear", "learned linear inverter", 0.87 * best, seconds=21.0),
            attack(
                "learned_sequence",
                "learned transformer inverter",
                best,
                seconds=117.0,
                reported_top5=rate(min(1.0, best * 1.2)),
                rouge_l=0.94 * best,
                settings={"passes": 6},
            ),
            attack("lm_prior", "beam search with a language prior", 0.81 * best, seconds=64.0),
            attack("optimize", "token selection by gradient", None, reason="ran out of its 600 s"),
            Attack(
                name="bidirectional",
                title="bidirectional (BiSR)",
                sees="gradients at the cut",
                status="not_applicable",
                reason="the bottom is frozen, so no gradient comes back",
            ),
        ),
        groups=(
            Group(name="all", description="every token but special ones", attack="learned_sequence", rate=recovery),
            Group(
                name="contributing", description="with a high score for the task", attack="map", rate=rate(best, 700)
            ),
            Group(name="personal", description="names, numbers and addresses, by tagging", needed=300),
            Group(
                name="rare",
                description="fewer than 10 times in the public text",
                attack="learned_sequence",
                rate=rate(best / 2, 500),
            ),
        ),
        by_frequency=(
            FrequencyBin(label="never", rate=None),
            FrequencyBin(label="1 to under 10", rate=rate(best / 2, 500)),
            FrequencyBin(label="10 to under 100", rate=rate(0.8 * best, 900)),
            FrequencyBin(label="100 or more", rate=rate(min(1.0, 1.1 * best), 2_400)),
        ),
        repeated=tuple(
            RepeatedRelease(releases=n, attack="learned_sequence", rate=rate(1 - (1 - best) / n**0.9, 2_000))
            for n in (1, 2, 5, 10, 20)
        ),
    )


def record(best: float, *, disclosed: bool = False, cti: bool = False, **more: Any) -> AttackRecord:
    """The whole record of a run whose strongest attack reads the share `best` of the tokens."""
    fields: dict[str, Any] = {
        "veiltune": "0.3.0",
        "created": "2026-01-31T12:00:00Z",
        "preset": "standard",
        "seconds": 431.0,
        "seed": 0,
        "public_source": "wikitext2/valid.txt",
        "sizes": Sizes(
            texts=400,
            tokens=8_000,
            calibration_texts=200,
            reported_texts=200,
            public_texts=2_000,
            public_tokens=100_000,
            unseen_token_share=0.04,
        ),
        "inversion": inversion(best),
        "controls": (
            Control(
                name="positive",
                description="releases without noise are read",
                attack="learned_sequence",
                rate=rate(0.992),
                expected=0.9,
                passed=True,
            ),
            Control(
                name="shuffled",
                description="releases that were exchanged between texts are not",
                attack="learned_sequence",
                rate=rate(0.031),
                expected=0.03,
                passed=True,
            ),
        ),
        "side_channels": (
            ranked("radius", "radius of the noise", 0.97 if cti else 0.5, 0.993 - 0.03 if cti else 0.504),
            attack("length", "length of each text", 1.0, trials=200, reason="lengths are sent as they are"),
            Attack(
                name="special_tokens",
                title="strength of the noise from special tokens",
                sees="the released vectors",
                status="done",
                reason="the strength of a mechanism is no secret",
                settings={"eta_found": 49.731234, "eta_true": 50.0},
            ),
            attack("repeated_noise", "the same noise on two texts", 0.0, trials=900),
            attack("replay", "asking for the same text again", 0.0, trials=200),
        ),
        "labels": Labels(
            mode="disclosed" if disclosed else "randomized_response",
            num_classes=2,
            majority=0.52,
            bound=None if disclosed else 0.953,
            claimed_epsilon=None if disclosed else 3.0,
            attacks=(
                attack(
                    "output_gradients",
                    "labels from the output gradient",
                    1.0 if disclosed else 0.951,
                    trials=1_000,
                    calibration=None,
                ),
                attack("clustering", "labels by clustering releases", 0.58, trials=1_000, calibration=None),
            ),
        ),
        "attributes": (
            Attribute(
                name="sex",
                classes=2,
                split="person",
                majority=rate(0.55, 600),
                ceiling=ranked("bag_of_words", "bag of words on the clean text", 0.68, 0.74),
                attacks=(
                    ranked("logistic", "logistic regression on mean vectors", 0.61, 0.66),
                    ranked("attention", "attention pooler", 0.63, 0.69),
                ),
            ),
            Attribute(
                name="income_level",
                classes=3,
                split="person",
                majority=rate(0.48, 600),
                ceiling=ranked("bag_of_words", "bag of words on the clean text", 0.51, 0.57),
                attacks=(ranked("logistic", "logistic regression on mean vectors", 0.47, 0.51),),
            ),
        ),
        "extraction": (
            ExtractionPoint(queries=100, fidelity=rate(0.71, 500, by_text=False)),
            ExtractionPoint(queries=1_000, fidelity=rate(0.9, 500, by_text=False)),
        ),
        "bounds": (
            Bound(
                name="d_chi_metric",
                title="d_chi bound, per token vector",
                value=50.0,
                unit="1 / distance",
                statement="two values of a token's vector at L2 distance D are told apart by a likelihood ratio of at"
                " most exp(50 D); it says nothing of vectors far apart, and a text adds up its tokens",
            ),
            Bound(
                name="labels",
                title="Labels, randomised response",
                value=None if disclosed else 3.0,
                unit="epsilon",
                statement="one example's label, replace-one; it does not cover what the text itself tells",
            ),
        ),
        "notes": ("The personal tokens were tagged by patterns; names that no pattern knows are missing.",),
    }
    return AttackRecord(**fields | more)


HOSTILE = "<script>alert(1)</script>\"' onload=x $\\frac{$ &amp; {{ 7*7 }} \u202e -->"


def write_hostile_run(folder: Path) -> Path:
    """A run in which whatever a customer or a file names is an attempt at markup."""
    attributes = tuple(
        item.model_copy(update={"name": HOSTILE, "ceiling": item.ceiling.model_copy(update={"title": HOSTILE})})
        for item in record(0.5).attributes
    )
    attacked = inversion(0.8).model_copy(
        update={
            "attacks": (
                attack("learned_sequence", HOSTILE, 0.8, settings={HOSTILE: HOSTILE}),
                attack("failed", "failed", None, reason=HOSTILE),
            ),
            "by_frequency": (FrequencyBin(label=HOSTILE, rate=rate(0.4)),),
        }
    )
    named = {"public_source": HOSTILE, "notes": (HOSTILE, "x" * 300), "created": HOSTILE}
    said = {
        "representations": {HOSTILE: HOSTILE, "statement": HOSTILE},
        "labels": {"mode": HOSTILE},
        "lengths": HOSTILE,
    }
    path = folder / ("<script>alert(2)<" + "&\"' $x$" + "y" * 80)
    fields = record(0.8, inversion=attacked, attributes=attributes, **named)
    write_run(path, fields, privacy=said, sample=False)
    write_sample(RunFolder(path), (HOSTILE, "</p></ol><script>alert(3)</script> " + "z" * 200))
    return path


def write_run(
    folder: Path,
    attacks: AttackRecord,
    *,
    utility: float = 0.861,
    alone: float | None = 0.85,
    privacy: dict[str, Any] | None = None,
    mechanism: dict[str, Any] | None = None,
    sample: bool = True,
    **sections: Any,
) -> Path:
    """An audited run folder, and its path; `privacy` is its privacy.json, `mechanism` that section of its config."""
    tree: dict[str, Any] = {
        "run": str(folder),
        "vendor": {"address": "127.0.0.1:50051", "plaintext": True},
        "split": {"cut_layer": 2},
        "data": {"train": "train.csv", "eval": "eval.csv"},
        "privacy": mechanism or {"mechanism": "d_chi", "noise_to_norm": 0.7},
    } | sections
    config = parse_config(TuneConfig, tree)
    folder.mkdir(parents=True)
    run = RunFolder.create(folder, config=dump_toml(config))
    run.write_json("summary.json", _summary(utility, alone))
    run.write_json("privacy.json", privacy or statement(attacks.labels.mode == "disclosed"))
    (folder / "attacks.json").write_text(attacks.model_dump_json())
    if sample:
        write_sample(run)
    return folder


def write_sample(run: RunFolder, texts: tuple[str, ...] = TEXTS) -> None:
    """What the audit keeps of some texts; every third token was not read."""
    (run.private / "audit").mkdir(exist_ok=True)
    content = {"attack": "learned_sequence", "texts": [_sampled(text.split(" ")) for text in texts]}
    (run.private / "audit" / "sample.json").write_text(json.dumps(content))


def _sampled(tokens: list[str]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "recovered": [index % 3 != 2 for index in range(len(tokens))],
        "special": [token in ("[CLS]", "[SEP]") for token in tokens],
        "personal": [token in PERSONAL for token in tokens],
    }


def _summary(utility: float, alone: float | None) -> dict[str, Any]:
    return {
        "utility": utility,
        "utility_metric": "accuracy",
        "customer_alone_utility": alone,
        "dominated": None if alone is None else utility <= alone,
        "eval_examples": 1_821,
        "seconds": 215.2,
        "bytes_up": 31_000_000,
        "bytes_down": 29_000_000,
        "releases": 6_920,
    }


def statement(disclosed: bool = False) -> dict[str, Any]:
    """privacy.json as `veiltune tune` writes it."""
    labels: dict[str, Any] = {"mode": "disclosed", "statement": "labels disclosed: the gradients reveal every label"}
    if not disclosed:
        labels = {
            "mode": "randomized_response",
            "claimed_label_epsilon": 3.0,
            "unit": "one example's label, replace-one",
            "keep_probability": 0.9526,
            "statement": "each label was randomised once; all epochs are post-processing of that draw",
        }
    return {
        "representations": {
            "mechanism": "d_chi",
            "metric": "L2",
            "unit": "one token's vector",
            "num_releases": 1,
            "strength": {"eta": 50.0, "noise_to_norm": 0.7, "snr_db": 3.1, "reference_norm": 10.97},
            "composed_eta": 50.0,
            "statement": "two values of a token's vector at L2 distance D are told apart by a likelihood ratio of at"
            " most exp(composed_eta * D), all releases together",
            "cut_layer": 2,
            "cut_embeddings": "word",
            "examples_released": 6_920,
            "releases": 6_920,
            "max_releases_per_example": 1,
            "tokens": 151_000,
            "bottom": "frozen",
            "replay": "each text once, the same bytes ever after",
        },
        "contributing_tokens": {"mode": "off"},
        "labels": labels,
        "lengths": "shown exactly",
        "randomness": "operating system CSPRNG",
        "adversary": "the vendor, who holds the bottom model and sees every release; others see TLS",
    }
