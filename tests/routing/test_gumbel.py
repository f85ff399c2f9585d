"""The Gumbel-softmax gate: Jang et al. 2017, and GG MoE's use of it (arXiv 2502.03608)."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from moekit.dispatch import Capacity
from moekit.errors import MoekitError, SpecError
from moekit.experts import SwiGLU
from moekit.layer import MoE, MoESpec
from moekit.routing import GumbelSoftmax, GumbelSoftmaxRouter, Site
from moekit.routing.softmax import gumbel_like

EXPERTS, WIDTH = 5, 8
SITE = Site(WIDTH, ("feed_forward",) * EXPERTS)
LOGITS = (0.4, -0.7, 1.1, 0.0, -0.2)


def router_of(**fields: object) -> GumbelSoftmaxRouter:
    """A float64 router with weights large enough to tell experts apart."""
    router = GumbelSoftmax(**fields).build(SITE).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(value * 0.5)
    return router


def constant_router(**fields: object) -> GumbelSoftmaxRouter:
    """A router whose logits are LOGITS for every row."""
    router = router_of(**fields)
    router.weight.data.zero_()
    router.bias.data.copy_(torch.tensor(LOGITS))
    return router


def rows(tokens: int = 20) -> Tensor:
    return torch.randn(tokens, WIDTH, dtype=torch.float64)


def layer_of(spec: GumbelSoftmax, experts: int = EXPERTS) -> MoE:
    layer = MoESpec(spec, SwiGLU(count=experts, hidden=8)).build(WIDTH).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


# --- distributions ------------------------------------------------------------------------------


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_like(torch.empty(40_000, dtype=torch.float64))
    assert kstest(noise.numpy(), "gumbel_r").pvalue > 0.01
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.03)  # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.05)


@pytest.mark.parametrize("fields", [{"temperature": 1e-4}, {"hard": True}, {"temperature": 2.0}])
def test_the_largest_weight_falls_as_the_softmax(fields: dict[str, object]) -> None:
    """Gumbel-max: at every temperature P(argmax = e) = softmax(ℓ)_e."""
    routing = constant_router(**fields)(rows(20_000))
    count_E = torch.bincount(routing.weight_NK.argmax(-1), minlength=EXPERTS)
    wanted_E = torch.tensor(LOGITS, dtype=torch.float64).softmax(0)
    assert chisquare(count_E.numpy(), (wanted_E * 20_000).numpy()).pvalue > 0.01
    torch.testing.assert_close(routing.scores_NE[0], wanted_E)


def test_two_experts_have_a_logistic_log_ratio() -> None:
    """log(w_0/w_1) = (ℓ_0 - ℓ_1 + logistic noise) / τ."""
    weight_NK = constant_router(temperature=0.8)(rows(20_000)).weight_NK
    ratio_N = weight_NK[:, 0].log() - weight_NK[:, 1].log()
    standard = ratio_N * 0.8 - (LOGITS[0] - LOGITS[1])
    assert kstest(standard.detach().numpy(), "logistic").pvalue > 0.01


def test_limits_of_the_temperature() -> None:
    x_ND = rows(200)
    cold, hot = router_of(temperature=1e-9)(x_ND), router_of(temperature=1e9)(x_ND)
    assert bool((cold.used_NK.sum(-1) == 1).all())
    assert bool((cold.weight_NK.amax(-1) == 1).all())
    torch.testing.assert_close(hot.weight_NK, torch.full_like(hot.weight_NK, 1 / EXPERTS))
    settled = router_of(temperature=1e9).eval()(x_ND)
    torch.testing.assert_close(settled.weight_NK, torch.full_like(hot.weight_NK, 1 / EXPERTS))


def test_every_row_has_its_own_noise_in_training() -> None:
    weight_NK = constant_router()(rows(50)).weight_NK
    assert len({tuple(row) for row in weight_NK.tolist()}) == 50


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 2.2])
@pytest.mark.parametrize("hard", [False, True])
def test_weights_and_gradients_equal_those_of_torch(hard: bool, temperature: float) -> None:
    router, x_ND = router_of(hard=hard, temperature=temperature), rows()
    cotangent = torch.randn(20, EXPERTS, dtype=torch.float64)
    found = []
    torch.manual_seed(7)
    routing = router(x_ND)
    (gradient,) = torch.autograd.grad((routing.weight_NK * cotangent).sum(), router.weight)
    found.append([routing.weight_NK, gradient])
    torch.manual_seed(7)
    logits_NE = x_ND @ router.weight.T + router.bias
    theirs = torch.nn.functional.gumbel_softmax(logits_NE, temperature, hard=hard)
    (gradient,) = torch.autograd.grad((theirs * cotangent).sum(), router.weight)
    found.append([theirs, gradient])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)


def test_straight_through_has_the_gradient_of_the_soft_sample_in_a_layer() -> None:
    """Same noise, same cotangent of the weights: the gate's gradients agree, in every expert."""
    soft, hard = (layer_of(GumbelSoftmax(temperature=0.9, hard=h)) for h in (False, True))
    hard.load_state_dict(soft.state_dict())
    x_ND = rows()
    found = []
    for layer in (soft, hard):
        torch.manual_seed(3)
        out = layer(x_ND)
        parameters = list(layer.router.parameters())
        found.append(torch.autograd.grad(out.y.sum(), parameters))
    for of_soft, of_hard in zip(*found, strict=True):  # y is linear in the weights
        torch.testing.assert_close(of_hard, of_soft, rtol=1e-10, atol=1e-12)
        assert bool((of_soft != 0).all())


