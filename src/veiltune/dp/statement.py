"""privacy.json: what a run of private training claims, by which plan, and what the claim leaves out."""

from __future__ import annotations

import math
from typing import Any

from veiltune.config import TrainConfig
from veiltune.dp.plan import DPPlan
from veiltune.dp.planning import classes_from_table, description, randomness, run_warnings

_NOT_COVERED = {
    "metrics.jsonl": "losses, gradient norms, shares and sizes of batches are computed from the table without noise",
    "tensorboard/": "the same figures",
    "summary.json": "scores come from the evaluation table without noise; times follow the drawn texts",
    "private/": "the key removes the noise, and the rest of the folder may show text: never hand it out",
}

_CLASSES = (
    "taken from the table as they are: a class that only one person's rows have tells of that person, by the shape of"
    " adapter/ and by its name in what is merged; name them in data.classes"
)


def statement(config: TrainConfig, plan: DPPlan, *, steps_taken: int) -> dict[str, Any]:
    """The content of privacy.json.

    Args:
        config: The run.
        plan: Its plan.
        steps_taken: So far.

    Returns:
        `claimed_epsilon` is that of the whole plan, infinite where noise is off or seeded; `planned_epsilon` is what
        the plan would claim of unpredictable noise.
    """
    return {
        "claimed_epsilon": claimed_epsilon(config, plan),
        "planned_epsilon": plan.claimed_epsilon,
        "rdp_epsilon": plan.rdp_epsilon,
        "delta": plan.delta,
        "unit": plan.unit,
        "neighbours": f"one {plan.unit} added or removed",
        "steps_taken": steps_taken,
        "epsilon_of_steps_taken": math.inf if config.noise_seed is not None else plan.epsilon_after(steps_taken),
        "covered": _covered(config) if plan.private and config.noise_seed is None else "nothing",
        "not_covered": _not_covered(config),
        "randomness": randomness(config),
        "warnings": run_warnings(config, plan),
        "statement": description(config, plan),
        "plan": plan.to_dict(),
    }


def _not_covered(config: TrainConfig) -> dict[str, str]:
    shown = {name: why for name, why in _NOT_COVERED.items() if name != "tensorboard/" or config.report.tensorboard}
    return shown | ({"the classes": _CLASSES} if classes_from_table(config) else {})


def _covered(config: TrainConfig) -> str:
    merged = " and merged/" if config.train.save_merged else ""
    return f"adapter/{merged}, and whatever is made from {'them' if merged else 'it'} alone"


def claimed_epsilon(config: TrainConfig, plan: DPPlan) -> float:
    """What may be claimed of the finished run: nothing where the noise is seeded."""
    return plan.claimed_epsilon if config.noise_seed is None else math.inf
