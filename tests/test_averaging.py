"""Averaging views wears noise off as sqrt(R), and a replayed release gains nothing."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from veiltune.attacks.averaging import average_views, averaged_eta
from veiltune.attacks.inversion import invert_by_nearest_embedding, score_token_recovery
from veiltune.errors import InputError
from veiltune.privatize.noise import sample_d_chi_noise

DIM, VOCAB, VIEWS = 64, 300, 9


def views(clean: torch.Tensor, eta: float, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [clean + sample_d_chi_noise(tuple(clean.shape), eta=eta, generator=generator) for _ in range(count)]


def test_power_falls_as_the_number_of_views() -> None:
    """E||z||^2 of d_chi noise is dim (dim + 1) / eta^2; that of the average is the same at `averaged_eta`."""
    clean, eta = torch.zeros(4000, DIM), 8.0
    power = average_views(views(clean, eta, VIEWS)).square().sum(dim=1)
    margin = 4 * float(power.std()) / len(clean) ** 0.5
    expected = DIM * (DIM + 1) / averaged_eta(eta, VIEWS) ** 2
    assert abs(float(power.mean()) - expected) < margin
    assert not abs(float(power.mean()) - DIM * (DIM + 1) / (eta * VIEWS) ** 2) < margin  # planted: falls with R


def test_average_equals_the_slow_twin_and_leaves_the_views_alone() -> None:
    clean = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    seen = views(clean, 2.0, 3)
    copies = [view.clone() for view in seen]
    slow = [[sum(float(view[i, j]) for view in seen) / 3 for j in range(3)] for i in range(5)]
    torch.testing.assert_close(average_views(seen), torch.tensor(slow))
    assert all(torch.equal(a, b) for a, b in zip(seen, copies, strict=True))


def test_fresh_noise_is_worn_off_and_a_replay_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.randn(VOCAB, DIM, generator=generator)
    secret = torch.randint(0, VOCAB, (600,), generator=generator)
    seen = views(vocabulary[secret], 2.0, VIEWS)

    def success(values: torch.Tensor) -> float:
        return score_token_recovery(invert_by_nearest_embedding(values, vocabulary), secret).success_rate

    one = success(seen[0])
    assert one < 0.8
    assert success(average_views(seen)) > one + 0.2
    assert success(average_views([seen[0]] * VIEWS)) == one


def test_unusable_views_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for unusable in ([], [torch.zeros(2, 3), torch.zeros(3, 3)]):
        with pytest.raises(InputError, match="views must be one or more releases of one shape"):
            average_views(unusable)
    with pytest.raises(InputError, match="num_views must be a whole number"):
        averaged_eta(1.0, 0)
