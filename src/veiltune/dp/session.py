"""A whole run of private fine-tuning: a configuration in; a model with its claim, in a run folder, out."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from veiltune.code_version import code_version
from veiltune.config import TrainConfig, dump_toml
from veiltune.dp import parallel
from veiltune.dp.checkpoints import Checkpoints, forget_after
from veiltune.dp.data import TrainingTables, read_training_tables
from veiltune.dp.data_stage import scrubbed, thin_out
from veiltune.dp.engine import StepResult
from veiltune.dp.evaluation import Evaluator
from veiltune.dp.following import BEGIN, engine_of, follow, optimizer_of, take_step
from veiltune.dp.memorisation import recitation
from veiltune.dp.memory import peak_memory
from veiltune.dp.metrics import Score
from veiltune.dp.plan import DPPlan
from veiltune.dp.planning import plan_of, run_warnings
from veiltune.dp.preparing import Prepared, prepare
from veiltune.dp.reporting import TrainProgress, TrainReporter
from veiltune.dp.run_card import RunCard, check_same_card, check_same_run, run_key
from veiltune.dp.sampling import Units
from veiltune.dp.schedules import learning_rate_at
from veiltune.dp.statement import claimed_epsilon, statement
from veiltune.dp.tracking import Tracker
from veiltune.errors import InputError, InterruptedRunError
from veiltune.models.adapters import count_parameters, save_adapter
from veiltune.models.merging import merged_model
from veiltune.runs import RunFolder, atomic_write_bytes, storage_errors

_EPSILON_POINTS = 40  # of a run, at which the epsilon spent so far is computed


def train(
    config: TrainConfig, *, reporter: TrainReporter | None = None, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Fine-tunes a model under a plan; called again, it goes on where it stopped, to the same result.

    The run folder gets ``config.toml``, ``metrics.jsonl``, ``privacy.json``, ``adapter/`` (``merged/`` where asked
    for), ``summary.json`` last, and ``private/`` (mode 0700) with the key and the checkpoints.

    Guarantee:
        That of the plan (`veiltune.dp.plan`) for ``adapter/`` and ``merged/``, as ``privacy.json`` words it, if
        ``private/`` stays secret. Not covered: ``metrics.jsonl``, the scores, times and the other files of the folder.

        ==============================================  =========================================================
        case                                            what happens
        ==============================================  =========================================================
        killed, then called again                       the same result bit for bit on the same machine; the
                                                        same epsilon
        called again when finished                      the same summary; nothing is trained
        several processes (torchrun)                    the result of one up to rounding, noise added once; the
                                                        first one writes
        stopped for good before the last step           ``privacy.json`` has the epsilon of the steps taken
        the model recites (stop_on_memorisation)        ends there; without privacy only
        another plan, table, model, key or version      refused; lists what differs
        ``noise_seed`` set                              claimed epsilon is infinite
        ==============================================  =========================================================

    Args:
        config: The run.
        reporter: Told about progress.
        stop: Asked between steps; True saves a checkpoint and raises.

    Returns:
        The summary, as read from summary.json: an infinite number is the word "inf", which float() reads. Nothing in
        the other processes of torchrun.

    Raises:
        InputError: Bad data or configuration; nothing was made. Or another process trains the same run folder.
        PrivacyError: The plan cannot be met, the model cannot be trained privately, or a resumed run has changed.
        InterruptedRunError: If `stop` said so.
        StorageError: If the run folder cannot be written; the same call goes on once it can.
    """
    _check_machine(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with parallel.processes(config.train.device):
        if parallel.world()[0]:
            follow(config)
            return {}
        try:
            return _trained(config, reporter or TrainReporter(), stop)
        finally:
            with contextlib.suppress(RuntimeError):  # of those that are gone already
                parallel.tell(None)


def _trained(config: TrainConfig, reporter: TrainReporter, stop: Callable[[], bool]) -> dict[str, Any]:
    """What `train` does in the first process, or the only one."""
    tables = read_training_tables(config)
    defences, private = config.settled_defences(), not config.privacy.disabled
    thinned = thin_out(tables, defences, private=private)
    units = thinned.tables.units()
    plan = plan_of(config, units)
    run = RunFolder(config.run)
    check_same_run(run, config, plan)
    run = RunFolder.create(config.run, config=dump_toml(config))
    with run.held(), _undone_if_refused(run):
        key = run_key(run, config.noise_seed)
        if (run.path / "summary.json").exists():
            card = RunCard.load(run)
            if card is not None:
                check_same_card(run, RunCard(card.plan, tables.fingerprint(key), card.model, card.version))
            reporter.say("the run was finished before: nothing was trained now")
            return dict(run.read_json("summary.json"))
        rows, notes = scrubbed(thinned.tables.train, defences, run.private / "data", private=private)
        ready = replace(thinned.tables, train=rows)
        prepared = prepare(config, ready, key=key, notes=[*thinned.notes, *notes])
        check_same_card(
            run, RunCard(plan.to_dict(), tables.fingerprint(key), prepared.fingerprint(key), code_version())
        )
        with storage_errors(run.path):
            return _Session(config, run, plan, prepared, ready, units, key, reporter).train(stop)


@contextlib.contextmanager
def _undone_if_refused(run: RunFolder) -> Iterator[None]:
    """A held run that fails before its first step leaves nothing in a corrected run's way."""
    fresh = RunCard.load(run) is None
    try:
        yield
    except BaseException:
        if fresh and not run.metrics():
            shutil.rmtree(run.path, ignore_errors=True)
        raise


class _Session:
    """A prepared run: loop, checkpoints, scores, files."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        plan: DPPlan,
        prepared: Prepared,
        tables: TrainingTables,
        units: Units,
        key: bytes,
        reporter: TrainReporter,
    ) -> None:
        self.config, self.run, self.plan, self.prepared, self.reporter = config, run, plan, prepared, reporter
        self.model, self.tables = prepared.model, tables
        self.optimizer = optimizer_of(config, prepared)
        self.checkpoints = Checkpoints(run)
        self.done = self._take_up()
        self.tracker = Tracker(run.path / "tensorboard", on=config.report.tensorboard, first_step=self.done)
        parallel.tell(BEGIN)
        self.engine = engine_of(config, plan, prepared, units, key, reporter)
        self.evaluator = Evaluator(
            examples=prepared.eval,
            rows=None if tables.labels else tables.eval,  # type: ignore[arg-type]  # prompts where there are no labels
            collate=prepared.collate,
            tokenizer=prepared.tokenizer,
            separator=config.data.separator,
            settings=config.evaluation,
            bf16=config.train.precision == "bf16",
            seed=config.train.seed,
        )
        self._epsilons: dict[int, float] = {}

    def train(self, stop: Callable[[], bool]) -> dict[str, Any]:
        for line in [*self.prepared.notes, *run_warnings(self.config, self.plan)]:
            self.reporter.say(line)
        self._write_privacy()
        with contextlib.closing(self.tracker):
            self._loop(stop)
            save_adapter(self.model, self.run.path / "adapter")  # first: epsilon is spent, whatever comes of the scores
            scores = self._final_scores()
        if self.config.train.save_merged:
            self._save_merged()
        self.run.write_json("summary.json", self._summary(scores))
        return dict(self.run.read_json("summary.json"))

    def _take_up(self) -> int:
        """Puts weights, moments and the log back to the last checkpoint; returns its step."""
        steps = self.checkpoints.steps()
        done = steps[-1] if steps else 0
        self.optimizer.restore(self.checkpoints.load(done, device=self.config.train.device) if done else None)
        lines = [line for line in forget_after(self.run, done) if "seconds" in line]
        self.seconds = float(lines[-1]["seconds"]) if lines else 0.0
        self.examples = sum(int(line["size"]) for line in lines)
        self.non_finite = sum(int(line["non_finite"]) for line in lines)
        return done

    def _loop(self, stop: Callable[[], bool]) -> None:
        total, every = self.plan.steps, self.config.train.evaluate_every
        self.reporter.phase("train", total)
        for step in range(self.done, total):
            if self._recites():
                break
            self._step(step)
            self.done, stopping = step + 1, stop()
            if every and self.done % every == 0 and self.done < total:
                self._log_scores(self.evaluator.scores(self.model))
            if stopping or self.done % self.config.train.checkpoint_every == 0 or self.done == total:
                self.checkpoints.save(self.done, self.optimizer.state())
                self._write_privacy()
            if stopping and self.done < total:
                raise InterruptedRunError(f"stopped at step {self.done}; the same command goes on from here")

    def _recites(self) -> bool:
        """Whether the model knows more of the training rows by heart than the configuration lets it."""
        most = self.config.settled_defences().stop_on_memorisation
        if not most or not self.done or self.done % self.config.train.checkpoint_every:
            return False
        found = recitation(
            self.model, self.prepared.train, self.prepared.eval, collate=self.prepared.collate,
            seed=self.config.train.seed,
        )  # fmt: skip
        self.run.log({"step": self.done, "recitation": vars(found) | {"excess": found.excess}})
        if found.excess > most:
            self.reporter.say(
                f"stopped at step {self.done} of {self.plan.steps}: the model recites {found.train:.1%} of the passages"
                f" of training rows and {found.unseen:.1%} of unseen ones (stop_on_memorisation = {most:g})"
            )
        return found.excess > most

    def _step(self, step: int) -> None:
        started, train = time.monotonic(), self.config.train
        rate = learning_rate_at(
            step,
            total=self.plan.steps,
            peak=train.learning_rate,
            schedule=train.schedule,
            warmup_fraction=train.warmup_fraction,
        )
        parallel.tell((step, rate))
        result = take_step(self.engine, self.optimizer, step, learning_rate=rate)
        self._tell(result, rate, time.monotonic() - started)

    def _tell(self, result: StepResult, rate: float, seconds: float) -> None:
        self.seconds += seconds
        self.examples += result.size
        self.non_finite += result.non_finite
        progress = TrainProgress(
            step=result.step + 1,
            total_steps=self.plan.steps,
            loss=result.loss,
            learning_rate=rate,
            epsilon=self._epsilon_after(result.step + 1),
            size=result.size,
            clipped_share=result.clipped_share,
            median_norm=result.median_norm,
            non_finite=result.non_finite,
            examples_per_second=round(result.size / max(seconds, 1e-9), 2),
            seconds=round(self.seconds, 3),
        )
        if result.non_finite and self.non_finite == result.non_finite:
            self.reporter.say("a gradient is not finite; such units contribute zero and are counted in non_finite")
        self.run.log(vars(progress))
        self.tracker.log(progress.step, vars(progress))
        self.reporter.trained(progress)

    def _epsilon_after(self, step: int) -> float:
        """Never less than what is spent: of the next of so many points, as composing takes its time."""
        if self.config.noise_seed is not None:
            return math.inf
        points = max(1, self.plan.steps // _EPSILON_POINTS)
        step = min(self.plan.steps, math.ceil(step / points) * points)
        if step not in self._epsilons:
            self._epsilons[step] = self.engine.epsilon_after(step)
        return self._epsilons[step]

    def _log_scores(self, scores: dict[str, Score]) -> None:
        line = {"step": self.done, "evaluation": _plain(scores)}
        if not any("evaluation" in known and known["step"] == self.done for known in self.run.metrics()[-1:]):
            self.run.log(line)
        self.tracker.log(self.done, {f"eval/{name}": score.value for name, score in scores.items()})

    def _final_scores(self) -> dict[str, Score]:
        self.reporter.phase("evaluate", 1)
        scores = self.evaluator.scores(self.model)
        self.reporter.advance(1)
        prompts, _ = self.evaluator.prompts()
        if prompts:
            self.reporter.phase("generate", len(prompts))
            of_texts, texts = self.evaluator.generated(
                self.model, progress=lambda done, total: self.reporter.advance(done)
            )
            scores |= of_texts
            atomic_write_bytes(self.run.private / "generated.json", json.dumps(texts).encode(), mode=0o600)
        self._log_scores(scores)
        return scores

    def _save_merged(self) -> None:
        folder = self.run.path / "merged"
        shutil.rmtree(folder, ignore_errors=True)
        merged_model(self.model).save_pretrained(folder)
        self.prepared.tokenizer.save_pretrained(folder)

    def _summary(self, scores: dict[str, Score]) -> dict[str, Any]:
        count = count_parameters(self.model)
        return {
            "scores": _plain(scores),
            "claimed_epsilon": claimed_epsilon(self.config, self.plan),
            "planned_epsilon": self.plan.claimed_epsilon,
            "delta": self.plan.delta,
            "unit": self.plan.unit,
            "noise_multiplier": self.plan.noise_multiplier,
            "steps": self.done,
            "planned_steps": self.plan.steps,
            "train_examples": len(self.prepared.train),
            "eval_examples": len(self.prepared.eval),
            "labels": list(self.tables.labels.names) if self.tables.labels else [],
            "notes": self.prepared.notes,
            "non_finite": self.non_finite,
            "seconds": round(self.seconds, 3),
            "processes": parallel.world()[1],
            "peak_memory_bytes": peak_memory(self.config.train.device),
            "defences": self.config.settled_defences().model_dump() | {"preset": self.config.defences.preset},
            "examples_per_second": round(self.examples / max(self.seconds, 1e-9), 2),
            "method": self.config.train.method,
            "trainable_parameters": count.trainable,
            "total_parameters": count.total,
            "model_digest": self.prepared.digest,
            "seeds": {"train": self.config.train.seed, "noise": self.config.noise_seed},
        }

    def _write_privacy(self) -> None:
        self.run.write_json("privacy.json", statement(self.config, self.plan, steps_taken=self.done))


def _plain(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: asdict(score) for name, score in scores.items()}


def _check_machine(device: str) -> None:
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"train.device must be 'cpu' on this machine, which has no CUDA device, got {device!r}")
