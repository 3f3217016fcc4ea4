"""The clipped sum of a batch's per-unit gradients, with its own sensitivity.

This page is a function from a loss to a sum. It wraps no module and changes no parameter; noise is added elsewhere
(`noise`), scaled by what the sum says of itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from veiltune._validate import one_of
from veiltune.dp.instrument import carried_layers, carrier_names, check_supported, recorded, trainable_names
from veiltune.dp.losses import Batch, LossFn
from veiltune.dp.record import Record
from veiltune.dp.scratch import Scratch
from veiltune.errors import InputError, PrivacyError
from veiltune.models.precision import float32_attention

ClippingMode = Literal["flat", "per_layer", "automatic"]
MODES: tuple[ClippingMode, ...] = ("flat", "per_layer", "automatic")

_AUTOMATIC_GAMMA = 0.01
_SLACK = 1.0 + 1e-6  # float32 norms are off by less; the bound must not be

_NOTHING_TRAINED = "nothing that trains took part in the loss; check what trains and what the loss reads"

UNITS, IS_PADDING = "units", "is_padding"


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """How one unit's contribution is bounded.

    ===========  ========================================  =======================  ===========================
    mode         factor of a gradient g                    sensitivity of the sum   source
    ===========  ========================================  =======================  ===========================
    flat         min(1, C / ||g||)                         C                        Abadi, arXiv:1607.00133
    per_layer    min(1, C / (sqrt(n) ||g_k||)) each        C                        McMahan, arXiv:1710.06963
    automatic    C / (||g|| + 0.01)                        C                        Bu (AUTO-S), arXiv:2206.07136
    ===========  ========================================  =======================  ===========================

    with n trainable tensors, g_k the gradient of the k-th. A clip norm of infinity leaves gradients as they are
    (training without privacy).

    Attributes:
        norm: C, in units of the gradient, above 0.
        mode: See above.

    Raises:
        InputError: If the norm is not above 0, or the mode is unknown.
    """

    norm: float
    mode: ClippingMode = "flat"

    def __post_init__(self) -> None:
        one_of(MODES, mode=self.mode)
        if not self.norm > 0:
            raise InputError(f"clip_norm must be positive (infinity for none), got {self.norm!r}")

    @property
    def active(self) -> bool:
        """Whether anything is bounded."""
        return math.isfinite(self.norm)

    def factors(self, squared_norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factor (U,) of each unit's gradient, for each parameter."""
        if not self.active:
            return {name: torch.ones_like(squared) for name, squared in squared_norms.items()}
        if self.mode == "per_layer":
            bound = self.norm / math.sqrt(len(squared_norms))
            return {name: _at_most_one(bound, squared.sqrt()) for name, squared in squared_norms.items()}
        total = torch.stack(list(squared_norms.values())).sum(0).sqrt()
        if self.mode == "flat":
            return dict.fromkeys(squared_norms, _at_most_one(self.norm, total))
        return dict.fromkeys(squared_norms, self.norm / (total * _SLACK + _AUTOMATIC_GAMMA))


@dataclass(kw_only=True)
class ClippedSum:
    """A sum of bounded contributions.

    Attributes:
        grads: Sums in float32 by parameter name; a carried weight (RGP) has two, ``NAME/left`` and ``NAME/right``.
        norms: (U,) each unit's norm before clipping, NaN or infinite where it was; empty if nothing is clipped.
            Private: never log one of them.
        losses: (U,) each unit's loss. Private.
        clipping: What bounded it.
        clipped: (U,) whether each unit's gradient, or with "per_layer" a part of it, was scaled down. Private.
        non_finite: Units whose gradient was not finite; they contribute zero.
    """

    grads: dict[str, Tensor]
    norms: Tensor
    losses: Tensor
    clipping: Clipping
    clipped: Tensor
    non_finite: int = 0

    def sensitivity(self) -> float:
        """How far, in L2, the sum moves at most when one unit is added or removed."""
        return self.clipping.norm

    def __repr__(self) -> str:
        return f"ClippedSum({len(self.losses)} units, sensitivity {self.sensitivity()})"


