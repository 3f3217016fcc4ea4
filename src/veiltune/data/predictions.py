"""The table of predictions that both ways of training write."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from veiltune.runs import atomic_write_bytes


def write_predictions(path: Path, probabilities: Sequence[Sequence[float]], labels: Sequence[str]) -> None:
    """Writes columns `prediction` and `probability`, a row a text.

    Args:
        path: CSV file; written whole or not at all.
        probabilities: Of each label, a row a text.
        labels: In the order of the columns.

    Raises:
        StorageError: If it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["prediction", "probability"])
    for row in probabilities:
        best = max(range(len(row)), key=row.__getitem__)
        writer.writerow([labels[best], f"{row[best]:.6f}"])
    atomic_write_bytes(path, text.getvalue().encode())
