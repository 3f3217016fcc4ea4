"""Carries out a plan on a model: draw, clip, add noise, hand the gradient to an optimizer.

`make_private` is the door for a loop of one's own; `DPTrainer` and ``veiltune train`` stand on the same `DPEngine`.
The guarantee is the plan's (`veiltune.dp.plan`); this page keeps its promises: every logical batch is the plan's own
Poisson draw, every sum is clipped at the plan's norm, gets noise once, and is divided by the expected batch size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from veiltune._validate import in_range, positive_int
from veiltune.csprng import KEY_BYTES, SecureGenerator
from veiltune.dp import parallel
from veiltune.dp.checks import MovementCheck, check_optimizer, check_table, probe
from veiltune.dp.clipping import IS_PADDING, UNITS, ClippedSum, Clipping, ClippingMode, SumInProgress
from veiltune.dp.instrument import carried_layers, carrier_names, check_supported, trainable_names
from veiltune.dp.losses import Batch, LossFn, causal_lm_losses
from veiltune.dp.noise import noisy_mean
from veiltune.dp.plan import DPPlan
from veiltune.dp.sampling import Units, micro_batches, whole
from veiltune.errors import InputError, PrivacyError
from veiltune.models.dropout import has_dropout, seed_torch

Collate = Callable[[Sequence[Any]], Batch]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one logical batch was like. Computed from private data without noise: for the trainer's eyes only.

    Attributes:
        step: Its number, from 0.
        size: Units drawn.
        loss: Mean loss of the units; NaN if nobody was drawn.
        clipped_share: Of the units, those whose gradient, or with "per_layer" a part of it, was scaled down; NaN
            without clipping or units.
        median_norm: Of the units' gradients before clipping; NaN likewise.
        non_finite: Units whose gradient was not finite and that contributed zero.
    """

    step: int
    size: int
    loss: float
    clipped_share: float
    median_norm: float
    non_finite: int


