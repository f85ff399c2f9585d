"""Top-k, expert choice, hash and warm-up routers against slow loops, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.errors import SignalError, SpecError
from moekit.routing import (
    DenseWarmup,
    ExpertChoice,
    Hash,
    Load,
    Pathway,
    ReLURouting,
    RouterSpec,
    Routing,
    Signals,
    Site,
    TopK,
)

WORKING = ("feed_forward",) * 8


def load_of(counts: list[int], tokens: int = 10) -> Load:
    return Load(torch.tensor(counts), torch.tensor(tokens))


def slow_top_k(spec: TopK, logits: list[float], bias: list[float], zero: set[int]):
    """One token's ids and weights, by sorting Python floats."""
    if spec.score == "sigmoid":
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    else:
        total = sum(math.exp(z) for z in logits)
        scores = [math.exp(z) / total for z in logits]
    ranking = [s + b for s, b in zip(scores, bias, strict=True)]
    if spec.groups > 1:
        size = len(logits) // spec.groups
        members = [range(g * size, (g + 1) * size) for g in range(spec.groups)]
        best = 1 if spec.group_score == "max" else 2
        value = [sum(sorted((ranking[e] for e in m), reverse=True)[:best]) for m in members]
        chosen = sorted(range(spec.groups), key=lambda g: -value[g])[: spec.top_groups]
        allowed = {e for g in chosen for e in members[g]}
    else:
        allowed = set(range(len(logits)))
    ids = sorted(allowed, key=lambda e: -ranking[e])[: spec.k]
    weights = [scores[e] for e in ids]
    if spec.normalize == "nonzero":
        weights = [0.0 if e in zero else w for e, w in zip(ids, weights, strict=True)]
    if spec.normalize != "none":
        total = sum(weights)
        weights = [w / total if total else 0.0 for w in weights]
    return ids, [w * spec.scale for w in weights]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "spec",
    [
        TopK(k=1),
        TopK(k=3, normalize="none"),
        TopK(k=2, normalize="nonzero"),
        TopK(k=4, normalize="nonzero", score="sigmoid"),
        TopK(k=2, score="sigmoid", scale=2.5),
        TopK(k=8),
        TopK(k=3, groups=4, top_groups=2, group_score="max"),
        TopK(k=3, groups=4, top_groups=2, group_score="top2"),
        TopK(k=3, groups=4, top_groups=2, score="sigmoid", bias_rate=0.1, bias=True),
        TopK(k=2, bias_rate=0.1),
        TopK(k=3, groups=2, top_groups=1, bias_rate=0.1),
        DenseWarmup(k=2, warmup_k=4, warmup_steps=0),
    ],
    ids=str,
)
def test_top_k_equals_a_slow_loop(spec: TopK, seed: int) -> None:
    torch.manual_seed(seed)
    kinds = ("zero", *WORKING[:4], "zero", "zero", "copy")
    router = spec.build(Site(6, kinds)).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    bias = [0.0] * 8
    if spec.bias_rate:
        router.correction_bias_E.copy_(torch.randn(8) * 0.3)
        bias = router.correction_bias_E.tolist()
    x_ND = torch.randn(20, 6, dtype=torch.float64)
    routing = router(x_ND)
    logits = x_ND @ router.weight.T
    if router.bias is not None:
        logits = logits + router.bias
    torch.testing.assert_close(routing.logits_NE, logits)
    for n in range(20):
        ids, weights = slow_top_k(spec, logits[n].tolist(), bias, {0, 5, 6})
        assert routing.expert_NK[n].tolist() == ids
        assert routing.weight_NK[n].tolist() == pytest.approx(weights, abs=1e-12)


def test_normalising_the_selected_is_a_softmax_over_the_selected() -> None:
    torch.manual_seed(0)
    router = TopK(k=3).build(Site(6, WORKING)).double()
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(9, 6, dtype=torch.float64))
    wanted = routing.logits_NE.gather(1, routing.expert_NK).softmax(-1)
    torch.testing.assert_close(routing.weight_NK, wanted)


