"""A guarded model is asked as the API behind that guard would answer, however it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lm_helper import Ended, Habit, save_tiny, veiltune, write_short_manifest
from test_blackbox import Naive, texts
from tiny import VOCAB, tiny_model
from tiny_text import BOS, causal_tokenizer
from veiltune.audit.blackbox import BlackBox, Tokens, Vectors
from veiltune.audit.guarded import GuardedModel
from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.lm import options
from veiltune.audit.lm.session import LEAKAGE
from veiltune.audit.local_model import LocalModel
from veiltune.data.manifest import read_manifest
from veiltune.guard.building import build_guard
from veiltune.guard.decoding import Guard
from veiltune.guard.vectors import Shape

TOKENIZER = causal_tokenizer()
SECRETS = ("Anna Lee", "212-555-0123")


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    path = tmp_path_factory.mktemp("guard") / "names.txt"
    path.write_text("\n".join(SECRETS))
    found = build_guard(TOKENIZER, size=VOCAB, protect=[path], shape=Shape(temperature=1.5))
    assert found is not None
    return found


class Slow(BlackBox):
    """The guard begins anew at every prefix, and the base class does the rest."""

    context, digest, name = 64, "0" * 64, "slow"

    def __init__(self, box: BlackBox, guard: Guard) -> None:
        self.box, self.guard, self.vocabulary = box, guard, box.vocabulary

    def next_token_log_probs(self, prefixes: Sequence[Tokens]) -> Vectors:
        vectors = self.box.next_token_log_probs(prefixes)
        rows = [self.guard.told(self.guard.start(p), vectors[k]) for k, p in enumerate(prefixes)]
        return np.stack(rows)


def sequences() -> list[list[int]]:
    """Some that run into a protected string, some that do not."""
    said = ["Write to Anna Lee today", "call 212-555-0123 now", "Anna Levin came", "annalee"]
    return [[BOS, *TOKENIZER(text, add_special_tokens=False)["input_ids"]] for text in said] + texts([5, 17, 2])


def test_every_way_of_asking_tells_what_the_guard_lets_through(guard: Guard) -> None:
    model = tiny_model("gpt2", "causal")
    fast = GuardedModel(LocalModel(model, TOKENIZER, batch_tokens=40), guard, mark="a")
    slow = Slow(Naive(model), guard)
    unlisted = build_guard(TOKENIZER, size=VOCAB, shape=Shape(temperature=1.5))
    assert unlisted is not None
    stopped = 0
    for one, two, free in zip(
        *(box.along(sequences()) for box in (fast, slow, Slow(Naive(model), unlisted))), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-4)
        stopped += int((np.abs(np.exp(one) - np.exp(free)) > 1e-3).any(axis=1).sum())
    assert stopped  # or the list did nothing here
    np.testing.assert_allclose(
        fast.next_token_log_probs(sequences()), slow.next_token_log_probs(sequences()), atol=1e-4
    )
    prefix = sequences()[0][:9]
    tails = [sequences()[0][9:], sequences()[0][9:13], *texts([1, 4, 4], seed=1), sequences()[0][9:13]]
    np.testing.assert_allclose(fast.suffix_log_probs(prefix, tails), slow.suffix_log_probs(prefix, tails), atol=1e-3)
    for chosen in ([2, 0], [1, 1, 0]):
        walks = [box.decoder([sequences()[k][:12] for k in (0, 1, 2)]) for box in (fast, slow)]
        for step in range(4):
            np.testing.assert_allclose(walks[0].log_probs, walks[1].log_probs, atol=1e-4)
            for walk in walks:
                walk.append([5 + step, 9, 40])
        for walk in walks:
            walk.select(chosen)
        np.testing.assert_allclose(walks[0].log_probs, walks[1].log_probs, atol=1e-4)


def test_another_guard_is_another_model(guard: Guard) -> None:
    box = Habit()
    one, two = GuardedModel(box, guard, mark="a"), GuardedModel(box, guard, mark="b")
    assert len({box.digest, one.digest, two.digest}) == 3 and one.name == "habit-0 (guarded)"


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(options, "PRESETS", {"ci": options.AuditSize(
        generations=12, generated_tokens=16, contexts=1, candidates=9, ranked=3, population=12
    )})  # fmt: skip
    write_short_manifest(tmp_path / "manifest.jsonl")
    save_tiny(tmp_path / "model")

    def run(guard: str, *more: object, model: object = tmp_path / "model") -> Ended:
        (tmp_path / "guard.toml").write_text(guard)
        return veiltune(
            monkeypatch, capsys, "audit", model, "--manifest", tmp_path / "manifest.jsonl", "--preset", "ci",
            "--output", tmp_path / "out", "--guard", tmp_path / "guard.toml", *more,
        )  # fmt: skip

    return run


def test_an_audit_through_a_guard_file(ask, tmp_path: Path) -> None:
    listed = f'[protect]\nfiles = ["{tmp_path / "manifest.jsonl"}"]\n'
    ended = ask(listed)
    assert ended.code == 0, ended.err
    record = LeakageRecord.model_validate_json((tmp_path / "out" / LEAKAGE).read_bytes())
    assert (
        record.model.endswith("(guarded)")
        and record.guarded_by == "protected strings"
        and record.extraction.recall.value == 0
    )
    assert len(read_manifest(tmp_path / "manifest.jsonl").persons) == 104


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("", "asks for no guard"),
        ('[protect]\nfiles = ["gone.txt"]\n', "gone.txt cannot be read"),
        ('[protcet]\nfiles = []\n', "did you mean 'protect'?"),
    ],
)  # fmt: skip
def test_a_guard_that_is_none_is_refused(ask, guard: str, message: str) -> None:
    ended = ask(guard)
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err


def test_an_api_has_its_own(ask) -> None:
    ended = ask("", "--tokenizer", "anything", model="http://localhost:1")
    assert ended.code == 2 and "--guard is for a local model" in ended.err
