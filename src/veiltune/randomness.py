"""Uniform and normal tensors from an explicit generator: the system's CSPRNG for life, torch's for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veiltune.csprng import KEY_BYTES as KEY_BYTES
from veiltune.csprng import SecureGenerator as SecureGenerator

Generator = torch.Generator | SecureGenerator

#: Draws made at once: what they need on the way stays in a core's cache.
_BLOCK = 2**15


def uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """float64 uniform draws in (0, 1], on the CPU: zero is left out so that a logarithm is always finite."""
    if isinstance(generator, SecureGenerator):
        return torch.from_numpy(generator.uniform(shape))
    return 1.0 - torch.rand(shape, dtype=torch.float64, generator=generator)


def normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """float64 standard normal draws, on the CPU.

    Source: Box and Muller 1958: radius sqrt(-2 ln u) and a uniform angle give two independent normals.
    """
    draws = torch.empty(math.prod(shape), dtype=torch.float64)
    for block in draws.split(_BLOCK) if len(draws) else ():
        pairs = uniform((2, (len(block) + 1) // 2), generator)
        radius, angle = pairs[0].log_().mul_(-2.0).sqrt_(), pairs[1].mul_(2.0 * math.pi)
        torch.cat([radius * angle.cos(), radius * angle.sin()], out=pairs.view(-1))
        block.copy_(pairs.view(-1)[: len(block)])
    return draws.reshape(shape)
