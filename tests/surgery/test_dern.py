"""DERN's three steps against slow loops, its invariants, and shortcuts that it must not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from surgery_models import Blocks, own_config, random_model, tiny
from torch import Tensor
from torch.nn import functional as F

from moekit import GELU, MoESpec, TopK
from moekit.errors import SpecError
from moekit.surgery import block_views
from moekit.surgery.methods import DERN, Frequency
from moekit.surgery.methods.spherical import recluster
from moekit.surgery.plan import BlockPlan, kept
from moekit.surgery.prune import prune_model
from moekit.surgery.recorder import record_model
from moekit.surgery.weights import ExpertWeights

HIDDEN, WIDTH = 6, 5
KEEP = [0, 2]


def bank_of(seed: int, experts: int = 5, hidden: int = HIDDEN) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return ExpertWeights(
        draw(experts, hidden, WIDTH), draw(experts, WIDTH, hidden), draw(experts, hidden, WIDTH)
    )


def importance(seed: int, experts: int = 5) -> Tensor:
    return torch.rand(experts, generator=torch.Generator().manual_seed(seed)).double() + 0.1


def run(expert: ExpertWeights, x_ND: Tensor) -> Tensor:
    e = expert.map(lambda t: t.to(x_ND.dtype))
    assert e.gate is not None
    return (F.silu(x_ND @ e.gate.T) * (x_ND @ e.up.T)) @ e.down.T


def test_neurons_add_up_to_the_expert() -> None:
    expert = bank_of(0)[1].map(lambda t: t.double())
    assert expert.gate is not None
    x_ND = torch.randn(7, WIDTH, dtype=torch.float64)
    total = sum(
        (F.silu(x_ND @ expert.gate[i]) * (x_ND @ expert.up[i]))[:, None] * expert.down[:, i]
        for i in range(HIDDEN)
    )
    torch.testing.assert_close(total, run(expert, x_ND), rtol=1e-12, atol=1e-12)


def slow_cosine(a: ExpertWeights, i: int, b: ExpertWeights, j: int, parts: Any) -> float:
    def vector(e: ExpertWeights, n: int) -> Tensor:
        assert e.gate is not None
        rows = {"gate": e.gate[n], "up": e.up[n], "down": e.down[:, n]}
        return torch.cat([rows[part] for part in parts]).double()

    return float(F.cosine_similarity(vector(a, i), vector(b, j), dim=0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parts", [("up", "down"), ("gate", "up", "down"), ("gate",), ("down",)])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.4])
def test_assignment_is_the_best_of_every_pair(seed: int, parts: Any, alpha: float) -> None:
    bank, method = bank_of(seed), DERN(alpha=alpha, parts=parts)
    found = method.reassign(bank, KEEP)
    plan = method.recombine(bank, importance(seed), KEEP)
    for source in (1, 3, 4):
        share = [0, 0]
        for i in range(HIDDEN):
            best = [
                max(slow_cosine(bank[source], i, bank[r], j, parts) for j in range(HIDDEN))
                for r in KEEP
            ]
            want = int(best[1] > best[0]) if max(best) > alpha else -1
            assert int(found[source][0][i]) == want
            if want >= 0:
                share[want] += 1
        assert plan.transfer_EK[source].tolist() == pytest.approx([s / HIDDEN for s in share])
    assert bool((plan.transfer_EK.sum(1) <= 1 + 1e-12).all())


def slow_kmeans(
    points: Tensor, weights: Tensor, count: int, distinct: float | None, iterations: int
) -> Tensor:
    """The paper's step written out in loops; from the first points where ``distinct`` is None."""
    order = sorted(range(len(points)), key=lambda s: -float(points[s, :WIDTH].abs().max()))
    unit = [points[s] / points[s].norm() for s in range(len(points))]
    starts: list[int] = list(range(count)) if distinct is None else []
    for s in order if distinct is not None else []:
        near = any(float(unit[s] @ unit[c]) >= distinct for c in starts)
        if len(starts) < count and (not near or distinct >= 1):
            starts.append(s)
    while len(starts) < count:
        rest = [s for s in range(len(points)) if s not in starts]
        starts.append(min(rest, key=lambda s: max(float(unit[s] @ unit[c]) for c in starts)))
    centres = [points[s] for s in starts]
    labels: list[int] = []
    for _ in range(iterations):
        cosine = [[float(u @ (c / c.norm())) for c in centres] for u in unit]
        new = [max(range(count), key=lambda c, row=row: row[c]) for row in cosine]
        if new == labels:
            break
        labels = new
        for c in range(count):
            mine = [s for s in range(len(points)) if labels[s] == c]
            assert mine, "the example must leave no cluster empty"
            length = sum(float(points[s].norm()) for s in mine) / len(mine)
            mass = [float(weights[s]) for s in mine]
            mass = mass if sum(mass) > 0 else [1.0] * len(mine)
            z = sum(
                m * points[s] * (length / points[s].norm()) for m, s in zip(mass, mine, strict=True)
            )
            z = z / sum(mass)
            centres[c] = length * z / z.norm()
    return torch.stack(centres)


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
@pytest.mark.parametrize("distinct", [None, 0.5, 0.8, 1.0])
def test_clustering_equals_loops(seed: int, distinct: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(4, 3 * WIDTH, generator=generator)
    points = heads.repeat(3, 1) + 0.1 * torch.randn(12, 3 * WIDTH, generator=generator)
    weights = torch.rand(12, generator=generator)
    weights[:2] = 0
    if distinct == 1.0:  # the bare start may take copies: give it points that are far apart
        points = torch.cat([heads, heads * 0.5 + 0.05 * torch.randn(4, 15, generator=generator)])
        weights = weights[:8]
    got = recluster(points, weights, 4, WIDTH, distinct, 50)
    want = slow_kmeans(points, weights, 4, distinct, 50)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_an_empty_cluster_takes_the_worst_fitted_neuron() -> None:
    """Equal starts leave all but one empty; no centre may be lost."""
    points = torch.ones(6, 3 * WIDTH)
    points[5] = torch.arange(15.0)
    got = recluster(points, torch.ones(6), 4, WIDTH, 1.0, 50)
    assert got.shape == (4, 15)
    assert bool(got.isfinite().all())
    assert bool((got.norm(dim=1) > 0).all())


@pytest.mark.parametrize(
    "method", [DERN(alpha=-0.2), DERN(alpha=-0.2, init="gate_max")], ids=["own", "gate_max"]
)
@pytest.mark.parametrize("seed", range(3))
def test_invariant_to_the_order_of_neurons(seed: int, method: DERN) -> None:
    bank = bank_of(seed).map(lambda t: t.double())
    x_ND = torch.randn(8, WIDTH, dtype=torch.float64)
    plan = method.recombine(bank, importance(seed), KEEP)
    shuffled = [bank[e].reordered(torch.randperm(HIDDEN)) for e in range(5)]
    names = [name for name, _ in bank.items()]
    other_bank = ExpertWeights(**{n: torch.stack([getattr(e, n) for e in shuffled]) for n in names})
    other = method.recombine(other_bank, importance(seed), KEEP)
    assert other.transfer_EK.equal(plan.transfer_EK)
    assert plan.experts is not None
    assert other.experts is not None
    for place in range(2):
        assert not plan.experts.up[place].equal(bank.up[KEEP[place]])  # it received neurons
        torch.testing.assert_close(
            run(other.experts[place], x_ND), run(plan.experts[place], x_ND), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("router", ["rows", "none"])
def test_nothing_moved_is_dropping_bit_for_bit(router: Any) -> None:
    model = tiny("mixtral")
    stats = record_model(model, Blocks())
    plain, _ = prune_model(model, DERN(alpha=1.0, router=router), [4] * 3, stats)
    for view, small, s in zip(block_views(model), block_views(plain), stats, strict=True):
        keep = s.weight_E.argsort(descending=True)[:4].sort().values
        for key, value in small.bank.items():
            assert value.equal(dict(view.bank.items())[key][keep])
        assert small.router.weight.equal(view.router.weight[keep])


def with_a_copy() -> ExpertWeights:
    """Three experts, of which the second is the first with its neurons in another order."""
    bank = bank_of(3, experts=3)
    bank[1].copy_(bank[0].reordered(torch.randperm(HIDDEN)))
    return bank


@pytest.mark.parametrize("method", [DERN(), DERN(init="gate_max")], ids=["own", "gate_max"])
def test_a_permuted_copy_is_absorbed_whole(method: DERN) -> None:
    bank = with_a_copy()
    plan = method.recombine(bank, importance(0, 3), [0, 2])
    assert plan.transfer_EK[1].tolist() == [1.0, 0.0]
    assert plan.experts is not None
    x_ND = torch.randn(20, WIDTH)
    torch.testing.assert_close(run(plan.experts[0], x_ND), run(bank[0], x_ND), rtol=1e-5, atol=1e-6)
    for key, value in bank[2].items():  # received nothing: not touched
        assert dict(plan.experts[1].items())[key].equal(value)


def test_the_bare_start_loses_neurons_where_copies_are_near() -> None:
    """Why the start passes over near copies: the paper's own gives one neuron several centres."""
    bank = with_a_copy()
    for _, value in bank.items():
        value[1] += 0.01 * torch.randn(value[1].shape)
    x_ND = torch.randn(50, WIDTH)
    error = {}
    for name, method in {
        "own": DERN(),
        "distinct": DERN(init="gate_max"),
        "bare": DERN(init="gate_max", init_distinct=1.0),
    }.items():
        plan = method.recombine(bank, importance(0, 3), [0, 2])
        assert plan.experts is not None
        want = run(bank[0], x_ND)
        error[name] = float((run(plan.experts[0], x_ND) - want).norm() / want.norm())
    assert max(error["own"], error["distinct"]) < 0.05 < error["bare"]  # the noise is 0.01


def test_every_neuron_keeps_a_centre_where_copies_are_less_near() -> None:
    """A second set of neurons at a cosine of about 0.7 with the first merges into it, one by one.

    At 0.8 both of a pair may be starts, so that another pair has none.
    """
    cosine = torch.nn.functional.cosine_similarity
    centres: dict[float | None, list[int]] = {None: [], DERN().init_distinct: [], 0.8: []}
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(8, 300, generator=generator)
        other = own[torch.randperm(8, generator=generator)]
        other = other + torch.randn(8, 300, generator=generator)
        for distinct, found in centres.items():
            made = recluster(torch.cat([own, other]), torch.ones(16), 8, 100, distinct, 50)
            nearest = cosine(made[:, None], own[None], dim=2).argmax(1)
            found.append(len(set(nearest.tolist())))
    assert centres[None] == centres[DERN().init_distinct] == [8] * 5
    assert sum(centres[0.8]) < 8 * 5


def test_a_stranger_costs_no_neuron_its_centre() -> None:
    """One neuron comes that is like none of full length but one: the others stay what they were."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(8, 300, generator=generator)
    came = own[3] + 1.5 * torch.randn(300, generator=generator)
    came[:100] *= 10  # a large gate, with which a start by the gate begins
    pool = torch.cat([own, came[None]])
    made = recluster(pool, torch.ones(9), 8, 100, None, 50)
    kept = [n for n in range(8) if made[n].allclose(own[n], atol=1e-5)]
    assert len(kept) == 7
    by_gate = recluster(pool, torch.ones(9), 8, 100, 0.5, 50)
    lost = [n for n in range(8) if not (by_gate - own[n]).norm(dim=1).min() < 1e-4]
    assert len(lost) > 1


def test_canonical_neurons_ignore_scale_and_sign() -> None:
    bank = bank_of(5)
    changed = bank.map(torch.clone)
    factor = torch.rand(5, HIDDEN) + 0.5
    sign = torch.where(torch.rand(5, HIDDEN) < 0.5, -1.0, 1.0)
    changed.up.mul_((factor * sign)[..., None])
    changed.down.mul_((sign / factor)[:, None, :])
    x_ND = torch.randn(9, WIDTH)
    torch.testing.assert_close(run(changed[1], x_ND), run(bank[1], x_ND), rtol=1e-4, atol=1e-4)
    plain, canonical = DERN(alpha=0.2), DERN(alpha=0.2, canonicalize=True)
    weights = importance(5)
    first, second = (canonical.recombine(b, weights, KEEP) for b in (bank, changed))
    assert first.transfer_EK.equal(second.transfer_EK)
    assert first.experts is not None
    assert second.experts is not None
    for place in range(2):
        torch.testing.assert_close(
            run(second.experts[place], x_ND), run(first.experts[place], x_ND), rtol=1e-3, atol=1e-3
        )
    moved = [plain.recombine(b, weights, KEEP).transfer_EK for b in (bank, changed)]
    assert not moved[0].equal(moved[1])


def test_the_router_is_folded_by_what_moved() -> None:
    model = tiny("mixtral")
    stats, view = record_model(model, Blocks())[0], block_views(model)[0]
    plan = DERN(alpha=0.0).plan(view, stats, 4)
    assert bool((plan.transfer_EK.sum(1) > 0).all())
    new = plan.new_router(view.router).weight.double()
    torch.testing.assert_close(
        new, plan.transfer_EK.T @ view.router.weight.double(), rtol=1e-5, atol=1e-6
    )
    none = DERN(alpha=0.0, router="none").plan(view, stats, 4)
    assert none.new_router(view.router).weight.equal(view.router.weight[list(plan.keep)])


def test_probability_passes_weights_on() -> None:
    model = tiny("olmoe")
    stats = record_model(model, Blocks())
    small, plans = prune_model(model, DERN(alpha=0.0, router="probability"), [4] * 3, stats)
    router: Any = small.get_submodule("inner.model.layers.0.mlp.gate")
    x_ND = torch.randn(30, 16)
    with torch.no_grad():
        _, w_NK, id_NK = router.router(x_ND)
        _, got_w, got_id = router(x_ND)
    for n in range(30):
        dense = torch.zeros(8, dtype=torch.float64)
        dense[id_NK[n]] = w_NK[n].double()
        want = dense @ plans[0].transfer_EK
        got = torch.zeros(4, dtype=torch.float64)
        got[got_id[n]] = got_w[n].double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_weights_and_not_counts_choose_the_experts() -> None:
    model = tiny("olmoe")
    stats = record_model(model, Blocks())
    dern = [DERN().plan(v, s, 4).keep for v, s in zip(block_views(model), stats, strict=True)]
    often = [Frequency().plan(v, s, 4).keep for v, s in zip(block_views(model), stats, strict=True)]
    heavy = [tuple(sorted(s.weight_E.argsort(descending=True)[:4].tolist())) for s in stats]
    assert dern == heavy
    assert dern != often


def test_recombined_experts_are_no_truncation() -> None:
    bank = bank_of(1)
    plan = DERN(alpha=0.0).recombine(bank, importance(1), KEEP)
    assert plan.experts is not None
    assert plan.experts.up.shape == (2, HIDDEN, WIDTH)
    assert plan.experts.down.shape == (2, WIDTH, HIDDEN)
    bare = kept(KEEP, 5).new_bank(bank)
    assert not torch.allclose(plan.experts.up, bare.up)
    again: BlockPlan = DERN(alpha=0.0).recombine(bank, importance(1), KEEP)
    assert again.experts is not None
    assert again.experts.up.equal(plan.experts.up)  # nothing is random


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 1.1}, "wanted a cosine"),
        ({"alpha": -1.1}, "wanted a cosine"),
        ({"parts": ()}, "some of gate, up and down"),
        ({"parts": ("up", "up")}, "each once"),
        ({"parts": ("bias",)}, "parts"),
        ({"init_distinct": 1.5}, "init_distinct"),
        ({"iterations": 0}, "at least 1"),
        ({"router": "sum"}, "router"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        DERN(**settings)


def test_experts_that_are_no_neurons_are_refused() -> None:
    for model, said in (
        (tiny("gpt_oss"), "have biases"),
        (random_model(own_config(MoESpec(TopK(k=2), GELU(8, hidden=8)))), "have no gate"),
    ):
        stats = record_model(model, Blocks())
        with pytest.raises(SpecError, match=f"DERN takes gated experts.*{said}"):
            DERN().plan(block_views(model)[0], stats[0], 4)


def test_no_weight_at_all_is_refused() -> None:
    model = tiny("olmoe")
    stats = record_model(model, Blocks())[0]
    stats.weight_E.zero_()
    with pytest.raises(SpecError, match="no token gave any expert"):
        DERN().plan(block_views(model)[0], stats, 4)
