"""ReMoE (arXiv 2412.14711): ReLU gates, the load-balancing L1 penalty and its controller."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.dispatch import Capacity
from moekit.errors import SpecError
from moekit.experts import SwiGLU
from moekit.layer import MoE, MoESpec
from moekit.routing import (
    L1Balance,
    L1BalanceLoss,
    Load,
    LossSite,
    ReLURouting,
    RoutingLosses,
    Signals,
    TopK,
)

EXPERTS = 8


def layer_of(k: float = 2, experts: int = EXPERTS, std: float = 0.4) -> MoE:
    layer = MoESpec(ReLURouting(k=k), SwiGLU(count=experts, hidden=8)).build(8).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return layer


def losses_of(layers: list[MoE], spec: L1Balance) -> RoutingLosses:
    return RoutingLosses([LossSite((spec,), layer.router) for layer in layers])


def controller(spec: L1Balance, layers: int = 1) -> tuple[RoutingLosses, L1BalanceLoss]:
    losses = losses_of([layer_of(k=spec.k) for _ in range(layers)], spec)
    (module,) = losses.losses
    return losses, module


def load_of(active: int, tokens: int = 10) -> Load:
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    counts[0] = active
    return Load(counts, torch.tensor(tokens))


# --- the router ---------------------------------------------------------------------------------


def test_gates_are_selection_and_weight_with_nothing_in_between() -> None:
    layer, x_ND = layer_of(), torch.randn(30, 8, dtype=torch.float64)
    routing = layer(x_ND).routing
    gate_NE = (x_ND @ layer.router.weight.T).clamp_min(0)
    torch.testing.assert_close(routing.dense_weight_NE(), gate_NE)
    assert torch.equal(routing.used_NK, gate_NE > 0)
    assert len({int(n) for n in routing.used_NK.sum(-1)}) > 2  # a varying number of experts
    assert int(layer(x_ND).rows_E.sum()) == int((gate_NE > 0).sum())


def test_all_gates_open_is_the_dense_ensemble_and_all_closed_is_nothing() -> None:
    layer = layer_of()
    x_ND = torch.rand(12, 8, dtype=torch.float64).requires_grad_()
    layer.router.weight.data.abs_()
    out = layer(x_ND)
    assert out.rows_E.tolist() == [12] * EXPERTS
    layer.router.weight.data.neg_()
    out = layer(x_ND)
    assert bool((out.y == 0).all())
    assert int(out.rows_E.sum()) == 0
    out.y.sum().backward()
    for tensor in (x_ND, *layer.parameters()):
        assert bool((tensor.grad == 0).all())


def test_switching_an_expert_off_is_continuous_where_top_k_jumps() -> None:
    """Move a gate from +ε to -ε: ReLU routing changes by O(ε), top-1 by O(1)."""
    bank = SwiGLU(count=2, hidden=8)
    torch.manual_seed(0)
    relu = MoESpec(ReLURouting(k=1), bank).build(2).double()
    top = MoESpec(TopK(k=1, normalize="none"), bank).build(2).double()
    for parameter in relu.experts.parameters():
        torch.nn.init.normal_(parameter)
    top.experts.load_state_dict(relu.experts.state_dict())
    jumps = []
    for epsilon in (1e-3, 1e-6):
        changes = []
        for layer, rows in (
            (relu, [[1.0, 0.0], [0.0, 1.0]]),  # gate 1 is the second feature
            (top, [[0.0, 0.0], [0.0, 1.0]]),  # expert 1 wins where that feature is positive
        ):
            layer.router.weight.data.copy_(torch.tensor(rows))
            on, off = ([1.0, sign * epsilon] for sign in (1, -1))
            y_2D = layer(torch.tensor([on, off], dtype=torch.float64)).y
            changes.append(float((y_2D[0] - y_2D[1]).abs().max().detach()))
        assert changes[0] < 50 * epsilon
        jumps.append(changes[1])
    assert jumps[1] > 0.05
    assert jumps[0] == pytest.approx(jumps[1], rel=0.05)


# --- the penalty --------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("balanced", [True, False])
def test_the_gradient_of_a_gate_is_f_lambda_over_layers_and_tokens(
    balanced: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    layers = [layer_of(), layer_of()]
    spec = L1Balance(k=2, initial=0.25, balanced=balanced)
    valid_N = torch.arange(20) % 3 > 0
    signals = Signals(valid_N=valid_N) if masked else None
    tokens = int(valid_N.sum()) if masked else 20
    routings = []
    for layer in layers:
        routing = layer.router(torch.randn(20, 8, dtype=torch.float64), signals)
        leaf = routing.scores_NE.detach().requires_grad_()
        routings.append(routing.replace(scores_NE=leaf))
    total, values = losses_of(layers, spec)(routings)
    total.backward()
    wanted_loss = 0.0
    for routing in routings:
        active_NE = (routing.scores_NE > 0) & (valid_N[:, None] if masked else True)
        f_E = EXPERTS / (2 * tokens) * active_NE.sum(0) if balanced else torch.ones(EXPERTS)
        wanted = (f_E * 0.25 / (2 * tokens)).double().expand(20, EXPERTS)
        found = routing.scores_NE.grad
        torch.testing.assert_close(found[active_NE], wanted[active_NE], rtol=1e-6, atol=0)
        if masked:
            assert bool((found[~valid_N] == 0).all())
        per_token = (f_E * routing.scores_NE.detach() * active_NE).sum() / tokens
        wanted_loss += float(per_token) / 2
    assert float(values["L1Balance"]) == pytest.approx(wanted_loss, rel=1e-6)
    assert float(total.detach()) == pytest.approx(0.25 * wanted_loss, rel=1e-6)


def test_inactive_gates_send_the_router_exactly_nothing() -> None:
    layer = layer_of()
    x_ND = torch.randn(20, 8, dtype=torch.float64)
    with torch.no_grad():  # expert 3 is closed for every token
        layer.router.weight[3] = 0.0
    total, _ = losses_of([layer], L1Balance(k=2, initial=1.0))([layer.router(x_ND)])
    total.backward()
    assert bool((layer.router.weight.grad[3] == 0).all())
    assert bool((layer.router.weight.grad[0] != 0).all())


def test_an_even_load_makes_the_refined_penalty_the_plain_one() -> None:
    """f_e = E/(kT) Σ_t A_te is 1 for all when each expert serves kT/E tokens."""
    gate_NE = torch.rand(8, EXPERTS, dtype=torch.float64) + 0.1
    open_NE = torch.zeros(8, EXPERTS, dtype=torch.bool)
    for n in range(8):
        open_NE[n, [n, (n + 1) % 8]] = True
    layer = layer_of()
    routing = layer.router(torch.randn(8, 8, dtype=torch.float64))
    even = routing.replace(
        expert_NK=torch.where(open_NE, torch.arange(8), -1),
        weight_NK=gate_NE * open_NE,
        scores_NE=gate_NE * open_NE,
    )
    found = [
        losses_of([layer], L1Balance(k=2, balanced=balanced))([even])[1]["L1Balance"]
        for balanced in (True, False)
    ]
    torch.testing.assert_close(*found)


def test_the_penalty_alone_closes_the_router() -> None:
    """From random gates to S > 0.99, while closed gates get exactly no gradient."""
    torch.manual_seed(0)
    layer = MoESpec(ReLURouting(k=1), SwiGLU(count=EXPERTS, hidden=4)).build(16)
    losses = losses_of([layer], L1Balance(k=1, initial=1.0))
    x_ND = torch.randn(256, 16).abs()  # a cone: every gate can be closed for every row
    optimiser = torch.optim.SGD(layer.router.parameters(), lr=0.02)
    for _ in range(400):
        routing = layer.router(x_ND)
        total, _ = losses([routing])
        optimiser.zero_grad()
        total.backward()
        closed_E = ~routing.used_NK.any(0)
        assert bool((layer.router.weight.grad[closed_E] == 0).all())
        optimiser.step()
    sparsity = 1 - float(layer.router(x_ND).used_NK.double().mean())
    assert sparsity > 0.99


# --- the controller -----------------------------------------------------------------------------


def test_the_coefficient_is_an_exact_power_for_a_thousand_steps() -> None:
    spec = L1Balance(k=2, initial=1e-8, alpha=1.2)
    losses, module = controller(spec)
    generator = torch.Generator().manual_seed(0)
    below = above = 0
    for _ in range(1000):
        active = int(torch.randint(0, 42, (), generator=generator))
        losses.update([load_of(active)])  # 10 tokens: the target is 20 active gates
        below += active > 20  # more gates open than wanted: sparsity below its target
        above += active < 20
        wanted = torch.tensor(1e-8 * 1.2 ** (below - above), dtype=torch.float32)
        assert torch.equal(module.lam, wanted)
        assert torch.equal(losses.coefficients()["L1Balance"], wanted)
    assert below + above < 1000  # steps at the target were among them, and held


def test_restoring_mid_run_continues_the_same_trajectory(tmp_path) -> None:
    steps = [int(n) for n in torch.randint(0, 42, (60,))]
    (losses, module), (other, restored) = (controller(L1Balance(k=2)) for _ in range(2))
    for step, active in enumerate(steps):
        losses.update([load_of(active)])
        if step == 30:
            torch.save(losses.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    for active in steps[31:]:
        other.update([load_of(active)])
    assert torch.equal(restored.lam, module.lam)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_touch_the_controller(dtype: torch.dtype) -> None:
    (losses, module), (plain, other) = (controller(L1Balance(k=2)) for _ in range(2))
    for _ in range(37):
        losses.to(dtype).update([load_of(40)])
        plain.update([load_of(40)])
    assert module.lam.dtype == torch.float32
    assert torch.equal(module.lam, other.lam)


@pytest.mark.parametrize("k", [1, 2, 3, 1.5])
def test_a_step_at_the_target_holds(k: float) -> None:
    losses, module = controller(L1Balance(k=k))
    losses.update([load_of(int(10 * k))])
    assert float(module.lam) == pytest.approx(1e-8)


def test_a_coefficient_that_underflowed_comes_back() -> None:
    losses, module = controller(L1Balance(k=2, initial=1e-30, alpha=10.0))
    for _ in range(40):
        losses.update([load_of(0)])
    assert float(module.lam) == 0.0
    for _ in range(40):
        losses.update([load_of(80)])
    assert float(module.lam) == pytest.approx(1e-30)


def test_sparsity_is_the_mean_over_layers_and_micro_batches() -> None:
    losses, module = controller(L1Balance(k=2), layers=2)
    # One layer far above the target of 20, one far below, together above.
    losses.update([load_of(50), load_of(0)])
    assert float(module.lam) == pytest.approx(1.2e-8)
    losses.update([load_of(15) + load_of(30), load_of(5) + load_of(20)])  # 70 of 80 wanted
    assert float(module.lam) == pytest.approx(1e-8)


def test_a_step_without_tokens_changes_nothing() -> None:
    losses, module = controller(L1Balance(k=2))
    losses.update([load_of(0, tokens=0)])
    assert float(module.lam) == pytest.approx(1e-8)


def test_a_forward_pass_does_not_move_the_coefficient() -> None:
    layer = layer_of()
    losses = losses_of([layer], L1Balance(k=2))
    for _ in range(3):
        losses([layer.router(torch.randn(5, 8, dtype=torch.float64))])
    assert float(losses.coefficients()["L1Balance"]) == pytest.approx(1e-8)


def test_finer_experts_keep_parameters_and_sparsity() -> None:
    """Granularity G: E·G experts of hidden width H/G at k·G (paper, sec. 4.3)."""
    coarse, fine = SwiGLU(count=8, hidden=32), SwiGLU(count=32, hidden=8)
    assert sum(coarse.parameters_E(16)) == sum(fine.parameters_E(16))
    for k, bank in ((1, coarse), (4, fine)):
        spec = MoESpec(ReLURouting(k=k), bank, losses=(L1Balance(k=k),))
        assert spec.expected_load() == pytest.approx(k)
        assert 1 - k / bank.count == 0.875


@pytest.mark.parametrize("seed", range(3))
def test_sparsity_settles_at_its_target_in_training(seed: int) -> None:
    """A regression onto a known mixture, with the published controller.

    Eight clusters with a map each keep every expert wanted. On inputs of one cluster gates can die
    under the growing penalty, and those left cannot come to the target.
    """
    torch.manual_seed(seed)
    width, target = 16, 1 - 2 / EXPERTS
    layer = MoESpec(ReLURouting(k=2), SwiGLU(count=EXPERTS, hidden=16)).build(width)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    losses = losses_of([layer], L1Balance(k=2))
    optimiser = torch.optim.Adam(layer.parameters(), lr=3e-3)
    centre_CD = torch.randn(EXPERTS, width)
    truth_CDD = torch.randn(EXPERTS, width, width) / math.sqrt(width)
    seen: list[float] = []
    for _ in range(600):
        cluster_N = torch.randint(EXPERTS, (256,))
        x_ND = centre_CD[cluster_N] + 0.3 * torch.randn(256, width)
        wanted_ND = torch.bmm(x_ND[:, None], truth_CDD[cluster_N]).squeeze(1).tanh()
        out = layer(x_ND)
        penalty, _ = losses([out.routing])
        error = (out.y - wanted_ND).square().mean()
        optimiser.zero_grad()
        (error + penalty).backward()
        optimiser.step()
        load = Load.of(out.routing)
        losses.update([load])
        seen.append(1 - float(load.assignments_E.sum()) / (256 * EXPERTS))
    assert seen[0] < 0.6  # near-dense at first
    late: Tensor = torch.tensor(seen[300:])
    assert float(late.mean()) == pytest.approx(target, abs=0.02)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": -1.0}, "k is -1"),
        ({"alpha": 1.0}, "alpha is 1"),
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"initial": 0.0}, "initial is 0"),
        ({"initial": -1e-8}, "initial is -1e-08"),
        ({"then": ((5, 0.1),)}, "leave then empty"),
    ],
)
def test_bad_penalties_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        L1Balance(**fields)  # type: ignore[arg-type]


def test_bad_designs_are_refused() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=4)
    with pytest.raises(SpecError, match="needs k below their number"):
        MoESpec(ReLURouting(k=8), bank)
    with pytest.raises(SpecError, match="use Dropless"):
        MoESpec(ReLURouting(k=2), bank, Capacity())
    with pytest.raises(SpecError, match="works on gates"):
        MoESpec(TopK(k=2), bank, losses=(L1Balance(k=2),))
