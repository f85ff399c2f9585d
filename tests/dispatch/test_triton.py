"""The Triton kernels against plain operations in float64: interpreted here, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from feed_forward_problems import PLAIN, PROBLEMS, Problem, compare

pytest.importorskip("triton")

from moekit.dispatch.choice import Choice
from moekit.dispatch.fused import feed_forward
from moekit.dispatch.triton_backend import Triton
from moekit.dispatch.triton_tiles import Tile, Tiles
from moekit.errors import SpecError

# Interpreted, bfloat16 is cut off and not rounded; see tests/contract/test_outputs.py.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 3e-3}
SMALL = Tiles(*[Tile(16, 32, 16)] * 4)


EVERY_PROBLEM = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
@pytest.mark.parametrize("tiles", [SMALL, None], ids=["small tiles", "chosen tiles"])
@EVERY_DTYPE
@EVERY_PROBLEM
def test_interpreted(problem: Problem, dtype: torch.dtype, tiles: Tiles | None) -> None:
    compare(problem, dtype, "cpu", Triton(tiles), TOLERANCE[dtype])


LARGE = Problem(tokens=1000, experts=8, k=2, width=256, hidden=384, seed=1)
COMPILED = PROBLEMS | {
    "many tiles": LARGE,
    "many tiles, transposed": replace(LARGE, transposed=True, bias=True),
    "few rows": replace(LARGE, tokens=20),
    "some rows": replace(LARGE, tokens=150, unused=0.2),
    "many experts": replace(LARGE, experts=200, k=8, tokens=4000, width=136, hidden=72),
}


@pytest.mark.gpu
@EVERY_DTYPE
@pytest.mark.parametrize("problem", COMPILED.values(), ids=COMPILED)
def test_compiled(problem: Problem, dtype: torch.dtype) -> None:
    compare(problem, dtype, "cuda", Triton(), TOLERANCE[dtype])


@pytest.mark.gpu
def test_auto_takes_the_kernels_on_a_gpu_and_float64_goes_on_without() -> None:
    for dtype, name in ((torch.bfloat16, "triton"), (torch.float64, "grouped_mm")):
        x_ND, weight_NK, bank = PLAIN.inputs(dtype, "cuda")
        plan = PLAIN.plan(PLAIN.experts_NK(), weight_NK)
        backend = Choice().backend(x_ND, plan, bank)
        assert backend is not None
        assert backend.name == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_an_expanded_gradient() -> None:
    """That of a sum has no strides, which a kernel must not take for rows."""
    x_ND, weight_NK, bank = PLAIN.inputs(torch.float32, "cpu")
    x_ND.requires_grad_()
    expert_NK = PLAIN.experts_NK()
    found = []
    for backend in (Triton(), None):
        y_NO = feed_forward(x_ND, PLAIN.plan(expert_NK, weight_NK), bank, backend)
        found.append(torch.autograd.grad(y_NO.sum(), x_ND)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
def test_tokens_whose_entries_lie_apart() -> None:
    x_ND, weight_NK, bank = PLAIN.inputs(torch.float32, "cpu")
    plan = PLAIN.plan(PLAIN.experts_NK(), weight_NK)
    apart_ND = x_ND.T.contiguous().T
    wanted, _ = Triton().forward(x_ND, plan, bank, keep=False)
    given, _ = Triton().forward(apart_ND, plan, bank, keep=False)
    assert torch.equal(given, wanted)


def test_where_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekit.dispatch.triton_backend.INTERPRETED", False)
    x_ND, weight_NK, bank = PLAIN.inputs(torch.float32, "cpu")
    plan = PLAIN.plan(PLAIN.experts_NK(), weight_NK)
    with pytest.raises(SpecError, match=r"triton.*cpu.*NVIDIA.*auto"):
        Choice("triton").backend(x_ND, plan, bank)
