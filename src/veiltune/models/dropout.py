"""Dropout that repeats exactly and costs little: masks from a fast generator, seeded by (seed, step, micro-batch).

torch draws CPU dropout masks one element at a time with a Mersenne twister; on MiniLM that is a fifth of a training
step. Here masks come from 16 random bits an element (numpy's SFC64), so p is rounded to a multiple of 2^-16.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from veiltune.csprng import SecureGenerator

_LEVELS = 2**16
_MT_WORDS = 624  # of torch's CPU generator, at 8 bytes each behind 24 bytes of seed and counters


class MaskSource:
    """The generator that all `FastDropout` modules of a part draw from."""

    def __init__(self) -> None:
        self.generator = np.random.Generator(np.random.SFC64(0))

    def seed(self, entropy: bytes) -> None:
        """Starts again from some bytes."""
        self.generator = np.random.Generator(np.random.SFC64(int.from_bytes(entropy, "little")))


class FastDropout(nn.Module):
    """Zeroes each value with probability p in training and scales the others so that the mean stays.

    >>> FastDropout(0.5, MaskSource()).eval()(torch.ones(3))
    tensor([1., 1., 1.])

    Source: Srivastava et al. 2014; not a privacy mechanism.
    """

    def __init__(self, p: float, source: MaskSource) -> None:
        super().__init__()
        self.p = p  # attention modules read it too
        self.source = source

    def forward(self, values: Tensor) -> Tensor:
        """Any shape to the same shape."""
        threshold = round(self.p * _LEVELS)
        if not self.training or not threshold:
            return values
        bits = self.source.generator.integers(0, _LEVELS, size=tuple(values.shape), dtype=np.uint16)
        mask = torch.from_numpy(bits >= threshold).to(device=values.device, dtype=values.dtype)
        return values * mask.mul_(_LEVELS / (_LEVELS - threshold))


def use_fast_dropout(module: nn.Module) -> MaskSource:
    """Replaces every `nn.Dropout` inside a module; returns their common source, on a second call the same one."""
    sources = [child.source for child in module.modules() if isinstance(child, FastDropout)]
    source = sources[0] if sources else MaskSource()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, FastDropout(child.p, source).train(child.training))
    return source


def dropout_rates(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every dropout rate inside a module, as owner and name of a number: of layers, and of attention modules.

    >>> [name for _, name in dropout_rates(nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)))]
    ['p']
    """
    return [
        (owner, name)
        for owner in module.modules()
        for name, value in vars(owner).items()
        if (isinstance(value, float) and "drop" in name) or (name == "p" and "Dropout" in type(owner).__name__)
    ]


def has_dropout(module: nn.Module) -> bool:
    """Whether any rate inside a module is above 0."""
    return any(getattr(owner, name) > 0 for owner, name in dropout_rates(module))


def seed_torch(generator: SecureGenerator) -> None:
    """Seeds torch's global generators: the CPU's with 19,968 bits, CUDA's with 63.

    `torch.manual_seed` takes 32 for the CPU, which can be searched: too few for masks that nobody may know.
    """
    torch.manual_seed(generator.integer())
    state = torch.get_rng_state()
    words = (generator.uniform((_MT_WORDS,)) * 2.0**53).astype(np.uint64) & np.uint64(2**32 - 1)
    state[24 : 24 + 8 * _MT_WORDS] = torch.from_numpy(words.view(np.uint8))
    torch.set_rng_state(state)


@contextlib.contextmanager
def repeatable_dropout(source: MaskSource, seed: int, step: int, micro_batch: int) -> Iterator[None]:
    """Seeds the source, and torch's global generator inside the block, so that a lost pass repeats exactly.

    torch's generator still serves dropout that is no module (inside attention kernels); outside the block it is as it
    was.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    source.seed(digest)
    with torch.random.fork_rng(devices=[]):
        seed_torch(SecureGenerator(digest))
        yield
