"""Scores, clusterings, alignment and UNCURL against brute force and other libraries."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from surgery_models import Blocks, tiny
from torch import Tensor

from moekit.errors import SpecError
from moekit.surgery import block_views
from moekit.surgery.methods import REAP, Frequency, HCSMoE, MSMoE, Random, RouterWeight, Uncurl
from moekit.surgery.methods.merging import alignment
from moekit.surgery.methods.method import best_in_groups
from moekit.surgery.methods.spectral import spectral_labels
from moekit.surgery.plan import BlockPlan
from moekit.surgery.prune import prune_model
from moekit.surgery.recorder import record_model
from moekit.surgery.statistics import BlockStatistics, Needs
from moekit.surgery.view import BlockView
from moekit.surgery.weights import ExpertWeights

DATA = Blocks()


def statistics(**changes: Any) -> BlockStatistics:
    """Statistics of eight experts, made up."""
    generator = torch.Generator().manual_seed(0)
    z_NE = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    values: dict[str, Any] = {
        "tokens": 50,
        "count_E": torch.tensor([10, 9, 8, 7, 6, 5, 4, 0]),
        "weight_E": torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 0], dtype=torch.float64),
        "gram_EE": z_NE.T @ z_NE,
        "norm_E": torch.ones(8, dtype=torch.float64),
        "weighted_norm_E": torch.tensor([5.0, 9, 1, 7, 3, 0, 8, 0], dtype=torch.float64),
        "mean_ED": torch.randn(8, 16, generator=generator, dtype=torch.float64),
        "input_SD": torch.randn(4, 16, generator=generator),
    }
    return BlockStatistics(**values | changes)


def view_of(name: str = "mixtral") -> BlockView:
    return block_views(tiny(name))[0]


def test_scores_by_hand() -> None:
    stats, view = statistics(), view_of()
    assert Frequency().plan(view, stats, 3).keep == (0, 1, 2)
    assert RouterWeight().plan(view, stats, 3).keep == (4, 5, 6)
    assert REAP().importance(stats).tolist() == pytest.approx([0.5, 1, 1 / 8, 1, 0.5, 0, 2, 0])
    assert REAP().plan(view, stats, 3).keep == (1, 3, 6)
    drawn = {Random(seed=s).plan(view, stats, 4).keep for s in range(20)}
    assert len(drawn) > 10
    with pytest.raises(SpecError, match="random ranks no experts"):
        Random().importance(stats)


def test_ties_go_to_the_first_and_groups_are_equal() -> None:
    assert best_in_groups(torch.ones(8), 4, 1) == [0, 1, 2, 3]
    assert best_in_groups(torch.arange(8.0), 4, 4) == [1, 3, 5, 7]
    with pytest.raises(SpecError, match="multiple of 4"):
        best_in_groups(torch.ones(8), 6, 4)
    with pytest.raises(SpecError, match="not finite"):
        best_in_groups(torch.full((8,), torch.nan), 4, 1)


def test_m_smoe_joins_the_most_similar_dominant() -> None:
    stats, view = statistics(), view_of()
    plan = MSMoE(align=False).plan(view, stats, 3)
    assert plan.keep == (0, 1, 2)
    cosine = stats.logit_similarity()
    for expert in range(3, 8):
        near = max(range(3), key=lambda d, e=expert: float(cosine[e, d]))
        assert plan.transfer_EK[expert].tolist() == [float(k == near) for k in range(3)]
    counts = stats.count_E.double()
    assert plan.merge_KE is not None
    for k in range(3):
        members = plan.transfer_EK[:, k].nonzero().flatten()
        want = torch.zeros(8, dtype=torch.float64)
        want[members] = counts[members] / counts[members].sum()
        torch.testing.assert_close(plan.merge_KE[k], want)


def slow_linkage(points: Tensor, count: int) -> set[frozenset[int]]:
    clusters = [frozenset([i]) for i in range(len(points))]

    def distance(a: frozenset[int], b: frozenset[int]) -> float:
        pairs = [float((points[i] - points[j]).norm()) for i in a for j in b]
        return sum(pairs) / len(pairs)

    while len(clusters) > count:
        a, b = min(itertools.combinations(clusters, 2), key=lambda pair: distance(*pair))
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return set(clusters)


def clusters_in(plan: BlockPlan) -> set[frozenset[int]]:
    return {frozenset(c.nonzero().flatten().tolist()) for c in plan.transfer_EK.T}


@pytest.mark.parametrize("count", range(2, 8))
def test_hc_smoe_is_average_linkage(count: int) -> None:
    stats, view = statistics(), view_of()
    plan = HCSMoE().plan(view, stats, count)
    assert stats.mean_ED is not None
    assert clusters_in(plan) == slow_linkage(stats.mean_ED, count)
    with pytest.raises(SpecError, match="record it with means"):
        HCSMoE().plan(view, statistics(mean_ED=None), count)


def random_expert(hidden: int, width: int = 5, bias: bool = False) -> ExpertWeights:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    biases = {"gate_bias": draw(hidden), "up_bias": draw(hidden), "down_bias": draw(width)}
    return ExpertWeights(
        draw(hidden, width), draw(width, hidden), draw(hidden, width), **biases if bias else {}
    )


def gain(first: ExpertWeights, second: ExpertWeights, order: Any) -> float:
    moved = second.reordered(torch.tensor(order))
    total = sum(
        float((value * dict(moved.items())[key]).sum())
        for key, value in first.items()
        if key != "down_bias"
    )
    return float(total)


@pytest.mark.parametrize("hidden", [1, 2, 5, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_alignment_is_the_best_of_all_permutations(hidden: int, bias: bool) -> None:
    first, second = random_expert(hidden, bias=bias), random_expert(hidden, bias=bias)
    order = alignment(first, second).tolist()
    orders = itertools.permutations(range(hidden))
    assert gain(first, second, order) == pytest.approx(max(gain(first, second, o) for o in orders))
    assert gain(first, second, order) >= gain(first, second, list(range(hidden))) - 1e-12


def test_alignment_undoes_a_permutation_and_keeps_the_function() -> None:
    view, expert = view_of(), random_expert(12, 16)
    shuffled = expert.reordered(torch.randperm(12))
    order = alignment(expert, shuffled)
    back = shuffled.reordered(order)
    for key, value in expert.items():
        assert value.equal(dict(back.items())[key])
    x_ND = torch.randn(9, 16, dtype=torch.float64)
    other = random_expert(12, 16)
    torch.testing.assert_close(
        view.compute(other.reordered(alignment(expert, other)), x_ND),
        view.compute(other, x_ND),
        rtol=1e-10,
        atol=1e-10,
    )


def blocked_affinity(sizes: list[int], seed: int) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    label = np.repeat(np.arange(len(sizes)), sizes)
    affinity = np.where(label[:, None] == label, 0.9, 0.2)
    affinity = affinity + 0.05 * generator.random(affinity.shape)
    affinity = (affinity + affinity.T) / 2
    np.fill_diagonal(affinity, 1.0)
    return affinity


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [[4, 4], [5, 2, 3], [3, 3, 3, 3], [1, 6, 2]])
def test_spectral_clusters_are_those_of_scikit_learn(sizes: list[int], seed: int) -> None:
    affinity = blocked_affinity(sizes, seed)
    labels = spectral_labels(affinity, len(sizes), seed)
    model = SpectralClustering(len(sizes), affinity="precomputed", random_state=0)
    want = model.fit_predict(affinity)
    pairs = set(zip(labels, want.tolist(), strict=True))
    assert len(pairs) == len(sizes) == len(set(labels))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_no_cluster_is_empty_even_if_all_are_alike(count: int) -> None:
    labels = spectral_labels(np.ones((8, 8)), count, seed=0)
    assert set(labels) == set(range(count))
    assert labels == spectral_labels(np.ones((8, 8)), count, seed=0)


def test_uncurl_follows_the_logits_of_the_task_and_not_the_rows() -> None:
    """Orthogonal rows, whose logits go together in one way on one task, in another on another."""
    view = view_of("mixtral")
    rows_ED = torch.eye(8, 16)
    base_N4 = torch.randn(200, 4, dtype=torch.float64)
    found = []
    for order in ([0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]):
        x_ND = torch.zeros(200, 16, dtype=torch.float64)
        x_ND[:, :8] = base_N4[:, order]
        z_NE = x_ND @ rows_ED.double().T
        plan = Uncurl().plan(view, statistics(gram_EE=z_NE.T @ z_NE), 4)
        found.append(clusters_in(plan))
    assert found[0] == {frozenset([i, i + 4]) for i in range(4)}
    assert found[1] == {frozenset([2 * i, 2 * i + 1]) for i in range(4)}


@pytest.mark.parametrize("router", ["alias", "average", "dominant"])
def test_uncurl_recovers_groups_of_permuted_copies(router: Any) -> None:
    model = tiny("mixtral").double()
    model.set_experts_implementation("eager")  # the only one in float64
    for view in block_views(model):
        for e in range(4):
            view.set_expert(e + 4, view.expert(e).reordered(torch.randperm(16)))
            view.router.weight[e + 4] = view.router.weight[e]
    method = Uncurl(router=router)
    stats = record_model(model, DATA)
    small, plans = prune_model(model, method, [4] * 3, stats)
    assert all(clusters_in(p) == {frozenset([i, i + 4]) for i in range(4)} for p in plans)
    inner = getattr(small, "inner", small)
    x_ND = torch.randn(6, 16, dtype=torch.float64)
    for plan, old, new in zip(plans, block_views(model), block_views(inner), strict=True):
        bank = new.architecture.experts(new.block)
        for place, head in enumerate(plan.keep):
            for member in (head % 4, head % 4 + 4):
                torch.testing.assert_close(
                    new.compute(bank[place], x_ND),
                    old.compute(old.expert(member), x_ND),
                    rtol=1e-10,
                    atol=1e-10,
                )
    if router == "alias":
        with torch.no_grad():
            small.inner.set_experts_implementation("eager")
            want = model(DATA.tokens).logits
            torch.testing.assert_close(small(DATA.tokens).logits, want, rtol=1e-5, atol=1e-5)


def test_without_alignment_the_mean_of_permuted_copies_is_another_function() -> None:
    view = view_of()
    for e in range(4):
        view.set_expert(e + 4, view.expert(e).reordered(torch.randperm(16)))
        view.router.weight[e + 4] = view.router.weight[e]
    z_NE = torch.randn(90, 16, dtype=torch.float64) @ view.router.weight.double().T
    stats, x_ND = statistics(gram_EE=z_NE.T @ z_NE), torch.randn(6, 16)
    for align in (True, False):
        plan = Uncurl(align=align).plan(view, stats, 4)
        bank = plan.new_bank(view.bank)
        near = torch.allclose(
            view.compute(bank[0], x_ND), view.compute(view.expert(plan.keep[0]), x_ND), atol=1e-4
        )
        assert near == align


def test_uncurl_needs_more_than_one_token() -> None:
    with pytest.raises(SpecError, match="1 token tells nothing"):
        Uncurl().plan(view_of(), statistics(tokens=1), 4)


def test_needs_add_up() -> None:
    assert Needs(norms=True, samples=3) | Needs(means=True, samples=5) == Needs(True, True, 5)
