"""A resumed `DPTrainer` is the uninterrupted run to the bit; resumed with anything changed it is refused."""

from __future__ import annotations

import copy
import json
import os
import stat
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veiltune.dp.trainer
from dp_tables import model, table
from dp_trainers import dropping_model, logged, moved, peft_model, plan, trainer, weights
from tiny import tiny_model
from veiltune.dp.encoding import Encoded
from veiltune.dp.encoding import collate as encoded_batch
from veiltune.errors import InputError, PrivacyError
from veiltune.models.adapters import attach_peft

# peft 0.21 asks transformers for a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize(("kind", "step"), [("dropout", 2), ("dropout", 5), ("peft", 2), ("rgp", 2)])
def test_resumed_it_is_the_uninterrupted_run(kind: str, step: int, tmp_path: Path) -> None:
    """To the bit, dropout included; step 5 is the end of an epoch of this plan, step 2 is not."""

    def make() -> Any:
        return {"dropout": dropping_model, "peft": peft_model}.get(kind, lambda: model(kind))()

    state = torch.get_rng_state()
    whole = trainer(tmp_path, make(), plan=plan(steps=7), args={"save_strategy": "steps", "save_steps": step})
    whole.train()
    torch.manual_seed(1234)  # a new process has another state
    other = trainer(tmp_path, make(), plan=plan(steps=7))
    other.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    torch.set_rng_state(state)
    expected, got = weights(whole.model), weights(other.model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    for name in ("loss", "epsilon", "epoch"):
        assert logged(other, name) == logged(whole, name)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer(folder, args={"save_strategy": "steps", "save_steps": 2}).train()
    return folder


@pytest.fixture
def run_folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it, with the key's folder."""
    import shutil

    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_key_is_secret_and_apart(stopped: Path) -> None:
    private = stopped / "run.private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert [path.name for path in private.iterdir()] == ["dp.key"]
    assert stat.S_IMODE((private / "dp.key").stat().st_mode) == 0o600
    key = (private / "dp.key").read_bytes()
    assert len(key) == 32
    inside = [path for path in (stopped / "run").rglob("*") if path.is_file()]
    assert len(inside) > 15
    for path in inside:
        content = path.read_bytes()
        assert key not in content and key.hex().encode() not in content, path.name
    assert all(path.name != "dp.key" for path in inside)


def test_a_finished_run_is_not_trained_on(run_folder: Path) -> None:
    whole = trainer(run_folder)
    result = whole.train(resume_from_checkpoint=True)
    saved = load_file(run_folder / "run" / "checkpoint-6" / "model.safetensors")
    assert result.global_step == 6 and len(logged(whole, "loss")) == 6
    assert all(torch.equal(saved[name], values) for name, values in weights(whole.model).items())


def test_the_last_checkpoint_is_found(run_folder: Path) -> None:
    import shutil

    shutil.rmtree(run_folder / "run" / "checkpoint-6")
    run = trainer(run_folder)
    assert run.train(resume_from_checkpoint=True).global_step == 6
    assert len(logged(run, "loss")) == 6  # four of them from before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": plan(0.9)}, "noise_multiplier: 1.0 in the run, 0.9 now"),
        ({"plan": plan(steps=8)}, "steps: 6 in the run, 8 now"),
        ({"args": {"learning_rate": 2e-2}}, "learning_rate: 0.01 in the run, 0.02 now"),
        ({"args": {"optim": "sgd"}}, "optim: adamw_torch.* in the run, sgd now"),
        ({"args": {"bf16": True}}, "bf16: False in the run, True now"),
        ({"train_dataset": table(60, seed=9)}, "another table"),
        ({"train_dataset": table(60)[::-1]}, "another table"),
    ],
)
def test_resumed_with_something_changed_is_refused(changes: dict[str, Any], said: str, run_folder: Path) -> None:
    made = model()
    before = weights(made)
    run = trainer(run_folder, made, **changes)
    with pytest.raises(PrivacyError, match=said) as caught:
        run.train(resume_from_checkpoint=str(run_folder / "run" / "checkpoint-2"))
    assert "\n" not in str(caught.value)
    assert not moved(before, made)  # nothing was loaded


