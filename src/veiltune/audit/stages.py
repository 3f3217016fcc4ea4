"""An audit in stages: what a stage found is kept, so that an interrupted audit goes on after the last one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from veiltune.runs import atomic_write_bytes, private_folder


class Stages:
    """Results of finished stages, as tensors, in a private folder.

    Args:
        folder: Made if need be.
        settings: Everything that results depend on; results of other settings are dropped.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        written = json.dumps(dict(settings), sort_keys=True).encode()
        mark = hashlib.sha256(written).hexdigest().encode()
        if (folder / "settings").exists() and (folder / "settings").read_bytes() == mark:
            return
        shutil.rmtree(folder, ignore_errors=True)
        atomic_write_bytes(private_folder(folder) / "settings", mark)

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a stage: from disk, or made and kept."""
        path = self._folder / f"{name}.safetensors"
        if not path.exists():
            made = {key: tensor.contiguous() for key, tensor in make().items()}
            atomic_write_bytes(path, save(made), mode=0o600)
        return load_file(path)
