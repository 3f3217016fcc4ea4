"""Large blocks of memory that the micro-batches of a sum use again and again instead of making them anew."""

from __future__ import annotations

import torch
from torch import Tensor

# glibc serves blocks up to 32 MiB from a heap, where an aligned block that was freed is too small for its successor as
# soon as anything was carved next to it: each micro-batch would take another one. Above, a block is mapped and given
# back whole. What is not touched takes no memory.
_MAPPED_BYTES = 2**25 + 2**16


def block(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) of uninitialised memory, of the dtype and device of another tensor."""
    return _flat(rows * columns, like)[: rows * columns].view(rows, columns)


class Scratch:
    """One block that each micro-batch of a sum takes in turn, and weights of lower precision, which it leaves alone."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._converted: dict[tuple[int, torch.dtype], Tensor] = {}

    def converted(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in another dtype, the same each time: no weight changes while a sum is taken."""
        key = id(weight), dtype
        if key not in self._converted:
            self._converted[key] = weight.detach().to(dtype)
        return self._converted[key]

    def block(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """As `block`; what was taken before is overwritten."""
        size, whole = rows * columns, self._whole
        if whole is None or whole.numel() < size or (whole.dtype, whole.device) != (like.dtype, like.device):
            self._whole = whole = None  # let go before the larger one is made
            self._whole = whole = _flat(size, like)
        return whole[:size].view(rows, columns)


def _flat(size: int, like: Tensor) -> Tensor:
    spare = _MAPPED_BYTES // like.element_size() if like.device.type == "cpu" else 0
    return torch.empty(max(size, spare), dtype=like.dtype, device=like.device)
