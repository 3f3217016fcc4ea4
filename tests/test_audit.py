"""Whole audits of real runs against a real vendor on loopback: what they find, refuse, survive and write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from parties import Vendor, running_vendor
from runs_helper import CLASSES, make_texts, tune_config, write_csv, write_tables
from tiny import model_of, tiny_config
from veiltune.audit import channels, inverting, split, suite
from veiltune.audit.lm.options import LeakageOptions
from veiltune.audit.observing import open_run
from veiltune.audit.options import AuditOptions
from veiltune.audit.presets import PRESETS
from veiltune.audit.record import AttackRecord
from veiltune.audit.scene import build_scene
from veiltune.audit.split import audit_run
from veiltune.config import TuneConfig
from veiltune.customer.session import tune
from veiltune.errors import DataError, InputError
from veiltune.runs import RunFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of 80 texts, and public text from the same letters."""
    path = tmp_path_factory.mktemp("audited")
    write_tables(path, train=80, eval=80)
    private = set((path / "train.csv").read_text().replace(",", "\n").split("\n"))
    texts, _ = make_texts(500, seed=99)
    (path / "public.txt").write_text("\n".join(text for text in texts if text not in private))
    return path


@pytest.fixture(scope="module")
def vendor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[Vendor]:
    model: PreTrainedModel = model_of(tiny_config("bert"), "base")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with running_vendor(folder / "vendor", folder / "model", max_jobs_per_tenant=50) as running:
        yield running


@pytest.fixture(scope="module")
def run_once(folder: Path, vendor: Vendor) -> Callable[..., TuneConfig]:
    """`run_once(name, section={...})`: a finished run, made at its first use in the module."""

    def make(name: str, **sections: Any) -> TuneConfig:
        config = tune_config(folder, vendor.address, run=str(folder / name), **sections)
        tune(config)
        return config

    return make


@pytest.fixture
def options(folder: Path) -> AuditOptions:
    return AuditOptions(public=str(folder / "public.txt"), preset="quick")


NOISY: dict[str, Any] = {"mechanism": "d_chi", "noise_to_norm": 1.5, "labels": "randomized_response"}


def by_name(entries: Any) -> dict[str, Any]:
    return {entry.name: entry for entry in entries}


def test_a_run_without_noise_is_an_open_book(run_once: Callable[..., TuneConfig], options: AuditOptions) -> None:
    config = run_once("open")
    record = audit_run(Path(config.run), options)
    assert record.inversion.recovery.value > 0.95
    assert all(control.passed for control in record.controls)
    attacks = by_name(record.inversion.attacks)
    assert {"nearest", "map", "lm_prior", "linear", "window", "sequence", "optimize"} == set(attacks)
    assert attacks["optimize"].status == "not_applicable" and "preset quick" in attacks["optimize"].reason
    assert all(attack.status != "failed" for attack in attacks.values()), attacks
    labels = by_name(record.labels.attacks)
    assert record.labels.bound is None and labels["output_gradient"].reported.value == 1.0
    assert labels["cut_gradient"].status == "not_applicable" and "frozen" in labels["cut_gradient"].reason
    side = by_name(record.side_channels)
    assert side["length"].reported.value == 1.0 and side["replay"].reported.value == 0.0
    assert side["radius"].status == "not_applicable"
    assert record.inversion.repeated == () and record.bounds[0].value is None
    assert record.extraction == () or all(point.fidelity.trials >= 50 for point in record.extraction)
    assert AttackRecord.model_validate(RunFolder(config.run).read_json("attacks.json")) == record


