"""Tensors to frames and back: raw little-endian bytes, every field checked before a value is used.

Nothing is ever unpickled. A frame that breaks a rule raises `ProtocolError` with a one-line cause and has changed
nothing. Shapes: N tokens of all examples of a frame, H hidden size, B examples, T longest example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from veiltune.errors import ProtocolError
from veiltune.wire import veiltune_pb2 as pb

PROTOCOL = 1
MAX_DIMENSIONS = 3
MAX_FRAME_BYTES = 64 * 2**20
MAX_PADDED_TOKENS = 2**16  # of the examples of one call, each counted as long as the longest
WIRE_DTYPES = {
    "fp32": pb.DTYPE_FLOAT32,
    "bf16": pb.DTYPE_BFLOAT16,
    "int8": pb.DTYPE_INT8_PER_TOKEN,
}
_ITEM_BYTES = {pb.DTYPE_FLOAT32: 4, pb.DTYPE_BFLOAT16: 2, pb.DTYPE_INT8_PER_TOKEN: 1}
_TORCH_DTYPES = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_INT8_PER_TOKEN: torch.int8,
}


class NotFiniteError(ProtocolError):
    """A tensor with NaN or infinity."""


def encode_tensor(tensor: Tensor, dtype: pb.DType = pb.DTYPE_FLOAT32) -> pb.Tensor:
    """Packs a tensor of at most three dimensions.

    Args:
        tensor: Any float tensor; detached and moved to the CPU.
        dtype: bf16 rounds to nearest; int8 scales each row (last axis) by its largest magnitude / 127.

    Returns:
        The message; `decode_tensor` gives the tensor back up to that rounding.
    """
    return encode_raw(*to_wire(tensor, dtype))


def token_bytes(hidden_size: int, dtype: pb.DType) -> int:
    """Bytes that a token's vector takes on the wire."""
    return hidden_size * _ITEM_BYTES[dtype] + (4 if dtype == pb.DTYPE_INT8_PER_TOKEN else 0)


def to_wire(tensor: Tensor, dtype: pb.DType) -> tuple[Tensor, Tensor | None]:
    """Rounds to the wire's dtype: (values, one scale a row for int8 or None). Kept, it can be sent again unchanged."""
    values = tensor.detach().to("cpu")
    if dtype == pb.DTYPE_INT8_PER_TOKEN:
        return quantize_rows(values)
    return values.to(_TORCH_DTYPES[dtype]), None


def encode_raw(values: Tensor, scales: Tensor | None) -> pb.Tensor:
    """Packs what `to_wire` gave: the same tensors give the same bytes."""
    dtype = next(wire for wire, kind in _TORCH_DTYPES.items() if kind == values.dtype)
    message = pb.Tensor(dtype=dtype, shape=list(values.shape), data=_raw_bytes(values))
    if scales is not None:
        message.scales = _raw_bytes(scales)
    return message


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scales each row to [-127, 127] and rounds: (..., H) floats -> int8 values, float32 scale a row.

    >>> quantize_rows(torch.tensor([[1.0, -2.0, 0.5]]))[0]
    tensor([[  64, -127,   32]], dtype=torch.int8)
    """
    scales = values.float().abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
    return (values.float() / scales.unsqueeze(-1)).round().to(torch.int8), scales


def decode_tensor(message: pb.Tensor, *, expected: Sequence[int | None], norm_bound: float | None = None) -> Tensor:
    """Unpacks a tensor after checking dtype, shape, byte count, finiteness and norm.

    Args:
        message: As it came off the wire.
        expected: The shape that the job declared, None where any size will do.
        norm_bound: Largest L2 norm of a vector along the last axis; None for no bound.

    Returns:
        float32 of the shape that came.

    Raises:
        ProtocolError: On any mismatch, naming what was expected and what came.
    """
    raw, scales = decode_raw(message, expected=expected)
    values = raw.float() if scales is None else raw.float() * scales.unsqueeze(-1)
    check_values(values, norm_bound=norm_bound)
    return values


def decode_raw(message: pb.Tensor, *, expected: Sequence[int | None]) -> tuple[Tensor, Tensor | None]:
    """Like `decode_tensor` but keeps the wire's dtype: (values, scale a row or None). Values are not checked yet."""
    shape = _checked_shape(message, expected)
    dtype = _TORCH_DTYPES[message.dtype]
    if not message.data:
        return torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1]) if dtype == torch.int8 else None
    values = torch.frombuffer(bytearray(message.data), dtype=dtype).reshape(shape)
    if dtype != torch.int8:
        return values, None
    return values, torch.frombuffer(bytearray(message.scales), dtype=torch.float32).reshape(shape[:-1])


