"""Draws: in range, of the right distribution, reproducible by label, and secret."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from veiltune import csprng, randomness
from veiltune.errors import InputError
from veiltune.randomness import Generator, SecureGenerator, normal, uniform

KEY = bytes(range(32))
MAKERS: list[Callable[[], Generator]] = [lambda: SecureGenerator(KEY), lambda: torch.Generator().manual_seed(3)]
both_kinds = pytest.mark.parametrize("make", MAKERS, ids=["secure", "torch"])


@both_kinds
def test_uniform_draws_fill_the_half_open_interval(make: Callable[[], Generator]) -> None:
    draws = uniform((200, 500), make())
    assert draws.dtype == torch.float64
    assert draws.min() > 0 and draws.max() <= 1
    assert torch.equal(draws * 2**53, (draws * 2**53).round())  # 53 bits, none lost
    assert stats.kstest(draws.flatten(), "uniform").pvalue > 1e-3
    assert stats.kstest((draws * 2**20).flatten() % 1, "uniform").pvalue > 1e-3  # the low bits as well
    assert stats.kstest(draws.flatten() ** 1.05, "uniform").pvalue < 1e-6  # planted


@both_kinds
def test_normal_draws_are_standard_normal(make: Callable[[], Generator]) -> None:
    draws = normal((400, 251), make())
    assert draws.dtype == torch.float64 and draws.shape == (400, 251)
    flat = draws.flatten()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert stats.kstest(flat * 1.05, "norm").pvalue < 1e-6  # planted
    assert stats.kstest(flat.clamp(-2, 2), "norm").pvalue < 1e-6  # planted


@both_kinds
def test_the_two_halves_of_box_muller_are_independent(make: Callable[[], Generator]) -> None:
    halves = normal((2, randomness._BLOCK // 2), make())  # one block: what is beside each other has one radius
    for f in (torch.Tensor.abs, torch.Tensor.square, lambda x: x):
        assert abs(stats.spearmanr(*f(halves)).statistic) < 0.03
    shared_radius = torch.stack([halves[0], halves[0].flip(0)])
    shared_radius[1] = halves[0].abs() * halves[1].sign()  # planted: same size, other sign
    assert abs(stats.spearmanr(*shared_radius.abs()).statistic) > 0.5


@both_kinds
def test_many_draws_are_those_of_blocks_one_after_the_other(make: Callable[[], Generator]) -> None:
    """None is used twice: a second release under the same noise would be no release at all."""
    size, generator = randomness._BLOCK, make()
    draws = normal((3 * size + 5,), make())
    assert torch.equal(draws, torch.cat([normal((count,), generator) for count in (size, size, size, 5)]))
    assert len(draws.unique()) == len(draws)
    assert abs(stats.spearmanr(draws[:size], draws[size : 2 * size]).statistic) < 0.03


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0, 5), (3, 7)])
@both_kinds
def test_any_shape(shape: tuple[int, ...], make: Callable[[], Generator]) -> None:
    assert uniform(shape, make()).shape == shape
    assert normal(shape, make()).shape == shape


def test_first_draw_follows_from_the_published_key_stream() -> None:
    published = bytes.fromhex("76b8e0ada0f13d90")  # RFC 8439, appendix A.1, test vector 1: key 0, nonce 0, block 0
    expected = ((int.from_bytes(published, "little") >> 11) + 1) / 2**53
    assert SecureGenerator(bytes(32)).uniform((1,)).item() == expected


def test_draws_depend_on_the_key_alone() -> None:
    whole, piecewise = SecureGenerator(KEY), SecureGenerator(KEY)
    pieces = torch.cat([uniform((3,), piecewise), uniform((5,), piecewise)])
    assert torch.equal(uniform((8,), whole), pieces)
    assert not torch.equal(uniform((8,), SecureGenerator()), uniform((8,), SecureGenerator()))


def test_derived_generators_do_not_depend_on_earlier_draws() -> None:
    used = SecureGenerator(KEY)
    used.uniform((100,))
    assert torch.equal(uniform((5,), used.derive("noise", 4)), uniform((5,), SecureGenerator(KEY).derive("noise", 4)))


def test_labels_are_encoded_without_ambiguity() -> None:
    labels: list[tuple[bytes | str | int, ...]] = [
        (), ("",), ("", ""), ("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), ("1",), (b"1",), (1,), (-1,), (11,), (1, 1),
        ("c", "ab"), ("a", "b"), ("asb",), (b"a", b"b"), (b"abb",),
    ]  # fmt: skip
    draws = {SecureGenerator(KEY).derive(*label).uniform(()).item() for label in labels}
    assert len(draws) == len(labels)
    assert SecureGenerator(KEY).uniform(()).item() not in draws


def test_a_long_stream_moves_to_the_next_nonce(monkeypatch: pytest.MonkeyPatch) -> None:
    first = uniform((40,), SecureGenerator(KEY))
    monkeypatch.setattr(csprng, "_STREAM_BYTES", 80)
    rolling = SecureGenerator(KEY)
    draws = torch.cat([uniform((10,), rolling) for _ in range(4)])
    assert torch.equal(draws[:10], first[:10])
    assert len(draws.unique()) == 40
    assert not torch.isin(draws[10:], first).any()


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_short_and_long_keys_are_refused(size: int) -> None:
    with pytest.raises(InputError, match=rf"key must have 32 bytes, got {size}"):
        SecureGenerator(bytes(size))


def test_the_key_is_not_shown_and_not_copied() -> None:
    generator = SecureGenerator(KEY)
    for text in (repr(generator), str(generator), f"{generator}"):
        assert text == "SecureGenerator(key=<secret>)"
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="holds a secret"):
            copier(generator)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    before = torch.random.get_rng_state()
    draws = [normal((5,), make()) for make in MAKERS]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(torch.equal(normal((5,), make()), old) for make, old in zip(MAKERS, draws, strict=True))
