"""Gaussian noise on a clipped sum, in proportion to that sum's own sensitivity."""

from __future__ import annotations

from torch import Tensor

from veiltune._validate import positive
from veiltune.dp.clipping import ClippedSum
from veiltune.errors import InputError
from veiltune.randomness import Generator, SecureGenerator, normal

_CHUNK = 2**16


def noisy_mean(
    total: ClippedSum, *, noise_multiplier: float, expected_batch_size: float, generator: Generator
) -> dict[str, Tensor]:
    """(sum + noise_multiplier * sensitivity * N(0, I)) / expected_batch_size, in place of the sum.

    Guarantee:
        For one release: the Gaussian mechanism of this noise multiplier, for units added or removed, against anyone
        who sees the result but not the generator's key. Noise is drawn and added in float64 and rounded to float32
        afterwards; the attack on floating-point noise (arXiv:2107.10138) is not provably excluded. Dividing by the
        drawn instead of the expected size would not be covered.

    ===============================  =====================================
    case                             result
    ===============================  =====================================
    noise_multiplier 0               the exact mean; nothing is drawn
    nobody was drawn                 noise alone
    infinite clip norm, noise > 0    InputError: no noise is enough
    ===============================  =====================================

    Args:
        total: From `clipping`; it is used up.
        noise_multiplier: Standard deviation over sensitivity, >= 0.
        expected_batch_size: Units drawn on average, > 0; never the drawn number.
        generator: A fresh one for each release; a `SecureGenerator` but in tests.

    Raises:
        InputError: If a value is out of range.

    Source: Abadi et al. 2016, arXiv:1607.00133.
    """
    positive(expected_batch_size=expected_batch_size)
    if noise_multiplier != 0:
        positive(noise_multiplier=noise_multiplier)
        if not total.clipping.active:
            raise InputError("noise needs a finite clip_norm, got infinity; set one, or noise_multiplier 0")
    std = noise_multiplier * total.sensitivity() if noise_multiplier else 0.0
    for name, tensor in total.grads.items():
        if std:
            own = generator.derive(name) if isinstance(generator, SecureGenerator) else generator
            _add_noise(tensor.view(-1), std, own)
        tensor.div_(expected_batch_size)
    return total.grads


def _add_noise(values: Tensor, std: float, generator: Generator) -> None:
    for part in values.split(_CHUNK):
        noise = normal((len(part),), generator).mul_(std)
        part.copy_(part.double().add_(noise.to(part.device)))