def test_the_balancing_bias_moves_towards_the_mean_load_and_leaves_the_weights() -> None:
    spec = TopK(k=2, score="sigmoid", bias_rate=1e-3)
    router = spec.build(Site(4, WORKING[:4]))
    router.update(load_of([5, 1, 3, 3]))
    expected = torch.tensor([-1e-3, 1e-3, 0.0, 0.0])
    assert torch.equal(router.correction_bias_E, expected)
    router.correction_bias_E.zero_()
    x_ND = torch.randn(7, 4)
    before = router(x_ND)
    router.correction_bias_E.fill_(0.5)  # the same for all: nothing may change
    after = router(x_ND)
    assert torch.equal(before.expert_NK, after.expert_NK)
    assert torch.equal(before.weight_NK, after.weight_NK)
    router.correction_bias_E.copy_(torch.tensor([100.0, 0.0, 0.0, 0.0]))
    assert bool((router(x_ND).expert_NK[:, 0] == 0).all())
    assert TopK(k=1).build(Site(4, WORKING)).state_dict().keys() == {"weight"}


def test_the_bias_alone_balances_a_lopsided_router() -> None:
    """DeepSeek-V3's rule with a frozen router: the worst expert comes down to the mean."""
    torch.manual_seed(0)
    router = TopK(k=2, score="sigmoid", bias_rate=0.01).build(Site(16, WORKING))
    torch.nn.init.normal_(router.weight, std=0.3)
    drift = torch.randn(16) * 0.5
    violations = []
    for _ in range(300):
        routing = router(torch.randn(512, 16) + drift)
        load = Load.of(routing)
        violations.append(float(load.assignments_E.max() / load.assignments_E.double().mean()))
        router.update(load)
    assert violations[0] > 1.8
    assert sum(violations[-50:]) / 50 < 1.15


def test_jitter_and_noise_are_for_training_alone() -> None:
    for spec in (TopK(k=2, jitter=0.5), TopK(k=2, noise=True)):
        router = spec.build(Site(6, WORKING))
        torch.nn.init.normal_(router.weight)
        x_ND = torch.randn(50, 6)
        copy = x_ND.clone()
        plain = TopK(k=2).build(Site(6, WORKING))
        plain.load_state_dict({"weight": router.weight})
        router.eval()
        assert torch.equal(router(x_ND).weight_NK, plain(x_ND).weight_NK)
        router.train()
        assert not torch.equal(router(x_ND).weight_NK, plain(x_ND).weight_NK)
        assert torch.equal(x_ND, copy)  # the released code scales its input in place


@torch.no_grad()
def test_noise_has_the_learned_standard_deviation() -> None:
    """ε · softplus(x W_noise), Shazeer et al. 2017, eq. 4."""
    torch.manual_seed(0)
    router = TopK(k=1, noise=True).build(Site(3, WORKING[:2]))
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.noise_weight)
    x_ND = torch.randn(1, 3)
    routing = router(x_ND.expand(20000, 3))
    log_N2 = routing.scores_NE.log()  # their difference is that of the noisy logits
    found = log_N2[:, 0] - log_N2[:, 1]
    clean_2 = (x_ND @ router.weight.T)[0]
    std_2 = torch.nn.functional.softplus(x_ND @ router.noise_weight.T)[0]
    assert float(found.std()) == pytest.approx(float(std_2.square().sum().sqrt()), rel=0.03)
    assert float(found.mean()) == pytest.approx(float(clean_2[0] - clean_2[1]), abs=0.05)
    # The clean logits are what losses and the next layer see.
    torch.testing.assert_close(routing.logits_NE, clean_2.expand(20000, 2))


