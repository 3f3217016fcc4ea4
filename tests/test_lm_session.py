"""The whole audit: an over-trained model is caught in every way, an untrained one in none; and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lm_helper import SMALL, Ended, lines_of, overtrain, save_untrained, veiltune
from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm import session
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.lm.session import audit_model
from veiltune.config import TrainConfig, parse_config
from veiltune.customer.reporting import Reporter
from veiltune.data.manifest import Manifest, read_manifest
from veiltune.data.synth import SynthOptions, synthesise
from veiltune.dp.session import train

CORPUS = SynthOptions(
    persons=40, population=24, validation=4, canaries=64, exposure_canaries=1, references=24, carrier_share=0.05,
    repetitions=(1, 2), exposure_repetitions=(1, 4),
)  # fmt: skip
OF_THE_GO = {"created", "seconds"}


@dataclass
class Scene:
    """A corpus, a model of random weights, and the same model after it learnt the corpus by heart."""

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "corpus"

    @property
    def untrained(self) -> Path:
        return self.folder / "untrained"

    @property
    def trained(self) -> Path:
        return self.folder / "trained"

    def options(self, **changes: Any) -> LeakageOptions:
        given = {"model": str(self.trained), "base": str(self.untrained), "output": self.folder / "audit"}
        return LeakageOptions(**given | {"manifest": self.text / "manifest.jsonl", "preset": "ci"} | changes)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veiltune.audit.lm.options.PRESETS", {"ci": replace(SMALL, contexts=1, population=30)})
        patch.setattr("veiltune.audit.lm.extraction.NAME_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = Scene(tmp_path_factory.mktemp("leak"))
    synthesise(scene.text, CORPUS)
    save_untrained(scene.untrained, lines_of(scene.text / "population.jsonl"))
    overtrain(scene.untrained, scene.trained, lines_of(scene.text / "train.jsonl"), epochs=22, batch=4)
    return scene


@pytest.fixture(scope="module")
def manifest(scene: Scene) -> Manifest:
    return read_manifest(scene.text / "manifest.jsonl")


@pytest.fixture(scope="module")
def leaky(scene: Scene) -> LeakageRecord:
    return audit_model(scene.options())


def test_a_model_that_knows_its_text_by_heart_is_caught(leaky: LeakageRecord) -> None:
    found, extraction = leaky.membership, leaky.extraction
    assert found is not None and found.auc.value >= 0.9 and found.auc.low > 0.7
    assert found.blind.low <= 0.5 <= found.blind.high
    assert extraction.excess_recall is not None and extraction.excess_recall.low > 0
    assert extraction.recall.value > 0.2 and extraction.chance is not None and extraction.chance.value < 0.05
    assert leaky.audited_epsilon is not None and leaky.audited_epsilon.epsilon > 1
    assert leaky.audited_epsilon.claimed_epsilon is None and not leaky.audited_epsilon.exceeds_claim
    often = [one.median_bits for one in leaky.exposure if one.repetitions == 4]
    assert often and min(often) > 3
    inside = [row.recall.value for row in extraction.discoverable if row.queries == 10_000]
    outside = [row.chance.value for row in extraction.discoverable if row.queries == 10_000 and row.chance]
    assert min(inside) > 0.3 > 0.05 > max(outside)
    assert leaky.perplexity is not None and leaky.perplexity.base_carrier is not None


def test_a_model_that_never_saw_the_text_is_cleared(scene: Scene) -> None:
    record = audit_model(scene.options(model=str(scene.untrained), base="", output=scene.folder / "clear"))
    assert record.membership is not None and record.extraction.excess_recall is not None
    assert record.membership.auc.low <= 0.5 <= record.membership.auc.high
    assert record.extraction.excess_recall.low <= 0 <= record.extraction.excess_recall.high
    assert record.extraction.excess_recall.high > 0  # never "0 %"
    assert record.audited_epsilon is not None and record.audited_epsilon.epsilon == 0


def test_what_is_written(scene: Scene, leaky: LeakageRecord, manifest: Manifest) -> None:
    """The file is the record, fits its schema, and the sizes are those of the manifest."""
    written = json.loads((scene.folder / "audit" / "leakage.json").read_bytes())
    assert LeakageRecord.model_validate(written) == leaky
    jsonschema.validate(written, LeakageRecord.model_json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written | {"full_vectors": "SECRET"}, LeakageRecord.model_json_schema())
    assert leaky.manifest_digest == manifest.digest
    assert (leaky.sizes.persons_in, leaky.sizes.persons_out, leaky.sizes.calibration_pairs) == (40, 40, 12)
    assert leaky.sizes.records == 2 * (20 * 1 + 20 * 2)
    assert leaky.membership is not None and leaky.membership.persons_in == leaky.membership.persons_out == 28
    assert oct((scene.folder / "audit" / "private").stat().st_mode)[-3:] == "700"


def test_no_text_is_in_the_record(scene: Scene, leaky: LeakageRecord, manifest: Manifest) -> None:
    assert leaky.extraction.recall.successes > 0
    written = (scene.folder / "audit" / "leakage.json").read_text()
    texts = [value for person in manifest.persons for value in person.values.values()]
    texts += [canary.secret for canary in manifest.canaries] + [record.text[:24] for record in manifest.records]
    names = [one.id for one in (*manifest.persons, *manifest.records, *manifest.canaries)]
    assert not any(secret in written or json.dumps(secret)[1:-1] in written for secret in (*texts, *names))
    samples = json.loads((scene.folder / "audit" / "private" / "leakage" / "samples.json").read_text())
    assert any(row["found"] and row["true"] in texts for row in samples)  # they are in the private part


class Bars(Reporter):
    """How far each phase came, and how far it was to go."""

    def __init__(self) -> None:
        self.bars: dict[str, tuple[int, int]] = {}

    def phase(self, name: str, total: int) -> None:
        self.bars[name] = (0, total)

    def advance(self, done: int) -> None:
        name, (_, total) = self.bars.popitem()
        self.bars[name] = (done, total)


def test_interrupted_and_taken_up_the_figures_are_the_same(
    scene: Scene, leaky: LeakageRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the stages: the same call asks only for what is missing."""
    options = scene.options(output=scene.folder / "stopped")

    def stop(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "name_only_guesses", stop)
        with pytest.raises(KeyboardInterrupt):
            audit_model(options)
    assert not (options.output / "leakage.json").exists()  # type: ignore[operator]
    for kept in ("true_prefix_guesses", "untargeted_guesses"):
        honest = getattr(session, kept)
        monkeypatch.setattr(
            session,
            kept,
            lambda box, *rest, honest=honest, **more: _only_base(box, leaky) or honest(box, *rest, **more),
        )
    heard = Bars()
    resumed = audit_model(options, reporter=heard)
    assert resumed.model_dump(exclude=OF_THE_GO) == leaky.model_dump(exclude=OF_THE_GO)
    assert {"sample", "true prefix model"} <= set(heard.bars) and all(
        done == total for done, total in heard.bars.values()
    )


