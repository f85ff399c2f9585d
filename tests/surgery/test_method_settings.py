"""Settings of methods whose effect the other tests leave open, each against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_models import CONFIGS, Blocks, tiny
from test_dern import HIDDEN, bank_of, slow_kmeans
from test_merging import statistics, view_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from moekit.errors import SpecError
from moekit.surgery import Budget, block_views, prune
from moekit.surgery.methods import (
    DERN,
    REAP,
    Frequency,
    HCSMoE,
    Method,
    MSMoE,
    Random,
    RouterWeight,
    Uncurl,
)
from moekit.surgery.methods.dern import _segments
from moekit.surgery.methods.spectral import spectral_labels
from moekit.surgery.prune import prune_model
from moekit.surgery.recorder import record_model
from moekit.surgery.weights import ExpertWeights

EVERY: list[Method] = [Frequency(), RouterWeight(), REAP(), DERN(), MSMoE(), HCSMoE(), Uncurl()]


def test_router_weight_is_a_mean_over_all_tokens_and_not_over_its_own() -> None:
    """Expert 0 gets much weight from many tokens, expert 7 more from each of few."""
    stats = statistics(
        count_E=torch.tensor([40, 30, 20, 10, 5, 4, 3, 2]),
        weight_E=torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.5, 2.9, 1.98], dtype=torch.float64),
    )
    own_E = stats.weight_E / stats.count_E
    assert own_E.argsort(descending=True)[:3].tolist() == [7, 6, 5]
    assert RouterWeight().plan(view_of(), stats, 3).keep == (0, 1, 2)
    assert RouterWeight().importance(stats).tolist() == pytest.approx(
        [float(w) / 50 for w in stats.weight_E]
    )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_moved_neurons_count_by_the_expert_they_come_from(weighted: bool, seed: int) -> None:
    """Experts of very unequal importance, so that another expert's would show."""
    bank = bank_of(0)
    generator = torch.Generator().manual_seed(seed)

    def near(value: Tensor) -> Tensor:  # each expert a noisy copy of the first
        return value[:1] + 0.3 * torch.randn(value.shape, generator=generator)

    bank = bank.map(near)
    importance_E = torch.tensor([1.0, 50.0, 3.0, 0.02, 7.0]).double()
    method = DERN(alpha=0.0, weighted=weighted)
    keep = [0, 2]
    moved = method.reassign(bank, keep)
    plan = method.recombine(bank, importance_E, keep)
    assert plan.experts is not None
    for place, expert in enumerate(keep):
        rows, mass = [_segments(bank[expert], None, False)], [importance_E[expert]] * HIDDEN
        for source, (to_H, _) in moved.items():
            rows.append(_segments(bank[source], None, False)[to_H == place])
            mass += [importance_E[source]] * int((to_H == place).sum())
        weights = torch.stack(mass) if weighted else torch.ones(len(mass))
        want = slow_kmeans(torch.cat(rows), weights, HIDDEN, None, method.iterations)
        got = _segments(plan.experts[place], None, False)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        other = torch.ones(len(mass)) if weighted else torch.stack(mass)
        unlike = slow_kmeans(torch.cat(rows), other, HIDDEN, None, method.iterations)
        assert float((unlike - want).abs().max()) > 1e-2


def test_cosines_of_exact_copies_are_never_above_1() -> None:
    """Rounding gives some of them 1 + 1e-7, and at alpha=1 nothing may move."""
    for seed in range(20):
        one = bank_of(seed, experts=1, hidden=32)
        bank = ExpertWeights(*(value.repeat(3, 1, 1) for _, value in one.items()))
        moved = DERN(alpha=1.0).reassign(bank, [0])
        assert all(bool((to_H == -1).all()) for to_H, _ in moved.values())


def cosines(z_NE: Tensor, center: bool) -> Tensor:
    """Of the logits of every two experts, entry by entry."""
    if center:
        z_NE = z_NE - z_NE.mean(1, keepdim=True)
    experts = z_NE.shape[1]
    found = torch.empty(experts, experts, dtype=torch.float64)
    for i in range(experts):
        for j in range(experts):
            dot = sum(float(a) * float(b) for a, b in zip(z_NE[:, i], z_NE[:, j], strict=True))
            found[i, j] = dot / float(z_NE[:, i].norm() * z_NE[:, j].norm())
    return found


def partition(labels: Any) -> set[frozenset[int]]:
    return {frozenset(i for i, own in enumerate(labels) if own == label) for label in set(labels)}


