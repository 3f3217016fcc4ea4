"""The tables of a private run: read, checked, counted, and told apart from changed ones. Loads no torch."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass

from veiltune.config import TrainConfig
from veiltune.data.prompts import Prompted, read_prompted
from veiltune.data.tables import LabelSet, Table, check_labels, read_columns
from veiltune.dp.sampling import Units
from veiltune.errors import DataError


@dataclass(frozen=True, repr=False)
class Labelled:
    """Rows of a classification table; its repr shows the size only.

    >>> Labelled(["a private text"], ["spam"])
    Labelled(1 rows)

    Attributes:
        texts: One a row.
        labels: One a row, as they stand in the file.
        persons: Whose row it is; None where the unit of privacy is an example.
    """

    texts: list[str]
    labels: list[str]
    persons: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Labelled({len(self)} rows)"


@dataclass(frozen=True)
class TrainingTables:
    """What a run learns from and what it is scored on.

    Attributes:
        train: Rows to learn; with persons where a person is the unit.
        eval: Rows to score on.
        labels: The classes of a classification, as configured or those of the training table.
    """

    train: Labelled | Prompted
    eval: Labelled | Prompted
    labels: LabelSet | None = None

    def units(self) -> Units:
        """What is protected: each person where the table names persons, else each row."""
        persons = self.train.persons
        return Units.examples(len(self.train)) if persons is None else Units.persons(persons)

    def fingerprint(self, key: bytes) -> str:
        """A digest of the training rows that says nothing of them without the key."""
        rows = self.train
        columns = [rows.texts, rows.labels] if isinstance(rows, Labelled) else [rows.prompts, rows.targets]
        return hmac.new(key, json.dumps([*columns, rows.persons]).encode(), hashlib.sha256).hexdigest()


def read_training_tables(config: TrainConfig) -> TrainingTables:
    """Reads and checks both tables; persons are asked of the training table only.

    Raises:
        DataError: If a table is missing, empty or broken, a column is missing, a cell is blank, or the labels of a
            classification cannot be learnt; never shows a cell.
    """
    if config.model.task == "generation":
        return TrainingTables(_prompted(config, config.data.train, persons=True), _prompted(config, config.data.eval))
    train = _labelled(config, config.data.train, persons=True)
    evaluation = _labelled(config, config.data.eval)
    check_labels(Table(train.texts, train.labels), config.data.train)
    labels = LabelSet(tuple(config.data.classes)) if config.data.classes else LabelSet.fit(train.labels)
    for source, rows in ((config.data.train, train), (config.data.eval, evaluation)):
        try:
            labels.encode(rows.labels)
        except DataError as error:
            where = "in data.classes" if config.data.classes else "of the training table"
            raise DataError(f"{source}: {error} {where}") from None
    return TrainingTables(train, evaluation, labels)


def _labelled(config: TrainConfig, source: str, *, persons: bool = False) -> Labelled:
    data = config.data
    names = [data.text_column, data.label_column, *([data.person_column] if persons and data.person_column else [])]
    keys = ["data.text_column", "data.label_column", "data.person_column"][: len(names)]
    texts, labels, *rest = read_columns(source, names, keys=keys, format=data.format)
    return Labelled(texts, labels, rest[0] if rest else None)


def _prompted(config: TrainConfig, source: str, *, persons: bool = False) -> Prompted:
    data = config.data
    return read_prompted(
        source,
        prompt_column=data.prompt_column or None,
        target_column=data.target_column,
        person_column=(data.person_column or None) if persons else None,
        format=data.format,
    )
