"""Layers as autograd functions whose backward pass hands per-example gradients to a `Record`.

Each takes its trainable tensors as inputs, so that autograd comes by, and returns no gradient for them: what would be
summed over examples there goes, unsummed, into the record. Nothing is computed twice, and whatever saves and restores
autograd's tensors (either kind of gradient checkpointing) works as it does for any layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veiltune.dp.record import Record

T = TypeVar("T", bound=Tensor | None)


def computing_dtype(values: Tensor) -> torch.dtype:
    """The dtype that matrix products of these values have: autocast's where it is on."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


@dataclass(frozen=True)
class MatrixUse:
    """One call of an affine map.

    Attributes:
        record: Where gradients go.
        weight: The weight's name in the record; None if it is frozen.
        bias: Likewise.
        transposed: The weight is (in, out), as in Conv1D, not (out, in).
    """

    record: Record
    weight: str | None
    bias: str | None
    transposed: bool


class Matrix(torch.autograd.Function):
    """x W + b, of which the weight, the bias or both train."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, use: MatrixUse) -> Tensor:
        """(B, ..., in) to (B, ..., out)."""
        dtype = computing_dtype(values)
        values, weight = values.to(dtype), weight.to(dtype)
        ctx.use = use
        ctx.save_for_backward(values if use.weight else None, weight)
        matrix = weight.t() if use.transposed else weight
        return torch.nn.functional.linear(values, matrix, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Records; passes on the gradient of the values only."""
        values, weight = ctx.saved_tensors
        use: MatrixUse = ctx.use
        outputs = _positions(gradient)
        if use.bias:
            use.record.add_total(use.bias, outputs)
        if use.weight:
            inputs = _positions(values)
            left, right = (inputs, outputs) if use.transposed else (outputs, inputs)
            use.record.add_product(use.weight, left, right)
        below = gradient @ (weight.t() if use.transposed else weight) if ctx.needs_input_grad[0] else None
        return below, None, None, None


@dataclass(frozen=True)
class LoraUse:
    """One call of a projection with a low-rank update: names in the record, None for a frozen factor, and alpha / r."""

    record: Record
    down: str | None
    up: str | None
    scaling: float
    transposed: bool


class Lora(torch.autograd.Function):
    """x W + b + s (x A^T) B^T with W and b frozen; the update is added in place and only x and x A^T are kept."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, use: LoraUse
    ) -> Tensor:
        """(B, ..., in) to (B, ..., out); down (r, in), up (out, r)."""
        dtype = computing_dtype(values)
        values, weight, down, up = (tensor.to(dtype) for tensor in (values, weight, down, up))
        matrix = weight.t() if use.transposed else weight
        outputs = torch.nn.functional.linear(values, matrix, None if bias is None else bias.to(dtype))
        low = values @ down.t()
        outputs.view(-1, outputs.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.t(), alpha=use.scaling)
        ctx.use = use
        ctx.save_for_backward(values, low, weight, down, up)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Records both factors' gradients; passes on that of the values."""
        values, low, weight, down, up = ctx.saved_tensors
        use: LoraUse = ctx.use
        low_gradient = (gradient @ up).mul_(use.scaling)
        if use.up:
            use.record.add_product(use.up, _positions(gradient), _positions(low) * use.scaling)
        if use.down:
            use.record.add_product(use.down, _positions(low_gradient), _positions(values))
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        below = gradient @ (weight.t() if use.transposed else weight)
        below.view(-1, below.shape[-1]).addmm_(low_gradient.view(-1, low_gradient.shape[-1]), down)
        return below, None, None, None, None, None


@dataclass(frozen=True)
class CarrierUse:
    """One call of a projection whose gradient travels on low-rank carriers: their names in the record."""

    record: Record
    left: str
    right: str
    transposed: bool


class Carried(torch.autograd.Function):
    """x W + b; recorded are dW R^T (out, r) and L^T dW (r, in), dW being the weight's gradient, which is not formed.

    Source: reparametrized gradient perturbation, Yu et al. 2021, arXiv:2106.09352.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, use: CarrierUse
    ) -> Tensor:
        """(B, ..., in) to (B, ..., out); left (out, r), right (r, in)."""
        dtype = computing_dtype(values)
        values, weight, left, right = (tensor.to(dtype) for tensor in (values, weight, left, right))
        ctx.use = use
        ctx.save_for_backward(values, weight, left, right)
        matrix = weight.t() if use.transposed else weight
        return torch.nn.functional.linear(values, matrix, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Records both carriers' gradients; passes on that of the values."""
        values, weight, left, right = ctx.saved_tensors
        use: CarrierUse = ctx.use
        inputs, outputs = _positions(values), _positions(gradient)
        use.record.add_product(use.left, outputs, inputs @ right.t())
        use.record.add_product(use.right, outputs @ left, inputs)
        below = gradient @ (weight.t() if use.transposed else weight) if ctx.needs_input_grad[0] else None
        return below, None, None, None, None, None


