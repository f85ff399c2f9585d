"""Residual rules by themselves: closed forms, hand loops, matrices, gradients, bad inputs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit import AdamFirst, AdamMomentum, HeavyBall, MoESpec, Plain, RobustMomentum, SwiGLU, TopK
from moekit.errors import SignalError, SpecError
from moekit.residual import ResidualSpec, check_stack

MU = st.floats(-0.95, 0.95)
GAMMA = st.floats(0.01, 3)
STATEFUL = (HeavyBall(0.6, 0.5), AdamMomentum(decay=0.1), AdamFirst(0.6), RobustMomentum(0.4))
RULES = (Plain(), *STATEFUL)


def each_rule(rules=RULES):
    return pytest.mark.parametrize("rule", rules, ids=lambda rule: type(rule).__name__)


def run(rule: ResidualSpec, x, layers):
    """The hidden state after each of ``layers``, functions from where they look to an output."""
    state, found = (), []
    for layer in layers:
        delta, state = rule.increment(x, layer(rule.look_ahead(x, state)), state)
        x = x + delta
        found.append(x)
    return found


def constant(y):
    return lambda x: y.expand_as(x)


@given(mu=MU, gamma=GAMMA, depth=st.integers(1, 9))
def test_constant_experts_sum_the_geometric_series(mu, gamma, depth):
    x, k = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    found = run(HeavyBall(mu, gamma), x, [constant(k)] * depth)[-1]
    series = sum((1 - mu**j) / (1 - mu) for j in range(1, depth + 1))
    torch.testing.assert_close(found, x + gamma * series * k, rtol=1e-12, atol=1e-12)


@given(mu=MU, gamma=GAMMA, sigma=st.floats(0.1, 4), depth=st.integers(1, 9))
def test_linear_experts_are_powers_of_a_matrix(mu, gamma, sigma, depth):
    x = torch.tensor([[1.5]], dtype=torch.float64)
    found = run(HeavyBall(mu, gamma), x, [lambda z: -sigma * z] * depth)[-1].item()
    matrix = np.array([[1 - gamma * sigma, gamma * mu], [-sigma, mu]])
    wanted = np.linalg.matrix_power(matrix, depth) @ np.array([1.5, 0.0])
    assert found == pytest.approx(wanted[0], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("mu", "sigma", "radius"),
    [(0.7, 3.0, 0.83666), (0.7, 3.5, 1.23166), (0.0, 3.0, 2.0), (0.0, 0.5, 0.5)],
)
def test_spectral_radius(mu, sigma, radius):
    assert HeavyBall(mu, 1.0).spectral_radius(sigma) == pytest.approx(radius, abs=1e-5)


@given(mu=st.floats(0, 0.95), gamma=GAMMA, share=st.floats(0.05, 1.5))
def test_the_stable_region(mu, gamma, share):
    """Stable for 0 < gamma sigma < 2 (1 + mu), at a share of that limit."""
    radius = HeavyBall(mu, gamma).spectral_radius(share * 2 * (1 + mu) / gamma)
    if abs(share - 1) > 1e-3:
        assert (radius < 1) == (share < 1)


def test_momentum_contracts_where_the_plain_residual_diverges():
    x, layers = torch.ones(1, 1), [lambda z: -3 * z] * 40
    assert abs(run(HeavyBall(0.7), x, layers)[-1]) < 0.01
    assert abs(run(Plain(), x, layers)[-1]) > 1e11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_momentum_is_the_plain_residual_bit_for_bit(dtype):
    x = torch.randn(5, 7).to(dtype)
    layers = [constant(torch.randn(7).to(dtype)) for _ in range(4)]
    pairs = zip(run(HeavyBall(0.0, 1.0), x, layers), run(Plain(), x, layers), strict=True)
    for ours, plain in pairs:
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_subtracting_with_negated_experts_is_the_same_bit_for_bit(mu):
    """The released code's ``m <- mu m + gamma c``, ``x <- x - m``, with the sign in the experts."""
    spec = MoESpec(TopK(k=2), SwiGLU(count=3, hidden=4))
    layers = [spec.build(3) for _ in range(4)]
    for parameter in (p for layer in layers for p in layer.parameters()):
        torch.nn.init.normal_(parameter, std=0.7)
    start = torch.randn(5, 3)
    ours = run(HeavyBall(mu, 0.5), start, [lambda z, m=m: m(z).y for m in layers])
    x, state = start, torch.zeros_like(start)
    for layer, wanted in zip(layers, ours, strict=True):
        with torch.no_grad():
            layer.experts.down_proj.neg_()
        state = mu * state + 0.5 * layer(x).y  # a step of 1/2 loses nothing to rounding
        x = x - state
        assert torch.equal(x, wanted)


