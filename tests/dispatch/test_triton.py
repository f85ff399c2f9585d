"""The Triton kernels against plain operations in float64: interpreted here, compiled on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moekit.dispatch.choice import Choice
from moekit.dispatch.fused import composed, feed_forward
from moekit.dispatch.plan import Plan, plan_rows
from moekit.dispatch.triton_backend import Triton
from moekit.dispatch.triton_tiles import Tile, Tiles
from moekit.errors import SpecError
from moekit.experts import GELU, GroupedMM, SwiGLU
from moekit.experts.experts import FeedForward
from moekit.routing import Routing

# Interpreted, bfloat16 is cut off and not rounded; see tests/contract/test_outputs.py.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 3e-3}
SMALL = Tiles(*[Tile(16, 32, 16)] * 4)


@dataclass(frozen=True)
class Problem:
    """Sizes and properties of one call; the routing has ``k`` slots, some of them unused."""

    tokens: int = 37
    experts: int = 5
    k: int = 2
    width: int = 24
    hidden: int = 20
    bias: bool = False
    gated: bool = True
    unused: float = 0.0
    transposed: bool = False
    one_takes_all: bool = False
    seed: int = 0

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, FeedForward]:
        kind = SwiGLU if self.gated else GELU
        bank = kind(count=self.experts, hidden=self.hidden, bias=self.bias).build(self.width)
        tensors = [
            None if t is None else torch.randn(t.shape) * 0.5 for t in bank.feed_forward().tensors
        ]
        if self.transposed:
            tensors[:2] = [t.mT.contiguous().mT for t in tensors[:2]]
        tensors = [None if t is None else t.to(device, dtype) for t in tensors]
        x_ND = torch.randn(self.tokens, self.width).to(device, dtype)
        weight_NK = torch.rand(self.tokens, self.k).to(device, dtype)
        return x_ND, weight_NK, FeedForward(*tensors, bank.activate)

    def experts_NK(self) -> Tensor:
        scores_NE = torch.rand(self.tokens, self.experts)
        expert_NK = scores_NE.topk(self.k).indices
        if self.one_takes_all:
            expert_NK = torch.full_like(expert_NK, self.experts - 1)
        return torch.where(torch.rand(self.tokens, self.k) < self.unused, -1, expert_NK)

    def plan(self, expert_NK: Tensor, weight_NK: Tensor) -> Plan:
        routing = Routing(
            expert_NK.to(weight_NK.device), weight_NK, self.experts, full=self.unused == 0
        )
        return plan_rows(routing, [(0, self.experts)], GroupedMM)


def results(
    problem: Problem, dtype: torch.dtype, device: str, tiles: Tiles | None, *, exact: bool
) -> list[Tensor]:
    """The output and every gradient; ``exact`` in float64, in plain operations."""
    torch.manual_seed(problem.seed)
    x_ND, weight_NK, bank = problem.inputs(dtype, device)
    expert_NK = problem.experts_NK()
    cotangent = torch.randn(problem.tokens, problem.width).to(device, dtype)
    leaves = [x_ND, weight_NK, *(t for t in bank.tensors if t is not None)]
    if exact:
        leaves = [leaf.double() for leaf in leaves]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    held = FeedForward(*leaves[2:4], *(leaves[4:] or (None, None)), bank.activation)
    plan = problem.plan(expert_NK, leaves[1])
    if exact:
        y_NO = composed(leaves[0], plan, held)
    else:
        y_NO = feed_forward(leaves[0], plan, held, Triton(tiles))
    return [y_NO.detach(), *torch.autograd.grad(y_NO, leaves, cotangent.to(y_NO.dtype))]


def compare(problem: Problem, dtype: torch.dtype, device: str, tiles: Tiles | None) -> None:
    ours = results(problem, dtype, device, tiles, exact=False)
    theirs = results(problem, dtype, device, tiles, exact=True)
    for given, wanted in zip(ours, theirs, strict=True):
        assert given.dtype == dtype
        assert given.shape == wanted.shape
        difference = (given.double() - wanted).norm()
        assert float(difference) <= TOLERANCE[dtype] * float(wanted.norm())


PLAIN = Problem()
PROBLEMS = {
    "plain": PLAIN,
    "sizes that no vector divides": replace(PLAIN, width=23, hidden=19, bias=True),
    "transposed weights": replace(PLAIN, width=32, hidden=32, transposed=True),
    "transposed, odd": replace(PLAIN, width=24, hidden=20, transposed=True, bias=True),
    "unused slots": replace(PLAIN, unused=0.4, bias=True),
    "no slot used": replace(PLAIN, unused=1.0),
    "another activation": replace(PLAIN, gated=False, bias=True, unused=0.3),
    "one expert takes all": replace(PLAIN, one_takes_all=True, k=1),
    "no tokens": replace(PLAIN, tokens=0),
    "one token": replace(PLAIN, tokens=1),
    "one expert": replace(PLAIN, experts=1, k=1),
    "every expert": replace(PLAIN, experts=3, k=3),
    "more experts than rows": replace(PLAIN, tokens=3, experts=40),
}
EVERY_PROBLEM = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
@pytest.mark.parametrize("tiles", [SMALL, None], ids=["small tiles", "chosen tiles"])
@EVERY_DTYPE
@EVERY_PROBLEM
def test_interpreted(problem: Problem, dtype: torch.dtype, tiles: Tiles | None) -> None:
    compare(problem, dtype, "cpu", tiles)


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
    compare(problem, dtype, "cuda", None)


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
