"""Matrix products in bfloat16, where that is faster."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

_THREAD = threading.local()  # .wide: whether attention is in float32


@contextmanager
def bf16_products(device_type: str, *, enabled: bool = True) -> Iterator[None]:
    """Autocast to bfloat16 with `float32_attention`, for a forward pass.

    Args:
        device_type: Where the model computes: "cpu", "cuda".
        enabled: False changes nothing.
    """
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled), float32_attention(device_type, enabled):
        yield


@contextmanager
def float32_attention(device_type: str, enabled: bool) -> Iterator[None]:
    """Keeps transformers' attention on a CPU out of autocast; held over the backward pass if that computes it again.

    torch 2.13's bfloat16 attention for CPUs is slower than its float32 one below some 500 tokens: forward and backward
    six times at 14 tokens, twice at 128 (docs/log.md). From the first use on, transformers' "sdpa" looks at a flag of
    its thread, and is what it was where the flag is not set.
    """
    _watch_attention()
    before = getattr(_THREAD, "wide", False)
    _THREAD.wide = enabled and device_type == "cpu"
    try:
        yield
    finally:
        _THREAD.wide = before


@functools.cache
def _watch_attention() -> None:
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    @functools.wraps(original)
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if not getattr(_THREAD, "wide", False):
            return original(module, query, key, value, mask, **options)
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        with torch.autocast("cpu", enabled=False):
            return original(module, query.float(), key.float(), value.float(), mask, **options)

    AttentionInterface.register("sdpa", attention)