def clipped_grad_sum(
    model: nn.Module, micro_batches: Iterable[Batch], *, loss: LossFn, clipping: Clipping, bf16: bool = False
) -> ClippedSum:
    """Sums per-unit gradients, each first scaled down to its bound, with one backward pass a micro-batch.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(1.0)
    >>> loss = lambda model, batch: 0.5 * (model(batch["x"]) - batch["y"]).square().sum(1)
    >>> batch = {"x": torch.ones(3, 1), "y": torch.tensor([[0.0], [1.0], [5.0]])}
    >>> out = clipped_grad_sum(model, [batch], loss=loss, clipping=Clipping(norm=2.0))
    >>> out.norms  # before clipping: the gradients are 1, 0 and -4
    tensor([1., 0., 4.])
    >>> out.grads["weight"]  # 1 + 0 - 2
    tensor([[-1.0000]])

    Guarantee:
        Adding or removing one unit (a row, or all rows of one number in ``units``) moves the sum by at most
        ``sensitivity()`` in L2, twice that for replacing one; up to float32 rounding of the sum itself. It holds if
        the loss of a row depends on that row alone (`checks.probe` tests it on the model). A sum, never a mean:
        dividing by the drawn batch size would leak it. How rows are cut into micro-batches changes memory, not the
        result (up to rounding, and but for dropout's masks); all rows of a unit must be in one of them.

    ====================================  ==========================================
    unit                                  contribution
    ====================================  ==========================================
    all rows ``is_padding``               exactly zero
    gradient or loss with nan or inf      exactly zero, counted in ``non_finite``
    gradient of norm 0                    zero
    no micro-batch, or an empty one       zero sum, ``norms`` of length 0
    ====================================  ==========================================

    Args:
        model: Its parameters that require gradients are those that train. Its mode is kept: dropout is drawn from
            torch's global generator.
        micro_batches: Tensors whose first axis are the rows, as `loss` takes them; besides ``units`` (B,), the number
            of each row's unit, and ``is_padding`` (B,), True for synthetic rows.
        loss: (B,) losses of the rows. A unit's loss is the mean of its rows'.
        clipping: The bound.
        bf16: Forward passes compute matrix products in bfloat16; a unit's contribution is then its rounded gradient,
            clipped by that one's own norm, to which what rounding may add is added, and sums are float32.

    Raises:
        PrivacyError: If a layer has no rule for per-example gradients, mixes examples, or a parameter got a gradient
            outside the rules.
        InputError: If the loss does not give one number a row, or ``units`` or ``is_padding`` do not fit the rows.

    Source: Abadi et al. 2016, arXiv:1607.00133; one pass by book-keeping as in Bu et al. 2022, arXiv:2210.00038.
    """
    check_supported(model)
    total = SumInProgress(model, clipping)
    for batch in micro_batches:
        total.add(model, batch, loss=loss, bf16=bf16)
    return total.result()


@dataclass
class SumInProgress:
    """Adds micro-batches one by one; `clipped_grad_sum` is this in a loop."""

    model: nn.Module
    clipping: Clipping
    norms: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    non_finite: int = 0

    def __post_init__(self) -> None:
        self._sums, self._scratch = zero_sums(self.model), Scratch()

    def add(self, model: nn.Module, batch: Batch, *, loss: LossFn, bf16: bool) -> None:
        """One forward and backward pass."""
        inputs = {name: value for name, value in batch.items() if name not in (UNITS, IS_PADDING)}
        num_rows = _rows_of(inputs, batch)
        if not num_rows:
            return
        record = Record(num_rows, batch.get(UNITS), self._scratch)
        device = next(iter(inputs.values())).device.type
        try:
            with recorded(model, record), float32_attention(device, bf16):
                with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                    losses = loss(model, inputs)
                weighted = _per_unit(_checked(losses, num_rows), batch)
                torch.autograd.backward(weighted.sum())
            _refuse_strays(model)
            self.take(record, _unit_sums(weighted.detach(), batch, record.num_units))
        finally:
            record.clear()

    @torch.no_grad()  # what is recorded still hangs on the pass's graph
    def take(self, record: Record, losses: Tensor) -> None:
        """Adds what a finished backward pass recorded; losses (U,)."""
        squared = record.squared_norms()
        if not squared:
            raise PrivacyError(_NOTHING_TRAINED)
        total = torch.stack(list(squared.values())).sum(0)
        keep = total.isfinite() & losses.isfinite()
        if not bool(keep.all()):
            record.mask(keep)
            self.non_finite += int((~keep).sum())
            squared = {name: norm.masked_fill(~keep, 0) for name, norm in squared.items()}
        factors = self.clipping.factors(squared)
        try:
            record.add_weighted_sums(factors, self._sums)
        except RuntimeError as error:  # some parameters have it already: added again, it would count twice
            raise PrivacyError("a micro-batch could not be added up; take smaller micro-batches and resume") from error
        if self.clipping.active:
            self.norms.append(total.sqrt())
            self.clipped.append(torch.stack(list(factors.values())).amin(0) < 1)
        self.losses.append(losses)

    def forget_last(self, *, beyond: int) -> None:
        """Leaves units from this number on out of the last micro-batch's norms and losses."""
        for kept in (self.norms, self.losses, self.clipped):
            kept[-1:] = [values[:beyond] for values in kept[-1:]]

    def result(self) -> ClippedSum:
        """The sum of all that was added."""
        device = next(self.model.parameters()).device
        empty = torch.zeros(0, device=device)
        return ClippedSum(
            grads=self._sums,
            norms=torch.cat([empty, *self.norms]),
            losses=torch.cat([empty, *self.losses]),
            clipping=self.clipping,
            clipped=torch.cat([empty.bool(), *self.clipped]),
            non_finite=self.non_finite,
        )


