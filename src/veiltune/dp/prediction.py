"""`veiltune predict` for a finished `veiltune train`: the classes of new texts, on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from veiltune.data.predictions import write_predictions
from veiltune.data.tables import read_table
from veiltune.dp.decoding import evaluating
from veiltune.dp.encoding import collate, encode_texts_with_labels
from veiltune.errors import InputError
from veiltune.models.families import longest_sequence
from veiltune.models.finished import fine_tuned, run_of
from veiltune.models.loading import pad_id_of


def predict_classes(
    folder: Path,
    source: str,
    output: Path,
    *,
    text_column: str | None = None,
) -> int:
    """Writes the predicted class and its probability for every text of a table.

    Args:
        folder: Of a finished run of a classifier.
        source: A table as for `veiltune train`, without labels.
        output: CSV to write, columns `prediction` and `probability`, in the order of the input. Must not exist.
        text_column: Where the texts are; the run's own column name if None.

    Returns:
        The number of predictions.

    Raises:
        InputError: If the run is not finished or not of a classifier, or `output` exists.
        DataError: If the table cannot be read.
        StorageError: If `output` cannot be written.
    """
    run = run_of(folder)
    if run is None:
        raise InputError(f"{folder} is not the folder of a finished run")
    config = run[1]
    if config.model.task != "classification":
        raise InputError(
            f"{folder} learnt to write texts, not classes; serve it (`veiltune guard serve`) or write it as a plain"
            " model (`veiltune merge`)"
        )
    if output.exists():
        raise InputError(f"{output} exists; name another file for the predictions")
    texts = read_table(source, text_column=text_column or config.data.text_column, format=config.data.format).texts
    found = fine_tuned(*run)
    max_length = min(config.data.max_length, longest_sequence(found.model.config))
    encoded = encode_texts_with_labels(found.tokenizer, texts, [0] * len(texts), max_length=max_length).examples
    order = sorted(range(len(texts)), key=lambda row: len(encoded[row].input_ids))
    size, pad = config.evaluation.batch_size, partial(collate, pad_id=pad_id_of(found))
    rows: dict[int, Tensor] = {}
    with evaluating(found.model), torch.inference_mode():
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = pad([encoded[row] for row in chosen])
            del batch["labels"]
            rows |= zip(chosen, found.model(**batch).logits.softmax(-1), strict=True)
    classes = run[0].read_json("summary.json")["labels"]
    write_predictions(output, [rows[row].tolist() for row in range(len(texts))], classes)
    return len(texts)
