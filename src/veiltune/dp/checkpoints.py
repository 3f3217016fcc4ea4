"""The checkpoints of a run of private training.

Sampling and noise of a step are functions of (key, step), so a checkpoint needs no state of a generator, and the
accountant's state is the number of steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from veiltune.errors import InputError
from veiltune.runs import RunFolder, atomic_write_bytes

KEPT_CHECKPOINTS = 2


class Checkpoints:
    """The checkpoints of a run, by steps done.

    Args:
        run: The run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self._folder = run.private / "checkpoints"
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def steps(self) -> list[int]:
        """Steps that can be resumed from, ascending."""
        return sorted(int(path.stem) for path in self._folder.glob("*.safetensors"))

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Writes a checkpoint whole or not at all, then drops all but the last ones.

        Raises:
            StorageError: If it cannot be written; the earlier ones are intact.
        """
        content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
        atomic_write_bytes(self._path(step), content, mode=0o600)
        for old in self.steps()[:-KEPT_CHECKPOINTS]:
            with contextlib.suppress(FileNotFoundError):
                self._path(old).unlink()

    def load(self, step: int, *, device: str) -> dict[str, Tensor]:
        """Reads a checkpoint onto a device.

        Raises:
            InputError: If it is damaged.
        """
        try:
            return safetensors.torch.load_file(self._path(step), device=device)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self._path(step)} cannot be read ({type(error).__name__}); delete it to go on from an earlier one"
            ) from None

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:08d}.safetensors"


def forget_after(run: RunFolder, step: int) -> list[dict[str, Any]]:
    """Drops the lines of metrics.jsonl that are beyond a step, which will be done again; returns the rest."""
    lines = run.metrics()
    kept = [line for line in lines if line["step"] <= step]
    if len(kept) < len(lines):
        whole = run.metrics_path.read_bytes().split(b"\n")[: len(kept)]
        atomic_write_bytes(run.metrics_path, b"".join(line + b"\n" for line in whole))
    return kept
