"""The clipped sum equals a batch-of-one loop, and no unit moves it by more than it says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from dp_twins import (
    Batch,
    Gradients,
    batch_for,
    checkpointing,
    distance,
    loss_for,
    micro_batches,
    norm_of,
    random_batch,
    relative_error,
    tuned_model,
    twin_sum,
    unit_gradients,
    without,
)
from veiltune.dp import products, record
from veiltune.dp.clipping import MODES, ClippedSum, Clipping, ClippingMode, clipped_grad_sum
from veiltune.dp.losses import causal_lm_losses, classification_losses
from veiltune.errors import InputError

METHODS = ("lora", "adapter", "compacter", "bitfit", "rgp", "full")
MODELS = (
    ("gpt2", "causal"),
    ("llama", "causal"),
    ("bert", "classification"),
    ("roberta", "classification"),
    ("gpt2", "classification"),
    ("llama", "classification"),
)
CHECKPOINTING = ("none", "reentrant", "non-reentrant")
SIZES = (3, 2, 1)
UNCLIPPED = Clipping(norm=float("inf"))
# Latin squares over the rest: every pair of values of (method, model, padding, checkpointing, micro-batch) occurs.
CASES = [
    (method, *MODELS[m], padding, CHECKPOINTING[(k + m) % 3], SIZES[(k + 2 * m + p) % 3])
    for k, method in enumerate(METHODS)
    for m in range(len(MODELS))
    for p, padding in enumerate(("right", "left"))
    if (method, MODELS[m][0]) != ("bitfit", "llama")  # its blocks have no bias
]


def engine_sum(model: nn.Module, batch: Batch, task: str, clipping: Clipping, **options: Any) -> ClippedSum:
    return clipped_grad_sum(model, [batch], loss=loss_for(task), clipping=clipping, **options)


def loop(model: nn.Module, batch: Batch, task: str) -> list[Gradients]:
    return unit_gradients(model, batch, loss=loss_for(task))


def clips_some(gradients: list[Gradients], mode: ClippingMode = "flat") -> Clipping:
    """A bound between the two largest norms."""
    *_, second, first = sorted(map(norm_of, gradients))
    return Clipping(norm=0.9 * second + 0.1 * first, mode=mode)


def check_equal(found: ClippedSum, gradients: list[Gradients], tolerance: float = 1e-5) -> None:
    assert relative_error(found.grads, twin_sum(gradients, found.clipping)) < tolerance
    assert found.norms.tolist() == pytest.approx([norm_of(one) for one in gradients], rel=tolerance, abs=1e-7)


@pytest.mark.parametrize(("method", "family", "task", "padding", "kind", "size"), CASES)
def test_the_sum_is_the_loops(method: str, family: str, task: str, padding: str, kind: str, size: int) -> None:
    model = tuned_model(family, task, method)
    batch = batch_for(model, task, padding=padding)
    gradients = loop(model, batch, task)
    with checkpointing(model, kind):
        found = clipped_grad_sum(model, micro_batches(batch, size), loss=loss_for(task), clipping=clips_some(gradients))
    check_equal(found, gradients)
    assert relative_error(found.grads, twin_sum(gradients, UNCLIPPED)) > 1e-3  # the clipping did something


def test_the_comparison_sees_a_small_error() -> None:
    model = tuned_model("gpt2", "causal", "lora")
    batch = batch_for(model, "causal")
    gradients = loop(model, batch, "causal")
    found = engine_sum(model, batch, "causal", clips_some(gradients))
    largest = max(found.grads.values(), key=lambda value: float(value.norm()))
    largest.mul_(1 + 1e-4)
    with pytest.raises(AssertionError):
        check_equal(found, gradients)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "method"), [("gpt2", "full"), ("bert", "compacter"), ("roberta", "rgp")])
def test_every_mode_is_the_loops(mode: ClippingMode, family: str, method: str) -> None:
    task = "causal" if family == "gpt2" else "classification"
    model = tuned_model(family, task, method)
    batch = batch_for(model, task)
    gradients = loop(model, batch, task)
    check_equal(engine_sum(model, batch, task, clips_some(gradients, mode)), gradients)


@pytest.mark.parametrize("balance", [0, 10**12], ids=["dense", "outer"])
@pytest.mark.parametrize("method", ["lora", "rgp", "full"])
def test_both_forms_of_a_matrix_are_the_loops(method: str, balance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MACHINE_BALANCE", balance)
    for family in ("gpt2", "llama"):  # GPT-2's head is its embedding, this Llama's is not
        model = tuned_model(family, "causal", method)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (family == "gpt2")
        batch = batch_for(model, "causal") | {"units": torch.tensor([1, 0, 1])}
        gradients = loop(model, batch, "causal")
        check_equal(engine_sum(model, batch, "causal", clips_some(gradients)), gradients)


def test_without_clipping_it_is_the_plain_gradient() -> None:
    model = tuned_model("llama", "causal", "full")
    batch = batch_for(model, "causal")
    found = engine_sum(model, batch, "causal", UNCLIPPED)
    assert relative_error(found.grads, twin_sum(loop(model, batch, "causal"), UNCLIPPED)) < 1e-5
    assert len(found.norms) == 0
    assert found.losses.tolist() == pytest.approx(causal_lm_losses(model, batch).tolist(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_near_and_bounded(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned_model("gpt2", "causal", method)
    batch = batch_for(model, "causal")
    exact = loop(model, batch, "causal")
    clipping = clips_some(exact)
    found = engine_sum(model, batch, "causal", clipping, bf16=True)
    assert all(grad.dtype == torch.float32 for grad in found.grads.values())

    def loop_loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return causal_lm_losses(model, batch)

    rounded = unit_gradients(model, batch, loss=loop_loss)
    assert relative_error(found.grads, twin_sum(rounded, clipping)) < 2e-2
    assert relative_error(found.grads, twin_sum(exact, clipping)) > 1e-4  # bf16 it was
    for row, (balance, long) in itertools.product(range(len(batch["labels"])), ((0, 64), (10**12, 64), (10**12, 2))):
        monkeypatch.setattr(record, "MACHINE_BALANCE", balance)
        monkeypatch.setattr(products, "_LONG", long)  # the last: each product rounded
        only = {name: value[row : row + 1] for name, value in batch.items()}
        for bound in (clipping.norm, 1e-3):
            alone = engine_sum(model, only, "causal", Clipping(norm=bound), bf16=True)
            assert norm_of(alone.grads) <= bound * (1 + 1e-4)
    again = engine_sum(model, batch, "causal", clipping, bf16=True)
    assert relative_error(again.grads, twin_sum(rounded, clipping)) < 2e-2


# --- units


def person_batch(model: PreTrainedModel, task: str) -> Batch:
    """Units of 3, 1 and 2 rows, and a row that is padding only."""
    parts = [batch_for(model, task, padding=padding) for padding in ("right", "none")]
    batch = {name: torch.cat([part[name] for part in parts] + [parts[0][name][:1]]) for name in parts[0]}
    padding = torch.tensor([False] * 6 + [True])
    return batch | {"units": torch.tensor([2, 0, 2, 1, 0, 0, 3]), "is_padding": padding}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_a_persons_rows_are_one_contribution(method: str, mode: ClippingMode) -> None:
    model = tuned_model("bert", "classification", method)
    batch = person_batch(model, "classification")
    gradients = loop(model, batch, "classification")
    found = engine_sum(model, batch, "classification", clips_some(gradients, mode))
    check_equal(found, gradients)
    assert len(found.norms) == len(found.losses) == 4
    assert float(found.norms[3]) == float(found.losses[3]) == 0.0


def test_padding_rows_within_a_persons_do_not_count() -> None:
    model = tuned_model("gpt2", "causal", "lora")
    batch = batch_for(model, "causal", padding="none") | {"units": torch.tensor([0, 1, 0])}
    padded = batch | {"is_padding": torch.tensor([False, False, True])}
    gradients = loop(model, padded, "causal")
    clipping = clips_some(gradients)
    found = engine_sum(model, padded, "causal", clipping)
    check_equal(found, gradients)
    assert distance(found.grads, engine_sum(model, batch, "causal", clipping).grads) > 1e-3


_TIED = tuned_model("gpt2", "causal", "full")
_LORA = tuned_model("llama", "causal", "lora")


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(MODES),
    log_norm=st.floats(-3, 2),
    tied=st.booleans(),
    people=st.booleans(),
    dense=st.booleans(),
)
def test_removing_a_unit_moves_the_sum_by_at_most_its_sensitivity(
    lengths: list[int], seed: int, mode: ClippingMode, log_norm: float, tied: bool, people: bool, dense: bool
) -> None:
    model = _TIED if tied else _LORA
    batch = random_batch(lengths, seed=seed)
    rows = len(lengths)
    if people:
        labels = torch.randint(0, 2, (rows,), generator=torch.Generator().manual_seed(seed))
        batch["units"] = torch.unique(labels, return_inverse=True)[1]
    clipping = Clipping(norm=10**log_norm, mode=mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "MACHINE_BALANCE", 0 if dense else 10**12)
        whole = engine_sum(model, batch, "causal", clipping)
        keep = batch.get("units", torch.arange(rows)) != 0
        rest = clipped_grad_sum(
            model, [without(batch, keep)] if keep.any() else [], loss=causal_lm_losses, clipping=clipping
        )
    rounding = 1e-6 * clipping.norm * rows
    assert distance(whole.grads, rest.grads) <= whole.sensitivity() * (1 + 1e-5) + rounding


@pytest.mark.parametrize("balance", [0, 10**12], ids=["dense", "outer"])
@pytest.mark.parametrize("positions", [2, 4, 16, 64])
def test_rows_that_cancel_do_not_pass_for_a_small_norm(
    balance: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person whose records pull in opposite ways: what is left drowns in the rounding of Gram matrices."""
    monkeypatch.setattr(record, "MACHINE_BALANCE", balance)
    generator = torch.Generator().manual_seed(positions)
    model = nn.Linear(64, 64, bias=False)
    values = torch.randn(1, 64, generator=generator).repeat(positions, 1)
    values *= 1 + 1e-5 * torch.randn(values.shape, generator=generator)
    sign = torch.tensor([1000.0, -1000.0]).repeat(positions // 2)[:, None]
    batch = {"values": values, "units": torch.zeros(positions, dtype=torch.long), "sign": sign}

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch["values"]) * batch["sign"]).sum(1)

    clipping = Clipping(norm=1e-3)
    (exact,) = unit_gradients(model, batch, loss=loss)
    found = clipped_grad_sum(model, [batch], loss=loss, clipping=clipping)
    assert norm_of(exact) > 10 * clipping.norm
    assert norm_of(found.grads) <= clipping.norm * (1 + 1e-5)
    assert float(found.norms) >= norm_of(exact) * (1 - 1e-3)


