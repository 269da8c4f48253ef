"""base.machine: product rates between and beyond what was measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.base.machine import ProductRate

_SECONDS = st.floats(1e-14, 1e-6)


@st.composite
def rates(draw: st.DrawFn, is_rising: bool = False) -> ProductRate:
    rows = sorted(draw(st.sets(st.integers(2, 2048), max_size=6)) | {1})
    seconds = draw(st.lists(_SECONDS, min_size=len(rows), max_size=len(rows)))
    return ProductRate(tuple(zip(rows, sorted(seconds) if is_rising else seconds, strict=True)))


@given(rates(), st.floats(1, 1e12))
def test_a_point_is_what_was_measured(rate: ProductRate, num_elements: float) -> None:
    for rows, seconds in rate.points:
        assert rate.seconds(num_elements, rows) == pytest.approx(num_elements * seconds)


@given(rates(), st.integers(1, 4000))
def test_between_two_points_it_is_a_straight_line(rate: ProductRate, num_tokens: int) -> None:
    before = [p for p in rate.points if p[0] <= num_tokens]
    after = [p for p in rate.points if p[0] > num_tokens]
    got = rate.seconds(1, num_tokens)
    if not after:
        assert got == pytest.approx(before[-1][1] * num_tokens / before[-1][0])
        return
    (rows_a, a), (rows_b, b) = before[-1], after[0]
    share = (num_tokens - rows_a) / (rows_b - rows_a)
    assert got == pytest.approx((1 - share) * a + share * b)


@given(rates(is_rising=True), st.integers(1, 4000), st.integers(1, 4000))
def test_more_rows_take_no_less_where_the_points_say_so(rate: ProductRate, some: int, others: int) -> None:
    few, many = sorted((some, others))
    assert rate.seconds(1, few) <= rate.seconds(1, many) * (1 + 1e-12)


@given(rates(), st.integers(1, 4000), st.integers(1, 10**9), st.integers(1, 10**9))
def test_elements_add_up(rate: ProductRate, num_tokens: int, some: int, others: int) -> None:
    parts = rate.seconds(some, num_tokens) + rate.seconds(others, num_tokens)
    assert rate.seconds(some + others, num_tokens) == pytest.approx(parts)


@given(st.floats(0.1, 4), st.floats(1e9, 1e13), st.floats(1e9, 1e15), st.integers(1, 10**6))
def test_a_roofline_is_exact(bytes_per_element: float, bytes_per_s: float, flops: float, num_tokens: int) -> None:
    rate = ProductRate.roofline(bytes_per_element, bytes_per_s, flops)
    wanted = max(bytes_per_element / bytes_per_s, 2 * num_tokens / flops)
    assert rate.seconds(1, num_tokens) == pytest.approx(wanted, rel=1e-6)
    assert all(map(math.isfinite, dict(rate.points).values()))
