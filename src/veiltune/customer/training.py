"""The customer's training loop: outputs in, loss here, gradients out; resumable at every checkpoint.

`examples/split_loop.py` is the same loop without resumption, micro-batches and progress, to be read first.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from veiltune.csprng import SecureGenerator
from veiltune.customer.batching import epoch_batches, learning_rate_at, micro_batches
from veiltune.customer.releasing import Releaser
from veiltune.customer.remote import PendingForward, RemoteJob, ragged
from veiltune.dp.plan import DPPlan
from veiltune.errors import InputError, InterruptedRunError, PrivacyError
from veiltune.models.dropout import MaskSource, repeatable_dropout, use_fast_dropout
from veiltune.models.optim import ResumableAdamW
from veiltune.privatize.labels import corrected_cross_entropy
from veiltune.runs import atomic_write_bytes
from veiltune.wire.codec import NotFiniteError

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train: plain numbers, the same for the split and for an unsplit run."""

    epochs: int
    batch_size: int
    micro_batches: int
    learning_rate: float
    warmup_fraction: float
    seed: int
    checkpoint_every: int


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Training examples as the loop needs them."""

    token_ids: Sequence[Sequence[int]]
    labels: Sequence[int]  # protected already
    rows: Sequence[int] | None  # positions in the upload; None if the bottom trains
    order: Sequence[int]  # in which they are drawn from; secret, or batches tell the vendor their places in the table


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a finished step tells."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float
    examples: int
    examples_per_second: float


class PoissonBatches:
    """The logical batches of a run whose finished model is to be private: the plan's own draw, for each step.

    Guarantee:
        Batches as the plan states them, to anyone without the secret. The vendor is told the drawn rows.
    """

    def __init__(self, plan: DPPlan, secret: bytes) -> None:
        self.steps, self.per_epoch = plan.steps, max(1, round(1 / plan.sampling_prob))
        self._sampler = plan.sampler(SecureGenerator(secret).derive("poisson"))

    def draw(self, step: int) -> list[int]:
        """Places in the examples' order; may be empty."""
        return [int(index) for index in self._sampler.draw(step)]