def test_a_single_layer_has_no_momentum():
    x, y = torch.randn(2, 3), torch.randn(3)
    for mu in (-0.5, 0.0, 0.9):
        (found,) = run(HeavyBall(mu, 0.3), x, [constant(y)])
        assert torch.equal(found, x + 0.3 * y)


def test_adam_is_adamw_without_bias_correction():
    """Against scalar arithmetic, number by number."""
    rule = AdamMomentum(beta1=0.8, beta2=0.95, eps=1e-6, gamma=0.3, decay=0.05)
    x = torch.randn(2, 3, dtype=torch.float64)
    ys = [torch.randn(2, 3, dtype=torch.float64) for _ in range(6)]
    found = run(rule, x, [constant(y) for y in ys])
    for i in range(2):
        for j in range(3):
            value, p, v = x[i, j].item(), 0.0, 0.0
            for y, after in zip(ys, found, strict=True):
                g = y[i, j].item()
                p = 0.8 * p + 0.2 * g
                v = 0.95 * v + 0.05 * g * g
                value = 0.95 * value + 0.3 * p / math.sqrt(v + 1e-6)
                assert after[i, j].item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_adam_first_has_a_closed_form_and_then_heavy_ball(decay):
    rule = AdamFirst(mu=0.6, gamma=0.5, adam_gamma=0.8, decay=decay)
    x = torch.randn(4, 3, dtype=torch.float64)
    ys = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    first, second, third = run(rule, x, [constant(y) for y in ys])
    saturated = 0.1 * ys[0] / (0.001 * ys[0] ** 2 + 1e-8).sqrt()
    torch.testing.assert_close(first, (1 - decay) * x + 0.8 * saturated)
    torch.testing.assert_close(second - first, 0.5 * (0.6 * ys[0] + ys[1]))
    torch.testing.assert_close(third - second, 0.5 * (0.36 * ys[0] + 0.6 * ys[1] + ys[2]))
    big = ys[0].abs() > 0.1  # where eps is nothing, Adam sees the sign alone
    torch.testing.assert_close(saturated[big], math.sqrt(10) * ys[0].sign()[big], rtol=1e-3, atol=0)


def test_adam_survives_half_precision():
    """In float16 an eps of 1e-8 is 0, and 0.001 y² is too."""
    for rule in (AdamMomentum(), AdamFirst()):
        found = run(rule, torch.zeros(2, 3, dtype=torch.float16), [torch.zeros_like] * 3)
        assert all(bool((x == 0).all()) for x in found)
        assert found[-1].dtype == torch.float16
    _, state = AdamMomentum().increment(torch.ones(2), torch.full((2,), 1e-2).half(), ())
    assert state[1].dtype == torch.float32
    assert bool((state[1] > 0).all())


def test_constants_of_robust_momentum():
    rule = RobustMomentum(rho=0.2, kappa=1.25, L=1.0)
    assert rule.step == pytest.approx(0.96)
    assert rule.momentum == pytest.approx(0.04)
    assert rule.look == pytest.approx(0.0416667, abs=1e-7)
    assert RobustMomentum(0.2, 1.25, 4.0).step == pytest.approx(0.24)


def test_robust_momentum_becomes_gradient_descent():
    rule = RobustMomentum(rho=1e-5, kappa=1 + 1e-5, L=2.0)
    assert rule.momentum < 1e-9
    assert rule.look < 1e-9
    assert rule.step == pytest.approx(0.5, rel=1e-4)


def test_robust_momentum_looks_ahead():
    """A hand loop with linear experts, in which a step at x itself gives another result."""
    rule, sigma = RobustMomentum(rho=0.5, kappa=1.5, L=1.0), 0.9
    s, a, w = 1.5 * 0.25 * 1.5, 1.5 * 0.125 / 0.5, 0.125 / (0.5 * 0.25 * 1.5)
    value, p = 2.0, 0.0
    for after in run(rule, torch.tensor([2.0], dtype=torch.float64), [lambda z: -sigma * z] * 5):
        p = a * p - sigma * (value + w * s * p)
        value += s * p
        assert after.item() == pytest.approx(value, rel=1e-12)