def test_the_optimising_attack_runs_on_some_of_the_texts(
    run_once: Callable[..., TuneConfig], options: AuditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(PRESETS["quick"], name="standard", optimized_texts=20, optimize_steps=40)
    monkeypatch.setattr(split, "PRESETS", {"standard": small})
    record = audit_run(Path(run_once("open").run), replace(options, preset="standard"))
    attack = by_name(record.inversion.attacks)["optimize"]
    assert attack.status == "done", attack
    assert attack.reported.value > 0.9
    assert attack.reported.trials < record.inversion.recovery.trials / 2


def test_an_attack_on_some_texts_that_is_the_strongest_leaves_the_side_channels_their_guesses(
    run_once: Callable[..., TuneConfig], options: AuditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: an optimising attack that reads all of three texts in four, and tries no other."""
    run = Path(run_once("noisy", privacy=NOISY).run)
    with open_run(run) as audited:
        secret = build_scene(audited, replace(options, seed=8), PRESETS["quick"]).truth.ids

    def some(adversary: Any, values: Any, lengths: Any, preset: Any) -> suite.Guesses:
        tried = (torch.arange(len(lengths)) % 4 > 0).repeat_interleave(torch.tensor(lengths))
        return suite.Guesses(torch.where(tried, secret, -1).unsqueeze(1).expand(-1, 5), tried)

    planted = dict(suite.INVERSIONS) | {"optimize": suite.InversionAttack("planted", "", some)}
    monkeypatch.setattr(inverting, "INVERSIONS", planted)
    record = audit_run(run, replace(options, seed=8))
    assert record.inversion.strongest == "optimize" and record.inversion.recovery.value == 1.0
    side = by_name(record.side_channels)
    assert all(channel.status != "failed" for channel in side.values()), side
    assert side["special_tokens"].status == "done"


def test_noise_hides_more_and_averaging_takes_it_away(
    run_once: Callable[..., TuneConfig], options: AuditOptions
) -> None:
    record = audit_run(Path(run_once("noisy", privacy=NOISY).run), options)
    assert all(control.passed for control in record.controls)
    assert record.inversion.recovery.value < 0.9
    curve = {(p.releases, p.attack): p.rate.value for p in record.inversion.repeated}
    assert curve[10, "linear"] > curve[1, "linear"] + 0.1
    labels = by_name(record.labels.attacks)
    bound = record.labels.bound
    assert bound is not None and labels["output_gradient"].reported.low <= bound
    kinds = {bound.name.split("_")[0] for bound in record.bounds}
    assert kinds == {"metric", "exact", "information", "recovery", "label"}
    side = by_name(record.side_channels)
    found = side["special_tokens"].settings
    assert found["eta_low"] < found["eta_high"] and side["repeated_noise"].reported.successes == 0
    assert side["radius"].status == "not_applicable"  # each class has letters of its own: all tokens contribute


def test_gaussian_noise_has_an_information_bound(run_once: Callable[..., TuneConfig], options: AuditOptions) -> None:
    privacy = NOISY | {"mechanism": "gaussian", "noise_to_norm": 2.0}
    record = audit_run(Path(run_once("gauss", privacy=privacy, split={"cut_layer": 0}).run), options)
    bounds = by_name(record.bounds)
    assert bounds["information"].value > 0 and 0 < bounds["recovery_cap"].value <= 1
    map_attack = by_name(record.inversion.attacks)["map"]
    assert map_attack.reported.low <= bounds["recovery_cap"].value  # one position at cut 0: the cap holds for it


def test_contributing_tokens_are_found_by_their_radius(
    run_once: Callable[..., TuneConfig], options: AuditOptions
) -> None:
    privacy = {
        "mechanism": "d_chi",
        "noise_to_norm": 1.0,
        "cti": "top",
        "cti_top_fraction": 0.03,
        "labels": "disclosed",
    }
    record = audit_run(Path(run_once("cti", privacy=privacy).run), options)
    channel = by_name(record.side_channels)["radius"]
    assert channel.auc.low > 0.9 and channel.reason == ""
    assert "no bound holds" in record.bounds[0].statement
    assert any("list of contributing tokens" in note for note in record.notes)


@pytest.mark.parametrize("cti", ["budget", "top"])
def test_at_cut_0_the_attackers_use_the_scales_of_contributing_tokens(
    run_once: Callable[..., TuneConfig], options: AuditOptions, cti: str
) -> None:
    """With every letter in one class only, nearly each token has less noise in its own class."""
    privacy = {"mechanism": "d_chi", "noise_to_norm": 3.0, "cti": cti, "cti_top_fraction": 0.03, "labels": "disclosed"}
    record = audit_run(Path(run_once(f"words-{cti}", privacy=privacy, split={"cut_layer": 0}).run), options)
    attacks = by_name(record.inversion.attacks)
    assert attacks["map"].status == attacks["lm_prior"].status == "done", attacks["map"].reason
    assert attacks["map"].reported.value > attacks["nearest"].reported.value


def test_lengths_behind_padding_stand_beside_a_blind_guess(
    run_once: Callable[..., TuneConfig], options: AuditOptions
) -> None:
    record = audit_run(Path(run_once("padded", privacy=NOISY, wire={"pad_to": 24}).run), options)
    channel = by_name(record.side_channels)["length"]
    assert channel.status == "done" and 0 < channel.settings["blind_guess"] < 0.5


def test_a_trainable_bottom_is_attacked_over_all_its_releases(
    run_once: Callable[..., TuneConfig], options: AuditOptions
) -> None:
    config = run_once("unfrozen", privacy=NOISY, split={"bottom": "bitfit"})
    with open_run(Path(config.run)) as audited:
        kept = sum(1 for _ in audited.releaser.outbox.steps())
    assert kept == 80 // 8 * 3
    record = audit_run(Path(config.run), options)
    assert any("released 3 times" in note for note in record.notes)
    assert by_name(record.labels.attacks)["cut_gradient"].status == "done"
    assert by_name(record.side_channels)["replay"].status == "not_applicable"


def test_releases_of_a_trainable_bottom_may_be_forgotten_and_the_audit_then_refuses(
    run_once: Callable[..., TuneConfig], options: AuditOptions
) -> None:
    config = run_once("forgetful", privacy=NOISY | {"keep_releases": False}, split={"bottom": "bitfit"})
    with pytest.raises(InputError, match="keep_releases = false"):
        audit_run(Path(config.run), options)


def test_personal_terms_and_attributes_are_counted_apart(
    run_once: Callable[..., TuneConfig], options: AuditOptions, folder: Path, tmp_path: Path, vendor: Vendor
) -> None:
    texts, labels = make_texts(120, seed=3)
    texts = [f"{text} {CLASSES[label][:2]}" for text, label in zip(texts, labels, strict=True)]
    write_csv(tmp_path / "eval.csv", texts[:20], labels[:20])
    rows = [
        "text,label,mood,author",
        *(f"{t},{s},{s},p{i // 2 % 25}" for i, (t, s) in enumerate(zip(texts, labels, strict=True))),
    ]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    public = set((folder / "public.txt").read_text().split("\n")) - set(texts)
    (tmp_path / "public.txt").write_text("\n".join(sorted(public)))
    (tmp_path / "terms.txt").write_text("\n".join(texts))
    config = tune_config(tmp_path, vendor.address)
    tune(config)
    record = audit_run(
        Path(config.run),
        replace(
            options,
            public=str(tmp_path / "public.txt"),
            attribute="mood",
            person="author",
            personal_terms=str(tmp_path / "terms.txt"),
        ),
    )
    groups = by_name(record.inversion.groups)
    assert groups["personal"].rate.trials == groups["all"].rate.trials  # every text is a term
    (attribute,) = record.attributes
    assert attribute.ceiling.status == "done", attribute.ceiling
    assert attribute.split == "person" and attribute.ceiling.reported.value > attribute.majority.value
    assert by_name(attribute.attacks)["logistic"].auc.value > 0.9  # the mood is written in the letters
    assert attribute.majority.by_text is not None  # texts of one person hang together
    assert (
        attribute.majority.by_text[1] - attribute.majority.by_text[0] > attribute.majority.high - attribute.majority.low
    )
    with pytest.raises(DataError, match="no column 'modd'"):
        audit_run(Path(config.run), replace(options, public=str(tmp_path / "public.txt"), attribute="modd"))


def test_an_interrupted_audit_goes_on_after_its_last_attack(
    run_once: Callable[..., TuneConfig], options: AuditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(run_once("noisy", privacy=NOISY).run)
    again = replace(options, seed=5)
    real, calls = inverting._attack, []

    def interrupted(scene: Any, attack: Any) -> dict[str, Tensor]:
        calls.append(attack.title)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(scene, attack)

    monkeypatch.setattr(inverting, "_attack", interrupted)
    before = (run / "attacks.json").read_bytes() if (run / "attacks.json").exists() else None
    with pytest.raises(KeyboardInterrupt):
        audit_run(run, again)
    assert ((run / "attacks.json").read_bytes() if before else None) == before
    first = list(calls)
    audit_run(run, again)
    assert calls[3:] == [first[2], *calls[4:]] and len(calls) == 3 + len(suite.INVERSIONS) - 2


def test_an_attack_that_crashes_is_reported_as_failed(
    run_once: Callable[..., TuneConfig], options: AuditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: object) -> suite.Guesses:
        raise ZeroDivisionError("abcd, a private text")

    broken = dict(suite.INVERSIONS) | {"linear": suite.InversionAttack("broken", "", crash)}
    monkeypatch.setattr(inverting, "INVERSIONS", broken)
    run = Path(run_once("noisy", privacy=NOISY).run)
    record = audit_run(run, replace(options, seed=6))
    entry = by_name(record.inversion.attacks)["linear"]
    assert entry.status == "failed" and entry.reported is None and "ZeroDivisionError" in entry.reason
    assert "private text" not in (run / "attacks.json").read_text()
    assert any("failed (linear)" in note for note in record.notes)


def test_a_customer_who_answers_a_second_request_anew_is_found_out(
    run_once: Callable[..., TuneConfig], options: AuditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: an outbox whose bytes change after it was asked again, and noise that is one and the same vector."""
    real, asked = channels._bytes, []

    def fresh(outbox: Any, keys: Any) -> list[bytes]:
        asked.append(1)
        return [bytes([len(asked)]) + content for content in real(outbox, keys)]

    monkeypatch.setattr(channels, "_bytes", fresh)
    with open_run(Path(run_once("noisy", privacy=NOISY).run)) as audited:
        scene = build_scene(audited, options, PRESETS["quick"])
        clean = scene.adversary.clean(scene.token_ids)
        shared = torch.randn(clean.shape[1], generator=torch.Generator().manual_seed(0))
        planted = replace(scene, values=clean + shared)
        found = by_name(channels.SideChannels(planted, scene.truth.ids).run())
    assert found["replay"].reported.value == 1.0
    assert found["repeated_noise"].reported.value == 1.0


def test_blind_attackers_fail_the_positive_control(
    run_once: Callable[..., TuneConfig], options: AuditOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(scene: Any) -> dict[str, Tensor]:
        return {"nearest": torch.zeros_like(scene.truth.ids)}

    monkeypatch.setattr(inverting, "_without_noise", blind)
    record = audit_run(Path(run_once("noisy", privacy=NOISY).run), replace(options, seed=7))
    assert not by_name(record.controls)["positive"].passed


def test_attacks_json_has_no_text_and_the_sample_is_private(
    run_once: Callable[..., TuneConfig], options: AuditOptions
) -> None:
    run = Path(run_once("open").run)
    audit_run(run, options)
    written = (run / "attacks.json").read_text()
    texts = [line.split(",")[0] for line in (run.parent / "train.csv").read_text().splitlines()[1:]]
    assert not any(text in written for text in texts)
    sample = run / "private" / "audit" / "sample.json"
    assert sample.stat().st_mode & 0o777 == 0o600
    content = json.loads(sample.read_text())
    assert {"tokens", "recovered", "special", "personal"} == set(content["texts"][0])
    letters = {letter for letters in CLASSES.values() for letter in letters}
    assert letters & set(content["texts"][0]["tokens"])


@pytest.mark.parametrize("wrong", ["nothing", "no outbox", "another table", "few", "no public", "private public"])
def test_what_cannot_be_audited_is_refused_in_a_line(
    wrong: str, run_once: Callable[..., TuneConfig], options: AuditOptions, tmp_path: Path, folder: Path
) -> None:
    run = tmp_path / "run"
    if wrong != "nothing":
        shutil.copytree(run_once("open").run, run)
    match wrong:
        case "nothing":
            expected = "is not a run folder"
        case "no outbox":
            shutil.rmtree(run / "private")
            expected = "has no outbox"
        case "another table":
            texts, labels = make_texts(30, seed=1234)
            config = (run / "config.toml").read_text().replace(str(folder / "train.csv"), str(tmp_path / "train.csv"))
            (run / "config.toml").write_text(config)
            write_csv(tmp_path / "train.csv", texts, labels)
            expected = "30 of 30 texts of .* were not released"
        case "few":
            table = (folder / "train.csv").read_text().splitlines()[:9]
            (tmp_path / "train.csv").write_text("\n".join(table))
            config = (run / "config.toml").read_text().replace(str(folder / "train.csv"), str(tmp_path / "train.csv"))
            (run / "config.toml").write_text(config)
            expected = "too few tokens .* needs 104"
        case "no public":
            options = replace(options, public=str(tmp_path / "absent.txt"))
            expected = "cannot be read"
        case _:
            texts = [line.split(",")[0] for line in (folder / "train.csv").read_text().splitlines()[1:4]]
            (tmp_path / "public.txt").write_text((folder / "public.txt").read_text() + "\n" + "\n".join(texts))
            options = replace(options, public=str(tmp_path / "public.txt"))
            expected = "has 3 texts that the run released"
    (run / "attacks.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=expected):
        audit_run(run, options)
    assert not (run / "attacks.json").exists()


def test_a_changed_tokenizer_is_refused(
    run_once: Callable[..., TuneConfig], options: AuditOptions, tmp_path: Path
) -> None:
    shutil.copytree(run_once("open").run, tmp_path / "run")
    path = tmp_path / "run" / "bottom" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"A"', 1))
    with pytest.raises(InputError, match=r"altered file 'tokenizer.json'"):
        audit_run(tmp_path / "run", options)


def test_too_few_persons_are_refused_before_the_attacks(
    run_once: Callable[..., TuneConfig], options: AuditOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_once("open").run, run)
    config = (run / "config.toml").read_text()
    train = Path(run_once("open").data.train)
    head, *lines = train.read_text().splitlines()
    rows = [f"{head},author", *(f"{line},only" for line in lines)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (run / "config.toml").write_text(config.replace(str(train), str(tmp_path / "train.csv")))
    monkeypatch.setattr(split, "run_suite", lambda *_: pytest.fail("the attacks were run"))
    with pytest.raises(InputError, match=r"the column 'author' names 1 persons; .* at least 4"):
        audit_run(run, replace(options, attribute="label", person="author"))


@pytest.mark.parametrize("seed", [-2, 10**20])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=rf"seed must be in \[0, \d+\], got {seed}"):
        AuditOptions(public="public.txt", seed=seed)
    with pytest.raises(InputError, match=rf"seed must be in \[0, \d+\], got {seed}"):
        LeakageOptions(model="model", manifest=Path("manifest.json"), seed=seed)


def test_an_unknown_preset_is_refused(options: AuditOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset must be one of quick, standard, full, got 'fast'"):
        audit_run(tmp_path, replace(options, preset="fast"))
