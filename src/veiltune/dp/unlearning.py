"""Makes a finished run forget named rows: less likely than before, while the other rows stay as likely as they were.

There is no guarantee in it, so it comes with what is needed to look again: the new run folder can be audited as it is,
`--leave-out` on the remaining persons and `--only` on the forgotten ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veiltune._validate import positive_int
from veiltune.config import TrainConfig, dump_toml
from veiltune.data.prompts import Prompted
from veiltune.dp.data import TrainingTables, read_training_tables
from veiltune.dp.data_stage import scrubbed, thin_out
from veiltune.dp.encoding import Encoded, collate, encode_prompted
from veiltune.dp.forgetting import METHODS, forgetting_losses
from veiltune.dp.losses import IGNORED, causal_lm_losses
from veiltune.dp.preparing import encoded_training_rows
from veiltune.dp.reporting import TrainReporter
from veiltune.dp.run_card import run_key
from veiltune.errors import DataError, InputError, PrivacyError
from veiltune.models.adapters import save_adapter, trainable_parameters
from veiltune.models.families import longest_sequence
from veiltune.models.finished import fine_tuned, run_of
from veiltune.models.loading import BaseModel, load_base
from veiltune.runs import RunFolder, atomic_write_bytes, storage_errors


@dataclass(frozen=True, kw_only=True)
class UnlearnOptions:
    """How rows are forgotten.

    Attributes:
        method: "npo" or "ascent"; see `forgetting_losses`.
        beta: Of "npo".
        steps: At most; it ends once training has made the rows to forget no likelier than rows that it never saw.
        batch_size: Rows to forget, and rows to keep, of a step.
        learning_rate: Of AdamW.
        keep_weight: Of the rows to keep, whose loss is added.
        seed: Draws the batches.
    """

    method: str = "npo"
    beta: float = 0.1
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 1e-3
    keep_weight: float = 1.0
    seed: int = 0


@dataclass(frozen=True, repr=False)
class _Rows:
    forget: Sequence[Encoded]
    keep: Sequence[Encoded]
    unseen: Sequence[Encoded]


def unlearn(
    run: str | Path,
    persons: Path,
    output: str | Path,
    options: UnlearnOptions | None = None,
    *,
    reporter: TrainReporter | None = None,
) -> dict[str, Any]:
    """Writes a run folder with a model that forgot the rows of some persons.

    Guarantee:
        None; see `forgetting_losses`. It is refused for a run with a claim of privacy, which training on without
        noise would end.

    Args:
        run: Folder of a finished `veiltune train` of a language model, with its training table where it was.
        persons: Whose rows: a text file, the value of data.person_column on each line.
        output: A new folder; it is audited like any other run.
        options: See `UnlearnOptions`.
        reporter: Told about progress.

    Returns:
        The summary: `steps`, and the mean loss a token of rows to forget, to keep and unseen: under the public model
        that training started from, before, and after.

    Raises:
        InputError: If a folder, file or option does not fit.
        DataError: If nobody of the file has rows in the table, or there is nothing to forget: training has made their
            rows no likelier than rows that it never saw.
        PrivacyError: If the run has a claim.
        StorageError: If the folder cannot be written.
    """
    options = options or UnlearnOptions()
    _check(options)
    opened = run_of(run)
    if opened is None:
        raise InputError(f"{run} is not the folder of a run of `veiltune train`")
    source, config = opened
    _check_run(config, Path(output))
    tables = _learnt(source, config)
    named = _named(persons)
    base = fine_tuned(source, config)
    rows = _encoded(config, tables, named, base, _key(source, config))
    public = load_base(config.model.name).model
    public.to(dtype=torch.float32)  # type: ignore[call-arg]  # transformers wraps `to`
    found = _Forgetting(base.model, public, rows, options, collate_with=base.tokenizer, reporter=reporter).run()
    target = RunFolder.create(output, config=dump_toml(config.model_copy(update={"run": str(output)})))
    with storage_errors(target.path):
        save_adapter(base.model, target.path / "adapter")
        atomic_write_bytes(target.private / "forgotten.txt", ("\n".join(sorted(named)) + "\n").encode(), mode=0o600)
        target.write_json("privacy.json", {**source.read_json("privacy.json"), "unlearning": _STATEMENT})
        target.write_json("summary.json", source.read_json("summary.json") | {"unlearning": {**vars(options), **found}})
    return found


_STATEMENT = (
    "The rows of some persons were made less likely afterwards. Nothing is proven about them, and others' rows may have"
    " become likelier: audit both."
)


class _Forgetting:
    """The loop."""

    def __init__(
        self,
        model: nn.Module,
        public: nn.Module,
        rows: _Rows,
        options: UnlearnOptions,
        *,
        collate_with: Any,
        reporter: TrainReporter | None,
    ) -> None:
        self._model, self._public, self._rows, self._options = model, public, rows, options
        self._reporter = reporter or TrainReporter()
        pad = collate_with.pad_token_id if collate_with.pad_token_id is not None else collate_with.eos_token_id
        self._collate = partial(collate, pad_id=int(pad))

    def run(self) -> dict[str, Any]:
        options, parameters = self._options, list(trainable_parameters(self._model).values())
        self._model.eval()  # no dropout: the same model before and after
        public, before = self._means(self._public.eval()), self._means(self._model)
        if _excess(before, public) <= 0:
            raise DataError(
                "there is nothing to forget: training has made the rows of these persons no likelier than rows that it"
                " never saw; nothing was written"
            )
        reference = self._log_probs_of_all() if options.method == "npo" else None
        optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
        forget, keep = (
            _batches(len(rows), options.batch_size, random.Random(f"{name} {options.seed}"))
            for name, rows in (("forget", self._rows.forget), ("keep", self._rows.keep))
        )
        self._reporter.phase("unlearn", options.steps)
        steps, means = 0, before
        while steps < options.steps and _excess(means, public) > 0:
            self._step(optimizer, next(forget), next(keep), reference)
            steps += 1
            self._reporter.advance(1)
            if steps % 5 == 0 or steps == options.steps:
                means = self._means(self._model)
        return {
            "steps": steps,
            "rows": len(self._rows.forget),
            "no_likelier_than_unseen": _excess(means, public) <= 0,
            "loss_public": public,
            "loss_before": before,
            "loss_after": means,
        }

    def _step(
        self, optimizer: torch.optim.Optimizer, forget: list[int], keep: list[int], reference: Tensor | None
    ) -> None:
        options = self._options
        told = self._log_probs([self._rows.forget[row] for row in forget])
        loss = forgetting_losses(
            told,
            method=options.method,
            reference=None if reference is None else reference[forget],
            beta=options.beta,
        ).mean()
        kept = causal_lm_losses(self._model, self._collate([self._rows.keep[row] for row in keep])).mean()
        (loss + options.keep_weight * kept).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def _log_probs(self, rows: Sequence[Encoded]) -> Tensor:
        """(B,) log-probability of each row's tokens with loss; for "ascent" their mean, as it was published."""
        batch = self._collate(rows)
        counts = (batch["labels"][:, 1:] != IGNORED).sum(1)
        return -causal_lm_losses(self._model, batch) * (counts if self._options.method == "npo" else 1)

    @torch.no_grad()
    def _log_probs_of_all(self) -> Tensor:
        rows, size = self._rows.forget, self._options.batch_size
        return torch.cat([self._log_probs(rows[at : at + size]) for at in range(0, len(rows), size)])

    @torch.no_grad()
    def _means(self, model: nn.Module) -> dict[str, float]:
        """Mean loss a token; of the rows to keep and the unseen ones as many as there are to forget, at least 64."""
        most = max(64, len(self._rows.forget))
        return {name: self._mean(model, rows[:most]) for name, rows in vars(self._rows).items()}

    def _mean(self, model: nn.Module, rows: Sequence[Encoded]) -> float:
        size = self._options.batch_size
        losses = [causal_lm_losses(model, self._collate(rows[at : at + size])) for at in range(0, len(rows), size)]
        return float(torch.cat(losses).mean())