def zero_sums(model: nn.Module) -> dict[str, Tensor]:
    """A float32 zero for every recorded name."""
    carried = carried_layers(model)
    sums = {}
    for name, parameter in model.named_parameters():
        if name in carried:
            layer = carried[name]
            for carrier, like in zip(carrier_names(name), (layer.left, layer.right), strict=True):
                sums[carrier] = _zeros(like)
        elif parameter.requires_grad:
            sums[name] = _zeros(parameter)
    return sums


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


def _rows_of(inputs: Batch, batch: Batch) -> int:
    if not inputs:
        raise InputError("a micro-batch holds no tensor for the model; give input_ids or what the loss takes")
    num_rows = len(next(iter(inputs.values())))
    for name in (UNITS, IS_PADDING):
        if name in batch and batch[name].shape != (num_rows,):
            raise InputError(f"{name} must have shape ({num_rows},), one a row, got {tuple(batch[name].shape)}")
    units = batch.get(UNITS)
    if units is not None and num_rows and not 0 <= int(units.min()) <= int(units.max()) < num_rows:
        raise InputError(f"units must number the units of a micro-batch of {num_rows} rows from 0 without gaps")
    return num_rows


def _checked(losses: Tensor, num_rows: int) -> Tensor:
    if losses.shape != (num_rows,):
        raise InputError(
            f"the loss must give one number a row, shape ({num_rows},), got {tuple(losses.shape)}; "
            "a mean over the batch would let one example rescale the others"
        )
    if not losses.requires_grad:
        raise PrivacyError(_NOTHING_TRAINED)
    return losses


def _per_unit(losses: Tensor, batch: Batch) -> Tensor:
    """Losses divided by the number of real rows of their unit, zero for padding rows."""
    padding, units = batch.get(IS_PADDING), batch.get(UNITS)
    real = torch.ones_like(losses) if padding is None else (~padding).to(losses)
    if units is not None:
        counts = torch.zeros_like(losses).index_add(0, units, real)[units]  # at most as many units as rows
        real = real / counts.clamp_min(1)
    return torch.where(real > 0, losses * real, 0)


def _unit_sums(losses: Tensor, batch: Batch, num_units: int) -> Tensor:
    units = batch.get(UNITS)
    return losses if units is None else losses.new_zeros(num_units).index_add(0, units, losses)


def _at_most_one(bound: float, norms: Tensor) -> Tensor:
    return (bound / (norms * _SLACK).clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)


def _refuse_strays(model: nn.Module) -> None:
    """A gradient that autograd summed itself is not clipped: the parameter is used where no rule sees it."""
    names = trainable_names(model)
    strays = [parameter for parameter in model.parameters() if id(parameter) in names and parameter.grad is not None]
    if strays:
        name = names[id(strays[0])]
        for parameter in strays:
            parameter.grad = None
        raise PrivacyError(
            f"{name} got a gradient outside its layer's rule ({len(strays)} parameters): it is used by a function of "
            "the model's own, or its .grad was not cleared; freeze it, or call zero_grad(set_to_none=True) first"
        )
