"""Matrix products in bfloat16: which operations are, and that attention on a CPU is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from dp_twins import batch_for, checkpointing, loss_for, relative_error, tuned_model
from veiltune.dp.clipping import Clipping, clipped_grad_sum
from veiltune.models.precision import bf16_products, float32_attention


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types that attention computed in, call by call."""
    seen: list[torch.dtype] = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        out = scaled_dot_product_attention(*args, **kwargs)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


@contextmanager
def plain_autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "roberta"])
def test_attention_stays_in_float32_within_and_nowhere_else(family: str, attended: list[torch.dtype]) -> None:
    task = "causal" if family in ("gpt2", "llama") else "classification"
    model = tuned_model(family, task, "lora")
    inputs = {name: value for name, value in batch_for(model, task).items() if name != "labels"}
    exact = model(**inputs).logits.detach()
    with bf16_products("cpu"):
        near = model(**inputs).logits.detach()
        assert linear(torch.ones(2, 8), torch.ones(4, 8)).dtype == torch.bfloat16
    assert set(attended) == {torch.float32}
    assert 0 < float((near.float() - exact).norm() / exact.norm()) < 2e-2
    attended.clear()
    with bf16_products("cpu", enabled=False):
        torch.testing.assert_close(model(**inputs).logits.detach(), exact, rtol=0, atol=0)
    attended.clear()
    with plain_autocast():
        model(**inputs)
    assert set(attended) == {torch.bfloat16}  # other people's autocast is as it was


def test_the_inner_context_wins_and_the_outer_one_comes_back(attended: list[torch.dtype]) -> None:
    model = tuned_model("gpt2", "causal", "lora")
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with plain_autocast(), float32_attention("cpu", True):
        with float32_attention("cpu", False):
            model(**inputs)
        assert set(attended) == {torch.bfloat16}
        attended.clear()
        model(**inputs)
        assert set(attended) == {torch.float32}


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_what_checkpointing_computes_again_is_what_it_was(kind: str, attended: list[torch.dtype]) -> None:
    model = tuned_model("gpt2", "causal", "lora")
    batch = batch_for(model, "causal")
    clipping = Clipping(norm=0.5)
    once = clipped_grad_sum(model, [batch], loss=loss_for("causal"), clipping=clipping, bf16=True)
    calls = len(attended)
    with checkpointing(model, kind):
        again = clipped_grad_sum(model, [batch], loss=loss_for("causal"), clipping=clipping, bf16=True)
    assert len(attended) >= 3 * calls  # forward, and once more
    assert set(attended) == {torch.float32}
    assert relative_error(again.grads, once.grads) < 1e-6