def check_values(values: Tensor, *, norm_bound: float | None) -> None:
    """Refuses NaN, infinity and vectors (last axis) longer than the bound."""
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError("tensor holds NaN or infinity; only finite values are accepted")
    if norm_bound is not None and values.numel():
        largest = float(values.norm(dim=-1).max())
        if largest > norm_bound:
            raise ProtocolError(f"a vector has norm {largest:.4g}, above the agreed bound {norm_bound:.4g}")


def check_lengths(message: pb.Ragged, *, max_tokens: int) -> list[int]:
    """The example lengths of a ragged frame, each in [1, max_tokens] and adding up to the rows that came."""
    lengths = list(message.lengths)
    if not lengths:
        raise ProtocolError("a ragged frame needs at least one example, got none")
    if min(lengths) < 1 or max(lengths) > max_tokens:
        raise ProtocolError(f"example lengths must be in [1, {max_tokens}], got {min(lengths)} to {max(lengths)}")
    rows = message.values.shape[0] if message.values.shape else 0
    if sum(lengths) != rows:
        raise ProtocolError(f"lengths add up to {sum(lengths)} tokens, the tensor has {rows}")
    return lengths


def check_padded(lengths: Sequence[int]) -> None:
    """Refuses examples that would take more than `MAX_PADDED_TOKENS` when padded to the longest of them."""
    padded = len(lengths) * max(lengths)
    if padded > MAX_PADDED_TOKENS:
        raise ProtocolError(
            f"{len(lengths)} examples padded to {max(lengths)} tokens are {padded} tokens, "
            f"a call may have {MAX_PADDED_TOKENS}; send it in more micro-batches"
        )


def pad_ragged(values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(N, H) and B lengths -> (B, T, H) padded on the right with zeros, and the (B, T) attention mask.

    Raises:
        ProtocolError: If that is more than `MAX_PADDED_TOKENS`.
    """
    check_padded(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(list(values.split(list(lengths))), batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(list(lengths)).unsqueeze(1)
    return padded, mask.long()


def unpad(padded: Tensor, mask: Tensor) -> Tensor:
    """(B, T, H) and its (B, T) mask -> (N, H): the inverse of `pad_ragged`."""
    return padded[mask.bool()]


def _raw_bytes(values: Tensor) -> bytes:
    contiguous = values.contiguous()
    if contiguous.dtype == torch.bfloat16:
        contiguous = contiguous.view(torch.int16)
    array: np.ndarray = contiguous.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _checked_shape(message: pb.Tensor, expected: Sequence[int | None]) -> list[int]:
    shape = list(message.shape)
    if message.dtype not in _ITEM_BYTES:
        raise ProtocolError(f"tensor dtype {message.dtype} is not allowed; expected one of fp32, bf16, int8")
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise ProtocolError(f"a tensor must have 1 to {MAX_DIMENSIONS} dimensions, got {len(shape)}")
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        wanted = ["any" if e is None else e for e in expected]
        raise ProtocolError(f"tensor shape must be {wanted}, got {shape}")
    items = math.prod(shape)
    if len(message.data) != items * _ITEM_BYTES[message.dtype]:
        raise ProtocolError(
            f"a tensor of shape {shape} needs {items * _ITEM_BYTES[message.dtype]} bytes, got {len(message.data)}"
        )
    scales = 4 * math.prod(shape[:-1]) if message.dtype == pb.DTYPE_INT8_PER_TOKEN else 0
    if len(message.scales) != scales:
        raise ProtocolError(f"a tensor of shape {shape} needs {scales} bytes of scales, got {len(message.scales)}")
    return shape