def test_straight_through_runs_one_expert_at_full_weight() -> None:
    layer, x_ND = layer_of(GumbelSoftmax(hard=True)), rows()
    trained = layer(x_ND)
    assert torch.equal(trained.routing.weight_NK.sort(-1).values[:, -1], torch.ones(20).double())
    assert bool((trained.routing.weight_NK.sort(-1).values[:, :-1] == 0).all())
    assert int(trained.rows_E.sum()) == 20 * EXPERTS  # its gradient needs all outputs
    settled = layer.eval()(x_ND)
    assert int(settled.rows_E.sum()) == 20
    best_N = settled.routing.logits_NE.argmax(-1)
    assert torch.equal(settled.routing.weight_NK.argmax(-1), best_N)
    assert bool((settled.routing.weight_NK.sum(-1) == 1).all())


def test_soft_gradient_equals_finite_differences_and_reaches_every_expert() -> None:
    router = router_of(temperature=0.7)
    names = [name for name, _ in router.named_parameters()]

    def weights(x_ND: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same noise at every evaluation
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(router, given, (x_ND,)).weight_NK

    leaves = [leaf.detach().clone().requires_grad_() for leaf in (rows(4), *router.parameters())]
    assert torch.autograd.gradcheck(weights, leaves)
    cotangent = torch.randn(4, EXPERTS, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights(*leaves) * cotangent).sum(), leaves[1])
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("training", [True, False])
def test_one_expert_does_not_depend_on_the_gate(training: bool) -> None:
    layer, x_ND = layer_of(GumbelSoftmax(), experts=1).train(training), rows()
    before = layer(x_ND).y
    torch.nn.init.normal_(layer.router.weight, std=5.0)
    torch.testing.assert_close(layer(x_ND).y, before, rtol=1e-12, atol=1e-12)


def test_a_restored_generator_reproduces_the_noise() -> None:
    router, x_ND = router_of(), rows()
    router(x_ND)
    state = torch.get_rng_state()
    wanted = [router(x_ND).weight_NK for _ in range(2)]
    torch.set_rng_state(state)
    for weight_NK in wanted:
        assert torch.equal(router(x_ND).weight_NK, weight_NK)
    assert not torch.equal(wanted[0], wanted[1])


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
def test_evaluation_is_deterministic_and_leaves_the_generator_alone(hard: bool) -> None:
    router, x_ND = router_of(hard=hard).eval(), rows()
    state = torch.get_rng_state()
    first = router(x_ND).weight_NK
    torch.manual_seed(99)
    assert torch.equal(router(x_ND).weight_NK, first)
    torch.set_rng_state(state)
    router(x_ND)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_is_the_mean_over_the_stored_draws() -> None:
    router, x_ND = router_of(samples=4, temperature=0.6).eval(), rows()
    routing = router(x_ND)
    draws = [
        ((routing.logits_NE + router.noise_ES[:, s].double()) / 0.6).softmax(-1) for s in range(4)
    ]
    torch.testing.assert_close(routing.weight_NK, sum(draws) / 4, rtol=1e-12, atol=0)
    for other in (routing.logits_NE / 0.6, routing.logits_NE):  # Jensen: neither softmax
        assert float((routing.weight_NK - other.softmax(-1)).detach().abs().max()) > 0.02


