"""Dropout: the right rate and mean, exact repetition, nothing else disturbed."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from veiltune.csprng import SecureGenerator
from veiltune.models.dropout import FastDropout, MaskSource, repeatable_dropout, seed_torch, use_fast_dropout


def test_rate_and_scale_are_those_of_torch_and_a_wrong_rate_is_noticed() -> None:
    source = MaskSource()
    with repeatable_dropout(source, 0, 0, 0):
        dropped = FastDropout(0.1, source)(torch.ones(200_000))
    zeros = int((dropped == 0).sum())
    assert binomtest(zeros, 200_000, 0.1).pvalue > 1e-3
    assert binomtest(zeros, 200_000, 0.11).pvalue < 1e-6
    assert dropped.max().item() == pytest.approx(1 / 0.9, rel=1e-4)


class SameLowWord(SecureGenerator):
    """Gives `torch.manual_seed` the same 32 bits whatever its key."""

    def integer(self) -> int:
        """Of which the CPU's generator takes the low half."""
        return super().integer() >> 32 << 32


def test_masks_hang_on_more_bits_than_can_be_searched() -> None:
    draws = []
    with torch.random.fork_rng(devices=[]):
        for key in (1, 1, 2):
            seed_torch(SameLowWord(bytes([key]) * 32))
            draws.append(nn.functional.dropout(torch.ones(4096), 0.5) == 0)
    assert torch.equal(draws[0], draws[1])
    assert binomtest(int((draws[0] == draws[2]).sum()), 4096, 0.5).pvalue > 1e-3
    assert all(binomtest(int(drawn.sum()), 4096, 0.5).pvalue > 1e-3 for drawn in draws)


def test_every_dropout_module_is_replaced_and_modes_are_kept() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1))).eval()
    use_fast_dropout(module)
    assert not any(type(part) is nn.Dropout for part in module.modules())
    assert torch.equal(module[2](torch.ones(5)), torch.ones(5))


def test_dropout_repeats_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    source = MaskSource()
    draws = []
    for seed, step, micro_batch in ((0, 1, 2), (0, 1, 2), (0, 1, 3)):
        with repeatable_dropout(source, seed, step, micro_batch):
            draws.append((nn.functional.dropout(torch.ones(64), 0.5), FastDropout(0.5, source)(torch.ones(64))))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))
    assert torch.equal(before, torch.get_rng_state())
