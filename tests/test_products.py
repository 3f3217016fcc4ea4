"""Products of factors: exact on bfloat16 entries, in float32, and a margin that covers what rounding takes away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from veiltune.dp import products
from veiltune.dp.products import ROUNDING, add_product, add_rounded_products, gram, norms
from veiltune.dp.record import Outer, Record

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factor(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal entries."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def narrow_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs, the last of them a partial one."""
    monkeypatch.setattr(products, "_SLAB", 7)


@pytest.mark.parametrize("one", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_grams_and_sums_equal_those_in_float64(one: torch.dtype, other: torch.dtype) -> None:
    """A product that was rounded to bfloat16 would be off by 4e-3."""
    left, right = factor(3, 5, 40, dtype=one, seed=0), factor(3, 6, 40, dtype=other, seed=1)
    torch.testing.assert_close(
        gram(left, right).double(), left.double() @ right.double().transpose(1, 2), rtol=0, atol=2e-5
    )
    tall, wide = factor(20, 9, dtype=one, seed=2), factor(20, 33, dtype=other, seed=3)
    for first, second in ((tall, wide), (wide, tall)):
        total = torch.ones(first.shape[1], second.shape[1])
        add_product(total, first, second)
        torch.testing.assert_close(total.double(), 1 + first.double().t() @ second.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_with_itself_and_its_norms(dtype: torch.dtype) -> None:
    """The diagonal of a Gram matrix holds the squared norms."""
    values = factor(2, 5, 40, dtype=dtype, seed=4)
    found = gram(values, values)
    torch.testing.assert_close(found, found.transpose(1, 2))
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2).sqrt(), norms(values))
    torch.testing.assert_close(norms(values).double(), values.double().norm(dim=-1))


