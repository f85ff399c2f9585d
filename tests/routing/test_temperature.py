"""The dense-to-sparse gate and its activation variant (arXiv 2401.13875)."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moekit.dispatch import Capacity
from moekit.errors import MoekitError, SignalError, SpecError
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import DenseToSparse, DenseToSparseRouter, Load, Site, TopK
from moekit.routing.softmax import gumbel_like, tempered_softmax
from moekit.training.decay import decayed_names

EXPERTS, WIDTH = 6, 8
SITE = Site(WIDTH, ("feed_forward",) * EXPERTS)
ALIKE = ("identity", "relu", "leaky_relu")
OTHERS = ("sigmoid", "tanh", "gelu", "silu", "softplus")
STEP = Load(torch.zeros(EXPERTS, dtype=torch.int64), torch.tensor(1))


def router_of(**fields: object) -> DenseToSparseRouter:
    """A float64 router with weights large enough to tell experts apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        router = DenseToSparse(**fields).build(SITE).double()  # type: ignore[arg-type]
    torch.manual_seed(1)
    for parameter in (router.weight, router.bias):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    return router


def advance(router: DenseToSparseRouter, steps: int) -> None:
    for _ in range(steps):
        router.update(STEP)


def rows(tokens: int = 20) -> Tensor:
    return torch.randn(tokens, WIDTH, dtype=torch.float64)


# --- the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ALIKE + OTHERS)
def test_weights_are_the_formula_expert_by_expert(activation: str) -> None:
    by_hand = {
        "identity": lambda z: z,
        "relu": lambda z: max(z, 0.0),
        "leaky_relu": lambda z: z if z > 0 else 0.01 * z,
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
        "tanh": math.tanh,
        "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
        "silu": lambda z: z / (1 + math.exp(-z)),
        "softplus": lambda z: math.log1p(math.exp(z)),
    }[activation]
    router, x_ND = router_of(temperature=0.7, activation=activation), rows()
    routing = router(x_ND)
    weight_ED, bias_E = router.weight.tolist(), router.bias.tolist()
    for n, x_D in enumerate(x_ND.tolist()):
        scores = [sum(w * x for w, x in zip(w_D, x_D, strict=True)) for w_D in weight_ED]
        odds = [math.exp((by_hand(z) + b) / 0.7) for z, b in zip(scores, bias_E, strict=True)]
        for e in range(EXPERTS):
            assert routing.weight_NK[n, e].item() == pytest.approx(odds[e] / sum(odds), rel=1e-12)
    assert torch.equal(routing.expert_NK, torch.arange(EXPERTS).expand(20, -1))


def test_identity_at_temperature_one_is_the_softmax_mixture() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=8)
    ours = MoESpec(DenseToSparse(bias=False), bank).build(WIDTH).double()
    theirs = MoESpec(TopK(k=EXPERTS), bank).build(WIDTH).double()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x_ND = rows()
    torch.testing.assert_close(ours(x_ND).y, theirs(x_ND).y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [0.1, 3.0])
@pytest.mark.parametrize("activation", ALIKE + OTHERS)
def test_scaling_gate_and_temperature_together(activation: str, factor: float) -> None:
    """Without effect exactly where the activation is homogeneous."""
    fields = {"activation": activation}
    ours, scaled = router_of(**fields), router_of(**fields, temperature=factor)
    for parameter in scaled.parameters():
        parameter.data.mul_(factor)
    x_ND = rows()
    gap = float((ours(x_ND).weight_NK - scaled(x_ND).weight_NK).detach().abs().max())
    if activation in ALIKE:
        assert gap < 1e-12
    else:
        assert gap > 1e-3


@pytest.mark.parametrize("activation", ALIKE + OTHERS)
def test_euler_identity_of_the_log_gate(activation: str) -> None:
    """Σ W·∂ + Σ b·∂ + τ∂/∂τ of each log-probability is 0 where the scale is not identified."""
    router = router_of(activation=activation, temperature=0.6, learned=True)
    found = []
    for n, x_D in enumerate(rows(12)):
        log_share = router(x_D[None]).weight_NK[0, n % EXPERTS].log()
        by_W, by_b, by_log_tau = torch.autograd.grad(
            log_share, [router.weight, router.bias, router.log_temperature]
        )
        total = (router.weight * by_W).sum() + (router.bias * by_b).sum() + by_log_tau
        found.append(abs(float(total.detach())))
    if activation in ALIKE:
        assert max(found) < 1e-12
    else:
        assert max(found) > 0.1


