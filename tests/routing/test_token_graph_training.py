"""Gradients through a graph of tokens, what it composes with, and its bad inputs."""

from __future__ import annotations

import math

import pytest
import torch
from token_graph_cases import (
    EVERY_SPEC,
    EXPERTS,
    SITE,
    WIDTH,
    built,
    drawn,
    everyone,
    given_weights,
    scores,
)
from torch import Tensor

from moekit.dispatch import Rectified
from moekit.errors import SignalError, SpecError
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import (
    AttentionAware,
    AttentionWeights,
    Comet,
    DenseWarmup,
    DotProductAttention,
    Load,
    Permuted,
    RouterSpec,
    Sequences,
    SimilarityAware,
    TopK,
)

# --- gradients ----------------------------------------------------------------------------------


@EVERY_SPEC
def test_gradients_equal_finite_differences(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec), drawn(2, 4)
    names = [name for name, _ in router.named_parameters()]
    attention = signals.attention

    def output(x: Tensor, query: Tensor, key: Tensor, value: Tensor, *weights: Tensor) -> Tensor:
        given = signals.replace(
            attention=DotProductAttention(query, key, attention.scale), value_ND=value
        )
        parameters = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(router, parameters, (x, given)).scores_NE

    leaves = [x_BTD.flatten(0, 1), attention.query_BATC, attention.key_BGPC, signals.value_ND]
    leaves += [parameter.detach() for parameter in router.parameters()]
    assert torch.autograd.gradcheck(output, [leaf.clone().requires_grad_() for leaf in leaves])


def test_the_loss_of_one_token_trains_the_routing_of_its_neighbour() -> None:
    router, (x_BTD, _) = built(AttentionAware()), drawn(1, 3)
    weight = torch.tensor([[1.0, 0, 0], [0.0, 1, 0], [0.25, 0, 0.75]], dtype=torch.float64)
    x_ND = x_BTD[0].requires_grad_()
    router(x_ND, given_weights(weight)).scores_NE[2, 0].log().backward()
    touched = x_ND.grad.abs().sum(-1) > 0
    assert touched.tolist() == [True, False, True]
    assert float(router.router.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    "spec", [AttentionAware(detach=True), SimilarityAware(rank=0, detach=True)], ids=str
)
def test_a_detached_graph_is_the_same_without_gradient(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec), drawn(1, 5)
    attached = built(spec.replace(detach=False))
    query = signals.attention.query_BATC.clone().requires_grad_()
    signals = signals.replace(attention=signals.attention.replace(query_BATC=query))
    x_BTD.requires_grad_()
    found = scores(router, x_BTD, signals)
    assert torch.equal(found, scores(attached, x_BTD, signals))
    found[0, 4, 0].backward()
    assert query.grad is None
    # All that is left is the gradient through R: P is linear in it, with the graph held fixed.
    with torch.no_grad():
        view = signals.sequences.view(None)
        weight = signals.attention.weights(view)[0].mean(0)
        if isinstance(spec, SimilarityAware):
            score = x_BTD[0] @ x_BTD[0].T / math.sqrt(WIDTH)
            weight = score.masked_fill(~everyone(1, 5).tril()[0], -math.inf).softmax(-1)
    own = x_BTD.detach()[0].requires_grad_()
    (weight @ (own @ router.router.weight.T).softmax(-1))[4, 0].backward()
    torch.testing.assert_close(x_BTD.grad[0], own.grad)


@EVERY_SPEC
def test_scores_that_underflow_have_finite_gradients(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec).float(), drawn(2, 4)
    with torch.no_grad():
        router.router.weight.mul_(1e3)
    x_ND = x_BTD.float().flatten(0, 1).requires_grad_()
    router(x_ND, signals).weight_NK.square().sum().backward()
    for tensor in (x_ND, *router.parameters()):
        assert bool(torch.isfinite(tensor.grad).all())


