"""Frames: what goes in comes out, and every malformed frame is refused before a value is used."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veiltune.errors import ProtocolError
from veiltune.wire import veiltune_pb2 as pb
from veiltune.wire.codec import (
    WIRE_DTYPES,
    check_lengths,
    decode_tensor,
    encode_raw,
    encode_tensor,
    pad_ragged,
    to_wire,
    unpad,
)


def slow_decode(message: pb.Tensor) -> list[float]:
    """The obviously correct twin for float32: one struct at a time."""
    import struct

    return [struct.unpack("<f", message.data[i : i + 4])[0] for i in range(0, len(message.data), 4)]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_float32_round_trip_is_exact_and_agrees_with_struct(values: list[float]) -> None:
    message = encode_tensor(torch.tensor([values]))
    assert decode_tensor(message, expected=(1, len(values))).tolist() == [values]
    assert slow_decode(message) == values


@pytest.mark.parametrize(("dtype", "relative"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 1 / 127)])
def test_rounding_of_each_wire_dtype_is_bounded(dtype: str, relative: float) -> None:
    values = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    message = encode_tensor(values, WIRE_DTYPES[dtype])
    error = (decode_tensor(message, expected=(None, 16)) - values).abs()
    assert bool((error <= relative * values.abs().amax(dim=-1, keepdim=True) + 1e-12).all())


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_what_was_rounded_once_is_sent_again_as_the_same_bytes(dtype: str) -> None:
    rounded = to_wire(torch.randn(7, 8), WIRE_DTYPES[dtype])
    assert encode_raw(*rounded).SerializeToString() == encode_raw(*rounded).SerializeToString()
    assert encode_raw(*rounded) == encode_tensor(
        decode_tensor(encode_raw(*rounded), expected=(7, 8)), WIRE_DTYPES[dtype]
    )


def test_bf16_costs_two_bytes_a_value() -> None:
    assert len(encode_tensor(torch.zeros(10, 384), pb.DTYPE_BFLOAT16).data) == 10 * 384 * 2


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (pb.Tensor(dtype=9, shape=[1, 2], data=bytes(8)), "dtype 9 is not allowed"),
        (pb.Tensor(shape=[1, 2], data=bytes(8)), "dtype 0 is not allowed"),
        (pb.Tensor(dtype=1, shape=[1] * 100, data=bytes(4)), "1 to 3 dimensions, got 100"),
        (pb.Tensor(dtype=1, shape=[], data=b""), "1 to 3 dimensions, got 0"),
        (pb.Tensor(dtype=1, shape=[1, 3], data=bytes(12)), r"must be \['any', 2\], got \[1, 3\]"),
        (pb.Tensor(dtype=1, shape=[1, 2], data=bytes(7)), "needs 8 bytes, got 7"),
        (pb.Tensor(dtype=1, shape=[2**31, 2], data=bytes(8)), "bytes, got 8"),
        (pb.Tensor(dtype=3, shape=[1, 2], data=bytes(2)), "4 bytes of scales, got 0"),
        (pb.Tensor(dtype=1, shape=[1, 2], data=bytes(8), scales=bytes(4)), "0 bytes of scales, got 4"),
        (encode_tensor(torch.tensor([[math.nan, 0.0]])), "NaN or infinity"),
        (encode_tensor(torch.tensor([[math.inf, 0.0]])), "NaN or infinity"),
        (encode_tensor(torch.tensor([[30.0, 40.0]])), "norm 50, above the agreed bound 49"),
    ],
)
def test_a_malformed_tensor_is_refused_with_its_cause(message: pb.Tensor, cause: str) -> None:
    with pytest.raises(ProtocolError, match=cause):
        decode_tensor(message, expected=(None, 2), norm_bound=49.0)


def test_a_vector_at_the_norm_bound_is_accepted() -> None:
    message = encode_tensor(torch.tensor([[30.0, 40.0]]))
    assert decode_tensor(message, expected=(None, 2), norm_bound=50.0).shape == (1, 2)


@pytest.mark.parametrize(
    ("lengths", "cause"),
    [
        ([], "at least one example"),
        ([0, 4], r"in \[1, 5\]"),
        ([6], r"in \[1, 5\]"),
        ([1, 2], "add up to 3 tokens, the tensor has 4"),
    ],
)
def test_lengths_must_fit_the_tensor(lengths: list[int], cause: str) -> None:
    message = pb.Ragged(values=encode_tensor(torch.zeros(4, 2)), lengths=lengths)
    with pytest.raises(ProtocolError, match=cause):
        check_lengths(message, max_tokens=5)


def test_padding_and_unpadding_are_inverse() -> None:
    values = torch.arange(12.0).reshape(6, 2)
    padded, mask = pad_ragged(values, [1, 3, 2])
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert torch.equal(unpad(padded, mask), values)


def test_no_message_has_a_field_for_text_token_ids_or_labels() -> None:
    forbidden = ("text", "token_id", "input_id", "label")
    allowed = {"num_labels"}
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            assert field.name in allowed or not any(word in field.name for word in forbidden), field.full_name