@pytest.mark.parametrize("center", [False, True])
def test_uncurls_affinity_is_half_of_1_plus_the_cosine(center: bool) -> None:
    """On logits for which the positive part, and the size, of a cosine give other clusters."""
    told_apart = set()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        base_N3 = torch.randn(60, 3, generator=generator, dtype=torch.float64)
        mix_3E = torch.randn(3, 8, generator=generator, dtype=torch.float64)
        z_NE = base_N3 @ mix_3E + 0.5
        stats = statistics(gram_EE=z_NE.T @ z_NE)
        cosine_EE = cosines(z_NE, center)
        found = Uncurl(center=center).clusters(stats, list(range(8)), 3)
        want = partition(spectral_labels(((1 + cosine_EE) / 2).numpy(), 3, 0))
        assert {frozenset(cluster) for cluster in found} == want
        others = {"positive": cosine_EE.clamp_min(0), "size": cosine_EE.abs()}
        others["uncentred"] = (1 + cosines(z_NE, not center)) / 2
        told_apart |= {
            name
            for name, other_EE in others.items()
            if partition(spectral_labels(other_EE.numpy(), 3, 0)) != want
        }
    assert told_apart == {"positive", "size", "uncentred"}


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
@pytest.mark.parametrize("router", ["dominant", "average"])
def test_rows_and_biases_of_merged_routers(name: str, router: Any) -> None:
    """Those of the most used member, bit for bit; or their means by how often each is used."""
    model = tiny(name)
    stats = record_model(model, Blocks(), HCSMoE().needs)
    small, plans = prune_model(model, HCSMoE(router=router), [3] * 3, stats)
    for plan, old, new, own in zip(
        plans, block_views(model), block_views(small), stats, strict=True
    ):
        for place, head in enumerate(plan.keep):
            members = plan.transfer_EK[:, place].nonzero().flatten()
            mass_M = own.count_E[members].double()
            for (_, before), (_, after) in zip(old.router.items(), new.router.items(), strict=True):
                if router == "dominant":
                    assert torch.equal(after[place], before[head])
                else:
                    rows = before[members].double()
                    shape = (-1,) + (1,) * (rows.ndim - 1)
                    mean = (rows * mass_M.view(shape)).sum(0) / mass_M.sum()
                    torch.testing.assert_close(after[place].double(), mean, rtol=1e-5, atol=1e-6)
        assert max(int((plan.transfer_EK[:, k] > 0).sum()) for k in range(3)) > 1


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_weights_that_are_not_finite_are_refused(method: Method) -> None:
    model = tiny("mixtral")
    stats = record_model(model, Blocks(), method.needs)
    view = block_views(model)[2]
    with torch.no_grad():
        view.bank.up[3, 0, 0] = torch.nan
    with pytest.raises(SpecError, match=r"weights \(up\) that are NaN or infinite"):
        prune_model(model, method, [4] * 3, stats)


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("gpt_oss", DERN(), "have biases"),
        ("deepseek_v3", REAP(allocation="global"), "a router with groups"),
    ],
)
def test_what_no_text_can_mend_is_refused_before_any_is_read(
    name: str, method: Method, said: str, tmp_path: Path
) -> None:
    tiny(name).save_pretrained(tmp_path / "whole")
    told: list[str] = []
    with pytest.raises(SpecError, match=said):
        prune(
            tmp_path / "whole",
            tmp_path / "out",
            method,
            Budget(ratio=0.5),
            Blocks(),
            progress=lambda what, *_: told.append(what),
        )
    assert not told
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    with pytest.raises(SpecError, match="ranks no experts"):
        Random(allocation="global")


def test_routers_that_keep_their_rows_need_no_equal_groups() -> None:
    """Five experts of eight in two groups, by both methods that pass weights on."""
    model = tiny("deepseek_v3")
    for method in (DERN(router="probability", alpha=0.1), MSMoE()):
        stats = record_model(model, Blocks(), method.needs)
        small, plans = prune_model(model, method, [5] * len(stats), stats)
        assert [plan.count for plan in plans] == [5] * len(stats)
        assert bool(small(input_ids=Blocks().tokens).logits.isfinite().all())


def test_gates_alone_have_no_sign_to_take() -> None:
    bank = bank_of(0)
    plain = DERN(alpha=0.0, parts=("gate",)).reassign(bank, [0, 2])
    for source, (to_H, sign_H) in (
        DERN(alpha=0.0, parts=("gate",), canonicalize=True).reassign(bank, [0, 2]).items()
    ):
        assert torch.equal(to_H, plain[source][0])
        assert bool((sign_H == 1).all())


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_config_that_asks_for_router_logits(name: str, allocation: Any, tmp_path: Path) -> None:
    """As checkpoints that were tuned with a balance loss do: they are not there block by block."""
    model = tiny(name)
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path / "whole")
    method = REAP(allocation=allocation)
    report = prune(
        tmp_path / "whole", tmp_path / "out", method, Budget(experts=5), Blocks(), Blocks(seed=3)
    )
    assert report.after is not None
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids_BT = Blocks().tokens
    assert bool(small(input_ids=ids_BT, labels=ids_BT).loss.isfinite())
    if allocation == "uniform":
        assert small.config.output_router_logits  # the checkpoint still says what it said


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_models_on_a_gpu_are_planned_as_on_the_cpu(method: Method, name: str) -> None:
    assert name in CONFIGS
    found = []
    for device in ("cpu", "cuda"):
        model = tiny(name).to(device)  # type: ignore[arg-type]
        stats = record_model(model, Blocks(), method.needs)
        small, plans = prune_model(model, method, [4] * len(stats), stats)
        found.append((plans, {n: t.cpu() for n, t in small.state_dict().items()}))
    assert [plan.keep for plan in found[0][0]] == [plan.keep for plan in found[1][0]]
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value, rtol=1e-3, atol=1e-4)
