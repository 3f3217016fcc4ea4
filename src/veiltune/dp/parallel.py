"""Several processes, one step: each takes a share of the logical batch, and the noise is drawn once.

Under torchrun every process derives the same draw and the same noise from one key. Sums are added up across processes
before the noise, which each process then adds to its own copy: the same numbers, so the weights stay equal, and the
step's noise is that of one process. Without `torch.distributed` everything here does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from veiltune.dp.clipping import ClippedSum
from veiltune.dp.sampling import Units
from veiltune.errors import InputError

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # the others wait while the first process evaluates


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Joins the other processes that torchrun started, each with a GPU of its own on "cuda"; alone, does nothing.

    Raises:
        InputError: If the device is one GPU of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device not in ("cpu", "cuda"):
        raise InputError(
            f"train.device must be 'cpu' or 'cuda' under torchrun, which gives each its own, got {device!r}"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tell(order: object) -> None:
    """Says something to all other processes, which wait for it in `told`; to be called by the first."""
    if world()[1] > 1:
        dist.broadcast_object_list([order], src=0)


def told() -> Any:
    """What the first process says next."""
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def same_everywhere(secret: bytes) -> bytes:
    """The first process's bytes, in every process."""
    if world()[1] == 1:
        return secret
    box = [secret]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def check_alike(model: nn.Module, examples: Sequence[Any], units: Units) -> None:
    """Refuses processes that hold different weights, tables or units.

    Gradients of different weights do not add up to a step, and with tables in another order one example could be drawn
    in two processes at once and count twice.

    Raises:
        InputError: In every process, if the weights, the examples, their order or whose they are differ between any
            two.
    """
    if world()[1] == 1:
        return
    weights = _digest_of(model)
    digest = hashlib.blake2b(json.dumps([rows.tolist() for rows in units.all_records()]).encode())
    for index in range(len(examples)):
        digest.update(json.dumps(examples[index], default=plain, sort_keys=True).encode() + b"\n")
    table = digest.hexdigest()
    seen = [("", "")] * world()[1]
    dist.all_gather_object(seen, (weights, table))
    if len(set(seen)) > 1:
        what = "examples" if len({weights for weights, _ in seen}) == 1 else "weights"
        raise InputError(
            f"the processes hold different {what}; load the same model and table, in the same order, in each"
        )


def _digest_of(model: nn.Module) -> str:
    digest = hashlib.blake2b()
    for values in model.parameters():
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """What JSON cannot hold, with all its content: a repr may leave some out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def own_share(parts: Sequence[T]) -> Sequence[T]:
    """Every n-th part; sorted by size, they come out alike."""
    rank, processes = world()
    return parts[rank::processes]


def summed(total: ClippedSum) -> ClippedSum:
    """The sum over all processes; norms and losses are put one after the other."""
    if world()[1] == 1:
        return total
    for tensor in total.grads.values():
        dist.all_reduce(tensor)
    gathered: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = [None] * world()[1]  # type: ignore[list-item]
    dist.all_gather_object(gathered, (total.norms.cpu(), total.losses.cpu(), total.clipped.cpu(), total.non_finite))
    return replace(
        total,
        norms=torch.cat([norms for norms, _, _, _ in gathered]),
        losses=torch.cat([losses for _, losses, _, _ in gathered]),
        clipped=torch.cat([clipped for _, _, clipped, _ in gathered]),
        non_finite=sum(count for *_, count in gathered),
    )