@pytest.mark.parametrize("activation", ALIKE + OTHERS)
def test_fisher_information_is_singular_along_the_scale_alone(activation: str) -> None:
    """Of the gate with a learned temperature, its last expert fixed where a shift has no effect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gate = DenseToSparse(temperature=0.4, learned=True, activation=activation)
        router = gate.build(Site(1, ("feed_forward",) * 3)).double()
    slope = [1.0, -0.7, 0.0] if activation == "identity" else [1.0, -0.7, 0.3]
    router.weight.data.copy_(torch.tensor(slope)[:, None])
    router.bias.data.copy_(torch.tensor([0.3, -0.3, 0.0]))
    share_NE = router(torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None]).weight_NK
    free = 2 if activation == "identity" else 3
    score_NEF = torch.zeros(*share_NE.shape, free + 3, dtype=torch.float64)
    for place in range(share_NE.numel()):
        by = torch.autograd.grad(
            share_NE.flatten()[place].log(),
            [router.weight, router.bias, router.log_temperature],
            retain_graph=True,
        )
        parts = (by[0][:free, 0], by[1][:2], by[2].view(1))  # by log τ, so along its unit
        score_NEF.view(-1, free + 3)[place] = torch.cat(parts)
    information = torch.einsum("ne,nef,neg->fg", share_NE.detach(), score_NEF, score_NEF) / 400
    scale = information.diagonal().sqrt()
    eigenvalue, vector = torch.linalg.eigh(information / scale[:, None] / scale)
    if activation in ALIKE:
        assert abs(float(eigenvalue[0])) < 1e-12 < 1e-4 < float(eigenvalue[1])
        wanted = torch.cat([router.weight[:free, 0], router.bias[:2], torch.ones(1)]) * scale
        cosine = torch.nn.functional.cosine_similarity(vector[:, 0], wanted.detach(), dim=0)
        assert abs(float(cosine)) > 1 - 1e-8
    else:
        assert float(eigenvalue[0]) > 1e-3


def test_the_activation_comes_before_bias_and_temperature() -> None:
    """Where every score is 0, tanh((0 + b)/τ) would differ from (tanh 0 + b)/τ."""
    router = router_of(activation="tanh", temperature=0.5)
    share_E = router(torch.zeros(1, WIDTH, dtype=torch.float64)).weight_NK[0]
    torch.testing.assert_close(share_E, (router.bias / 0.5).softmax(0))


@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu"])
@pytest.mark.parametrize("learned", [True, False])
def test_gradients_equal_finite_differences(activation: str, learned: bool) -> None:
    router = router_of(activation=activation, temperature=0.8, learned=learned)
    names = [name for name, _ in router.named_parameters()]
    assert ("log_temperature" in names) == learned

    def weights(x_ND: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(router, given, (x_ND,)).weight_NK

    leaves = [rows(4), *(p.detach().clone() for p in router.parameters())]
    assert torch.autograd.gradcheck(weights, [leaf.requires_grad_() for leaf in leaves])


# --- limits -------------------------------------------------------------------------------------


def test_a_high_temperature_is_uniform_and_a_low_one_the_best_expert() -> None:
    x_ND = rows()
    hot, cold = router_of(temperature=1e9), router_of(temperature=1e-9)
    torch.testing.assert_close(
        hot(x_ND).weight_NK, torch.full((20, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    )
    routing = cold(x_ND)
    best_N = routing.logits_NE.argmax(-1)
    one_hot_NE = torch.nn.functional.one_hot(best_N, EXPERTS).double()
    assert torch.equal(routing.weight_NK, one_hot_NE)
    assert torch.equal(routing.used_NK, one_hot_NE > 0)  # the others are not run


@pytest.mark.parametrize(("temperature", "learned"), [(1e-6, False), (1e-6, True), (1e-37, False)])
def test_large_logits_at_a_low_temperature_stay_finite(temperature: float, learned: bool) -> None:
    router = router_of(temperature=temperature, learned=learned).float()
    with torch.no_grad():
        router.weight.mul_(1e4)
    x_ND = rows().float().requires_grad_()
    routing = router(x_ND)
    routing.weight_NK.square().sum().backward()
    assert bool(torch.isfinite(routing.weight_NK).all())
    for leaf in (x_ND, *router.parameters()):
        assert bool(torch.isfinite(leaf.grad).all())


# --- sparsification -----------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.16])
def test_experts_below_the_threshold_are_not_run(threshold: float) -> None:
    x_ND = rows(200)
    dense, sparse = router_of()(x_ND), router_of(threshold=threshold)(x_ND)
    kept_NE = dense.weight_NK >= threshold
    assert torch.equal(sparse.used_NK, kept_NE)
    assert torch.equal(sparse.weight_NK, dense.weight_NK * kept_NE)
    assert torch.equal(sparse.scores_NE, dense.weight_NK)
    assert len({int(n) for n in kept_NE.sum(-1)}) > 1
    assert int(kept_NE.sum(-1).min()) >= 1


def test_a_threshold_just_below_uniform_keeps_an_expert_for_every_token() -> None:
    router = router_of(threshold=math.nextafter(1 / EXPERTS, 0), temperature=1e30).float()
    assert bool(router(rows(500).float()).used_NK.any(-1).all())


def test_top_k_begins_when_the_annealing_ends() -> None:
    router = router_of(temperature=1.0, final=0.9, steps=3, k=2)
    x_ND = rows()
    for _ in range(3):
        assert bool(router(x_ND).used_NK.all())
        router.update(STEP)
    for training in (True, False):
        routing = router.train(training)(x_ND)
        assert bool((routing.used_NK.sum(-1) == 2).all())
        best_NK = routing.logits_NE.topk(2).indices
        assert bool(routing.used_NK.gather(1, best_NK).all())
        full = (routing.logits_NE / 0.9).softmax(-1)
        torch.testing.assert_close(
            routing.weight_NK, full.masked_fill(~routing.used_NK, 0.0), rtol=1e-6, atol=0
        )


def test_experts_left_out_send_no_gradient_of_their_weight() -> None:
    router, x_ND = router_of(k=1), rows(5)
    routing = router(x_ND)
    (found,) = torch.autograd.grad(routing.weight_NK.sum(), routing.logits_NE)
    best_N1 = routing.logits_NE.argmax(-1, keepdim=True)
    p_NE = routing.scores_NE.detach()
    p_N1 = p_NE.gather(1, best_N1)
    wanted = p_N1 * (torch.zeros_like(p_NE).scatter(1, best_N1, 1.0) - p_NE)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


# --- the temperature as state -------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_the_trajectory_is_exact_and_holds_at_its_end(schedule: str) -> None:
    router = router_of(temperature=2.0, final=0.3, steps=1000, schedule=schedule)
    for step in range(1003):
        done = min(step / 1000, 1.0)
        wanted = 2.0 + (0.3 - 2.0) * done if schedule == "linear" else 2.0 * 0.15**done
        assert float(router.temperature()) == pytest.approx(wanted, rel=1e-13)
        if step in (0, 1000, 1002):
            assert float(router.temperature()) == (2.0 if step == 0 else 0.3)
        router.update(STEP)


def test_a_rise_is_a_schedule_too_and_a_constant_stays() -> None:
    rising = router_of(temperature=0.5, final=4.0, steps=2, schedule="exponential")
    constant = router_of(temperature=0.5)
    found = []
    for _ in range(4):
        found.append(float(rising.temperature()))
        assert float(constant.temperature()) == 0.5
        rising.update(STEP)
        constant.update(STEP)
    assert found == pytest.approx([0.5, math.sqrt(2), 4.0, 4.0])


def test_restoring_mid_run_continues_the_same_trajectory(tmp_path: Path) -> None:
    ours, restored = (router_of(temperature=2.0, final=0.1, steps=50) for _ in range(2))
    advance(ours, 20)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt"))
    x_ND = rows()
    for _ in range(40):
        assert torch.equal(restored.temperature(), ours.temperature())
        assert torch.equal(restored(x_ND).weight_NK, ours(x_ND).weight_NK)
        ours.update(STEP)
        restored.update(STEP)
    ours.reset_parameters()
    assert float(ours.temperature()) == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_touch_the_schedule(dtype: torch.dtype) -> None:
    ours, plain = (router_of(temperature=2.0, final=0.1, steps=3000) for _ in range(2))
    ours.to(dtype)
    for step in (1, 700, 301):  # 1002: a bfloat16 counter would have stopped at 256
        advance(ours, step)
        advance(plain, step)
        assert torch.equal(ours.temperature(), plain.temperature())


def test_forward_passes_do_not_move_the_temperature() -> None:
    router = router_of(temperature=2.0, final=0.1, steps=5)
    for training in (True, False, True):
        router.train(training)(rows())
    assert float(router.temperature()) == 2.0


def test_a_learned_temperature_learns_and_does_not_decay() -> None:
    router = router_of(temperature=3.0, learned=True, activation="tanh")
    assert decayed_names(router) == ["weight"]
    optimiser = torch.optim.SGD([router.log_temperature], lr=1.0)
    x_ND = rows(50)
    best_NE = router(x_ND).logits_NE.detach().argmax(-1, keepdim=True)
    for _ in range(30):
        loss = -router(x_ND).weight_NK.gather(1, best_NE).log().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert 0 < float(router.temperature().detach()) < 1.0
    advance(router, 5)
    router.reset_parameters()
    assert float(router.temperature().detach()) == pytest.approx(3.0)


@pytest.mark.parametrize("activation", ALIKE)
def test_learning_what_cannot_be_identified_warns(activation: str) -> None:
    with pytest.warns(UserWarning, match="neither can be estimated"):
        DenseToSparse(learned=True, activation=activation).build(SITE)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", OTHERS)
def test_learning_beside_another_activation_does_not_warn(activation: str) -> None:
    DenseToSparse(learned=True, activation=activation).build(SITE)  # type: ignore[arg-type]


# --- noise --------------------------------------------------------------------------------------


def test_noise_is_added_before_the_division_and_in_training_alone() -> None:
    noisy, plain, x_ND = router_of(noise=True, temperature=0.7), router_of(temperature=0.7), rows()
    torch.manual_seed(5)
    routing = noisy(x_ND)
    torch.manual_seed(5)
    noise_NE = gumbel_like(routing.logits_NE)
    torch.testing.assert_close(
        routing.weight_NK, ((routing.logits_NE + noise_NE) / 0.7).softmax(-1), rtol=1e-12, atol=0
    )
    assert torch.equal(routing.logits_NE, plain(x_ND).logits_NE)
    assert torch.equal(noisy.eval()(x_ND).weight_NK, plain(x_ND).weight_NK)


def test_tempered_softmax_equals_softmax_of_the_quotient() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    for dim in (-1, 1):
        torch.testing.assert_close(tempered_softmax(logits, 0.3, dim), (logits / 0.3).softmax(dim))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; wanted a positive finite"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),  # 0 in float32
        ({"final": 0.0, "steps": 5}, "final is 0.0"),
        ({"final": math.inf, "steps": 5}, "final is inf"),
        ({"final": 0.3}, "annealing needs both"),
        ({"steps": 5}, "annealing needs both"),
        ({"steps": -1}, "steps is -1"),
        ({"final": 0.3, "steps": 5, "learned": True}, "no schedule"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"k": 0}, "k is 0"),
        ({"init_std": 0.0}, "init_std is 0.0"),
        ({"activation": "cube"}, "activation is 'cube'"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
    ],
)
def test_bad_gates_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence) as caught:
        DenseToSparse(**fields)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MoekitError)


def test_bad_designs_are_refused() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=4)
    with pytest.raises(SpecError, match="k is 7 but the bank has 6 experts"):
        MoESpec(DenseToSparse(k=7), bank)
    with pytest.raises(SpecError, match="all would be left out"):
        MoESpec(DenseToSparse(threshold=0.2), bank)
    with pytest.raises(SpecError, match="use Dropless"):
        MoESpec(DenseToSparse(), bank, Capacity())


def test_not_a_number_is_named_in_anomaly_mode_and_never_hidden() -> None:
    router, x_ND = router_of(), rows()
    x_ND[3, 2] = math.nan
    assert bool(router(x_ND).weight_NK[3].isnan().all())
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(SignalError, match="logits that are not finite"),
    ):
        router(x_ND)


def test_expected_load() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=4)
    assert MoESpec(DenseToSparse(), bank).expected_load() == EXPERTS
    annealed = DenseToSparse(temperature=2.0, final=0.3, steps=9, k=2)
    assert MoESpec(annealed, bank).expected_load() == pytest.approx(2)
