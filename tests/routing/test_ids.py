"""Counting and sorting ids by every way there is, against Python's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moekit.dispatch.native_library import library, sorted_ids
from moekit.routing.ids import count_ids, is_here, queue_positions, sort_ids


@st.composite
def some_ids(draw: st.DrawFn) -> tuple[list[int], int]:
    size = draw(st.sampled_from([1, 2, 8, 255, 256, 257, 2**16, 2**16 + 1]))
    return draw(st.lists(st.integers(0, size - 1), max_size=60)), size


def wanted(ids: list[int]) -> tuple[list[int], Counter[int]]:
    return sorted(range(len(ids)), key=lambda place: ids[place]), Counter(ids)


def check(order: Tensor, count: Tensor, ids: list[int], size: int) -> None:
    want_order, want_count = wanted(ids)
    assert order.dtype == count.dtype == torch.int64
    assert order.tolist() == want_order
    assert len(count) == size
    assert {e: int(count[e]) for e in count.nonzero().flatten().tolist()} == want_count


@given(some_ids())
def test_on_the_host(case: tuple[list[int], int]) -> None:
    ids, size = case
    given_R = torch.tensor(ids, dtype=torch.int64)
    assert is_here(given_R)
    check(sort_ids(given_R, size), count_ids(given_R, size), ids, size)


@given(some_ids())
def test_where_nothing_may_be_looked_at(case: tuple[list[int], int]) -> None:
    """As on a GPU, and while operations are traced."""
    ids, size = case
    given_R = torch.tensor(ids, dtype=torch.int64)
    with FlopCounterMode(display=False):
        assert not is_here(given_R)
        check(sort_ids(given_R, size), count_ids(given_R, size), ids, size)


@given(some_ids())
def test_by_the_kernel(case: tuple[list[int], int]) -> None:
    if library() is None:
        pytest.skip("no compiler")
    ids, size = case
    for given_R in (torch.tensor(ids, dtype=torch.int64), torch.tensor([ids, ids]).T.long()[:, 0]):
        found = sorted_ids(given_R, size)
        assert found is not None
        check(*found, ids, size)


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_the_kernel_refuses_other_ids(bad: int) -> None:
    if library() is None:
        pytest.skip("no compiler")
    with pytest.raises(IndexError, match="not one of 0 to 3"):
        sorted_ids(torch.tensor([0, 3, bad, 1]), 4)
    assert sorted_ids(torch.tensor([0, 3], dtype=torch.int32), 4) is None


@given(some_ids(), st.randoms(use_true_random=False))
def test_places_in_a_queue(case: tuple[list[int], int], random: object) -> None:
    ids, size = case
    order = list(range(len(ids)))
    random.shuffle(order)  # type: ignore[attr-defined]
    found = queue_positions(torch.tensor(ids).long(), torch.tensor(order).long(), size)
    before: Counter[int] = Counter()
    for place in order:
        assert int(found[place]) == before[ids[place]]
        before[ids[place]] += 1


def test_while_compiling() -> None:
    ids_R = torch.tensor([3, 0, 3, 1])
    counted = torch.compile(
        lambda ids: (sort_ids(ids, 4), count_ids(ids, 4)), backend="eager", fullgraph=True
    )
    order_R, count_E = counted(ids_R)
    check(order_R, count_E, ids_R.tolist(), 4)