class DPEngine:
    """A model, a table and a plan, ready to take steps.

    Args:
        model: Its parameters that require gradients train. Checked: every one has a per-example rule, and on a few
            examples no one moves another's gradient.
        examples: The table: whatever `collate` takes.
        plan: For exactly this many units.
        loss: (B,) losses, one a row.
        collate: Makes a batch of tensors from examples.
        key: 32 secret bytes that sampling and noise derive from; None draws them. Keep it as secret as the table.
        units: Who owns which example; None: each example is a unit.
        lengths: Tokens of each example, to put like with like; None asks ``len(example["input_ids"])``.
        max_rows: Examples differentiated at once. Memory, not the result; with dropout also the result, because other
            cuts have other masks: then keep it, `max_tokens` and the number of processes for all of a run.
        max_tokens: Padded tokens differentiated at once; None is no limit.
        bf16: Matrix products in bfloat16.
        pad_rows: Fill each micro-batch to `max_rows` with rows that count nothing, for compilers that like one shape.
        say: Told, once, when memory ran out and the micro-batch was halved.

    Raises:
        InputError: If the plan is for another number of units, `units` or `lengths` are of another table, or an
            argument is out of range.
        PrivacyError: If the model cannot be trained privately.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        plan: DPPlan,
        collate: Collate,
        loss: LossFn = causal_lm_losses,
        key: bytes | None = None,
        units: Units | None = None,
        lengths: Sequence[int] | None = None,
        max_rows: int = 32,
        max_tokens: int | None = None,
        bf16: bool = False,
        pad_rows: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.model, self.examples, self.plan, self.loss, self.collate = model, examples, plan, loss, collate
        self.units = units or Units.examples(len(examples))
        if len(self.units) != plan.num_units:
            raise InputError(
                f"the plan is for {plan.num_units} units, the table has {len(self.units)}; make a plan for this table"
            )
        self.key = parallel.same_everywhere(os.urandom(KEY_BYTES) if key is None else key)
        self._generator = SecureGenerator(self.key)
        self._sampler = plan.sampler(self._generator)
        self._lengths = [_length(example) for example in examples] if lengths is None else list(lengths)
        check_table(self.units, len(examples), self._lengths)
        self._max_rows, self._max_tokens, self._pad_rows = positive_int(max_rows=max_rows), max_tokens, pad_rows
        self._bf16, self._say = bf16, say or (lambda message: None)
        self._halved, self._fill = False, self._max_rows
        self._clipping = Clipping(norm=plan.clip_norm, mode=cast(ClippingMode, plan.clipping))
        check_supported(model)
        self._trainable = trainable_names(model)
        probe(model, self._unlike_examples(), loss=loss, collate=collate)
        parallel.check_alike(model, examples, self.units)
        self._movement, self._taken = MovementCheck(model), 0
        self._current = self._finished = -1  # steps: of the last gradient, and of the last update
        self.refresh()

    def batch(self, step: int) -> LogicalBatch:
        """The Poisson draw of a step: a function of the key and the step."""
        return LogicalBatch(self, step)

    def epsilon_after(self, steps: int) -> float:
        """Claimed epsilon of so many steps."""
        return self.plan.epsilon_after(steps)

    def backward(self, step: int) -> StepResult:
        """Writes the step's private gradient into ``.grad`` of every trainable parameter.

        Raises:
            PrivacyError: If the step is beyond the plan, or the model's parameters were exchanged meanwhile.
        """
        if not 0 <= step < self.plan.steps:
            raise PrivacyError(
                f"step {step} is not in the plan, which has {self.plan.steps}; make a plan for more steps"
            )
        if step <= self._finished:
            raise PrivacyError(
                f"step {step} was taken already: again, it would use the same noise for other gradients; "
                "a plan's steps are taken once, in order"
            )
        if step <= self._current:
            raise PrivacyError(
                f"the gradient of step {step} was handed out already: again, at other weights, it would have the same "
                "noise, and the difference none; use an optimizer that wants one gradient a step (not LBFGS, not SAM)"
            )
        if self._current > self._finished and any(p.grad is not None for p in self.model.parameters()):
            raise PrivacyError(
                f"the gradient of step {self._current} was not used; call the optimizer's step() before the next batch"
            )
        if trainable_names(self.model).keys() != self._trainable.keys():
            raise PrivacyError("the model's parameters were exchanged; make the engine and the optimizer anew")
        with self._own_randomness(step):
            total, size = self._clipped_sum(step)
        mean = noisy_mean(
            total,
            noise_multiplier=self.plan.noise_multiplier,
            expected_batch_size=self.plan.expected_batch_size,
            generator=self._generator.derive("noise", step),
        )
        self._write_gradients(mean)
        self._current = step
        return _summary(step, size, total)

    def finish_step(self) -> None:
        """To be called after the optimizer's step: clears gradients, checks that weights move, renews carriers."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self._taken, self._finished = self._taken + 1, self._current
        self._movement.after(self._taken)
        self.refresh()

    def refresh(self) -> None:
        """Makes RGP's carriers from the weights as they are; to be called after loading weights, too."""
        for layer in carried_layers(self.model).values():
            layer.refresh()

    @contextlib.contextmanager
    def _own_randomness(self, step: int) -> Iterator[None]:
        """Dropout from the run's key, and torch's generators as they were afterwards.

        Under a seed that others know, a unit that comes or goes would shift everybody's masks, and with them the sum by
        more than clipping allows; under a secret one they are what they might have been anyway.
        """
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed_torch(self._generator.derive("dropout", step, parallel.world()[0]))
            yield

    def _clipped_sum(self, step: int) -> tuple[ClippedSum, int]:
        drawn = self._sampler.draw(step)
        records = self.units.records(drawn, max_records=self.plan.max_records, generator=self._generator, step=step)
        total = SumInProgress(self.model, self._clipping)
        for members in parallel.own_share(self._split(records)):
            for some in self._halves(members) if self._halved else (members,):
                self._add([[int(index) for index in records[unit]] for unit in some], total)
        return parallel.summed(total.result()), len(drawn)

    def _split(self, records: Sequence[Any]) -> list[list[int]]:
        """Physical batches of units, alike in size and length: the same in every process, whoever ran out of memory."""
        longest = [max(self._lengths[index] for index in own) for own in records]
        counts = [len(own) for own in records]
        return micro_batches(longest, counts, max_rows=self._max_rows, max_tokens=self._max_tokens) if counts else []

    def _add(self, units: list[list[int]], total: SumInProgress) -> None:
        """Adds some units; when memory runs out, in two halves, and from then on with half the rows."""
        try:
            total.add(self.model, self._collated(units), loss=self.loss, bf16=self._bf16)
            total.forget_last(beyond=len(units))  # rows that only fill up
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or self._halved or len(units) < 2 or has_dropout(self.model):
                raise  # with dropout halves would have other masks, and a step done again another sum
            self._halved, self._fill = True, max(1, self._max_rows // 2)
            self._say(f"out of memory: micro-batches are halved to {self._fill} rows from here on")
        else:
            return
        for half in self._halves(units):
            self._add(half, total)

    @staticmethod
    def _halves(units: list[T]) -> list[list[T]]:
        middle = (len(units) + 1) // 2
        return [half for half in (units[:middle], units[middle:]) if half]

    def _collated(self, units: list[list[int]]) -> dict[str, Tensor]:
        rows = [self.examples[index] for own in units for index in own]
        number = [unit for unit, own in enumerate(units) for _ in own]
        spare = max(0, self._fill - len(rows)) if self._pad_rows else 0
        batch = dict(self.collate([*rows, *[rows[-1]] * spare]))
        if len(rows) != len(units) or spare:
            batch[UNITS] = torch.tensor(number + list(range(len(units), len(units) + spare)))
        if spare:
            batch[IS_PADDING] = torch.arange(len(rows) + spare) >= len(rows)
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in batch.items()}

    def _write_gradients(self, mean: Mapping[str, Tensor]) -> None:
        carried = carried_layers(self.model)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in carried:
                left, right = (mean[carrier] for carrier in carrier_names(name))
                layer = carried[name]
                gradient = layer.gradient(left.to(layer.left.dtype), right.to(layer.right.dtype))
            else:
                gradient = mean[name]
            parameter.grad = gradient.to(parameter.dtype).reshape(parameter.shape)

    def _unlike_examples(self) -> list[Any]:
        """The shortest, the middle and the longest example: what padding would give away shows between them."""
        order = sorted(range(len(self.examples)), key=self._lengths.__getitem__)
        chosen = dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
        return [self.examples[index] for index in chosen]


