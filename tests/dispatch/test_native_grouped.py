"""Our kernels for CPUs where experts are of any kind, and their weights in any layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from feed_forward_problems import PROBLEMS, Problem, compare, results
from torch import Tensor

from moekit.dispatch.choice import GROUPED_ELSEWHERE, Choice
from moekit.dispatch.native_grouped import NativeGrouped
from moekit.dispatch.native_library import library
from moekit.experts.groups import RowGroups

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler here")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Experts without rows, with a few rows, with all counts up to where strips begin, and with many.
LARGER = {
    "few rows": Problem(tokens=25, experts=12, k=3, width=70, hidden=53, bias=True),
    "every small count": Problem(tokens=90, experts=24, k=2, width=130, hidden=35, seed=1),
    "many rows": Problem(tokens=700, experts=3, k=2, width=101, hidden=64, gated=False, seed=2),
    "wide rows": Problem(tokens=9, experts=6, k=1, width=1030, hidden=515, seed=3),
    "one element": Problem(tokens=5, experts=2, k=1, width=1, hidden=1, gated=False, seed=4),
}
EVERY = {**PROBLEMS, **LARGER}
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@EVERY_DTYPE
@pytest.mark.parametrize("transposed", [False, True], ids=["as_it_is", "transposed"])
@pytest.mark.parametrize("name", EVERY)
def test_results(name: str, transposed: bool, dtype: torch.dtype) -> None:
    problem = replace(EVERY[name], transposed=transposed)
    compare(problem, dtype, "cpu", NativeGrouped(), TOLERANCE[dtype])


@EVERY_DTYPE
@pytest.mark.parametrize("transposed", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(
    transposed: bool, dtype: torch.dtype
) -> None:
    threads, found = torch.get_num_threads(), []
    problem = Problem(tokens=300, experts=9, k=2, width=256, hidden=200, transposed=transposed)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(problem, dtype, "cpu", NativeGrouped()))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_in_memory_that_is_zero_already(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moekit.dispatch.native_library.FRESH", 0)
    problem = Problem(tokens=3, experts=40, transposed=transposed)
    compare(problem, torch.float32, "cpu", NativeGrouped(), 1e-5)


def test_gradients_lie_as_their_weights_do() -> None:
    """Else autograd would copy them."""
    groups = RowGroups(torch.tensor([3, 0, 4]))
    grad_RO, rows_RI = torch.randn(7, 6), torch.randn(7, 5)
    for weight_EOI in (torch.randn(3, 6, 5), torch.randn(3, 5, 6).mT):
        given = NativeGrouped().weight_gradient(groups, grad_RO, rows_RI, weight_EOI)
        assert given.stride() == weight_EOI.stride()
        torch.testing.assert_close(given, groups.weight_gradient(grad_RO, rows_RI))


def layouts() -> dict[str, Tensor]:
    """The same weights (3, 6, 5) in several places."""
    weight_EOI = torch.randn(3, 6, 5)
    wide = torch.zeros(3, 8, 9)
    wide[:, :6, :5] = weight_EOI
    return {
        "plain": weight_EOI,
        "slice": wide[:, :6, :5],
        "slice, transposed": wide.mT.contiguous()[:, :5, :6].mT,
        "experts in between": weight_EOI.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("name", layouts())
def test_weights_in_any_layout(name: str) -> None:
    torch.manual_seed(0)
    groups, rows_RI, weight_EOI = RowGroups(torch.tensor([3, 0, 4])), torch.randn(7, 5), layouts()
    given = NativeGrouped().product(groups, rows_RI, weight_EOI[name])
    torch.testing.assert_close(given, groups.product(rows_RI, weight_EOI["plain"]))


def test_weights_with_gaps_both_ways_run_another_way() -> None:
    x_ND, weight_NK, bank = Problem().inputs(torch.float32, "cpu")
    apart_EJD = torch.zeros(*bank.up_EJD.shape, 2)[..., 0]
    plan = Problem().plan(Problem().experts_NK(), weight_NK)
    for name in ("native", "auto"):
        found = Choice(name).backend(x_ND, plan, bank._replace(up_EJD=apart_EJD))  # type: ignore[arg-type]
        assert found is not None
        assert found.name in ("streamed", "grouped_mm")


def chosen(problem: Problem, dtype: torch.dtype, name: str = "auto") -> str:
    x_ND, weight_NK, bank = problem.inputs(dtype, "cpu")
    plan = problem.plan(problem.experts_NK(), weight_NK)
    found = Choice(name).backend(x_ND, plan, bank)  # type: ignore[arg-type]
    assert found is not None
    return found.name


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("kind", [{"gated": False}, {"transposed": True}], ids=str)
def test_what_is_chosen(
    kind: dict[str, bool], capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    few = Problem(tokens=GROUPED_ELSEWHERE, experts=2, k=1, **kind)
    crowd = replace(few, tokens=1000)
    for dtype in (torch.float32, torch.bfloat16):
        assert chosen(few, dtype) == "native_grouped"
        assert chosen(crowd, dtype, "native") == "native_grouped"
    assert chosen(crowd, torch.float32) != "native_grouped"
    assert (chosen(crowd, torch.bfloat16) == "native_grouped") == (capability == "AVX2")
    for dtype in (torch.float16, torch.float64):
        assert chosen(few, dtype) != "native_grouped"
        assert chosen(few, dtype, "native") == "streamed"
