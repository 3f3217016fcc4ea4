"""AdamW that resumes: the same as torch's, and the same after being put away."""

from __future__ import annotations

import torch
from torch import nn

from veiltune.models.optim import ResumableAdamW


def gradients(step: int) -> torch.Tensor:
    """A gradient that depends on the step only."""
    return torch.randn(5, generator=torch.Generator().manual_seed(step))


def train(optimizer: ResumableAdamW, weight: nn.Parameter, steps: range) -> None:
    """Applies the gradients of some steps."""
    for step in steps:
        weight.grad = gradients(step)
        optimizer.apply(learning_rate=0.1 / (step + 1))


def test_equals_torch_adamw() -> None:
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    train(ResumableAdamW({"w": ours}, weight_decay=0.1), ours, range(6))
    adamw = torch.optim.AdamW([theirs], lr=1.0, weight_decay=0.1)
    for step in range(6):
        theirs.grad = gradients(step)
        adamw.param_groups[0]["lr"] = 0.1 / (step + 1)
        adamw.step()
    assert torch.equal(ours, theirs)


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    straight, broken = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    train(ResumableAdamW({"w": straight}, weight_decay=0.1), straight, range(8))
    first = ResumableAdamW({"w": broken}, weight_decay=0.1)
    train(first, broken, range(4))
    state = first.state()
    train(first, broken, range(4, 6))  # lost work
    fresh = nn.Parameter(torch.zeros(5))
    second = ResumableAdamW({"w": fresh}, weight_decay=0.1)
    second.restore(state)
    train(second, fresh, range(4, 8))
    assert torch.equal(straight, fresh)
    assert second.step == 8