# --- the edge table


def nan_loss(row: int, value: float) -> Any:
    """A classification loss one row of which is not finite, and so is its gradient."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        losses = classification_losses(model, batch)
        return losses * torch.where(torch.arange(len(losses)) == row, value, 1.0)

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_counts_for_nothing(method: str, value: float) -> None:
    model = tuned_model("bert", "classification", method)
    batch = batch_for(model, "classification")
    rest = loop(model, without(batch, torch.tensor([True, False, True])), "classification")
    found = clipped_grad_sum(model, [batch], loss=nan_loss(1, value), clipping=clips_some(rest))
    assert relative_error(found.grads, twin_sum(rest, found.clipping)) < 1e-5
    assert found.non_finite == 1
    assert not found.norms[1].isfinite()
    assert not found.losses[1].isfinite()


@pytest.mark.parametrize("balance", [0, 10**12], ids=["dense", "outer"])
def test_an_overflow_in_one_row_leaves_the_others(balance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MACHINE_BALANCE", balance)
    model = nn.Linear(3, 2)
    batch = {"values": torch.tensor([[1.0, 2.0, 3.0], [3e38, 3e38, 3e38], [0.0, 0.0, 0.0]])}

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch["values"]).square().sum(1)

    found = clipped_grad_sum(model, [batch], loss=loss, clipping=Clipping(norm=1.0))
    others = unit_gradients(model, {"values": batch["values"][[0, 2]]}, loss=loss)
    assert found.non_finite == 1
    assert relative_error(found.grads, twin_sum(others, found.clipping)) < 1e-5


def test_a_person_with_one_bad_row_counts_for_nothing() -> None:
    model = tuned_model("bert", "classification", "lora")
    batch = batch_for(model, "classification") | {"units": torch.tensor([0, 1, 1])}
    found = clipped_grad_sum(model, [batch], loss=nan_loss(1, float("nan")), clipping=Clipping(norm=1.0))
    other = loop(model, {name: value[:1] for name, value in batch.items()}, "classification")
    assert found.non_finite == 1
    assert relative_error(found.grads, twin_sum(other, found.clipping)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_nothing_drawn_gives_a_zero_sum(method: str) -> None:
    model = tuned_model("bert", "classification", method)
    batch = batch_for(model, "classification")
    empty = {name: value[:0] for name, value in batch.items()}
    expected = {name: value.shape for name, value in loop(model, batch, "classification")[0].items()}
    for batches in ([], [empty], [empty, empty | {"units": torch.zeros(0, dtype=torch.long)}]):
        found = clipped_grad_sum(model, batches, loss=classification_losses, clipping=Clipping(norm=1.0))
        assert {name: grad.shape for name, grad in found.grads.items()} == expected
        assert norm_of(found.grads) == 0.0
        assert (len(found.norms), len(found.losses), found.non_finite) == (0, 0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_gradient_stays_zero(mode: ClippingMode) -> None:
    model = tuned_model("gpt2", "causal", "full")
    batch = batch_for(model, "causal")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = engine_sum(model, batch, "causal", Clipping(norm=1.0, mode=mode))
    assert norm_of(found.grads) == 0.0
    assert found.norms.tolist() == found.losses.tolist() == [0.0] * 3
    assert found.non_finite == 0


def test_all_rows_padding_is_exactly_nothing() -> None:
    model = tuned_model("bert", "classification", "full")
    batch = batch_for(model, "classification") | {"is_padding": torch.ones(3, dtype=torch.bool)}
    found = clipped_grad_sum(model, [batch], loss=nan_loss(1, float("nan")), clipping=Clipping(norm=1.0))
    assert norm_of(found.grads) == 0.0
    assert found.losses.tolist() == [0.0] * 3


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_clip_norm_that_bounds_nothing_is_refused(norm: float) -> None:
    with pytest.raises(InputError, match="clip_norm"):
        Clipping(norm=norm)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="mode"):
        Clipping(norm=1.0, mode="flatt")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"is_padding": torch.tensor([True])}, r"is_padding must have shape \(3,\), one a row, got \(1,\)"),
        ({"units": torch.tensor([0, 1])}, r"units must have shape \(3,\), one a row, got \(2,\)"),
        ({"units": torch.tensor([0, 1, -1])}, "units must number the units of a micro-batch of 3 rows from 0"),
        ({"units": torch.tensor([0, 1, 7])}, "units must number the units of a micro-batch of 3 rows from 0"),
    ],
)
def test_extras_that_do_not_fit_are_refused(extras: Batch, message: str) -> None:
    batch = {"values": torch.ones(3, 2)} | extras
    with pytest.raises(InputError, match=message):
        clipped_grad_sum(nn.Linear(2, 1), [batch], loss=classification_losses, clipping=Clipping(norm=1.0))


def test_a_micro_batch_without_a_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="holds no tensor"):
        clipped_grad_sum(nn.Linear(2, 1), [{}], loss=classification_losses, clipping=Clipping(norm=1.0))


def test_the_sum_shows_no_private_number() -> None:
    model = tuned_model("bert", "classification", "lora")
    found = engine_sum(model, batch_for(model, "classification"), "classification", Clipping(norm=2.0))
    assert repr(found) == "ClippedSum(3 units, sensitivity 2.0)"