def test_the_process_keeps_its_precision() -> None:
    """Other float32 products of the process are computed as before, after a failure too."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    values = factor(1, 4, 8, dtype=torch.bfloat16, seed=5)
    gram(values, values)
    assert settings.fp32_precision == before
    with pytest.raises(RuntimeError):
        gram(values, factor(2, 4, 8, dtype=torch.bfloat16, seed=6))
    assert settings.fp32_precision == before


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_norms_and_sums_are_exact_whatever_the_process_has_chosen(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TF32 or bfloat16 for float32 products, which some scripts choose, norms would be below what is summed."""
    settings = [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    seen: list[tuple[str, ...]] = []

    def watched(function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def call(*factors: Tensor) -> Tensor | None:
            seen.append(tuple(one.fp32_precision for one in settings))
            return function(*factors)

        return call

    for name in ("gram", "add_product"):
        monkeypatch.setattr(f"veiltune.dp.record.{name}", watched(getattr(products, name)))
    monkeypatch.setattr("veiltune.dp.record.MACHINE_BALANCE", 10**12)
    record = Record(2)
    record.add_product("weight", *(factor(2, 4, 8, dtype=dtype, seed=seed) for seed in (7, 8)))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        chosen = [one.fp32_precision for one in settings]
        record.squared_norms()
        record.add_weighted_sums({"weight": torch.ones(2)}, {"weight": torch.zeros(8, 8)})
        assert seen == [("ieee", "ieee")] * 3 and [one.fp32_precision for one in settings] == chosen
        assert "ieee" not in chosen
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("positions", [2, 4, 8, 32])
def test_norms_never_fall_short_where_positions_cancel(
    dtype: torch.dtype, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that pull in opposite ways leave little more than rounding, which the margin covers."""
    monkeypatch.undo()
    short = 0
    for seed, (outputs, inputs) in enumerate([(64, 64), (384, 1536), (64, 30000), (2000, 384)] * 4):
        left = factor(1, 1, outputs, dtype=dtype, seed=seed).repeat(1, positions, 1)
        left[:, 1::2] *= -1
        same = factor(1, 1, inputs, dtype=torch.float32, seed=100 + seed).repeat(1, positions, 1)
        right = (same * (1 + 1e-2 * factor(1, positions, inputs, dtype=torch.float32, seed=200 + seed))).to(dtype)
        exact = float(Outer(left.double(), right.double()).dense().square().sum())
        record = Record(1)
        monkeypatch.setattr("veiltune.dp.record.MACHINE_BALANCE", 10**12)
        record.add_product("weight", left, right)
        found = float(record.squared_norms()["weight"])
        bare = float((gram(left, left) * gram(right, right)).sum())
        assert exact <= found <= exact + 2e-6 * float(Outer(left, right).lengths()) ** 2
        short += bare < exact
    assert short  # without the margin some would


def doubled(units: int, positions: int, width: int, *, sign: int, seed: int) -> Tensor:
    """Half of the positions, and the same with a sign and a little more."""
    half, more = (factor(units, positions // 2, width, dtype=torch.float32, seed=seed + i) for i in range(2))
    return torch.cat([half, sign * half + 2e-2 * more], 1).bfloat16()


def products_of(left: Tensor, right: Tensor) -> Tensor:
    return left.double().transpose(1, 2) @ right.double()


@pytest.mark.parametrize("shape", [(5, 64, 40, 33), (3, 127, 700, 96), (2, 512, 96, 700)])
def test_a_units_product_is_rounded_once(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is a share of the product, though what cancels in it is large; rounded factors would miss that."""
    units, positions, outputs, inputs = shape
    monkeypatch.setattr(products, "_ENTRIES", 7 * inputs)  # seven rows at a time
    left = doubled(units, positions, outputs, sign=-1, seed=10)  # the halves of the product cancel, almost
    right = doubled(units, positions, inputs, sign=1, seed=20)
    weights = torch.rand(units, generator=torch.Generator().manual_seed(30))
    for unit in range(units):
        alone, exact = torch.zeros(outputs, inputs), products_of(left, right)[unit]
        add_rounded_products(alone, left[unit : unit + 1], right[unit : unit + 1], torch.ones(1))
        assert 0 < float((alone.double() - exact).norm()) <= ROUNDING * float(exact.norm())
        weighted = left[unit].double().t() @ (right[unit] * weights[unit]).bfloat16().double()
        assert float((weighted - exact * weights[unit]).norm()) > ROUNDING * float((exact * weights[unit]).norm())
    total = torch.ones(outputs, inputs)
    add_rounded_products(total, left, right, weights)
    expected = 1 + (products_of(left, right) * weights[:, None, None]).sum(0)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def test_norms_are_at_least_those_of_what_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two uses of a weight cancel, so that what each is rounded by is large beside both."""
    monkeypatch.setattr("veiltune.dp.record.MACHINE_BALANCE", 10**12)
    monkeypatch.setattr("veiltune.dp.record.prefers_dense", lambda **_: False)
    longer = 0
    for seed in range(0, 40, 4):
        left, right = (factor(4, 64, width, dtype=torch.bfloat16, seed=seed + i) for i, width in enumerate((24, 16)))
        record, totals = Record(4), []
        record.add_product("tied", left, right)
        record.add_product("tied", -left, (right.float() * 1.001).bfloat16())
        record.add_product("once", left, right)
        squares = record.squared_norms()
        for unit in range(4):
            sums = {name: torch.zeros(24, 16) for name in squares}
            record.add_weighted_sums(dict.fromkeys(squares, torch.eye(4)[unit]), sums)
            totals.append({name: float(sums[name].double().norm()) for name in squares})
        exact = products_of(left, right).flatten(1).norm(dim=1)
        for name, found in squares.items():
            for unit in range(4):
                assert totals[unit][name] <= float(found[unit].sqrt())
        longer += sum(totals[unit]["once"] > float(exact[unit]) for unit in range(4))
        assert torch.all(squares["once"].sqrt() <= 1.01 * exact)
    assert longer  # without the margin some would
