"""What the four parts must be able to express: routers, scopes, depth and state.

The smallest design for each line of that list, made of public parts and subclasses of them; none
needs a change of the layer. Banks and dispatches: test_expressive_banks.py.
"""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from layer_parts import (
    EXPERTS,
    KINDS,
    WIDTH,
    ScopeRouter,
    bank,
    layer_of,
    one_expert,
    site,
    weighted,
)
from torch import Tensor, nn

from moekit.dispatch import Dropless
from moekit.errors import SignalError
from moekit.experts import (
    GroupedMM,
    SwiGLU,
)
from moekit.layer import MoE, MoESpec
from moekit.routing import (
    AttentionWeights,
    Carry,
    Load,
    LossSite,
    Router,
    Routing,
    RoutingLosses,
    Sequences,
    Signals,
    Site,
    SwitchBalance,
    TopK,
)

pytestmark = pytest.mark.usefixtures("double")


# --- scopes -------------------------------------------------------------------------------------


def test_a_decision_for_a_whole_scope() -> None:
    router = ScopeRouter(site(), k=2)
    layer = layer_of(router, bank())
    x_ND, scope_N = torch.randn(10, WIDTH), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    valid_N = torch.tensor([True] * 9 + [False])
    out = layer(x_ND, Signals(scope_N=scope_N, valid_N=valid_N))
    means = [x_ND[0:4].mean(0), x_ND[4:7].mean(0), x_ND[7:9].mean(0)]
    share_SE = (torch.stack(means) @ router.inner.weight.T).softmax(-1)
    top, ids = share_SE.topk(2)
    weight_SE = torch.zeros(3, EXPERTS).scatter(1, ids, top / top.sum(-1, keepdim=True))
    wanted = weighted(layer.experts, x_ND, weight_SE[scope_N]) * valid_N[:, None]
    torch.testing.assert_close(out.y, wanted)
    assert int(out.rows_E.sum()) == 9 * 2
    losses = RoutingLosses([LossSite((SwitchBalance(),), router)])  # over the rows, as any other
    total, _ = losses([out.routing])
    total.backward()
    assert router.inner.weight.grad is not None
    with pytest.raises(SignalError, match="ScopeRouter needs the signal scope_N"):
        layer(x_ND)


# --- several routers, one router ----------------------------------------------------------------


class ModalityRouter(Router):
    """Each type of token has a router over its own part of one bank (MoIIE); parts overlap."""

    requires: ClassVar[frozenset[str]] = frozenset({"modality_N"})

    def __init__(self, at: Site, sets: tuple[tuple[int, ...], ...]) -> None:
        super().__init__(at)
        self.sets = sets
        self.parts = nn.ModuleList(
            TopK(k=2).build(Site(at.width, tuple(at.kinds[e] for e in chosen))) for chosen in sets
        )

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        expert_NK = torch.full((len(x_ND), 2), -1)
        weight_NK = x_ND.new_zeros(len(x_ND), 2)
        for kind, (chosen, part) in enumerate(zip(self.sets, self.parts, strict=True)):
            own_N1 = (signals.modality_N == kind)[:, None]
            found = part.route(x_ND, signals).remap(torch.tensor(chosen), self.site.experts)
            expert_NK = torch.where(own_N1, found.expert_NK, expert_NK)
            weight_NK = torch.where(own_N1, found.weight_NK, weight_NK)
        return Routing(expert_NK, weight_NK, self.site.experts)


def test_several_routers_over_overlapping_sets_of_one_bank() -> None:
    sets = ((0, 1, 2, 3), (5, 3, 2))
    router = ModalityRouter(site(), sets)
    for part in router.parts:
        nn.init.normal_(part.weight)
    layer = layer_of(router, bank())
    x_ND, kind_N = torch.randn(40, WIDTH), torch.arange(40) % 2
    out = layer(x_ND, Signals(modality_N=kind_N))
    weight_NE = torch.zeros(40, EXPERTS)
    for n in range(40):
        chosen, part = sets[kind_N[n]], router.parts[kind_N[n]]
        top, ids = (part.weight @ x_ND[n]).softmax(0).topk(2)
        for weight, local in zip(top / top.sum(), ids.tolist(), strict=True):
            weight_NE[n, chosen[local]] = weight
    torch.testing.assert_close(out.y, weighted(layer.experts, x_ND, weight_NE))
    load = [out.routing.keep((kind_N == kind)[:, None].expand(40, 2)).load_E() for kind in (0, 1)]
    assert bool((load[0][[4, 5]] == 0).all())
    assert bool((load[1][[0, 1, 4]] == 0).all())
    assert int(load[0][[2, 3]].sum()) > 0
    assert int(load[1][[2, 3]].sum()) > 0  # the shared experts serve both


