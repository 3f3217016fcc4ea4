"""A slot: what one job trains on the shared base model, and how to put it away and take it up again.

The frozen tensors of all slots are the same storage; a slot owns only its PEFT parameters, its head, its optimizer
and the autograd graphs of micro-batches that wait for their gradients.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veiltune.dp.instrument import recorded
from veiltune.dp.record import Record
from veiltune.errors import ProtocolError
from veiltune.models.adapters import attach_peft, count_parameters, trainable_parameters
from veiltune.models.dropout import repeatable_dropout, use_fast_dropout
from veiltune.models.loading import BaseModel, classifier_model
from veiltune.models.optim import ResumableAdamW
from veiltune.models.precision import bf16_products
from veiltune.models.split import ModelPart, split_head, split_model
from veiltune.vendor.private_sum import PrivateSum
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import pad_ragged, unpad

MAX_IN_FLIGHT = 16


class StepMismatchError(ProtocolError):
    """The frame does not follow from where the job stands: one of the parties went back to a checkpoint."""


@dataclass(frozen=True)
class _Graph:
    representations: Tensor  # (B, T, H)
    mask: Tensor  # (B, T)
    outputs: Tensor  # (B, C) logits, or (B, H) hidden states in the U-shape
    record: Record | None  # of per-example gradients, if the job trains under DP


class Slot:
    """One job's part of the top model, in training."""

    def __init__(self, base: BaseModel, spec: pb.JobSpec) -> None:
        self.spec = spec
        self.top = build_top(base, spec)
        self._dropout = use_fast_dropout(self.top)
        self._optimizer = ResumableAdamW(trainable_parameters(self.top), weight_decay=spec.weight_decay)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._private = PrivateSum(self.top, spec) if spec.clip_norm else None
        self.busy_seconds = 0.0
        self.device = next(self.top.parameters()).device

    @property
    def step(self) -> int:
        """Updates applied so far."""
        return self._optimizer.step

    @property
    def num_parameters(self) -> tuple[int, int]:
        """Trainable and total parameters of the vendor's part."""
        count = count_parameters(self.top)
        return count.trainable, count.total

    @property
    def output_size(self) -> int:
        """Columns of an output: classes, or the hidden size in the U-shape."""
        return self.spec.num_labels if self.spec.head == "vendor" else self.top.hidden_size

    def forward(self, step: int, micro_batch: int, values: Tensor, lengths: Sequence[int]) -> Tensor:
        """Runs a training forward pass and keeps its graph.

        Args:
            step: Must be the slot's step.
            micro_batch: Number within the step; with the step it seeds the dropout, so a replay is exact (under DP
                in the same process only: the seed is secret there, see `PrivateSum`).
            values: (N, H) token vectors of B examples, one after the other.
            lengths: Tokens of each example.

        Returns:
            (B, output_size), detached.
        """
        self.check_step(step)
        if len(self._graphs) >= MAX_IN_FLIGHT:
            waiting = len(self._graphs)
            raise ProtocolError(f"{waiting} micro-batches wait for their gradients, the limit is {MAX_IN_FLIGHT}")
        self.top.train()
        representations, mask = self._padded(values, lengths)
        representations.requires_grad_(not self.spec.frozen_bottom)
        record = Record(len(lengths)) if self._private else None
        watched = recorded(self.top, record) if record else contextlib.nullcontext()
        seed = self._private.dropout_seed if self._private else self.spec.seed
        dropout = repeatable_dropout(self._dropout, seed, step, micro_batch)
        with self._busy(), watched, dropout, self._precision():
            outputs: Tensor = self.top(representations, mask).float()
        self._graphs[step, micro_batch] = _Graph(representations, mask, outputs, record)
        return outputs.detach().cpu()

    def backward(self, step: int, micro_batch: int, output_gradients: Tensor) -> Tensor | None:
        """Adds a micro-batch's gradients; returns the (N, H) cut gradients, or None for a frozen bottom."""
        self.check_step(step)
        graph = self._graphs.get((step, micro_batch))
        if graph is None:
            raise StepMismatchError(
                f"no forward pass waits at step {step}, micro-batch {micro_batch}; send Forward first"
            )
        if output_gradients.shape != graph.outputs.shape:
            expected, came = list(graph.outputs.shape), list(output_gradients.shape)
            raise ProtocolError(f"output gradients must have shape {expected}, got {came}")
        del self._graphs[step, micro_batch]
        if graph.outputs.requires_grad:
            with self._busy():
                torch.autograd.backward(graph.outputs, output_gradients.to(self.device))
        if self._private and graph.record:
            self._private.add(graph.record)
        cut = graph.representations.grad
        return None if cut is None else unpad(cut, graph.mask).cpu()

    def optim_step(self, step: int, learning_rate: float) -> int:
        """Applies AdamW to the gradients gathered in this step; returns the new step."""
        self.check_step(step)
        if self._graphs:
            raise ProtocolError(f"{len(self._graphs)} micro-batches of step {step} still wait for their gradients")
        with self._busy():
            if self._private:
                self._private.write_gradients()
            self._optimizer.apply(learning_rate=learning_rate)
        return self.step

    def predict(self, values: Tensor, lengths: Sequence[int]) -> Tensor:
        """(N, H) token vectors -> (B, output_size) without dropout; changes nothing."""
        self.top.eval()
        with self._busy(), torch.no_grad(), self._precision():
            outputs: Tensor = self.top(*self._padded(values, lengths))
        return outputs.float().cpu()

    def state(self) -> dict[str, Tensor]:
        """Step, parameters and AdamW moments, for a checkpoint."""
        return self._optimizer.state()

    def restore(self, state: dict[str, Tensor] | None) -> None:
        """Goes back to a checkpoint, or to the seeded start for None; waiting graphs and gradients are dropped."""
        self._graphs.clear()
        if self._private:
            self._private.clear()
        self._optimizer.restore(state)

    def check_step(self, step: int) -> None:
        """Refuses a frame for another step."""
        if step != self.step:
            raise StepMismatchError(f"the job is at step {self.step}, the frame is for step {step}; open the job again")

    def _padded(self, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        representations, mask = pad_ragged(values, lengths)
        return representations.to(self.device), mask.to(self.device)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.busy_seconds += time.perf_counter() - started

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return bf16_products(self.device.type, enabled=self.spec.precision == "bf16")


def build_top(base: BaseModel, spec: pb.JobSpec) -> ModelPart:
    """The vendor's part of the job: the top (head included) or, U-shaped, the trunk below the customer's head."""
    model = classifier_model(base, num_labels=spec.num_labels, seed=spec.seed)
    _, top = split_model(model, cut_layer=spec.cut_layer, cut_embeddings=spec.cut_embeddings, share_weights=True)
    part: ModelPart = top if spec.head == "vendor" else split_head(top)[0]
    attach_peft(
        part,
        method=spec.method,
        seed=spec.seed,
        rank=spec.rank,
        alpha=spec.alpha,
        dropout=spec.dropout,
        adapter_size=spec.adapter_size,
    )
    return part