# --- expert choice ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.7, 8.0])
def test_expert_choice_equals_a_slow_loop(capacity: float, seed: int) -> None:
    torch.manual_seed(seed)
    router = ExpertChoice(capacity=capacity).build(Site(6, WORKING)).double()
    torch.nn.init.normal_(router.weight)
    x_ND = torch.randn(21, 6, dtype=torch.float64)
    valid_N = torch.rand(21) < 0.8
    routing = router(x_ND, Signals(valid_N=valid_N))
    scores = (x_ND @ router.weight.T).softmax(-1).detach()
    tokens = [n for n in range(21) if valid_N[n]]
    places = min(len(tokens), math.ceil(capacity * len(tokens) / 8))
    wanted = torch.full((21, 8), -1)
    for e in range(8):
        for n in sorted(tokens, key=lambda n: -float(scores[n, e]))[:places]:
            wanted[n, e] = e
    assert torch.equal(routing.expert_NK, wanted)
    torch.testing.assert_close(routing.weight_NK, scores * (wanted >= 0))
    assert routing.load_E().tolist() == [places] * 8


# --- hash ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("vocabulary", [8, 100, 101])
def test_hash_tables_are_even_and_distinct(vocabulary: int, k: int) -> None:
    router = Hash(k=k, seed=5).build(Site(6, WORKING, vocabulary=vocabulary))
    routing = router(torch.randn(vocabulary, 6), Signals(token_id_N=torch.arange(vocabulary)))
    assert all(len(set(row)) == k for row in routing.expert_NK.tolist())
    assert bool((routing.weight_NK == 1 / k).all())
    for slot in range(k):  # every slot spreads the ids evenly, up to one
        counts = torch.bincount(routing.expert_NK[:, slot], minlength=8)
        assert int(counts.max() - counts.min()) <= 1
    same = Hash(k=k, seed=5).build(Site(6, WORKING, vocabulary=vocabulary))
    other = Hash(k=k, seed=6).build(Site(6, WORKING, vocabulary=vocabulary))
    assert torch.equal(router.table_VK, same.table_VK)
    assert vocabulary == 8 or not torch.equal(router.table_VK, other.table_VK)


# --- warm-up ------------------------------------------------------------------------------------


def test_warm_up_is_near_dense_for_its_steps_and_survives_a_checkpoint() -> None:
    spec = DenseWarmup(k=1, warmup_k=6, warmup_steps=3)
    router, restored = (spec.build(Site(6, WORKING)) for _ in range(2))
    x_ND = torch.randn(5, 6)
    widths = []
    for step in range(5):
        for _ in range(2):  # micro-batches do not count
            routing = router(x_ND)
        widths.append(routing.expert_NK.shape[1])
        assert router.eval()(x_ND).expert_NK.shape[1] == 1
        router.train().update(load_of([1] * 8))
        if step == 1:
            restored.load_state_dict(router.state_dict())
    assert widths == [6, 6, 6, 1, 1]
    assert int(router.steps_left) == 0
    assert restored(x_ND).expert_NK.shape[1] == 6
    restored.update(load_of([1] * 8))
    assert restored(x_ND).expert_NK.shape[1] == 1


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (TopK, {"k": 0}),
        (TopK, {"k": 1.5}),
        (TopK, {"k": True}),
        (TopK, {"jitter": 1.0}),
        (TopK, {"jitter": -0.1}),
        (TopK, {"scale": 0.0}),
        (TopK, {"bias_rate": -1e-3}),
        (TopK, {"groups": 2, "top_groups": 3}),
        (TopK, {"groups": 0}),
        (TopK, {"score": "relu"}),
        (TopK, {"init_std": 0.0}),
        (TopK, {"init_std": -1.0}),
        (DenseWarmup, {"warmup_k": 0}),
        (DenseWarmup, {"warmup_steps": -1}),
        (Pathway, {"logit_norm": "layer"}),
        (ReLURouting, {"k": 0}),
        (ReLURouting, {"init_std": 0.0}),
        (ExpertChoice, {"capacity": 0.0}),
        (ExpertChoice, {"init_std": 0.0}),
        (Hash, {"k": 0}),
    ],
    ids=str,
)
def test_bad_values_are_refused(kind: type[RouterSpec], fields: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=kind.__name__):
        kind(**fields)