def test_one_router_shared_by_two_layers() -> None:
    router = TopK(k=2).build(site())
    nn.init.normal_(router.weight)
    stack = nn.ModuleList([layer_of(router, bank()), layer_of(router, bank())])
    names = [name for name, _ in stack.named_parameters()]
    assert sum("router" in name for name in names) == 1
    x_ND = torch.randn(7, WIDTH)
    outputs = [layer(x_ND) for layer in stack]
    assert torch.equal(outputs[0].routing.expert_NK, outputs[1].routing.expert_NK)
    assert not torch.equal(outputs[0].y, outputs[1].y)
    each = [torch.autograd.grad(o.y.sum(), router.weight, retain_graph=True)[0] for o in outputs]
    sum(o.y.sum() for o in outputs).backward()
    torch.testing.assert_close(router.weight.grad, each[0] + each[1])
    losses = RoutingLosses([LossSite((SwitchBalance(),), router) for _ in stack])
    total, values = losses([o.routing for o in outputs])
    alone, _ = RoutingLosses([LossSite((SwitchBalance(),), router)])([outputs[0].routing])
    torch.testing.assert_close(total, 2 * alone)
    assert set(values) == {"SwitchBalance"}


# --- what a router may look at ------------------------------------------------------------------


class SelfRouter(Router):
    """Experts choose themselves: the norm of an expert's own pre-activations (MoRA)."""

    requires: ClassVar[frozenset[str]] = frozenset({"experts"})

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        inner = torch.einsum("nd,ehd->neh", x_ND, signals.experts.up_weight)
        logits_NE = inner.norm(dim=-1)
        scores_NE = logits_NE.softmax(-1)
        weight_NK, expert_NK = scores_NE.topk(2)
        return Routing(expert_NK, weight_NK, self.site.experts, logits_NE, scores_NE, full=True)


def test_a_router_that_looks_into_the_experts() -> None:
    layer = layer_of(SelfRouter(site()), bank())
    x_ND = torch.randn(9, WIDTH)
    out = layer(x_ND)
    for n in range(9):
        norms = (layer.experts.gate_up_proj @ x_ND[n]).norm(dim=-1).tolist()
        best = sorted(range(EXPERTS), key=lambda e: -norms[e])[:2]
        assert out.routing.expert_NK[n].tolist() == best
    out.routing.weight_NK.sum().backward()
    assert float(layer.experts.gate_up_proj.grad.abs().max()) > 0
    assert list(layer.router.parameters()) == []
    with pytest.raises(SignalError, match="SelfRouter needs the signal experts"):
        layer.router(x_ND)


class ConditionRouter(Router):
    """Logits of the token and of a timestep, context or environment (Switch-DiT, MixER)."""

    requires: ClassVar[frozenset[str]] = frozenset({"condition_SC", "scope_N"})

    def __init__(self, at: Site, condition: int) -> None:
        super().__init__(at)
        self.token = nn.Linear(at.width, at.experts, bias=False)
        self.condition = nn.Linear(condition, at.experts, bias=False)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        shift_SE = self.condition(signals.condition_SC)
        logits_NE = self.token(x_ND) + shift_SE[signals.scope_N]
        scores_NE = logits_NE.softmax(-1)
        weight_NK, expert_NK = scores_NE.topk(2)
        return Routing(expert_NK, weight_NK, self.site.experts, logits_NE, scores_NE, full=True)


def test_a_router_that_looks_at_a_condition() -> None:
    layer = layer_of(ConditionRouter(site(), condition=3), bank())
    x_ND, scope_N = torch.randn(1, WIDTH).expand(4, WIDTH), torch.tensor([0, 0, 1, 1])
    signals = Signals(condition_SC=torch.randn(2, 3) * 20, scope_N=scope_N)
    routing = layer(x_ND, signals).routing
    assert torch.equal(routing.expert_NK[0], routing.expert_NK[1])
    assert not torch.equal(routing.logits_NE[0], routing.logits_NE[2])
    layer(x_ND, signals).y.sum().backward()
    assert float(layer.router.condition.weight.grad.abs().max()) > 0
    with pytest.raises(SignalError, match="ConditionRouter needs the signal condition_SC"):
        layer(x_ND, Signals(scope_N=scope_N))


class AttentionRouter(Router):
    """Scores averaged over the tokens that a token attends to (attention-aware routing)."""

    requires: ClassVar[frozenset[str]] = frozenset({"sequences", "attention"})

    def __init__(self, at: Site) -> None:
        super().__init__(at)
        self.inner = nn.Linear(at.width, at.experts, bias=False)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE = self.inner(x_ND)
        sequences = signals.sequences
        share_BTE = sequences.split(logits_NE.softmax(-1))
        view = sequences.view(signals.valid_N)
        scores_NE = signals.attention.average(share_BTE, view).flatten(0, 1)
        weight_NK, expert_NK = scores_NE.topk(2)
        return Routing(expert_NK, weight_NK, self.site.experts, logits_NE, scores_NE, full=True)