class HypercomplexUse:
    """One call of a PHM layer: names in the record of its rules, left and right factors and bias."""

    def __init__(self, record: Record, rules: str, left: str, right: str, bias: str) -> None:
        self.record, self.rules, self.left, self.right, self.bias = record, rules, left, right, bias


class Hypercomplex(torch.autograd.Function):
    """x W + b with W = sum_i kron(rules[i], left[i] @ right[i]); all four tensors train.

    Source: Mahabadi et al. 2021, arXiv:2106.04647.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, rules: Tensor, left: Tensor, right: Tensor, bias: Tensor, use: HypercomplexUse
    ) -> Tensor:
        """(B, ..., in) to (B, ..., out); rules (n, n, n), left (n, in/n, r), right (n, r, out/n)."""
        dtype = computing_dtype(values)
        values = values.to(dtype)
        weight = hypercomplex_weight(rules, left, right).to(dtype)
        ctx.use = use
        ctx.save_for_backward(values, weight, rules, left, right)
        return torch.nn.functional.linear(values, weight.t(), bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Records; the factors' gradients come from the positions, and no gradient of the whole matrix is formed."""
        values, weight, rules, left, right = ctx.saved_tensors
        use: HypercomplexUse = ctx.use
        record, n = use.record, len(rules)
        rules, left, right = rules.float(), left.float(), right.float()
        inputs = record.grouped(_positions(values)).float().unflatten(2, (n, -1))  # (U, T, a, p): row a p of W
        outputs = record.grouped(_positions(gradient)).float().unflatten(2, (n, -1))  # (U, T, b, q): column b q
        low = torch.einsum("utap,ipr->utair", inputs, left)
        high = torch.einsum("utbq,irq->utbir", outputs, right)
        record.add_dense(use.rules, torch.einsum("utair,utbir->uiab", low, high))
        onto_rows = torch.einsum("utbir,iab->utair", high, rules)
        record.add_dense(use.left, torch.einsum("utap,utair->uipr", inputs, onto_rows))
        onto_columns = torch.einsum("utair,iab->utbir", low, rules)
        record.add_dense(use.right, torch.einsum("utbq,utbir->uirq", outputs, onto_columns))
        record.add_total(use.bias, _positions(gradient))
        below = gradient @ weight.t() if ctx.needs_input_grad[0] else None
        return below, None, None, None, None, None


def hypercomplex_weight(rules: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(in, out) sum of Kronecker products."""
    blocks = torch.einsum("iab,ipq->apbq", rules, left @ right)
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)


@dataclass(frozen=True)
class TableUse:
    """One reading of an embedding: its name in the record, and the id whose row does not train."""

    record: Record
    weight: str
    padding_idx: int | None


class Table(torch.autograd.Function):
    """Rows of an embedding."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, use: TableUse) -> Tensor:
        """(B, T) ids to (B, T, H)."""
        ctx.use, ctx.rows = use, len(weight)
        ctx.save_for_backward(ids)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        """Records."""
        (ids,) = ctx.saved_tensors
        use: TableUse = ctx.use
        if use.padding_idx is not None:
            gradient = gradient.masked_fill((ids == use.padding_idx)[..., None], 0)
        use.record.add_lookup(use.weight, ids, gradient, ctx.rows)
        return None, None, None


@dataclass(frozen=True)
class ScaleUse:
    """One call of a norm's elementwise part: names in the record, None for what is frozen or absent."""

    record: Record
    weight: str | None
    bias: str | None


class Scale(torch.autograd.Function):
    """x * w + b, element by element of the last axis."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, use: ScaleUse) -> Tensor:
        """(B, ..., H) to the same."""
        ctx.use = use
        ctx.save_for_backward(values if use.weight else None, weight)
        outputs = values * weight
        return outputs if bias is None else outputs.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Records; passes on the gradient of the values."""
        values, weight = ctx.saved_tensors
        use: ScaleUse = ctx.use
        if use.bias:
            use.record.add_total(use.bias, _positions(gradient))
        if use.weight:
            use.record.add_total(use.weight, _positions(gradient) * _positions(values))
        return (gradient * weight).to(gradient.dtype) if ctx.needs_input_grad[0] else None, None, None, None


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Calls an autograd function, whose `apply` has no types."""
    return cast(Tensor, function.apply(*arguments))


def _positions(values: Tensor) -> Tensor:
    """(B, ..., d) to (B, T, d); (B, d) counts as one position."""
    return values.reshape(len(values), -1, values.shape[-1])