@pytest.mark.parametrize(
    "spec",
    [
        TopK(k=9),
        TopK(k=2, groups=3),
        TopK(k=3, groups=4),
        TopK(k=1, groups=8),
        DenseWarmup(k=1, warmup_k=9),
        DenseWarmup(k=1, warmup_k=3, groups=4),
        ReLURouting(k=8),
        ExpertChoice(capacity=8.5),
        Hash(k=9),
    ],
    ids=str,
)
def test_banks_that_are_too_small_are_refused(spec: RouterSpec) -> None:
    with pytest.raises(SpecError, match=type(spec).__name__):
        spec.build(Site(6, WORKING, vocabulary=10))


def test_signals_are_checked_by_name_and_shape() -> None:
    router = Hash(k=1).build(Site(6, WORKING, vocabulary=10))
    x_ND = torch.randn(5, 6)
    with pytest.raises(SignalError, match="HashRouter needs the signal token_id_N"):
        router(x_ND)
    with pytest.raises(SignalError, match=r"token_id_N has shape \(4,\); wanted \(5,\)"):
        router(x_ND, Signals(token_id_N=torch.zeros(4, dtype=torch.int64)))
    top = TopK(k=1).build(Site(6, WORKING))
    with pytest.raises(SignalError, match=r"valid_N has shape \(5, 1\)"):
        top(x_ND, Signals(valid_N=torch.ones(5, 1, dtype=torch.bool)))
    with pytest.raises(SignalError, match=r"valid_N has dtype torch.int64; wanted torch.bool"):
        top(x_ND, Signals(valid_N=torch.ones(5, dtype=torch.int64)))
    with pytest.raises(SpecError, match="size of the vocabulary"):
        Hash(k=1).build(Site(6, WORKING))


def test_anomaly_mode_names_the_router_of_bad_values() -> None:
    router = TopK(k=1).build(Site(6, WORKING))
    x_ND = torch.full((2, 6), float("nan"))
    router(x_ND)  # unchecked: looking at values waits for the device
    with torch.autograd.set_detect_anomaly(True), pytest.raises(SignalError, match="TopKRouter"):
        router(x_ND)

    class Wild(type(router)):
        def select(self, scores_NE: Tensor) -> Tensor:
            return torch.full((len(scores_NE), 1), 8)

        def combine_weights(self, logits_NE, scores_NE, expert_NK) -> Tensor:
            return torch.ones(expert_NK.shape)

    router.__class__ = Wild
    with torch.autograd.set_detect_anomaly(True), pytest.raises(SpecError, match="outside 0 to 7"):
        router(torch.randn(2, 6))


# --- the routing itself -------------------------------------------------------------------------


def test_routings_refuse_shapes_that_disagree() -> None:
    with pytest.raises(SpecError, match=r"must both be \(N, K\)"):
        Routing(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), 4)
    with pytest.raises(SpecError, match=r"must both be \(N, K\)"):
        Routing(torch.zeros(3, dtype=torch.int64), torch.zeros(3), 4)


def test_load_and_dense_weights_are_counted_slot_by_slot() -> None:
    expert_NK = torch.tensor([[0, 2, -1], [2, -1, -1], [-1, -1, -1], [1, 0, 2]])
    weight_NK = torch.rand(4, 3).masked_fill(expert_NK < 0, 0.0)
    routing = Routing(expert_NK, weight_NK, experts=4)
    assert routing.load_E().tolist() == [2, 1, 3, 0]
    dense = routing.dense_weight_NE()
    assert dense.shape == (4, 4)
    for n, row in enumerate(expert_NK.tolist()):
        for e in range(4):
            wanted = weight_NK[n, row.index(e)] if e in row else torch.tensor(0.0)
            assert dense[n, e] == wanted
    masked = routing.without_padding(torch.tensor([True, True, True, False]))
    assert masked.load_E().tolist() == [1, 0, 2, 0]
    assert int(Load.of(masked).tokens) == 3
    assert int(Load.of(routing).tokens) == 4