@pytest.mark.parametrize("poison", ["factors", "weights"])
@EVERY_SPEC
def test_rows_that_see_nothing_keep_their_own_routing(spec: RouterSpec, poison: str) -> None:
    router, (x_BTD, signals) = built(spec), drawn(2, 4)
    valid_BT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    if poison == "weights":  # a softmax over nothing
        weight = signals.attention.weights(signals.sequences.view(valid_BT.flatten()))
        weight = weight.masked_fill(~valid_BT[:, None, :, None], math.nan)
        signals = signals.replace(attention=AttentionWeights(weight))
    x_ND = x_BTD.flatten(0, 1).requires_grad_()
    routing = router(x_ND, signals.replace(valid_N=valid_BT.flatten()))
    assert routing.expert_NK[:2].eq(-1).all()
    wanted = router.router(x_ND).scores_NE[:2]
    torch.testing.assert_close(routing.scores_NE[:2], wanted, rtol=1e-9, atol=1e-12)
    routing.scores_NE[2:].square().sum().backward()
    assert bool(torch.isfinite(x_ND.grad).all())


@pytest.mark.parametrize("scale", [1e3, 1e15])
def test_a_posterior_far_from_every_value_is_finite(scale: float) -> None:
    router = built(AttentionAware(heads="posterior", sigma=1e-15)).float()
    x_BTD, signals = drawn(1, 6)
    signals = signals.replace(value_ND=signals.value_ND.float() * scale)
    routing = router(x_BTD[0].float(), signals)
    assert bool(torch.isfinite(routing.scores_NE).all())


# --- composition --------------------------------------------------------------------------------


def test_state_belongs_to_the_wrapped_router() -> None:
    router = SimilarityAware(TopK(k=1, bias_rate=0.1)).build(SITE)
    router.update(Load(torch.tensor([4, 0, 0, 0]), torch.tensor(4)))
    assert router.router.correction_bias_E.tolist() == pytest.approx([-0.1, 0.1, 0.1, 0.1])
    warm = AttentionAware(DenseWarmup(k=1, warmup_k=3, warmup_steps=1)).build(SITE).double()
    x_BTD, signals = drawn(1, 4)
    assert warm(x_BTD[0], signals).expert_NK.shape == (4, 3)
    warm.update(Load(torch.zeros(4), torch.tensor(4)))
    assert warm(x_BTD[0], signals).expert_NK.shape == (4, 1)


def test_it_composes_with_permutations_and_rectification() -> None:
    router = Permuted(SimilarityAware(TopK(k=2)), steps=1).build(SITE).double()
    assert router.requires == {"sequences"}
    router.order_E.copy_(torch.tensor([2, 0, 3, 1]))
    x_BTD, signals = drawn(2, 5)
    found = router(x_BTD.flatten(0, 1), signals)
    wanted = router.router(x_BTD.flatten(0, 1), signals)
    assert torch.equal(found.expert_NK, router.order_E[wanted.expert_NK])
    bank = SwiGLU(count=EXPERTS, hidden=8)
    layer = MoESpec(AttentionAware(TopK(k=2)), bank, Rectified(groups=2)).build(WIDTH).double()
    out = layer(x_BTD, signals)
    assert torch.equal(out.routing.scores_NE, layer.router(x_BTD.flatten(0, 1), signals).scores_NE)
    with pytest.raises(SpecError, match="set normalize to selected"):
        MoESpec(AttentionAware(TopK(normalize="none")), bank, Rectified(groups=2))


def test_a_start_that_is_the_identity_in_the_mean() -> None:
    full = SimilarityAware().build(SITE)
    torch.testing.assert_close(full.query_weight, torch.eye(WIDTH) / math.sqrt(WIDTH))
    low = SimilarityAware(rank=20_000).build(SITE)
    torch.testing.assert_close(
        low.query_weight.T @ low.key_weight, torch.eye(WIDTH) / math.sqrt(WIDTH), rtol=0, atol=0.05
    )
    fixed = SimilarityAware(rank=0).build(SITE)
    assert [name for name, _ in fixed.named_parameters()] == ["router.weight"]


