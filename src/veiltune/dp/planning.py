"""From a configuration to the plan, and `veiltune train --dry-run`. Loads no torch and no model."""

from __future__ import annotations

from typing import Any

from veiltune.config import TrainConfig
from veiltune.config.defences import PRESETS
from veiltune.dp.data import TrainingTables, read_training_tables
from veiltune.dp.data_stage import thin_out
from veiltune.dp.plan import DPPlan
from veiltune.dp.run_card import check_same_run
from veiltune.dp.sampling import Units
from veiltune.runs import RunFolder


def plan_of(config: TrainConfig, units: Units) -> DPPlan:
    """The plan that a configuration asks for on a table of these units.

    Raises:
        InputError: If a value is out of range, or the table is smaller than a batch.
        PrivacyError: If no noise meets the target; says what would fit.
    """
    train, privacy = config.train, config.privacy
    schedule: dict[str, Any] = {
        "num_units": len(units),
        "unit": units.name,
        "max_records": privacy.max_records,
        "expected_batch_size": train.batch_size,
        "steps": train.steps,
        "epochs": train.epochs,
    }
    if privacy.disabled:
        return DPPlan.without_privacy(**schedule)
    claim: dict[str, Any] = {
        "delta": privacy.delta,
        "clip_norm": privacy.clip_norm,
        "clipping": privacy.clipping,
    }
    if privacy.noise_multiplier is not None:
        return DPPlan.for_noise(privacy.noise_multiplier, **schedule, **claim)
    assert privacy.epsilon is not None
    return DPPlan.for_epsilon(privacy.epsilon, **schedule, **claim)


def dry_run(config: TrainConfig) -> dict[str, str]:
    """The run in words, a line each: the data are read and counted, nothing is trained or written.

    Raises:
        InputError: See `plan_of` and `read_training_tables`.
        PrivacyError: See `plan_of`; or the run folder was begun with another plan.
        ConfigError: If the run folder was begun with another configuration.
    """
    thinned = thin_out(read_training_tables(config), config.settled_defences(), private=not config.privacy.disabled)
    tables, units = thinned.tables, thinned.tables.units()
    plan = plan_of(config, units)
    check_same_run(RunFolder(config.run), config, plan)
    train = config.train
    lines = {"data": "; ".join([_data(tables, units), *thinned.notes]), **description(config, plan)}
    lines |= {f"warning {number}": line for number, line in enumerate(run_warnings(config, plan), start=1)}
    return lines | {
        "training": f"{train.method} on {config.model.name} for {config.model.task}, learning_rate "
        f"{train.learning_rate:g} ({train.schedule}), {train.precision} on {train.device}",
        "defences": config.settled_defences().words(),
        "length": f"at most {config.data.max_length} tokens an example; the run says how many are longer and cut",
        "randomness": randomness(config),
        "run folder": config.run,
    }


def description(config: TrainConfig, plan: DPPlan) -> dict[str, str]:
    """`DPPlan.describe`, but for a run whose noise is seeded, which has no claim."""
    lines = plan.describe(classes_fixed=not classes_from_table(config))
    if config.noise_seed is None or not plan.private:
        return lines
    del lines["covers"]
    return lines | {"claim": "no privacy: noise_seed is set, and whoever knows it can remove the noise"}


def classes_from_table(config: TrainConfig) -> bool:
    """Whether a classifier's classes are what the training table has, which is outside every claim."""
    return config.model.task == "classification" and config.data.classes is None


def run_warnings(config: TrainConfig, plan: DPPlan) -> list[str]:
    """What weakens the claim, one line each."""
    lines = plan.warnings()
    if PRESETS[config.defences.preset]["max_records"] and not config.data.person_column:
        lines.append(f"preset {config.defences.preset} caps a person's rows, and no data.person_column tells persons")
    asked = config.privacy.epsilon
    if asked is not None and plan.private and plan.claimed_epsilon < 0.9 * asked:
        lines.append(
            f"epsilon {asked:g} was asked for and {plan.claimed_epsilon:.3g} is claimed: no plan has less noise than a"
            f" multiplier of {plan.noise_multiplier:g}"
        )
    if config.noise_seed is not None:
        lines.append("noise_seed is set: whoever knows it can remove the noise, so the run protects nothing")
    return lines


def randomness(config: TrainConfig) -> str:
    """Where sampling and noise come from."""
    if config.noise_seed is None:
        return "key from the operating system's CSPRNG, kept in private/key"
    return f"noise_seed {config.noise_seed}: for tests only, protects nothing"


def _data(tables: TrainingTables, units: Units) -> str:
    owners = f" of {len(units)} persons (at most {units.largest} each)" if units.name == "person" else ""
    classes = f", {len(tables.labels)} classes" if tables.labels else ""
    return f"{len(tables.train)} training examples{owners}, {len(tables.eval)} for evaluation{classes}"