@dataclass(frozen=True)
class LogicalBatch:
    """One step's draw. `backward` is all that there is to do with it; the examples stay inside."""

    engine: DPEngine
    step: int

    def backward(self) -> StepResult:
        """Writes the private gradient into ``.grad``; the optimizer's step comes next."""
        return self.engine.backward(self.step)


class PrivateBatches:
    """The plan's logical batches, in order: ``for batch in batches: batch.backward(); optimizer.step()``.

    Attributes:
        engine: What carries them out; ``engine.key`` must be kept, in secret, to resume.
    """

    def __init__(self, engine: DPEngine, optimizer: torch.optim.Optimizer, first_step: int) -> None:
        self.engine, self._first_step, self._ready = engine, first_step, False
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def __len__(self) -> int:
        return self.engine.plan.steps - self._first_step

    def __iter__(self) -> Iterator[PrivateBatch]:
        for step in range(self._first_step, self.engine.plan.steps):
            yield PrivateBatch(self, step)

    def backward(self, step: int) -> StepResult:
        """See `LogicalBatch.backward`."""
        result = self.engine.backward(step)
        self._ready = True
        return result

    def _before(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        if not self._ready:
            raise PrivacyError("optimizer.step() without batch.backward(): each private gradient is used exactly once")

    def _after(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        self._ready = False
        self.engine.finish_step()


@dataclass(frozen=True)
class PrivateBatch:
    """One step's draw, tied to an optimizer."""

    batches: PrivateBatches
    step: int

    def backward(self) -> StepResult:
        """Writes the private gradient into ``.grad``; ``optimizer.step()`` comes next."""
        return self.batches.backward(self.step)


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Any],
    *,
    plan: DPPlan,
    collate: Collate,
    loss: LossFn = causal_lm_losses,
    persons: Sequence[str] | None = None,
    first_step: int = 0,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, PrivateBatches]:
    """Three objects in, three out: a model, its optimizer and a table become a private training loop.

    ::

        model, optimizer, batches = make_private(model, optimizer, examples, plan=plan, collate=collate)
        for batch in batches:
            batch.backward()      # Poisson draw, per-example gradients, clipping, noise
            optimizer.step()

    The model and the optimizer are the same objects. The optimizer refuses a step without a fresh private gradient and
    clears the gradients after each.

    Guarantee:
        That of the plan (`veiltune.dp.plan`), for what the optimizer makes of the gradients. It does not cover the
        `StepResult` that `backward` returns, nor anything else the loop computes from the examples.

    Args:
        model: See `DPEngine`.
        optimizer: Any optimizer over exactly the parameters that train.
        examples: See `DPEngine`.
        plan: See `DPEngine`.
        collate: See `DPEngine`.
        loss: See `DPEngine`.
        persons: The owner of each example, for a plan whose unit is the person.
        first_step: Where a resumed run goes on (with the same key), from 0 to the plan's steps.
        **options: Further arguments of `DPEngine`.

    Raises:
        InputError: If an argument does not fit the plan.
        PrivacyError: If the model, the loss or the optimizer cannot be made private.
    """
    if (persons is not None) != (plan.unit == "person"):
        raise InputError(f"the plan protects each {plan.unit}; give persons exactly for a plan with unit 'person'")
    in_range(0, plan.steps, first_step=whole(first_step=first_step))
    check_optimizer(model, optimizer)
    units = None if persons is None else Units.persons(persons)
    engine = DPEngine(model, examples, plan=plan, collate=collate, loss=loss, units=units, **options)
    return model, optimizer, PrivateBatches(engine, optimizer, first_step)


def _length(example: Any) -> int:
    """Tokens of an example, as its `input_ids` count them; 1 where it has none."""
    ids = example.get("input_ids") if isinstance(example, Mapping) else getattr(example, "input_ids", None)
    return 1 if ids is None else len(ids)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _summary(step: int, size: int, total: ClippedSum) -> StepResult:
    losses, norms = total.losses[total.losses.isfinite()], total.norms[total.norms.isfinite()]
    nan = float("nan")
    return StepResult(
        step=step,
        size=size,
        loss=float(losses.mean()) if len(losses) else nan,
        clipped_share=float(total.clipped[total.norms.isfinite()].float().mean()) if len(norms) else nan,
        median_norm=float(norms.median()) if len(norms) else nan,
        non_finite=total.non_finite,
    )