def test_experts_see_the_tokens_themselves() -> None:
    layer = MoESpec(AttentionAware(), SwiGLU(count=EXPERTS, hidden=8)).build(WIDTH).double()
    rows: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    x_BTD, _ = drawn(1, 6)
    weight = torch.rand(6, 6, dtype=torch.float64)
    layer(x_BTD, given_weights(weight / weight.sum(-1, keepdim=True)))
    seen = sorted(rows[0].tolist())
    assert seen == sorted(2 * x_BTD[0].tolist())


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimilarityAware(temperature=0.0), "temperature is 0.0; wanted 1e-06 or more"),
        (lambda: SimilarityAware(temperature=-1.0), "temperature is -1.0"),
        (lambda: SimilarityAware(temperature=math.nan), "temperature is nan"),
        (lambda: SimilarityAware(rank=-1), "rank is -1; wanted 0 or more, or None"),
        (lambda: SimilarityAware(detach=True), "set rank=0"),
        (lambda: AttentionAware(sigma=0.0), "sigma is 0.0; wanted a positive finite number"),
        (lambda: AttentionAware(sigma=math.inf), "sigma is inf"),
        (lambda: AttentionAware(heads="max"), "heads is 'max'"),
        (lambda: SimilarityAware(Comet()), "Comet does not tell apart; use TopK"),
        (lambda: AttentionAware(TopK(score="sigmoid")), "use score=softmax or mix=logit"),
        (
            lambda: MoESpec(SimilarityAware(TopK(k=5)), SwiGLU(count=4, hidden=8)),
            "k is 5 but the bank has 4 experts",
        ),
    ],
)
def test_bad_specs(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_sigmoid_logits_can_be_averaged() -> None:
    router = built(AttentionAware(TopK(score="sigmoid"), mix="logit"))
    x_BTD, _ = drawn(1, 6)
    found = router(x_BTD[0], given_weights(torch.full((6, 6), 1 / 6, dtype=torch.float64)))
    share_E = (x_BTD[0] @ router.router.weight.T).mean(0).sigmoid()
    torch.testing.assert_close(found.scores_NE, (share_E / share_E.sum()).expand(6, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": None}, r"rows \(N, D\) do not say which \(B, T, D\) they form"),
        ({"attention": None}, "needs the signal attention, which was not passed"),
        ({"sequences": Sequences(5)}, "has 5 sequences, which 12 rows cannot form"),
        ({"sequences": Sequences(0)}, "has 0 sequences, which 12 rows cannot form"),
        (
            {"sequences": Sequences(3, everyone(2, 4))},
            r"visible_BTP is \(2, 4, 4\) of torch.bool; wanted \(3 or 1, 4, 4\) of torch.bool",
        ),
        ({"sequences": Sequences(3, everyone(3, 4).float())}, "of torch.float32; wanted"),
        ({"sequences": Sequences(2)}, r"queries \(3, 4, 4, 3\) and keys .* B, T, P = 2, 6, 6"),
        (
            {"attention": AttentionWeights(torch.ones(3, 4, 4))},
            r"weights \(3, 4, 4\); wanted \(B, heads, T, P\) with B, T, P = 3, 4, 4",
        ),
        ({"attention": AttentionWeights(torch.ones(3, 1, 4, 5))}, r"weights \(3, 1, 4, 5\)"),
        ({"attention": AttentionWeights(torch.ones(3, 1, 5, 4))}, r"weights \(3, 1, 5, 4\)"),
    ],
)
def test_bad_signals(change: dict[str, object], message: str) -> None:
    router, (x_BTD, signals) = built(AttentionAware()), drawn(3, 4)
    with pytest.raises(SignalError, match=message):
        router(x_BTD.flatten(0, 1), signals.replace(**change))


def test_a_posterior_without_values_is_refused() -> None:
    router, (x_BTD, signals) = built(AttentionAware(heads="posterior")), drawn(3, 4)
    with pytest.raises(SignalError, match="needs the signal value_ND"):
        router(x_BTD.flatten(0, 1), signals.replace(value_ND=None))
    with pytest.raises(SignalError, match=r"value_ND has shape \(12, 4\); wanted \(12, 5\)"):
        router(x_BTD.flatten(0, 1), signals.replace(value_ND=torch.ones(12, 4)))


def test_weights_that_do_not_sum_to_one_are_refused_in_anomaly_mode() -> None:
    router, (x_BTD, _) = built(AttentionAware()), drawn(1, 4)
    weight = torch.eye(4, dtype=torch.float64)
    weight[2, 0] = 0.01
    router(x_BTD[0], given_weights(weight))
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        router(x_BTD[0], given_weights(torch.eye(4, dtype=torch.float64) * 1.0005))
        with pytest.raises(SignalError, match="do not sum to 1"):
            router(x_BTD[0], given_weights(weight))
        padded = given_weights(weight).replace(valid_N=torch.arange(4) != 2)
        router(x_BTD[0], padded)
