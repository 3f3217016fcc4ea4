"""Attributes of persons, inferred from what was released of their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veiltune.attacks.attribute import (
    attribute_auc,
    bag_of_words_ceiling,
    infer_attribute,
    majority_guess,
    split_by_person,
)
from veiltune.attacks.intervals import share_by_group
from veiltune.attacks.ranking import roc_curve
from veiltune.attacks.result import AttackResult
from veiltune.audit.attempts import attempt
from veiltune.audit.observing import observed_views
from veiltune.audit.record import Attack, Attribute, Estimate, Rate
from veiltune.audit.scene import Scene
from veiltune.data.tables import LabelSet, read_table
from veiltune.errors import InputError

LEAST_PERSONS = 4  # two on either side: one side learns, and keeps one back to choose with
TEXTS = {"quick": 600, "standard": 3_000, "full": 20_000}
KINDS = {
    "logistic": "logistic regression on mean vectors",
    "mlp": "the published MLP head on mean vectors",
    "attention": "attention pooler",
}


def check_attribute(scene: Scene) -> None:
    """Refuses an attribute that cannot be inferred.

    Raises:
        InputError: If the table lacks a column, all texts have the same value, or there are too few persons.
    """
    options = scene.options
    if not options.attribute:
        return
    _, values, persons = _columns(scene)
    if len(set(values)) < 2:
        raise InputError(f"the attribute {options.attribute!r} has one value only; there is nothing to infer")
    if len(set(persons)) < LEAST_PERSONS:
        raise InputError(
            f"the column {options.person!r} names {len(set(persons))} persons; to learn an attribute from some and try"
            f" it on others takes at least {LEAST_PERSONS}"
        )


def attribute_attacks(scene: Scene) -> tuple[Attribute, ...]:
    """A sensitive attribute of each text's author, from releases; trained on some persons, tested on others."""
    if not scene.options.attribute:
        return ()
    known = _read(scene)
    sees = "released vectors, and the attribute of other persons' texts"
    return (
        Attribute(
            name=scene.options.attribute,
            classes=known.num_classes,
            split="person" if scene.options.person else "text",
            majority=known.rate(majority_guess(known.training_classes, len(known.truth))),
            ceiling=attempt("bag_of_words", "bag of words on the clean text", "the text itself", known.from_text),
            attacks=tuple(_from_releases(known, kind, title, sees) for kind, title in KINDS.items()),
        ),
    )


@dataclass(frozen=True)
class _Known:
    """Texts, releases and classes on both sides of the split; `truth` is only scored against."""

    num_classes: int
    seed: int
    texts: tuple[list[str], list[str]]
    releases: tuple[list[Tensor], list[Tensor]]
    persons: tuple[list[str], list[str]]
    training_classes: Tensor
    truth: Tensor

    def from_text(self) -> dict[str, Any]:
        """The yardstick."""
        return self._scored(
            bag_of_words_ceiling(
                self.texts[0],
                self.training_classes,
                self.texts[1],
                num_classes=self.num_classes,
                seed=self.seed,
                persons=self.persons[0],
            )
        )

    def from_releases(self, kind: str) -> dict[str, Any]:
        """One attack."""
        return self._scored(
            infer_attribute(
                self.releases[0],
                self.training_classes,
                self.releases[1],
                kind=kind,
                num_classes=self.num_classes,
                seed=self.seed,
                persons=self.persons[0],
            )
        )

    def rate(self, guesses: Tensor) -> Rate:
        """The share of texts that were guessed; where persons have several, with an interval that knows of it."""
        hits, persons = guesses == self.truth, self.persons[1]
        result = AttackResult(name="attribute", successes=int(hits.sum()), trials=len(hits))
        if len(set(persons)) == len(persons):
            return Rate.of(result)
        _, low, high = share_by_group(hits, persons)
        return Rate.of(result, (low, high))

    def _scored(self, scores: Tensor) -> dict[str, Any]:
        """Accuracy, and AUC and ROC of one class against the rest: the second of two, else the commonest."""
        target = 1 if self.num_classes == 2 else int(self.truth.bincount().argmax())
        found = attribute_auc(scores, self.truth, persons=self.persons[1])
        fields: dict[str, Any] = {"reported": self.rate(scores.argmax(dim=-1))}
        if target in found:
            value, low, high = found[target]
            fields["auc"] = Estimate(value=value, low=low, high=high)
            fields["roc"] = roc_curve(scores[:, target], self.truth == target, points=51)
        return fields


def _from_releases(known: _Known, kind: str, title: str, sees: str) -> Attack:
    return attempt(kind, title, sees, lambda: known.from_releases(kind))


def _read(scene: Scene) -> _Known:
    rows, values, persons = _columns(scene)
    names = LabelSet.fit(values)
    classes = torch.tensor(names.encode(values))
    test = split_by_person(persons, seed=scene.options.seed)
    releases = [torch.stack(views).mean(dim=0) for views in observed_views(scene.audited, rows)]
    texts = [scene.audited.table.texts[row] for row in rows]

    def parted(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        both = list(zip(items, test.tolist(), strict=True))
        return [item for item, held in both if not held], [item for item, held in both if held]

    return _Known(
        num_classes=len(names),
        seed=scene.options.seed,
        texts=parted(texts),
        releases=parted(releases),
        persons=parted(persons),
        training_classes=classes[~test],
        truth=classes[test],
    )


def _columns(scene: Scene) -> tuple[list[int], list[str], list[str]]:
    """Rows, their attributes and authors, for at most as many texts as the preset takes."""
    options, data = scene.options, scene.audited.config.data

    def column(name: str) -> list[str]:
        table = read_table(data.train, text_column=data.text_column, attribute_column=name, format=data.format)
        return table.attributes or []

    attributes = column(options.attribute)
    authors = column(options.person) if options.person else [str(row) for row in range(len(attributes))]
    first = {key: row for row, key in reversed(list(enumerate(scene.audited.keys)))}
    rows = sorted(first.values())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    rows = [rows[i] for i in order[: TEXTS[scene.preset.name]]]
    return rows, [attributes[row] for row in rows], [authors[row] for row in rows]
