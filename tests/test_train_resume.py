"""Killed and resumed: SIGKILL in the middle of a step, and a result that is bit for bit that of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs_helper import wait_until
from train_helper import classification_config
from veiltune.config import TrainConfig, dump_toml
from veiltune.dp import session
from veiltune.dp.session import train
from veiltune.errors import InputError, InterruptedRunError, PrivacyError, RunInUseError
from veiltune.runs import RunFolder

STEPS, EVERY, KILLED_AT = 60, 8, 27  # or a little later
TIMES = ("seconds", "examples_per_second")
pytestmark = pytest.mark.timeout(300)  # processes start slowly on a busy machine
Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure(tmp_path: Path, tiny_folder: Path) -> Configure:
    """`configure(name)`: 60 steps with noise, scores on the way and checkpoints at multiples of 8."""

    def config(name: str, **sections: Any) -> TrainConfig:
        training = {"steps": STEPS, "checkpoint_every": EVERY, "evaluate_every": 10} | sections.pop("train", {})
        return classification_config(tmp_path, tiny_folder, run=str(tmp_path / name), train=training, **sections)

    return config


def lines_of(config: TrainConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    lines = RunFolder(config.run).metrics()
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def result_of(config: TrainConfig) -> dict[str, bytes]:
    adapter = Path(config.run) / "adapter"
    return {path.name: path.read_bytes() for path in adapter.iterdir()}


def kill_at(config: TrainConfig, steps: int, folder: Path) -> None:
    """Runs `veiltune train` in a process of its own and kills it once so many steps are logged."""
    path = folder / "killed.toml"
    path.write_text(dump_toml(config))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "veiltune", "train", str(path)]
    with (folder / "killed.err").open("wb") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment)
        try:
            wait_until(
                lambda: len(RunFolder(config.run).metrics()) >= steps or process.poll() is not None, "steps", seconds=90
            )
            assert process.poll() is None, (folder / "killed.err").read_text()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(30)


def test_a_killed_run_goes_on_to_the_same_result(configure: Configure, tmp_path: Path) -> None:
    undisturbed, killed = configure("undisturbed"), configure("killed")
    train(undisturbed)
    kill_at(killed, KILLED_AT, tmp_path)
    done = max(line["step"] for line in lines_of(killed))
    assert KILLED_AT - 3 <= done < STEPS and not (Path(killed.run) / "summary.json").exists()
    train(killed)
    assert result_of(killed) == result_of(undisturbed)  # bit for bit
    assert lines_of(killed) == lines_of(undisturbed)  # no step twice, none missing
    claims = [RunFolder(config.run).read_json("privacy.json") for config in (killed, undisturbed)]
    assert claims[0] == claims[1] and claims[0]["steps_taken"] == STEPS


def test_the_comparison_can_fail(configure: Configure) -> None:
    """A run under another key, and one that lost its moments at a checkpoint, end elsewhere."""
    results = []
    for name, seed in (("one", 11), ("other", 12)):
        config = configure(name, noise_seed=seed, train={"steps": 9})
        train(config)
        results.append(result_of(config)["adapter_model.safetensors"])
    forgetful = configure("forgetful", train={"steps": 9})
    asked = iter([False] * 3 + [True])
    with pytest.raises(Exception, match="stopped at step 4"):
        train(forgetful, stop=lambda: next(asked))
    (checkpoint,) = (Path(forgetful.run) / "private" / "checkpoints").glob("*4.safetensors")
    without = {name: tensor for name, tensor in load_file(checkpoint).items() if not name.startswith("exp_avg")}
    save_file(without, checkpoint)
    train(forgetful)
    results.append(result_of(forgetful)["adapter_model.safetensors"])
    assert len(set(results)) == 3


def test_killed_after_the_last_step(configure: Configure) -> None:
    config = configure("late", train={"steps": 4})
    summary, result, lines = train(config), result_of(config), lines_of(config)
    (Path(config.run) / "summary.json").unlink()
    (Path(config.run) / "adapter" / "adapter_model.safetensors").unlink()
    assert train(config)["scores"] == summary["scores"]
    assert result_of(config) == result and lines_of(config) == lines


def test_a_torn_line_and_a_damaged_checkpoint(configure: Configure) -> None:
    config = configure("torn", train={"steps": 12, "checkpoint_every": 4})
    asked = iter([False] * 9 + [True])
    with pytest.raises(Exception, match="stopped at step 10"):
        train(config, stop=lambda: next(asked))
    with RunFolder(config.run).metrics_path.open("ab") as file:
        file.write(b'{"step": 11, "lo')
    newest = sorted((Path(config.run) / "private" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(InputError, match="delete it to go on from an earlier one"):
        train(config)
    newest.unlink()
    train(config)  # from step 8
    whole = configure("whole", train={"steps": 12, "checkpoint_every": 4})
    train(whole)
    assert result_of(config) == result_of(whole) and lines_of(config) == lines_of(whole)


def test_another_key_is_refused(configure: Configure) -> None:
    config = configure("key", train={"steps": 4})
    with pytest.raises(Exception, match="stopped"):
        train(config, stop=lambda: True)
    key = Path(config.run) / "private" / "key"
    key.write_bytes(bytes(32))
    with pytest.raises(PrivacyError, match="training data or the key has changed"):
        train(config)


def test_global_randomness_is_left_alone(configure: Configure) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(configure("quiet", train={"steps": 2}))
    assert torch.equal(torch.rand(3), expected)


def test_a_run_folder_has_one_writer(tmp_path: Path, tiny_folder: Path) -> None:
    config = classification_config(tmp_path, tiny_folder, train={"steps": 2})
    with pytest.raises(InterruptedRunError):
        train(config, stop=lambda: True)
    before = sorted(path.name for path in Path(config.run).rglob("*"))
    with RunFolder(config.run).held(), pytest.raises(RunInUseError, match="another process is at work in"):
        train(config)
    assert sorted(path.name for path in Path(config.run).rglob("*")) == before
    train(config)


def test_a_run_begun_by_another_process_in_the_meantime_is_left(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = classification_config(tmp_path, tiny_folder, train={"steps": 2})

    def overtaken(ours: TrainConfig) -> str:
        RunFolder.create(ours.run, config="[theirs]\n")
        return dump_toml(ours)

    monkeypatch.setattr(session, "dump_toml", overtaken)
    with pytest.raises(InputError, match="holds a run with another configuration"):
        train(config)
    assert RunFolder(config.run).config_path.read_text() == "[theirs]\n"


def test_a_run_that_is_a_file(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file is a file; name a folder as `run`"):
        train(classification_config(tmp_path, tiny_folder, run=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"