def looking(weight_TT: Tensor) -> Signals:
    return Signals(sequences=Sequences(1), attention=AttentionWeights(weight_TT[None, None]))


def test_a_router_that_looks_along_the_sequence() -> None:
    layer = layer_of(AttentionRouter(site()), bank())
    x_ND = torch.randn(6, WIDTH)
    uniform = torch.full((6, 6), 1 / 6)
    routing = layer(x_ND, looking(uniform)).routing
    assert all(torch.equal(row, routing.expert_NK[0]) for row in routing.expert_NK)
    torch.testing.assert_close(routing.scores_NE.sum(-1), torch.ones(6))
    alone = layer(x_ND, looking(torch.eye(6))).routing
    torch.testing.assert_close(alone.scores_NE, alone.logits_NE.softmax(-1))


# --- depth --------------------------------------------------------------------------------------


def momentum_block(layer: MoE, x_ND: Tensor, carry: Carry, mu: float) -> tuple[Tensor, Carry]:
    """MomentumSMoE's residual rule: ``p ← μ p + y``, ``x ← x + p``."""
    out = layer(x_ND, carry=carry)
    (before,) = out.carry.momentum or (torch.zeros_like(out.y),)
    momentum = mu * before + out.y
    return x_ND + momentum, out.carry.replace(momentum=(momentum,))


def test_momentum_threads_through_the_stack() -> None:
    layers = [MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8)).build(WIDTH) for _ in range(4)]
    for layer in layers:
        layer.experts.reset_parameters(std=0.4)
    start = torch.randn(5, WIDTH)
    x_ND, carry = start, Carry()
    for layer in layers:
        x_ND, carry = momentum_block(layer, x_ND, carry, mu=0.7)
    outputs, wanted = [], start
    for layer in layers:
        outputs.append(layer(wanted).y)
        depth = len(outputs)
        wanted = wanted + sum(0.7 ** (depth - 1 - i) * y for i, y in enumerate(outputs))
    torch.testing.assert_close(x_ND, wanted)
    again, _ = momentum_block(layers[0], start, Carry(), mu=0.7)
    torch.testing.assert_close(again, start + outputs[0])  # nothing was kept on a module


# --- state --------------------------------------------------------------------------------------


class AnnealedGates(Router):
    """Dense softmax gates whose temperature falls once an optimiser step."""

    temperature: Tensor

    def __init__(self, at: Site) -> None:
        super().__init__(at)
        self.weight = nn.Parameter(torch.randn(at.experts, at.width))
        self.register_buffer("temperature", torch.ones(()))

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE = x_ND @ self.weight.T
        scores_NE = (logits_NE / self.temperature).softmax(-1)
        expert_NK = torch.arange(self.site.experts).expand(scores_NE.shape)
        return Routing(expert_NK, scores_NE, self.site.experts, logits_NE, scores_NE, full=True)

    @torch.no_grad()
    def update(self, load: Load) -> None:
        self.temperature.mul_(0.5)


def test_state_moves_by_update_alone_and_weights_may_be_dense() -> None:
    layer = layer_of(AnnealedGates(site()), bank())
    x_ND = torch.randn(5, WIDTH)
    for _ in range(3):
        layer(x_ND).y.sum().backward()
    assert float(layer.router.temperature) == 1.0
    out = layer(x_ND)
    torch.testing.assert_close(
        out.y, weighted(layer.experts, x_ND, (x_ND @ layer.router.weight.T).softmax(-1))
    )
    assert out.rows_E.tolist() == [5] * EXPERTS
    layer.router.update(Load.of(out.routing))
    saved = layer.state_dict()
    restored = layer_of(AnnealedGates(site()), bank())
    restored.load_state_dict(saved)
    assert float(restored.router.temperature) == 0.5
    sharper = (2 * x_ND @ layer.router.weight.T).softmax(-1)
    torch.testing.assert_close(restored(x_ND).y, weighted(layer.experts, x_ND, sharper))


def test_parts_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="built for 5 experts and the bank has 6"):
        layer_of(TopK(k=2).build(site(KINDS[:5])), bank())


def test_a_shared_expert_runs_beside_any_design() -> None:
    shared = bank(count=1)
    layer = MoE(TopK(k=2).build(site()), bank(), Dropless().build(), shared=shared)
    x_ND = torch.randn(6, WIDTH)
    plain = layer_of(layer.router, layer.experts)(x_ND).y
    torch.testing.assert_close(layer(x_ND).y, plain + one_expert(shared, 0, x_ND))
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x_ND).y - plain, shared(x_ND, GroupedMM(torch.tensor([6])))
        )