def _only_base(box: Any, leaky: LeakageRecord) -> None:
    assert box.digest != leaky.model_digest, "the model was asked again"


def arguments(scene: Scene, *more: object) -> list[object]:
    """On top of the audit that is there: nothing is asked again."""
    where = ["--manifest", scene.text / "manifest.jsonl", "--preset", "ci", "--base", scene.untrained]
    return ["audit", *where, *more]


def test_gates_on_the_command_line(
    scene: Scene, leaky: LeakageRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: object) -> Ended:
        given = arguments(scene, scene.trained, "--output", scene.folder / "audit", *more)
        return veiltune(monkeypatch, capsys, *given)

    passed = run("--fail-if", "auc_upper < 0.5", "--fail-if", "recall > 2")
    assert passed.code == 0 and "veiltune:" not in passed.err and "leakage.json" in passed.out
    failed = run("--fail-if", "auc_lower > 0.6", "--fail-if", "recall > 2", "--fail-if", "excess_recall > 0.01")
    lines = told(failed)
    assert failed.code == 7 and len(lines) == 2
    assert lines[0].startswith("veiltune: gate failed: auc_lower is 0.") and "excess_recall > 0.01" in lines[1]
    for text, words in (("auk > 1", "did you mean 'auc'"), ("excess_recall_upper > 0.01", "it needs 381 (a corpus of")):
        refused = run("--fail-if", text)
        assert refused.code == 2 and words in refused.err and len(told(refused)) == 1
    broken = run("--claimed-epsilon", "0.5", "--fail-if", "auc_lower > 0.6")  # the worse news comes first
    assert broken.code == 5 and "above the claimed 0.5: the implementation or the claim is wrong" in broken.err
    assert run("--claimed-epsilon", "50").code == 0


def told(ended: Ended) -> list[str]:
    """Standard error without progress."""
    return [line for line in ended.err.splitlines() if line.startswith("veiltune: ")]


def run_config(scene: Scene) -> TrainConfig:
    """Private training that starts from a model which already knows the canaries: its small epsilon is not true."""
    tree: dict[str, Any] = {
        "run": str(scene.folder / "run"),
        "noise_seed": 3,
        "model": {"name": str(scene.trained), "task": "generation"},
        "data": {
            "train": str(scene.text / "train.jsonl"), "eval": str(scene.text / "validation.jsonl"),
            "prompt_column": "", "target_column": "text", "person_column": "person", "max_length": 64,
        },
        "privacy": {"noise_multiplier": 8.0, "clip_norm": 1.0, "delta": 1e-5},
        "train": {"method": "lora", "steps": 1, "batch_size": 8, "learning_rate": 1e-6, "rank": 2, "threads": 1},
        "evaluation": {"max_new_tokens": 2},
    }  # fmt: skip
    return parse_config(TrainConfig, tree)


def test_a_run_whose_claim_is_wrong_ends_with_exit_code_5(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claimed = float(train(run_config(scene))["planned_epsilon"])
    assert claimed < 1
    ended = veiltune(monkeypatch, capsys, *arguments(scene, scene.folder / "run"))
    assert ended.code == 5 and "the implementation or the claim is wrong" in ended.err
    assert len(told(ended)) == 1
    record = LeakageRecord.model_validate_json((scene.folder / "run" / "leakage.json").read_bytes())
    bound = record.audited_epsilon
    assert bound is not None and bound.exceeds_claim and bound.epsilon > bound.claimed_epsilon == claimed  # type: ignore[operator]
    assert (bound.canaries, bound.claimed_unit, bound.delta) == (64, "person", 1e-5)
