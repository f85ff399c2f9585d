"""The sparse projection against all supports, against POT, and its gradient."""

from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.routing import sparse_simplex_projection


def on_simplex(x: Tensor, total: float) -> Tensor:
    """Projection of one vector on the whole simplex: the threshold is found by bisection."""
    low, high = float(x.min()) - total - 1, float(x.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if float((x - middle).clamp_min(0).sum()) > total else (low, middle)
        )
    return (x - low).clamp_min(0)


def by_all_supports(x: Tensor, k: int, total: float) -> Tensor:
    candidates = []
    for support in itertools.combinations(range(len(x)), k):
        y = torch.zeros_like(x)
        y[list(support)] = on_simplex(x[list(support)], total)
        candidates.append(y)
    return min(candidates, key=lambda y: float((y - x).square().sum()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", range(1, 7))
def test_equals_the_best_of_all_supports(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(10 * size + seed)
    for scale, total in ((1.0, 1.0), (0.2, 2.5), (3.0, 0.3)):
        x = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        for k in range(1, size + 1):
            wanted = by_all_supports(x, k, total)
            found = sparse_simplex_projection(x, k, total)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
            assert int((found > 0).sum()) <= k


@pytest.mark.parametrize("k", [1, 3, 9])
def test_equals_pot_and_a_loop_over_the_batch(k: int, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(4, 5, 9, dtype=torch.float64)
    total = torch.rand(4, 5, dtype=torch.float64) + 0.1
    found = sparse_simplex_projection(x, k, total)
    wanted = ot.utils.projection_sparse_simplex(
        x.view(-1, 9).numpy(), k, z=total.flatten().numpy(), axis=1
    )
    capsys.readouterr()  # POT 0.9.7 prints a shape
    np.testing.assert_allclose(found.view(-1, 9).numpy(), wanted, rtol=0, atol=1e-12)
    for i, j in itertools.product(range(4), range(5)):
        assert torch.equal(found[i, j], sparse_simplex_projection(x[i, j], k, total[i, j]))


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_gradient(k: int) -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    total = (torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: sparse_simplex_projection(x, k, t), (x, total))


def test_the_support_is_chosen_before_anything_is_cut_off() -> None:
    """Negative entries count: clipping them first would leave nothing to project."""
    x = torch.tensor([-3.0, -1.0, -1.5])
    torch.testing.assert_close(
        sparse_simplex_projection(x, 2), torch.tensor([0.0, 0.75, 0.25]), rtol=0, atol=1e-6
    )


def test_excluded_entries_and_an_empty_sum() -> None:
    x = torch.tensor([[0.3, float("-inf"), 0.1], [0.3, 0.2, 0.1]])
    found = sparse_simplex_projection(x, 3, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.0, 0.4], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_bad_k(k: int) -> None:
    with pytest.raises(SpecError, match="wanted 1 to 3"):
        sparse_simplex_projection(torch.zeros(2, 3), k)
