"""Calls of a feed-forward bank that every kernel of our own must answer, and the answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moekit.dispatch.backend import Backend
from moekit.dispatch.fused import feed_forward
from moekit.dispatch.plan import Plan, plan_rows
from moekit.experts import GELU, GroupedMM, SwiGLU
from moekit.experts.experts import FeedForward
from moekit.routing import Routing


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
    problem: Problem, dtype: torch.dtype, device: str, backend: Backend | None
) -> list[Tensor]:
    """The output and every gradient; without a backend in float64, in plain operations."""
    torch.manual_seed(problem.seed)
    x_ND, weight_NK, bank = problem.inputs(dtype, device)
    expert_NK = problem.experts_NK()
    cotangent = torch.randn(problem.tokens, problem.width).to(device, dtype)
    leaves = [x_ND, weight_NK, *(t for t in bank.tensors if t is not None)]
    if backend is None:
        leaves = [leaf.double() for leaf in leaves]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    held = FeedForward(*leaves[2:4], *(leaves[4:] or (None, None)), bank.activation)
    plan = problem.plan(expert_NK, leaves[1])
    y_NO = feed_forward(leaves[0], plan, held, backend)
    return [y_NO.detach(), *torch.autograd.grad(y_NO, leaves, cotangent.to(y_NO.dtype))]


def compare(
    problem: Problem, dtype: torch.dtype, device: str, backend: Backend, tolerance: float
) -> None:
    """Hold a backend's results to those of plain operations in float64."""
    ours = results(problem, dtype, device, backend)
    theirs = results(problem, dtype, device, None)
    for given, wanted in zip(ours, theirs, strict=True):
        assert given.dtype == dtype
        assert given.shape == wanted.shape
        difference = (given.double() - wanted).norm()
        assert float(difference) <= tolerance * float(wanted.norm())


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
