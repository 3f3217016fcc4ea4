"""What makes a plan weak: a claim that excludes little, or noise that drowns what is to be learnt. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from veiltune.dp.plan import DPPlan

_WEAK_EPSILON, _WEAK_NOISE = 10.0, 0.5
_MOST_NOISE = 0.1  # times the expected batch size


def weaknesses(plan: DPPlan) -> list[str]:
    """One line each, with what would help; empty for a run without privacy, which claims nothing."""
    if not plan.private:
        return []
    lines = []
    if plan.delta >= 1 / plan.num_units:
        lines.append(
            f"delta {plan.delta:g} is not below 1/{plan.num_units}: a mechanism that publishes one {plan.unit} "
            "at random has such a delta; choose one at least ten times smaller"
        )
    if plan.claimed_epsilon > _WEAK_EPSILON:
        lines.append(
            f"claimed epsilon {plan.claimed_epsilon:.3g} is above {_WEAK_EPSILON:g}: the guarantee alone excludes "
            "hardly any attack; add noise, take fewer steps or smaller batches, and audit the run"
        )
    if plan.noise_multiplier < _WEAK_NOISE:
        lines.append(
            f"noise_multiplier {plan.noise_multiplier:g} is below {_WEAK_NOISE:g}: whoever knows that a unit was "
            "drawn can often see it in one step; larger batches allow more noise"
        )
    if plan.noise_multiplier > _MOST_NOISE * plan.expected_batch_size:
        lines.append(
            f"noise_multiplier {plan.noise_multiplier:g} drowns an expected batch of {plan.expected_batch_size:g}: "
            "each coordinate of the mean gradient gets more noise than a tenth of what its whole norm can be, and "
            "little will be learnt; take larger batches, fewer steps or a larger epsilon"
        )
    if plan.expected_batch_size < 1:
        lines.append(f"the expected batch of {plan.expected_batch_size:g} is below one {plan.unit}: most are empty")
    return lines
