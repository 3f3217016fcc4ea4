"""What is checked on the user's own model: that no example moves another's gradient, and that training trains."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.dp.clipping import Clipping, clipped_grad_sum
from veiltune.dp.instrument import trainable_names
from veiltune.dp.losses import Batch, LossFn
from veiltune.dp.sampling import Units
from veiltune.errors import InputError, PrivacyError
from veiltune.models.dropout import dropout_rates

_STEPS_TO_MOVE = 5


def probe(
    model: nn.Module, examples: Sequence[Any], *, loss: LossFn, collate: Callable[[Sequence[Any]], Batch]
) -> None:
    """Refuses a model and loss in which removing one example moves the gradient of another, or a buffer.

    Each example's gradient norm and loss, in a batch of all of them, must be those that it has without one of the
    others; in evaluation mode and in training mode, with dropout off in both. Nothing is trained.

    Args:
        model: As it will be trained.
        examples: Two to four that differ in length.
        loss: As in `clipped_grad_sum`.
        collate: Makes a batch of examples; it pads, which must not matter either.

    Raises:
        PrivacyError: If it does. A loss averaged over the tokens or the positives of the batch, a contrastive loss,
            layers that mix examples, or positions that depend on other rows' padding have this effect. Also if a buffer
            changes, since buffers are saved with the weights and get no noise.
    """
    before = _digests_of_buffers(model)
    for training in (False, True):
        with _without_dropout(model, training=training):
            _check_apart(model, examples, loss=loss, collate=collate)
    changed = [name for name, digest in _digests_of_buffers(model).items() if before.get(name) != digest]
    if changed:
        raise PrivacyError(
            f"{changed[0]} changes with the examples of a batch and is saved with the weights, without noise; switch "
            "its running statistics off"
        )


def _check_apart(
    model: nn.Module, examples: Sequence[Any], *, loss: LossFn, collate: Callable[[Sequence[Any]], Batch]
) -> None:
    tolerance = 0.05 if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()) else 2e-3
    device = next(model.parameters()).device

    def measure(chosen: Sequence[Any]) -> Tensor:
        batch = {name: value.to(device) for name, value in collate(chosen).items()}
        total = clipped_grad_sum(model, [batch], loss=loss, clipping=Clipping(norm=1.0))
        return torch.stack([total.norms, total.losses])  # (2, U)

    together = measure(examples)
    for removed in range(len(examples) if len(examples) > 1 else 0):
        rest = [index for index in range(len(examples)) if index != removed]
        apart = measure([examples[index] for index in rest])
        change = (together[:, rest] - apart).abs() / apart.abs().clamp_min(1e-4)
        if bool((change > tolerance).any()):
            raise PrivacyError(
                "the loss mixes examples: without one of them the gradient or loss of another changes by "
                f"{float(change.max()):.1%}, so clipping bounds nobody; give a loss whose rows depend on "
                "themselves alone (a mean over the example's own tokens; positions that ignore padding)"
            )


def check_table(units: Units, num_examples: int, lengths: Sequence[int]) -> None:
    """Refuses owners, examples and lengths that are not of one table, and empty examples.

    Raises:
        InputError: If so.
    """
    records = len(units) if units.name == "example" else sum(map(len, units.all_records()))
    if not records == num_examples == len(lengths):
        raise InputError(
            f"each example must have one owner and one length, got {num_examples} examples, {records} owners and "
            f"{len(lengths)} lengths; give one of each, in the table's order"
        )
    if (shortest := min(lengths)) < 1:
        raise InputError(
            f"example {lengths.index(shortest)} must have at least 1 token, got {shortest}; leave empty examples out"
        )


class MovementCheck:
    """Refuses a run whose weights do not move: an optimizer that holds other parameters, or a learning rate of 0."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start = self._fingerprint()

    def after(self, steps: int) -> None:
        """To be called after each update; looks once, when so many steps were taken that something must have moved.

        Raises:
            PrivacyError: If no trainable parameter changed.
        """
        if steps == _STEPS_TO_MOVE and self._fingerprint() == self._start:
            raise PrivacyError(
                f"after {steps} steps no trainable weight has changed: epsilon is spent for nothing; make the "
                "optimizer from the parameters that the model has now, after moving it, and check the learning rate"
            )

    def _fingerprint(self) -> list[tuple[float, float]]:
        trainable = [p.detach() for p in self._model.parameters() if p.requires_grad]
        return [(math.fsum([float(p.double().sum())]), float(p.double().square().sum())) for p in trainable]


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that holds other parameters than those that train.

    Raises:
        PrivacyError: If one is missing (it would never move) or foreign (it would train without protection).
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = trainable_names(model)
    missing = [name for key, name in names.items() if key not in held]
    if missing:
        raise PrivacyError(
            f"the optimizer does not hold {missing[0]} ({len(missing)} of {len(names)} trainable parameters are "
            "missing); make it from the model's parameters after attaching and moving the model"
        )
    ours = {id(parameter) for parameter in model.parameters()}
    foreign = sum(key not in ours for key in held)
    if foreign:
        raise PrivacyError(
            f"the optimizer holds {foreign} parameters that are not the model's; they would not be private"
        )


@contextlib.contextmanager
def _without_dropout(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in a mode, with every dropout rate at 0; all modes, rates and generators are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    rates = [(module, name, getattr(module, name)) for module, name in dropout_rates(model)]
    device = next(model.parameters()).device
    model.train(training)
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        for module, mode in modes:
            module.training = mode


def _digests_of_buffers(model: nn.Module) -> dict[str, bytes]:
    """Of the buffers that are saved with the weights."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved and buffer.numel()}
    return {
        name: hashlib.blake2b(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).digest()
        for name, buffer in buffers.items()
    }