class Trainer:
    """Trains the vendor's part, and the customer's head and bottom where they train."""

    def __init__(
        self,
        job: RemoteJob,
        *,
        releaser: Releaser,
        examples: Examples,
        schedule: Schedule,
        flip_matrix: Tensor | None,
        head: nn.Module | None,
        local: ResumableAdamW,
        checkpoints: Path,
        keep_releases: bool = True,
        poisson: PoissonBatches | None = None,
    ) -> None:
        self.job, self.releaser, self.examples, self.schedule = job, releaser, examples, schedule
        self._flip_matrix, self._head, self._local = flip_matrix, head, local
        self._checkpoints, self._keep_releases = checkpoints, keep_releases
        self._seen: list[tuple[int, dict[str, Tensor]]] = []  # gradients of the first epoch, since the last checkpoint
        self._bottom_dropout = use_fast_dropout(releaser.bottom)
        self._head_dropout = MaskSource() if head is None else use_fast_dropout(head)
        self._lengths = [len(ids) for ids in examples.token_ids]
        self._poisson = poisson
        self._per_epoch = poisson.per_epoch if poisson else -(-len(self._lengths) // schedule.batch_size)
        self.total_steps = poisson.steps if poisson else self._per_epoch * schedule.epochs

    def resume_at(self, step: int) -> None:
        """Puts the customer's trainable part back to a checkpoint (0 = the start).

        Raises:
            PrivacyError: If steps would be done again whose releases are not kept: the vendor could have other values
                under the same noise.
        """
        if step < self.releaser.outbox.forgotten:
            raise PrivacyError(
                f"the vendor is at step {step}, before step {self.releaser.outbox.forgotten}, up to which the releases "
                "are not kept any more (privacy.keep_releases = false): done again, other values would have the same "
                "noise; start a new run"
            )
        self._local.restore(load_file(self._checkpoint(step)) if step else None)

    def run(self, *, on_step: Callable[[Progress], None], stop: Callable[[], bool] = lambda: False) -> None:
        """Trains from the current step to the end.

        Args:
            on_step: Told about every finished step.
            stop: Asked between steps; True writes a checkpoint and raises.

        Raises:
            InterruptedRunError: If `stop` said so.
        """
        for step, batch in self._remaining():
            started = time.monotonic()
            rate = learning_rate_at(
                step,
                total=self.total_steps,
                warmup_fraction=self.schedule.warmup_fraction,
                peak=self.schedule.learning_rate,
            )
            loss = self._step(step, batch, rate)
            speed = len(batch) / (time.monotonic() - started)
            on_step(
                Progress(
                    step=step + 1,
                    total_steps=self.total_steps,
                    epoch=step // self._per_epoch,
                    loss=loss,
                    learning_rate=rate,
                    examples=len(batch),
                    examples_per_second=speed,
                )
            )
            stopping = stop()
            if stopping or (step + 1) % self.schedule.checkpoint_every == 0 or step + 1 == self.total_steps:
                self._save(step + 1)
            if stopping and step + 1 < self.total_steps:
                raise InterruptedRunError(f"stopped at step {step + 1}; the same command goes on from here")

    @property
    def checkpoints(self) -> list[int]:
        """Steps that the customer can resume from."""
        return checkpoint_steps(self._checkpoints)

    def _remaining(self) -> Iterator[tuple[int, list[int]]]:
        step = self._local.step
        if self._poisson:
            for later in range(step, self.total_steps):
                drawn = [self.examples.order[place] for place in self._poisson.draw(later)]
                yield later, sorted(drawn, key=lambda i: -self._lengths[i])
            return
        for epoch in range(step // self._per_epoch, self.schedule.epochs):
            batches = epoch_batches(
                self._lengths,
                batch_size=self.schedule.batch_size,
                seed=self.schedule.seed,
                epoch=epoch,
                order=self.examples.order,
            )
            for batch in batches[step - epoch * self._per_epoch :]:
                yield step, batch
                step += 1

    def _step(self, step: int, batch: list[int], rate: float) -> float:
        """One update: the next micro-batch is under way at the vendor while this one's loss is computed."""
        parts = self._parts(batch)
        following = self._send(step, 0, parts[0]) if parts else None
        loss = 0.0
        for i, part in enumerate(parts):
            pending = following
            assert pending is not None
            following = self._send(step, i + 1, parts[i + 1]) if i + 1 < len(parts) else None
            loss += self._learn(*pending, part, len(batch))
        self.job.settle(wait=False)
        self.job.send_optim_step(step=step, learning_rate=rate)
        self._local.apply(learning_rate=rate)
        return loss

    def _parts(self, batch: list[int]) -> list[list[int]]:
        """Micro-batches; those of a Poisson draw are as large as an expected batch's at most, and there may be none."""
        if not self._poisson:
            return micro_batches(batch, self.schedule.micro_batches)
        most = -(-self.schedule.batch_size // self.schedule.micro_batches)
        return micro_batches(batch, -(-len(batch) // most)) if batch else []

    def _send(self, step: int, micro_batch: int, part: list[int]) -> tuple[PendingForward, Tensor | None]:
        if self.examples.rows is not None:
            rows = [self.examples.rows[i] for i in part]
            return self.job.send_forward(step=step, micro_batch=micro_batch, rows=rows), None
        values = self._release(step, micro_batch, part)
        released = self.releaser.outbox.step_release(step, micro_batch)
        assert released is not None
        frame = ragged(released.values, released.scales, released.lengths)
        return self.job.send_forward(step=step, micro_batch=micro_batch, released=frame), values

    def _release(self, step: int, micro_batch: int, part: list[int]) -> Tensor:
        """Privatizes a micro-batch of a trainable bottom: a new release of each example, kept before it is sent."""
        token_ids = [self.examples.token_ids[i] for i in part]
        self.releaser.bottom.train()
        with repeatable_dropout(self._bottom_dropout, self.schedule.seed, step, micro_batch):
            clean = self.releaser.clean(token_ids)
        labels = [self.examples.labels[i] for i in part]
        values = self.releaser.noisy(clean, token_ids, labels, b"step", step, micro_batch)
        if self.releaser.outbox.step_release(step, micro_batch) is None:
            lengths = [len(ids) for ids in token_ids]
            self.releaser.outbox.add_step(step, micro_batch, self.releaser.to_wire(values, lengths))
        self._count(step, micro_batch, token_ids)
        return values

    def _count(self, step: int, micro_batch: int, token_ids: Sequence[Sequence[int]]) -> None:
        """Counts a micro-batch's releases; copies of a text in it have noise of their own, so each is one more."""
        seen: Counter[bytes] = Counter()
        for ids in token_ids:
            key = self.releaser.key(ids)
            number = ((step + 1) << 32) + (micro_batch << 16) + seen[key]
            self.releaser.sent([key], [len(ids)], release=number)
            seen[key] += 1

    def _learn(self, pending: PendingForward, values: Tensor | None, part: list[int], batch_size: int) -> float:
        try:
            outputs = pending.outputs(values)
        except NotFiniteError:
            raise InputError(
                f"the outputs of step {pending.step} are not finite: training has diverged; lower train.learning_rate,"
                " in a new run"
            ) from None
        outputs.retain_grad()
        if values is not None:
            values.retain_grad()
        labels = torch.tensor([self.examples.labels[i] for i in part])
        logits = self._logits(outputs, pending)
        loss = corrected_cross_entropy(logits, labels, self._flip_matrix).sum()
        loss.backward(
            torch.tensor(1.0 if self._poisson else 1 / batch_size)
        )  # under DP the vendor divides, after the noise
        if pending.step < self._per_epoch:
            self._seen.append((pending.step, _gradients(part, outputs, values)))
        return loss.item() / batch_size

    def _logits(self, outputs: Tensor, pending: PendingForward) -> Tensor:
        if self._head is None:
            return outputs
        with repeatable_dropout(self._head_dropout, self.schedule.seed + 1, pending.step, pending.micro_batch):
            logits: Tensor = self._head(outputs)
        return logits

    def _save(self, step: int) -> None:
        """The customer's checkpoint first, the vendor's second: a step known to the vendor is known to both."""
        atomic_write_bytes(self._checkpoint(step), save(self._local.state()))
        self._keep_gradients()
        self.job.save(step)
        for old in self.checkpoints[:-KEPT_CHECKPOINTS]:
            with contextlib.suppress(FileNotFoundError):
                self._checkpoint(old).unlink()
        if not self._keep_releases:
            self.releaser.outbox.forget_steps(before=min(self.checkpoints))

    def _keep_gradients(self) -> None:
        if self._seen:
            names = self._seen[0][1]
            joined = {name: torch.cat([gradients[name] for _, gradients in self._seen]) for name in names}
            self.releaser.outbox.add_gradients(self._seen[0][0], joined)
            self._seen.clear()

    def _checkpoint(self, step: int) -> Path:
        return self._checkpoints / f"{step:08d}.safetensors"


def _gradients(part: list[int], outputs: Tensor, values: Tensor | None) -> dict[str, Tensor]:
    """What crossed the wire for a micro-batch: (B, .) output gradients and, if the bottom trains, (N, H) cut ones."""
    assert outputs.grad is not None
    seen = {"examples": torch.tensor(part), "outputs": outputs.detach(), "output_gradients": outputs.grad}
    if values is not None:
        assert values.grad is not None
        seen["cut_gradients"] = values.grad.bfloat16()  # half the disk; an attack loses nothing by it
    return seen


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps whose checkpoint the customer holds, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.safetensors"))