def _excess(means: dict[str, float], public: dict[str, float]) -> float:
    """How much more training has gained on the rows to forget than on rows that it never saw, nats a token.

    Each is compared with itself under the public model, since rows differ in how hard they are.
    """
    return (public["forget"] - means["forget"]) - (public["unseen"] - means["unseen"])


def _check(options: UnlearnOptions) -> None:
    if options.method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {options.method!r}")
    positive_int(steps=options.steps)
    positive_int(batch_size=options.batch_size)
    if not (options.learning_rate > 0 and options.keep_weight >= 0):
        raise InputError("learning_rate must be above 0 and keep_weight at least 0")


def _check_run(config: TrainConfig, output: Path) -> None:
    if config.model.task != "generation":
        raise InputError("only a language model can be made to forget texts; the run learns classes")
    if not config.privacy.disabled:
        raise PrivacyError(
            "the run has a claim of privacy, which training on without noise would end; its guarantee covers every"
            f" {'person' if config.data.person_column else 'example'} already"
        )
    if not config.data.person_column:
        raise InputError("the run's table names no persons (data.person_column), so nobody's rows can be told")
    if output.exists():
        raise InputError(f"{output} exists; name a new folder")


def _learnt(run: RunFolder, config: TrainConfig) -> TrainingTables:
    """The rows as the run learnt them, after its data stage."""
    defences = config.settled_defences()
    if defences.scrub != "off" and not (run.path / "private" / "data" / "scrubbed" / "scrub.json").exists():
        raise InputError(f"{run.path} has lost private/data, the rows as it learnt them; train it again")
    tables = thin_out(read_training_tables(config), defences, private=False).tables
    rows, _ = scrubbed(tables.train, defences, run.private / "data", private=False)
    return replace(tables, train=rows)