@each_rule()
def test_gradients_through_four_moe_layers(rule):
    if hasattr(rule, "eps"):  # Adam's root is steeper near 0 than finite differences can follow
        rule = rule.replace(eps=1e-2)
    spec = MoESpec(TopK(k=2), SwiGLU(count=3, hidden=4))
    layers = [spec.build(3).double() for _ in range(4)]
    weights = [layer.experts.down_proj for layer in layers]
    for parameter in (p for layer in layers for p in layer.parameters()):
        torch.nn.init.normal_(parameter, std=0.7)

    def last(x, *_):
        return run(rule, x, [lambda z, m=m: m(z).y for m in layers])[-1]

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(last, (x, *weights), atol=1e-5, rtol=1e-3)


@each_rule(STATEFUL)
def test_nothing_is_detached(rule):
    """The first layer reaches the second through the state alone, the direct path being cut."""
    x, first = torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    _, state = rule.increment(x, first, ())
    delta, _ = rule.increment(x, torch.randn(2, 3), state)
    (gradient,) = torch.autograd.grad(delta.sum(), first)
    assert bool((gradient != 0).all())


@each_rule(STATEFUL)
def test_the_state_is_an_argument_and_nothing_else(rule):
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    once, state = rule.increment(x, y, ())
    twice, other = rule.increment(x, y, ())
    assert torch.equal(once, twice)
    assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))
    continued, _ = rule.increment(x, y, state)
    assert not torch.equal(continued, once)


def test_plain_hands_a_state_on():
    x, state = torch.randn(2, 3), (torch.randn(2, 3),)
    assert Plain().increment(x, x, state)[1] is state
    assert Plain().look_ahead(x, state) is x


@pytest.mark.parametrize(
    "make",
    [
        lambda: HeavyBall(mu=1.0),
        lambda: HeavyBall(mu=-1.0),
        lambda: HeavyBall(mu=math.nan),
        lambda: HeavyBall(gamma=0.0),
        lambda: HeavyBall(gamma=-1.0),
        lambda: HeavyBall(gamma=math.inf),
        lambda: HeavyBall(mu="0.5"),
        lambda: AdamMomentum(beta1=1.0),
        lambda: AdamMomentum(beta2=-0.1),
        lambda: AdamMomentum(eps=0.0),
        lambda: AdamMomentum(gamma=0.0),
        lambda: AdamMomentum(decay=1.5),
        lambda: AdamFirst(mu=1.0),
        lambda: AdamFirst(adam_gamma=0.0),
        lambda: RobustMomentum(rho=0.0),
        lambda: RobustMomentum(rho=1.0),
        lambda: RobustMomentum(kappa=1.0),
        lambda: RobustMomentum(L=0.0),
        lambda: RobustMomentum(rho=0.2, kappa=4.0),
        lambda: ResidualSpec.from_dict({"kind": "Nesterov"}),
    ],
)
def test_bad_rules(make):
    with pytest.raises(SpecError) as refused:
        make()
    assert isinstance(refused.value, ValueError)


@each_rule(STATEFUL)
def test_a_state_of_another_kind_is_refused(rule):
    x = torch.randn(2, 3)
    _, state = rule.increment(x, x, ())
    wrong = {
        "shape": tuple(s[:1] for s in state),
        "dtype": tuple(s.double() for s in state),
        "device": tuple(s.to("meta") for s in state),
        "count": (*state, state[0]),
    }
    for bad in wrong.values():
        with pytest.raises(SignalError, match="handed"):
            rule.increment(x, x, bad)


@each_rule()
def test_a_rule_survives_json(rule):
    spec = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8), residual=rule)
    again = MoESpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


def test_a_layer_without_a_rule_in_its_file_is_plain():
    stored = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8)).to_dict()
    del stored["residual"]
    assert MoESpec.from_dict(stored).residual == Plain()


def test_one_kind_of_state_a_stack():
    check_stack((HeavyBall(0.1), Plain(), HeavyBall(0.9, 2.0)))
    check_stack(())
    for other in (AdamMomentum(), RobustMomentum(), AdamFirst()):
        with pytest.raises(SpecError, match="HeavyBall"):
            check_stack((HeavyBall(), Plain(), other))
