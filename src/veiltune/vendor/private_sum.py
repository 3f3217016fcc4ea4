"""The clipped, noisy gradient of a job that trains under DP: the vendor's half of ``[privacy.dp]``."""

from __future__ import annotations

import torch
from torch import nn

from veiltune.csprng import SecureGenerator
from veiltune.dp.clipping import Clipping, SumInProgress
from veiltune.dp.instrument import check_supported
from veiltune.dp.noise import noisy_mean
from veiltune.dp.record import Record
from veiltune.wire import veiltune_pb2 as pb


class PrivateSum:
    """Gathers the micro-batches of a step and turns them into one private gradient.

    Guarantee:
        What the optimizer gets of a step is a sum of per-example gradients, each clipped to the job's clip_norm, with
        Gaussian noise of noise_multiplier times that, divided by the expected batch size: DP of the finished model for
        each example, if the customer draws the batches as its plan says and dropout is seeded by `dropout_seed`: with
        a seed that others know, an example that comes or goes would shift the others' masks, and their gradients. A
        step that is done again after a crash gets fresh noise. It protects nobody from the vendor itself.

    Args:
        part: The vendor's part, with its method attached.
        spec: Of the job.

    Attributes:
        dropout_seed: Secret, of this process.
    """

    def __init__(self, part: nn.Module, spec: pb.JobSpec) -> None:
        check_supported(part)
        self._part, self._spec = part, spec
        self._clipping = Clipping(norm=spec.clip_norm)
        self._generator, self._releases = SecureGenerator(), 0
        self.dropout_seed = self._generator.derive("dropout").integer()
        self.clear()

    def clear(self) -> None:
        """Drops what was gathered."""
        self._sum = SumInProgress(self._part, self._clipping)

    def add(self, record: Record) -> None:
        """Adds a micro-batch whose backward pass is done."""
        device = next(self._part.parameters()).device
        self._sum.take(record, torch.zeros(record.num_units, device=device))

    def write_gradients(self) -> None:
        """Writes the step's private gradient into ``.grad``; with nothing gathered it is noise alone."""
        self._releases += 1
        mean = noisy_mean(
            self._sum.result(),
            noise_multiplier=self._spec.noise_multiplier,
            expected_batch_size=self._spec.expected_batch_size,
            generator=self._generator.derive("noise", self._releases),
        )
        for name, parameter in self._part.named_parameters():
            if parameter.requires_grad:
                parameter.grad = mean[name].to(parameter.dtype)
        self.clear()
