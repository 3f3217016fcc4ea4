"""The other processes of ``torchrun ... veiltune train``: each computes its share of every step and writes nothing.

The first process is the session, as if it were alone; it says which step comes next, and when there is none. The others
make the same model and rows from the run folder that it has begun.
"""

from __future__ import annotations

from dataclasses import replace

from veiltune.config import TrainConfig
from veiltune.dp import parallel
from veiltune.dp.checkpoints import Checkpoints
from veiltune.dp.data import read_training_tables
from veiltune.dp.data_stage import scrubbed, thin_out
from veiltune.dp.engine import DPEngine, StepResult
from veiltune.dp.plan import DPPlan
from veiltune.dp.planning import plan_of
from veiltune.dp.preparing import Prepared, prepare
from veiltune.dp.reporting import TrainReporter
from veiltune.dp.run_card import run_key
from veiltune.dp.sampling import Units
from veiltune.models.adapters import trainable_parameters
from veiltune.models.optim import ResumableAdamW
from veiltune.runs import RunFolder

BEGIN = "begin"


def follow(config: TrainConfig) -> None:
    """Does what the first process says until it says that there is nothing more to do.

    Args:
        config: The same as its.
    """
    if parallel.told() != BEGIN:
        return
    defences, private, run = config.settled_defences(), not config.privacy.disabled, RunFolder(config.run)
    key = run_key(run, config.noise_seed)
    thinned = thin_out(read_training_tables(config), defences, private=private)
    units = thinned.tables.units()
    rows, _ = scrubbed(thinned.tables.train, defences, run.private / "data", private=private)
    prepared = prepare(config, replace(thinned.tables, train=rows), key=key, notes=[])
    optimizer = optimizer_of(config, prepared)
    checkpoints = Checkpoints(run)
    done = checkpoints.steps()[-1:]
    optimizer.restore(checkpoints.load(done[0], device=config.train.device) if done else None)
    engine = engine_of(config, plan_of(config, units), prepared, units, key, TrainReporter())
    while (order := parallel.told()) is not None:
        step, rate = order
        take_step(engine, optimizer, step, learning_rate=rate)


def optimizer_of(config: TrainConfig, prepared: Prepared) -> ResumableAdamW:
    """AdamW over what trains."""
    return ResumableAdamW(trainable_parameters(prepared.model), weight_decay=config.train.weight_decay)


def engine_of(
    config: TrainConfig, plan: DPPlan, prepared: Prepared, units: Units, key: bytes, reporter: TrainReporter
) -> DPEngine:
    """The engine of a run, the same in every process."""
    return DPEngine(
        prepared.model,
        prepared.train,
        plan=plan,
        loss=prepared.loss,
        collate=prepared.collate,
        key=key,
        units=units,
        max_rows=config.train.micro_batch,
        bf16=config.train.precision == "bf16",
        say=reporter.say,
    )


def take_step(engine: DPEngine, optimizer: ResumableAdamW, step: int, *, learning_rate: float) -> StepResult:
    """A step of the plan."""
    result = engine.batch(step).backward()
    optimizer.apply(learning_rate=learning_rate)
    engine.finish_step()
    return result
