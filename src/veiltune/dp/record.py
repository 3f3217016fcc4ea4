"""What one backward pass leaves behind for each unit, and how it is measured and summed.

A gradient of a unit (an example, or a person with all its records) for one parameter is kept in one of three forms:

=========  ==========================================  ==========================  ===========================
form       holds, for U units of L positions           gradient of unit u          for
=========  ==========================================  ==========================  ===========================
dense      (U, *shape)                                 itself                      low-rank factors, biases
outer      left (U, L, p), right (U, L, d)             left[u].T @ right[u]        matrices: never U x p x d
lookup     ids (U, L), values (U, L, d)                row v: sum over ids == v    embeddings
=========  ==========================================  ==========================  ===========================

A parameter that is used more than once (a tied head, shared factors) has one entry a use; its norm has the cross terms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veiltune.dp.products import ROUNDING, add_product, add_rounded_products, full_precision, gram, is_rounded, norms
from veiltune.dp.scratch import Scratch, block

#: Floating point operations that pass in the time in which one element of a per-example matrix is written, read for
#: its norm and read for the sum; measured on a CPU (docs/log.md). Only speed depends on it.
MACHINE_BALANCE = 256


@dataclass(frozen=True)
class Outer:
    """Gradients left[u].T @ right[u]."""

    left: Tensor  # (U, L, p)
    right: Tensor  # (U, L, d)

    def dense(self) -> Tensor:
        """(U, p, d)."""
        return self.left.transpose(1, 2) @ self.right

    def lengths(self) -> Tensor:
        """(U,) sum of the positions' norms, at least the gradient's."""
        return (norms(self.left) * norms(self.right)).sum(1)

    def masked(self, keep: Tensor) -> Outer:
        """With exact zeros for units that are not kept."""
        return Outer(_masked(self.left, keep), _masked(self.right, keep))


@dataclass(frozen=True)
class Lookup:
    """Gradients of a table (rows, d) whose rows `ids` were read."""

    ids: Tensor  # (U, L)
    values: Tensor  # (U, L, d)
    rows: int

    def dense(self) -> Tensor:
        """(U, rows, d)."""
        table = self.values.new_zeros(len(self.ids), self.rows, self.values.shape[2])
        return table.scatter_add_(1, self.ids[:, :, None].expand_as(self.values), self.values)

    def lengths(self) -> Tensor:
        """(U,) sum of the positions' norms, at least the gradient's."""
        return norms(self.values).sum(1)

    def masked(self, keep: Tensor) -> Lookup:
        """With exact zeros for units that are not kept."""
        return Lookup(self.ids, _masked(self.values, keep), self.rows)


Factored = Outer | Lookup


def prefers_dense(*, positions: int, outputs: int, inputs: int) -> bool:
    """Whether writing out a unit's (outputs, inputs) gradient is cheaper than the Gram matrices of its norm.

    The Gram matrices cost 2 L^2 (p + d) operations, the written matrix `MACHINE_BALANCE` p d.

    >>> prefers_dense(positions=128, outputs=1152, inputs=4), prefers_dense(positions=128, outputs=768, inputs=768)
    (True, False)
    """
    return MACHINE_BALANCE * outputs * inputs <= 2 * positions**2 * (outputs + inputs)


class Record:
    """Gathers the gradients of one micro-batch.

    Args:
        num_rows: B, rows of the micro-batch.
        units: (B,) number of each row's unit, from 0 without gaps; None where each row is a unit.
        scratch: Memory that the micro-batches of a sum share; None for a single one.
    """

    def __init__(self, num_rows: int, units: Tensor | None = None, scratch: Scratch | None = None) -> None:
        self.num_rows = num_rows
        self.converted = (scratch or Scratch()).converted
        self._scratch = scratch
        self.num_units = num_rows if units is None else int(units.max()) + 1 if num_rows else 0
        self._places = None if units is None else _places(units, self.num_units)
        self._dense: dict[str, Tensor] = {}
        self._factored: dict[str, list[Factored]] = defaultdict(list)

    def block(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """(rows, columns) of uninitialised memory for what one layer keeps until the sum is taken."""
        scratch, self._scratch = self._scratch, None  # lent once: a second user gets memory of its own
        return scratch.block(rows, columns, like) if scratch else block(rows, columns, like)

    def grouped(self, values: Tensor) -> Tensor:
        """(B, T, ...) to (U, L, ...): the rows of a unit one after the other, zeros where it has fewer than others."""
        if self._places is None:
            return values
        rows = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return rows[self._places.to(values.device)].flatten(1, 2)

    def add_dense(self, name: str, gradients: Tensor) -> None:
        """Adds gradients (U, *shape) to a parameter's."""
        gradients = gradients.float()
        known = self._dense.get(name)
        self._dense[name] = gradients if known is None else known.add_(gradients)

    def add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Adds the gradients sum_t left[b, t] x right[b, t] of rows: left (B, T, p), right (B, T, d)."""
        factors = Outer(self.grouped(left), self.grouped(right))
        positions, outputs, inputs = factors.left.shape[1], left.shape[2], right.shape[2]
        if prefers_dense(positions=positions, outputs=outputs, inputs=inputs):
            self.add_dense(name, factors.dense())
        else:
            self._factored[name].append(factors)

    def add_total(self, name: str, values: Tensor) -> None:
        """Adds the gradients sum_t values[b, t] of rows, values (B, T, d)."""
        self.add_dense(name, self.grouped(values).float().sum(1))

    def add_lookup(self, name: str, ids: Tensor, values: Tensor, rows: int) -> None:
        """Adds the gradients of a table of so many rows: values (B, T, d) at ids (B, T)."""
        self._factored[name].append(Lookup(self.grouped(ids), self.grouped(values), rows))

    def squared_norms(self) -> dict[str, Tensor]:
        """(U,) squared L2 norm of each parameter's gradient, in float32, at least of what a sum takes of it."""
        self._settle()
        with full_precision():
            return self._squared_norms()

    def _squared_norms(self) -> dict[str, Tensor]:
        squares = {name: dense.flatten(1).square().sum(1) for name, dense in self._dense.items()}
        for name, uses in self._factored.items():
            own = [_inner(one, one) for one in uses]
            cross = [2 * _inner(one, other) for i, one in enumerate(uses) for other in uses[:i]]
            squares[name] = torch.stack(own + cross).sum(0).clamp_min(0) + _rounding(uses)
            rounded = [
                (square.clamp_min(0) + _rounding([use])).sqrt()
                for use, square in zip(uses, own, strict=True)
                if isinstance(use, Outer) and is_rounded(use.left, use.right)
            ]
            if rounded:
                squares[name] = (squares[name].sqrt() + ROUNDING * torch.stack(rounded).sum(0)).square()
        return squares

    def mask(self, keep: Tensor) -> None:
        """Replaces the gradients of units that are not kept, infinities and NaNs included, by zeros."""
        self._dense = {name: _masked(dense, keep) for name, dense in self._dense.items()}
        for uses in self._factored.values():
            uses[:] = [use.masked(keep) for use in uses]

    def add_weighted_sums(self, weights: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
        """Adds sum_u weights[name][u] gradient[u] to each parameter's sum, in place."""
        self._settle()
        with full_precision():
            for name, dense in self._dense.items():
                sums[name].view(-1).addmv_(dense.flatten(1).t(), weights[name])
            for name, uses in self._factored.items():
                for use in uses:
                    _add_weighted(use, weights[name], sums[name])

    def clear(self) -> None:
        """Lets go of all gradients. What is kept here holds the pass's graph, and the graph holds the record."""
        self._dense.clear()
        self._factored.clear()

    def _settle(self) -> None:
        """A parameter in both forms is brought into the dense one."""
        for name in self._dense.keys() & self._factored.keys():
            for use in self._factored.pop(name):
                self.add_dense(name, use.dense())


def _places(units: Tensor, num_units: int) -> Tensor:
    """(U, R) row numbers of each unit's rows, B where a unit has fewer than R."""
    order = torch.argsort(units, stable=True)
    counts = torch.bincount(units, minlength=num_units)
    starts = counts.cumsum(0) - counts
    places = units.new_full((num_units, int(counts.max())), len(units))
    rank = torch.arange(len(units), device=units.device) - starts[units[order]]
    places[units[order], rank] = order
    return places


def _masked(values: Tensor, keep: Tensor) -> Tensor:
    return values.masked_fill(~keep.view(-1, *(1,) * (values.dim() - 1)), 0)


def _inner(one: Factored, other: Factored) -> Tensor:
    """(U,) inner products of two uses' gradients; nothing of a parameter's shape is formed."""
    if isinstance(one, Lookup) and isinstance(other, Lookup):
        same = one.ids[:, :, None] == other.ids[:, None, :]
        return (gram(one.values, other.values) * same).sum((1, 2))
    if isinstance(one, Outer) and isinstance(other, Outer):
        return (gram(one.left, other.left) * gram(one.right, other.right)).sum((1, 2))
    outer, lookup = (one, other) if isinstance(one, Outer) else (other, one)
    assert isinstance(outer, Outer) and isinstance(lookup, Lookup)
    # entry (s, t) of the first factor: what the product gives to the table's row ids[t]
    chosen = outer.left.gather(2, lookup.ids[:, None, :].expand(-1, outer.left.shape[1], -1))
    return (chosen.float() * gram(outer.right, lookup.values)).sum((1, 2))


def _rounding(uses: Sequence[Factored]) -> Tensor:
    """(U,) at least what a squared norm from Gram matrices is too small by: where positions cancel, that matters.

    Measured in units of eps (sum of the positions' norms)^2, for widths to 50,257 in float32 and bfloat16: at most 7.3
    for 2 positions, 4.6 for 4, 2.4 for 8, 0.9 from 16 on.
    """
    length = torch.stack([use.lengths() for use in uses]).sum(0)
    positions = sum((use.left if isinstance(use, Outer) else use.ids).shape[1] for use in uses)
    share = torch.finfo(torch.float32).eps * (1 + 20 / positions) if positions > 1 else 0.0
    return share * length.square()


def _add_weighted(use: Factored, weights: Tensor, total: Tensor) -> None:
    if isinstance(use, Lookup):
        weighted = use.values.float() * weights[:, None, None]
        total.index_add_(0, use.ids.flatten(), weighted.flatten(0, 1))
    elif is_rounded(use.left, use.right):
        add_rounded_products(total, use.left, use.right, weights)
    else:
        left, right = use.left, use.right
        if left.shape[2] < right.shape[2]:
            left = left * weights[:, None, None]  # in float32, as the weights are
        else:
            right = right * weights[:, None, None]
        add_product(total, left.flatten(0, 1), right.flatten(0, 1))
