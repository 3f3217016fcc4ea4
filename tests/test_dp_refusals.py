"""What is refused, and that a model is left as it was, also after an exception."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dp_twins import batch_for, norm_of, tuned_model
from veiltune.dp import clipping as clipping_module
from veiltune.dp.clipping import Clipping, clipped_grad_sum
from veiltune.dp.instrument import check_supported
from veiltune.dp.losses import causal_lm_losses, recorded_heads
from veiltune.dp.record import Record
from veiltune.errors import InputError, PrivacyError

SIZE = 6


def rows_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["values"]).tanh().square().flatten(1).sum(1)


def values_of(*shape: int) -> dict[str, Tensor]:
    return {"values": torch.randn(*shape, generator=torch.Generator().manual_seed(1))}


def only(layer: nn.Module, *names: str) -> nn.Module:
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in names)
    return layer


class Gain(nn.Module):
    """A trainable parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)
        self.gain = nn.Parameter(torch.ones(SIZE))

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values) * self.gain


class Borrowed(nn.Module):
    """Uses a layer's weight behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(values), self.layer.weight)


class Sideways(nn.Module):
    """Its layer sees positions as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values.transpose(0, 1)).transpose(0, 1)


class OnePlusRMSNorm(LlamaRMSNorm):
    """Gemma's formula in Llama's clothes."""

    def forward(self, values: Tensor) -> Tensor:
        rms = (values.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return (1 + self.weight) * values / rms


class Subclass(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        return 2 * super().forward(values)


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(nn.Linear(SIZE, SIZE))


def compiled_within() -> nn.Module:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
    model[1].compile(backend="eager")
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(3)), "1 is a BatchNorm1d: it mixes"),
    "frozen BatchNorm": (lambda: nn.Sequential(nn.Linear(SIZE, 2), only(nn.BatchNorm1d(3))), "it mixes"),
    "Conv1d": (lambda: nn.Conv1d(3, 3, 1), "Conv1d, has no rule"),
    "raw parameter": (Gain, "gain trains but its layer, Gain, has no rule"),
    "attention": (lambda: nn.MultiheadAttention(SIZE, 1), "MultiheadAttention, has no rule"),
    "nothing": (lambda: only(nn.Linear(SIZE, SIZE)), "nothing in the model trains"),
    "1 + w": (lambda: OnePlusRMSNorm(SIZE), "OnePlusRMSNorm, has no rule"),
    "Gemma": (lambda: GemmaRMSNorm(SIZE), "GemmaRMSNorm, has no rule"),
    "weight norm": (weight_normed, "weight_g trains but its layer, Linear, has no rule"),
    "compiled": (lambda: torch.compile(nn.Linear(SIZE, SIZE), backend="eager"), "the model is compiled"),
    "compiled layer": (compiled_within, "1 is compiled .torch.compile. and holds what trains"),
    "subclass": (lambda: Subclass(SIZE, SIZE), "Subclass, has no rule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_before_anything_runs(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(PrivacyError, match=message):
        check_supported(model)
    with pytest.raises(PrivacyError, match=message):
        clipped_grad_sum(model, [], loss=rows_loss, clipping=Clipping(norm=1.0))


def refused(model: nn.Module, message: str, *, loss: Any = rows_loss, kind: type[Exception] = PrivacyError) -> None:
    """The refusal comes, and the model is as before: parameters, forward methods, gradients, copies."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message):
        clipped_grad_sum(model, [values_of(4, 3, SIZE)], loss=loss, clipping=Clipping(norm=1.0))
    check_untouched(model, before)


def check_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert not any("forward" in vars(module) for module in model.modules())
    assert not recorded_heads.get()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    copied = copy.deepcopy(model)
    assert all(torch.equal(value, before[name]) for name, value in copied.state_dict().items())


def test_a_compiled_part_in_which_nothing_trains_changes_nothing() -> None:
    model = nn.Sequential(only(Sideways()), nn.Linear(SIZE, SIZE))
    batches, clipping = [values_of(4, 3, SIZE)], Clipping(norm=1.0)
    plain = clipped_grad_sum(model, batches, loss=rows_loss, clipping=clipping)
    calls: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return graph.forward

    model[0].compile(backend=counting)
    compiled = clipped_grad_sum(model, batches, loss=rows_loss, clipping=clipping)
    assert calls
    assert all(torch.equal(compiled.grads[name], value) for name, value in plain.grads.items())


def test_a_weight_used_behind_its_layers_back_is_refused() -> None:
    refused(Borrowed(), r"layer.weight got a gradient outside its layer's rule \(1 parameters\)")


def test_a_left_over_gradient_is_refused() -> None:
    model = nn.Linear(SIZE, SIZE)
    model.bias.grad = torch.zeros(SIZE)
    refused(model, "bias got a gradient outside")


def test_a_layer_that_sees_other_rows_is_refused() -> None:
    refused(Sideways(), "layer sees 3 rows where the batch has 4")


def test_a_norm_over_two_axes_is_refused() -> None:
    refused(nn.LayerNorm((3, SIZE)), "LayerNorm over 2 axes")


def test_a_bias_beside_a_carried_weight_is_refused() -> None:
    model = tuned_model("gpt2", "causal", "rgp")
    model.get_submodule("transformer.h.0.attn.c_attn.projection").bias.requires_grad_(True)
    with pytest.raises(PrivacyError, match="bias that trains beside its carried weight"):
        clipped_grad_sum(model, [batch_for(model, "causal")], loss=causal_lm_losses, clipping=Clipping(norm=1.0))


def test_an_embedding_that_mixes_is_refused() -> None:
    model = nn.Embedding(4, SIZE, scale_grad_by_freq=True)
    with pytest.raises(PrivacyError, match="scale_grad_by_freq"):
        clipped_grad_sum(model, [{"values": torch.tensor([[1]])}], loss=rows_loss, clipping=Clipping(norm=1.0))


@pytest.mark.parametrize("reduce", [Tensor.mean, lambda losses: losses[:, None], lambda losses: losses[:2]])
def test_a_loss_that_is_not_one_number_a_row_is_refused(reduce: Callable[[Tensor], Tensor]) -> None:
    refused(
        nn.Linear(SIZE, SIZE),
        r"one number a row, shape \(4,\)",
        loss=lambda m, b: reduce(rows_loss(m, b)),
        kind=InputError,
    )


def test_a_loss_that_reads_nothing_that_trains_is_refused() -> None:
    model = nn.ModuleList([nn.Linear(SIZE, SIZE), only(nn.Linear(SIZE, SIZE))])
    refused(model, "took part in the loss", loss=lambda model, batch: rows_loss(model[1], batch))


def test_a_forward_method_of_ones_own_is_refused_and_kept() -> None:
    """Wrappers put one on the layer itself; recording past it would compute another function."""
    model = nn.Linear(SIZE, SIZE)
    model.forward = lambda values: 2 * values  # type: ignore[method-assign]
    with pytest.raises(PrivacyError, match="forward"):
        clipped_grad_sum(model, [values_of(4, SIZE)], loss=rows_loss, clipping=Clipping(norm=1.0))
    assert torch.equal(model(torch.ones(SIZE)), 2 * torch.ones(SIZE))


# --- the model is left as it was


@pytest.mark.parametrize("method", ["lora", "compacter", "rgp", "full"])
def test_a_model_is_untouched_after_success_and_after_an_exception(method: str) -> None:
    model = tuned_model("gpt2", "causal", method)
    batch = batch_for(model, "causal")
    before = copy.deepcopy(model.state_dict())
    clipped_grad_sum(model, [batch], loss=causal_lm_losses, clipping=Clipping(norm=1.0))
    check_untouched(model, before)

    def failing(model: nn.Module, batch: Any) -> Tensor:
        causal_lm_losses(model, batch)
        raise MemoryError("planted")

    with pytest.raises(MemoryError, match="planted"):
        clipped_grad_sum(model, [batch], loss=failing, clipping=Clipping(norm=1.0))
    check_untouched(model, before)
    again = clipped_grad_sum(model, [batch], loss=causal_lm_losses, clipping=Clipping(norm=1.0))
    assert norm_of(again.grads) > 0
    ordinary = causal_lm_losses(model, batch).sum()
    ordinary.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


class Failing(torch.autograd.Function):
    """Breaks the backward pass, as running out of memory does."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise MemoryError("planted")


def broken(values: Tensor) -> Tensor:
    return Failing.apply(values)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fails", [False, True])
def test_no_gradient_stays_in_memory(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[weakref.ref[Record]] = []

    def tracked(*arguments: Any) -> Record:
        made = Record(*arguments)
        records.append(weakref.ref(made))
        return made

    monkeypatch.setattr(clipping_module, "Record", tracked)
    below, above = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
    model = nn.ModuleList([below, above])

    def loss(model: Any, batch: Any) -> Tensor:
        hidden = model[0](batch["values"])
        return model[1](broken(hidden) if fails else hidden).square().sum((1, 2))

    try:
        clipped_grad_sum(model, [values_of(4, 3, SIZE)], loss=loss, clipping=Clipping(norm=1.0))
        assert not fails
    except MemoryError:
        assert fails
    gc.collect()
    assert len(records) == 1
    assert all(record() is None for record in records)
