"""How much memory a run took."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(device: str) -> int:
    """Bytes: of a CUDA device what tensors took at most; of a CPU the process's largest resident size.

    The latter is that of the whole process, libraries and data included, and of whatever it did before.

    >>> peak_memory("cpu") > 10_000_000
    True
    """
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
