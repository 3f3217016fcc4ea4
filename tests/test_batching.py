"""Batches: every example once, length-sorted, repeatable; schedules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from veiltune.customer.batching import encode_texts, epoch_batches, learning_rate_at, micro_batches, pad_ids


@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_every_example_once(lengths: list[int], batch_size: int, epoch: int) -> None:
    batches = epoch_batches(lengths, batch_size=batch_size, seed=1, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert batches == epoch_batches(lengths, batch_size=batch_size, seed=1, epoch=epoch)


def test_batches_waste_less_padding_than_random_ones_and_differ_by_epoch() -> None:
    lengths = [1 + (i * 37) % 60 for i in range(640)]
    batches = epoch_batches(lengths, batch_size=32, seed=0, epoch=0)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert batches != epoch_batches(lengths, batch_size=32, seed=0, epoch=1)


@given(st.integers(1, 50), st.integers(1, 60))
def test_micro_batches_keep_order_and_are_nearly_equal(size: int, count: int) -> None:
    parts = micro_batches(list(range(size)), count)
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_learning_rate_rises_then_falls_and_stays_in_range() -> None:
    rates = [learning_rate_at(s, total=100, warmup_fraction=0.1, peak=2.0) for s in range(100)]
    assert max(rates) == 2.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates) > 0


def test_padding_hides_lengths_in_buckets(tokenizer: PreTrainedTokenizerFast) -> None:
    exact = encode_texts(tokenizer, ["ab", "abcdef"], max_length=32)
    bucketed = encode_texts(tokenizer, ["ab", "abcdef"], max_length=32, pad_to=8)
    assert [len(ids) for ids in exact] == [4, 8]
    assert [len(ids) for ids in bucketed] == [8, 8]
    assert bucketed[0][:4] == exact[0]


@pytest.mark.parametrize("max_length", [3, 5])
def test_texts_are_cut_at_the_longest_length(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    assert [len(ids) for ids in encode_texts(tokenizer, ["abcdefgh"], max_length=max_length)] == [max_length]


def test_pad_ids_masks_exactly_the_padding() -> None:
    ids, mask = pad_ids([[5], [6, 7, 8]])
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