def test_the_mean_of_outputs_is_the_output_of_the_mean_gate() -> None:
    layer, x_ND = layer_of(GumbelSoftmax(samples=6)).eval(), rows()
    wanted = layer(x_ND).y
    table_ES = layer.router.noise_ES.clone()
    outputs = []
    for s in range(6):
        layer.router.noise_ES.copy_(table_ES[:, s : s + 1].expand_as(table_ES))
        outputs.append(layer(x_ND).y)
    torch.testing.assert_close(sum(outputs) / 6, wanted, rtol=1e-10, atol=1e-12)


def test_draws_approach_the_mean_of_training_at_the_monte_carlo_rate() -> None:
    """The error falls as the inverse root of the number of draws, towards E[w] in training."""
    x_ND = torch.zeros(1, WIDTH, dtype=torch.float64)
    truth_E = constant_router()(x_ND.expand(400_000, -1)).weight_NK.mean(0)
    sizes, errors = [10, 100, 1000, 10_000], []
    for samples in sizes:
        squares = [
            (constant_router(samples=samples, seed=seed).eval()(x_ND).weight_NK[0] - truth_E)
            .square()
            .mean()
            for seed in range(60)
        ]
        errors.append(float(torch.stack(squares).mean().detach()) ** 0.5)
    x = torch.tensor(sizes).double().log()
    y = torch.tensor(errors).double().log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-0.5, abs=0.1)
    assert errors[-1] < 0.003


def test_draws_belong_to_the_seed_and_to_the_checkpoint(tmp_path: Path) -> None:
    ours, same, other = router_of(seed=4), router_of(seed=4), router_of(seed=5)
    assert torch.equal(ours.noise_ES, same.noise_ES)
    assert not torch.equal(ours.noise_ES, other.noise_ES)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    x_ND = rows()
    assert torch.equal(other.eval()(x_ND).weight_NK, ours.eval()(x_ND).weight_NK)
    revived = pickle.loads(pickle.dumps(ours))
    assert torch.equal(revived(x_ND).weight_NK, ours(x_ND).weight_NK)


def test_half_precision_keeps_the_draws() -> None:
    router = router_of()
    before = router.noise_ES.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        router.to(dtype)
        assert router.noise_ES.dtype == torch.float32
        assert torch.equal(router.noise_ES, before)


def test_the_names_of_experts_do_not_matter_in_evaluation() -> None:
    ours, renamed, x_ND = router_of().eval(), router_of().eval(), rows()
    order = torch.randperm(EXPERTS)
    for a, b in zip(ours.state_dict().values(), renamed.state_dict().values(), strict=True):
        b.copy_(a[order])
    torch.testing.assert_close(
        renamed(x_ND).weight_NK, ours(x_ND).weight_NK[:, order], rtol=1e-12, atol=0
    )


def test_large_logits_at_a_low_temperature_stay_finite() -> None:
    router = router_of(temperature=1e-37).float()
    with torch.no_grad():
        router.weight.mul_(1e4)
    for training in (True, False):
        x_ND = rows().float().requires_grad_()
        routing = router.train(training)(x_ND)
        routing.weight_NK.square().sum().backward()
        assert bool(torch.isfinite(routing.weight_NK).all())
        assert bool(torch.isfinite(x_ND.grad).all())


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; wanted a positive finite"),
        ({"temperature": -2.0}, "temperature is -2.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"samples": 0}, "samples is 0"),
        ({"init_std": -1.0}, "init_std is -1.0"),
        ({"hard": "yes"}, "hard is 'yes'"),
    ],
)
def test_bad_gates_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence) as caught:
        GumbelSoftmax(**fields)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MoekitError)


def test_a_capacity_limit_is_refused() -> None:
    with pytest.raises(SpecError, match="use Dropless"):
        MoESpec(GumbelSoftmax(), SwiGLU(count=EXPERTS, hidden=4), Capacity())


def test_not_a_number_shows_in_the_output() -> None:
    x_ND = rows()
    x_ND[3, 2] = math.nan
    for training in (True, False):
        assert bool(router_of().train(training)(x_ND).weight_NK[3].isnan().all())


def test_expected_load() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=4)
    assert MoESpec(GumbelSoftmax(), bank).expected_load() == EXPERTS
    assert MoESpec(GumbelSoftmax(hard=True), bank).expected_load() == pytest.approx(1)
