"""Products of factors in float32, whatever the factors' dtype, without a float32 copy of any whole factor.

A head's factor has tokens x vocabulary entries: in bfloat16 a copy of it in float32 takes longer than the product that
it is made for. So factors of lower precision are converted a slab of columns at a time. Where bfloat16 is multiplied
faster, a sum takes each unit's product rounded to it once, which moves that share by `ROUNDING` of itself at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

#: By how much of its L2 norm a gradient moves, at most, when its entries are rounded to bfloat16.
ROUNDING = 2**-8

#: Columns that are converted at once: a slab of 512 positions is 4 MB.
_SLAB = 2048

#: Entries of a unit's product that are rounded at once; fewer positions than this cost less in float32 (docs/log.md).
_ENTRIES, _LONG = 2**19, 64

_MKLDNN: Any = cast(Any, torch.backends.mkldnn).matmul


def gram(one: Tensor, other: Tensor) -> Tensor:
    """Inner products of vectors: (U, L, d) and (U, L', d) to (U, L, L'), summed in float32.

    Entries of bfloat16 factors are multiplied exactly, and no result is rounded to bfloat16.
    """
    if one.dtype == other.dtype == torch.float32:
        return one @ other.transpose(1, 2)
    total = one.new_zeros(one.shape[0], one.shape[1], other.shape[1], dtype=torch.float32)
    exact = one.dtype == other.dtype == torch.bfloat16  # a CPU that multiplies bfloat16 rounds nothing then
    with _multiplied(_MKLDNN, "bf16") if exact else nullcontext():
        if one is other:
            for _, slab in _slabs(one):
                total.baddbmm_(slab, slab.transpose(1, 2))
        else:
            for (_, left), (_, right) in zip(_slabs(one), _slabs(other), strict=True):
                total.baddbmm_(left, right.transpose(1, 2))
    return total


def norms(values: Tensor) -> Tensor:
    """L2 norms over the last dimension, in float32."""
    squares = values.new_zeros(values.shape[:-1], dtype=torch.float32)
    if values.dtype == torch.float32:
        torch.linalg.vector_norm(values, dim=-1, out=squares)
        return squares
    for _, slab in _slabs(values):
        squares += slab.square_().sum(-1)
    return squares.sqrt_()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left.T @ right to `total` (p, d) in place: left (N, p), right (N, d)."""
    if left.dtype == right.dtype == torch.float32:
        total.addmm_(left.t(), right)
    elif left.shape[1] < right.shape[1]:
        add_product(total.t(), right, left)
    else:
        right = right.float()
        for rows, slab in _slabs(left):
            total[rows].addmm_(slab.t(), right)


def is_rounded(left: Tensor, right: Tensor) -> bool:
    """Whether `add_rounded_products` takes the sum of units' products left[u].T @ right[u].

    It does where that is faster, if a probe of this CPU's products finds positions summed in float32.
    """
    both = left.dtype == right.dtype == torch.bfloat16 and left.device.type == "cpu"
    return both and left.shape[1] >= _LONG and _sums_in_float32()


def add_rounded_products(total: Tensor, left: Tensor, right: Tensor, weights: Tensor) -> None:
    """Adds sum_u weights[u] left[u].T @ right[u] to `total` (p, d), each unit's product rounded to bfloat16 once.

    The product is summed over the positions in float32 first: rounding the weighted factors instead would be faster
    still, and where positions cancel, it would leave more than the unit's norm allows.

    Args:
        total: (p, d) float32, in place.
        left: (U, L, p) bfloat16.
        right: (U, L, d) bfloat16.
        weights: (U,) float32.
    """
    rows = max(1, _ENTRIES // right.shape[2])
    product = right.new_empty(min(rows, left.shape[2]), right.shape[2])
    for start in range(0, left.shape[2], rows):
        part = total[start : start + rows]
        for factor, other, weight in zip(left[..., start : start + rows], right, weights.tolist(), strict=True):
            part.add_(torch.mm(factor.t(), other, out=product[: len(part)]), alpha=weight)


@cache
def _sums_in_float32() -> bool:
    """Whether this CPU's bfloat16 products are rounded when all positions are summed: here 1 of 2^13 is left then."""
    large = torch.full((2 * _LONG, 32), 2.0**6, dtype=torch.bfloat16)
    left, right = large.clone(), large.clone()
    left[_LONG:] *= -1
    left[-1] -= 2.0**-1
    return bool((left.t() @ right == -(2.0**5)).all())


def _slabs(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some columns at a time and the values there in float32, in memory that the next ones take over."""
    size = values.shape[-1]
    memory = values.new_empty(*values.shape[:-1], min(size, _SLAB), dtype=torch.float32)
    for start in range(0, size, _SLAB):
        columns = slice(start, min(start + _SLAB, size))
        slab = memory[..., : columns.stop - start]
        yield columns, slab.copy_(values[..., columns])


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products of float32 factors, even if the process has chosen TF32 or bfloat16 for them.

    Those round the factors: a norm could come out below that of what is summed, by one part in 500.
    """
    with _multiplied(_MKLDNN, "ieee"), _multiplied(torch.backends.cuda.matmul, "ieee"):
        yield


@contextmanager
def _multiplied(settings: Any, precision: str) -> Iterator[None]:
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before
