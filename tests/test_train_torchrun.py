"""`torchrun ... veiltune train`: the run of one process, whoever began it, and nothing left hanging."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_train import run_of, weights
from train_helper import classification_config
from veiltune.config import TrainConfig, dump_toml
from veiltune.dp.session import train
from veiltune.errors import InputError, InterruptedRunError


def torchrun(config: TrainConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    toml = folder / "train.toml"
    toml.write_text(dump_toml(config))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, "-m", "veiltune", "train", str(toml)],
        capture_output=True, text=True, timeout=180, env=environment, cwd=folder, check=False,
    )  # fmt: skip


def distance(one: TrainConfig, other: TrainConfig) -> float:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    gap = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine)
    return (gap / sum(float(tensor.square().sum()) for tensor in theirs.values())) ** 0.5


def test_two_processes_finish_what_one_began(tmp_path: Path, tiny_folder: Path) -> None:
    """And the result is that of one alone up to rounding: noise twice, or other noise, would show."""
    alone = classification_config(tmp_path, tiny_folder, run=str(tmp_path / "alone"))
    summary = train(alone)
    both = classification_config(tmp_path, tiny_folder, run=str(tmp_path / "both"))
    with pytest.raises(InterruptedRunError):
        train(both, stop=lambda: True)
    (begun,) = run_of(both).metrics()
    done = torchrun(both, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert distance(both, alone) < 1e-5
    other = classification_config(tmp_path, tiny_folder, run=str(tmp_path / "other"), noise_seed=99)
    train(other)
    assert distance(other, alone) > 1e-2
    lines = run_of(both).metrics()
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, summary["steps"] + 1)) and lines[0] == begun
    assert [line["size"] for line in lines if "size" in line] == [
        line["size"] for line in run_of(alone).metrics() if "size" in line
    ]
    told = run_of(both).read_json("summary.json")
    assert told["processes"] == 2 and summary["processes"] == 1
    assert told["claimed_epsilon"] == summary["claimed_epsilon"] and told["scores"] == summary["scores"]
    assert done.stdout.count("claimed epsilon") == 1  # the others say nothing
    again = torchrun(both, tmp_path)
    assert again.returncode == 0 and run_of(both).metrics() == lines


def test_a_refusal_ends_all(tmp_path: Path, tiny_folder: Path) -> None:
    config = classification_config(tmp_path, tiny_folder, model={"name": str(tmp_path / "nowhere")})
    refused = torchrun(config, tmp_path)
    assert refused.returncode != 0 and refused.stderr.count("veiltune: cannot load the model") == 1
    assert not (tmp_path / "run").exists()


def test_one_device_for_several_processes(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="'cpu' or 'cuda' under torchrun"):
        train(classification_config(tmp_path, tiny_folder, train={"device": "cuda:1"}))
    assert not (tmp_path / "run").exists()