@pytest.mark.parametrize("changes", [{"args": {"per_device_train_batch_size": 2}}, {"max_tokens": 16}])
def test_another_cut_is_other_masks(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer(tmp_path, dropping_model(), args={"save_strategy": "steps", "save_steps": 2}).train()
    last = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(PrivacyError, match=r"(per_device_train_batch_size|max_tokens): \S+ in the run, \d+ now"):
        trainer(tmp_path, dropping_model(), **changes).train(resume_from_checkpoint=last)
    plain = tmp_path / "plain"
    trainer(plain, args={"save_strategy": "steps", "save_steps": 2}).train()
    trainer(plain, **changes).train(resume_from_checkpoint=str(plain / "run" / "checkpoint-2"))  # memory only


def test_resumed_with_other_owners_is_refused(tmp_path: Path) -> None:
    claim = plan(num_units=20, expected_batch_size=6, unit="person", steps=2)
    options: dict[str, Any] = {"plan": claim, "args": {"save_strategy": "steps", "save_steps": 1}}
    trainer(tmp_path, persons=[f"p{row % 20}" for row in range(60)], **copy.deepcopy(options)).train()
    run = trainer(tmp_path, persons=[f"p{row // 3}" for row in range(60)], **options)
    with pytest.raises(PrivacyError, match="another table"):
        run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_what_a_rows_repr_leaves_out_counts(tmp_path: Path) -> None:
    """The rows of `veiltune.dp.encoding` show their lengths only."""

    def encoded(seed: int) -> list[Encoded]:
        draws = torch.randint(2, 128, (60, 6), generator=torch.Generator().manual_seed(seed)).tolist()
        return [Encoded(ids, [-100, *ids[1:]]) for ids in draws]

    pad, saving = partial(encoded_batch, pad_id=0), {"save_strategy": "steps", "save_steps": 5}
    trainer(tmp_path, train_dataset=encoded(0), data_collator=pad, args=saving).train()
    for seed, refusal in ((1, pytest.raises(PrivacyError, match="another table")), (0, nullcontext())):
        run = trainer(tmp_path, train_dataset=encoded(seed), data_collator=pad)
        with refusal:
            run.train(resume_from_checkpoint=True)


def resume_error(folder: Path) -> str:
    with pytest.raises((InputError, PrivacyError)) as caught:
        trainer(folder).train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_resumed_without_its_key_or_state_is_refused(run_folder: Path) -> None:
    key, state = run_folder / "run.private" / "dp.key", run_folder / "run" / "checkpoint-2" / "veiltune_dp.json"
    key.write_bytes(os.urandom(32))
    assert "of another run" in resume_error(run_folder)
    key.unlink()
    assert "dp.key" in resume_error(run_folder)
    for broken in ("{", json.dumps({"plan": {}}), json.dumps({"plan": plan().to_dict()})):
        state.write_text(broken)
        assert "cannot be resumed privately" in resume_error(run_folder)
    state.unlink()
    assert "veiltune_dp.json" in resume_error(run_folder)


def based_on(seed: int, method: str = "lora") -> Any:
    """The same adapters on another base model; RGP trains its weights and keeps the start of each."""
    made = tiny_model("gpt2", "causal", seed=seed)
    attach_peft(made, method=method, seed=0, rank=4)
    return made


@pytest.mark.parametrize("method", ["lora", "rgp"])
def test_resumed_on_another_base_model_is_refused(method: str, tmp_path: Path) -> None:
    first = trainer(tmp_path, based_on(0, method), args={"save_strategy": "steps", "save_steps": 2})
    first.train()
    reset = based_on(0, method)
    reset.config.layer_norm_epsilon = 0.1
    for other in (based_on(7, method), model("bitfit"), reset):
        before = weights(other)
        with pytest.raises(PrivacyError, match="another frozen model or settings"):
            trainer(tmp_path, other).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert not moved(before, other)
    first.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))  # has trained, which is no difference


def test_resumed_by_another_version_is_refused(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veiltune.dp.trainer.code_version", lambda: "9.9")
    assert "another version of Veiltune" in resume_error(run_folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_resumed_without_a_part_is_refused(name: str, run_folder: Path) -> None:
    (run_folder / "run" / "checkpoint-2" / name).unlink()
    assert f"it has no whole {name}" in resume_error(run_folder)


def test_weights_alone_cannot_be_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, args={"save_strategy": "steps", "save_steps": 2, "save_only_model": True}).train()
    assert "save_only_model" in resume_error(tmp_path)
    with pytest.raises(InputError, match=r"has no checkpoint that can be resumed.*save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def killed_in(place: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a run in the middle of writing the checkpoint of step 4."""
    owner = veiltune.dp.trainer if hasattr(veiltune.dp.trainer, place) else run
    whole = getattr(owner, place)

    def dying(*arguments: Any, **options: Any) -> Any:
        if run.state.global_step == 4:
            raise SystemExit("killed")
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, place, dying)
    with pytest.raises(SystemExit):
        run.train()
    monkeypatch.undo()


@pytest.mark.parametrize(
    "place", ["atomic_write_bytes", "save_model", "_save_optimizer_and_scheduler", "_save_rng_state"]
)
def test_a_kill_while_a_checkpoint_is_written_leaves_one(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    killed_in(place, trainer(tmp_path, args=saving), monkeypatch)
    again = trainer(tmp_path, args=saving)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_checkpoint_that_was_cut_off_is_not_the_newest(run_folder: Path) -> None:
    (run_folder / "run" / "checkpoint-6" / "trainer_state.json").write_text('{"global_step"')
    run = trainer(run_folder)
    assert run.train(resume_from_checkpoint=True).global_step == 6 and len(logged(run, "loss")) == 6


def test_a_new_runs_checkpoint_over_an_old_one_is_not_taken_for_whole(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the old weights are replaced and the old optimizer's state is not."""
    run = trainer(run_folder, args={"save_strategy": "steps", "save_steps": 4})
    killed_in("_save_optimizer_and_scheduler", run, monkeypatch)
    with pytest.raises(InputError, match=r"no whole trainer_state\.json"):
        trainer(run_folder).train(resume_from_checkpoint=str(run_folder / "run" / "checkpoint-4"))


def test_the_table_is_read_for_its_digest_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, args={"save_strategy": "steps", "save_steps": 1})
    made, count = run._ingredients, []
    run._ingredients = lambda key: count.append(key) or made(key)
    run.train()
    assert len(count) == 1


def test_a_new_run_in_the_same_folder_draws_a_new_key(run_folder: Path) -> None:
    old = (run_folder / "run.private" / "dp.key").read_bytes()
    run = trainer(run_folder, args={"save_strategy": "steps", "save_steps": 5})
    run.train()
    assert run.engine.key != old == old[:32]
    assert "of another run" in resume_error(run_folder)  # checkpoint-2 is the old one's


def test_where_the_key_goes_when_the_output_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = trainer(tmp_path, args={"output_dir": ".", "save_strategy": "steps", "save_steps": 3})
    run.train()
    assert (tmp_path / "here.private" / "dp.key").is_file() and (tmp_path / "here" / "checkpoint-3").is_dir()