def _key(run: RunFolder, config: TrainConfig) -> bytes:
    """From which the gaps of the rows derive; nothing else here does."""
    if not config.defences.goldfish:
        return b""
    if not (run.private / "key").exists():
        raise InputError(f"{run.path} has lost private/key, which says where its goldfish gaps were; train it again")
    return run_key(run, config.noise_seed)


def _named(path: Path) -> set[str]:
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path} must be a text file with a person on each line") from None
    if not names:
        raise DataError(f"{path} names nobody; write a person on each line")
    return names


def _encoded(config: TrainConfig, tables: TrainingTables, named: set[str], base: BaseModel, key: bytes) -> _Rows:
    """Rows with the loss that they were trained with: to keep a row must not teach what its defences kept out."""
    train, data = tables.train, config.data
    assert isinstance(train, Prompted)
    assert train.persons is not None
    if missing := len(named - set(train.persons)):
        raise DataError(f"{missing} of {len(named)} named persons have no rows in {data.train}; correct the file")

    length = min(data.max_length, longest_sequence(base.model.config))
    whole = encoded_training_rows(config, base, tables, key=key).examples
    forget = [row for row, person in zip(whole, train.persons, strict=True) if person in named]
    keep = [row for row, person in zip(whole, train.persons, strict=True) if person not in named]
    if not keep:
        raise DataError("every row is to be forgotten; start from the base model instead")
    assert isinstance(tables.eval, Prompted)
    unseen = encode_prompted(
        base.tokenizer, tables.eval, max_length=length, loss_on=data.loss_on, separator=data.separator
    )
    return _Rows(forget, keep, unseen.examples)


def _batches(count: int, size: int, rng: random.Random) -> Iterator[list[int]]:
    while True:
        order = rng.sample(range(count), count)
        yield from (order[at : at + size] for at in range(0, count, size))
