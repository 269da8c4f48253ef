"""pipeline.routing: which experts a token passes, with which weights, and scores that are no numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipo.base.errors import ComputeError
from pipo.pipeline.routing import likeliest, likeliest_one, route, route_one


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("num", [1, 2, 8, 64])
def test_as_torch_routes(num: int, renormalise: bool) -> None:
    scores = np.random.default_rng(num).standard_normal((50, 64)).astype(np.float32) * 3
    weights, experts = torch.topk(torch.softmax(torch.from_numpy(scores), dim=-1), num)
    if renormalise:
        weights /= weights.sum(dim=-1, keepdim=True)
    order = experts.argsort(dim=-1)
    found = route(scores, num, renormalise=renormalise, what="a router")
    np.testing.assert_array_equal(found.experts, experts.gather(1, order).numpy())
    np.testing.assert_allclose(found.weights, weights.gather(1, order).numpy(), rtol=1e-5)
    for row, want_experts, want_weights in zip(scores, found.experts, found.weights, strict=True):
        one = route_one(row.tolist(), num, renormalise=renormalise, what="a router")
        assert one.experts == [want_experts.tolist()]
        np.testing.assert_allclose(one.weights[0], want_weights, rtol=1e-5)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=12), st.integers(1, 4))
def test_of_equal_scores_the_first(scores: list[int], num: int) -> None:
    want = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:num])
    assert likeliest_one([float(score) for score in scores], num, "x") == want
    assert likeliest(np.asarray([scores], np.float32), num, "x").tolist() == [want]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused_by_name(bad: float) -> None:
    scores = np.zeros((3, 8), np.float32)
    scores[2, 5] = bad
    with pytest.raises(ComputeError, match="the router of block 7 gave scores that are not finite for token 2"):
        route(scores, 2, renormalise=True, what="the router of block 7")
    with pytest.raises(ComputeError, match="not finite for token 0"):
        route_one(scores[2].tolist(), 2, renormalise=True, what="it")


def test_finite_scores_whose_sum_is_not_are_taken() -> None:
    scores = np.full((1, 8), 3e38, np.float32)
    assert route(scores, 2, renormalise=True, what="it").experts.tolist() == [[0, 1]]
    assert route_one([3e38] * 8, 2, renormalise=True, what="it").experts == [[0, 1]]
