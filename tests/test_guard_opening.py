"""What is served: a finished run as it was fine-tuned; whatever gives no next-token vectors is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from train_helper import generation_config
from veiltune.cli import app
from veiltune.dp.session import train
from veiltune.errors import InputError
from veiltune.guard.engine import Engine
from veiltune.guard.jobs import VectorJob
from veiltune.guard.opening import open_model


def test_a_run_is_served_as_it_was_fine_tuned(tmp_path: Path) -> None:
    train(generation_config(tmp_path, train={"steps": 2, "save_merged": True}))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    with torch.no_grad():
        expected = merged(torch.tensor([[2, 40, 41]])).logits[0, -1].log_softmax(-1).numpy()
    for folder in ("run", "run/merged"):
        found = open_model(str(tmp_path / folder))
        engine = Engine(found.model)
        try:
            (told,) = engine.submit(VectorJob([[2, 40, 41]])).result(60)
        finally:
            engine.close()
        assert told == pytest.approx(expected, abs=1e-4)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        open_model(str(tmp_path / "run"))


def test_an_encoder_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="no causal language model"):
        open_model(str(tiny_folder))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("veiltune.guard.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused = CliRunner().invoke(app, ["guard", "serve", "anything"])
    assert isinstance(refused.exception, InputError) and "pip install '.[guard]'" in str(refused.exception)
