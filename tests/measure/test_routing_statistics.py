"""Statistics against slow loops, under every router, with padding, added and reduced."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from moekit import (
    Bank,
    Capacity,
    Constant,
    Copy,
    ExpertChoice,
    Hash,
    MoE,
    MoEOutput,
    MoESpec,
    Pathway,
    ReLURouting,
    Signals,
    SwiGLU,
    TopK,
    Zero,
)
from moekit.measure.statistics import LayerStatistics, ModelStatistics

MIXED = Bank((SwiGLU(count=3, hidden=4), Constant(1), Copy(1), Zero(1)))
DESIGNS = {
    "top-k": MoESpec(TopK(k=2), SwiGLU(count=5, hidden=4)),
    "sigmoid": MoESpec(TopK(k=3, score="sigmoid"), SwiGLU(count=4, hidden=4)),
    "mixed bank": MoESpec(Pathway(k=2), MIXED),
    "relu": MoESpec(ReLURouting(k=2), SwiGLU(count=5, hidden=4)),
    "hash": MoESpec(Hash(k=2), SwiGLU(count=4, hidden=4)),
    "expert choice": MoESpec(ExpertChoice(capacity=1.5), SwiGLU(count=4, hidden=4)),
    "capacity": MoESpec(TopK(k=2), SwiGLU(count=4, hidden=4), dispatch=Capacity(factor=0.5)),
}


def run(design: MoESpec, tokens: int, padding: int, seed: int = 0) -> tuple[MoE, MoEOutput]:
    torch.manual_seed(seed)
    layer = design.build(width=6, vocabulary=11)
    valid = torch.ones(tokens, dtype=torch.bool)
    valid[:padding] = False
    signals = Signals(valid_N=valid, token_id_N=torch.randint(0, 11, (tokens,)))
    return layer, layer(10 * torch.randn(tokens, 6), signals)


def by_hand(output: MoEOutput, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Every count again, a token at a time in Python."""
    routing = output.routing
    load, histogram, entropy, tokens = [0] * len(kinds), [0] * 99, 0.0, 0
    for n in range(routing.tokens):
        if routing.valid_N is not None and not bool(routing.valid_N[n]):
            continue
        tokens += 1
        used = [e for e in routing.expert_NK[n].tolist() if e >= 0]
        for e in used:
            load[e] += 1
        histogram[sum(kinds[e] == "feed_forward" for e in used)] += 1
        if routing.scores_NE is not None:
            scores = routing.scores_NE[n].tolist()
            shares = [s / sum(scores) for s in scores if s > 0]
            entropy -= sum(p * math.log(p) for p in shares)
    return {"load": load, "histogram": histogram, "entropy": entropy, "tokens": tokens}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_counts_equal_a_loop_over_tokens(name: str, padding: int, seed: int) -> None:
    layer, output = run(DESIGNS[name], tokens=17, padding=padding, seed=seed)
    kinds = layer.experts.kinds
    got, want = LayerStatistics.of(output, kinds).summary(), by_hand(output, kinds)
    size = len(got["histogram"])
    assert got["tokens"] == want["tokens"] == 17 - padding
    assert got["load"] == want["load"]
    assert got["histogram"] == want["histogram"][:size]
    assert sum(want["histogram"][size:]) == 0
    assert got["rows"] == int(output.rows_E.sum())
    dense = [n for n, kind in zip(want["load"], kinds, strict=True) if kind == "feed_forward"]
    assert got["feed_forward_experts_per_token"] == pytest.approx(sum(dense) / want["tokens"])
    assert got["experts_per_token"] == pytest.approx(sum(want["load"]) / want["tokens"])
    assert got["load_violation"] == pytest.approx(max(dense) / (sum(dense) / len(dense)))
    assert got["unused_experts"] == dense.count(0)
    if output.routing.scores_NE is None:
        assert got["entropy"] is None
    else:
        assert got["entropy"] == pytest.approx(want["entropy"] / want["tokens"], rel=1e-5)


def test_dropped_assignments_are_those_that_reached_no_product() -> None:
    layer, output = run(DESIGNS["capacity"], tokens=20, padding=4)
    got = LayerStatistics.of(output, layer.experts.kinds).summary()
    assert got["dropped"] == sum(got["load"]) - got["rows"] > 0
    assert got["dropped_share"] == pytest.approx(got["dropped"] / 32)


def test_sparsity_of_relu_routing_is_the_share_of_closed_gates() -> None:
    layer, output = run(DESIGNS["relu"], tokens=20, padding=0)
    assert output.routing.scores_NE is not None
    closed = (output.routing.scores_NE == 0).double().mean()
    got = LayerStatistics.of(output, layer.experts.kinds).summary()
    assert got["sparsity"] == pytest.approx(float(closed))


@given(cut=st.integers(0, 12), seed=st.integers(0, 5))
def test_the_sum_over_parts_is_the_whole(cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = DESIGNS["mixed bank"].build(width=6)
    x = torch.randn(12, 6)
    parts = [LayerStatistics.of(layer(part), layer.experts.kinds) for part in (x[:cut], x[cut:])]
    whole = LayerStatistics.of(layer(x), layer.experts.kinds).summary()
    total = (parts[0] + parts[1]).summary()
    assert total.pop("entropy") == pytest.approx(whole.pop("entropy"), rel=1e-5)
    assert total == whole


def test_histograms_of_different_lengths_add_up() -> None:
    two = run(MoESpec(TopK(k=2), SwiGLU(count=4, hidden=4)), 5, 0)[1]
    three = run(MoESpec(TopK(k=3), SwiGLU(count=4, hidden=4)), 7, 0)[1]
    total = LayerStatistics.of(two) + LayerStatistics.of(three)
    assert total.summary()["histogram"] == [0, 0, 5, 7]


def test_layers_with_different_banks_are_not_added() -> None:
    small, mixed = (run(DESIGNS[name], 5, 0) for name in ("top-k", "mixed bank"))
    with pytest.raises(ValueError, match="different banks"):
        LayerStatistics.of(small[1]) + LayerStatistics.of(mixed[1], mixed[0].experts.kinds)


def test_no_tokens_at_all_gives_zeros_and_no_division_by_zero() -> None:
    got = LayerStatistics.of(run(DESIGNS["top-k"], tokens=0, padding=0)[1]).summary()
    assert got["tokens"] == got["rows"] == got["load_violation"] == got["entropy"] == 0
    assert got["load"] == [0] * 5


def test_scores_of_zero_have_no_entropy() -> None:
    layer = DESIGNS["relu"].build(width=6)
    assert LayerStatistics.of(layer(torch.zeros(4, 6))).summary()["entropy"] == 0.0


def test_a_model_is_a_sequence_of_layers_with_means_over_them() -> None:
    pairs = [run(DESIGNS[name], 9, 2) for name in ("top-k", "mixed bank", "hash")]
    kinds = [layer.experts.kinds for layer, _ in pairs]
    model = ModelStatistics.of([output for _, output in pairs], kinds)
    got = model.summary()
    each = [layer.summary() for layer in model]
    assert got["layers"] == each
    assert len(model) == 3
    assert got["tokens"] == 7
    assert got["rows_per_token"] == pytest.approx(sum(s["rows_per_token"] for s in each) / 3)
    known = [s["entropy"] for s in each[:2]]  # the hash router of the third has no scores
    assert got["entropy"] == pytest.approx(sum(known) / 2)
    assert [load.tokens.item() for load in model.loads] == [7, 7, 7]
    doubled = (model + model).summary()
    assert doubled["tokens"] == 14
    assert doubled["rows_per_token"] == pytest.approx(got["rows_per_token"])


def test_no_layers_give_an_empty_summary() -> None:
    assert ModelStatistics(()).summary() == {"tokens": 0, "layers": []}


def _rank(rank: int, store: str, expected: dict[str, Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    total = _of_rank(rank).all_reduce().summary()
    dist.destroy_process_group()
    assert total["layers"][0]["entropy"] == pytest.approx(expected["layers"][0]["entropy"])
    for got, want in zip(total["layers"], expected["layers"], strict=True):
        assert {k: got[k] for k in ("tokens", "load", "rows", "histogram")} == {
            k: want[k] for k in ("tokens", "load", "rows", "histogram")
        }


def _of_rank(rank: int) -> ModelStatistics:
    pairs = [run(DESIGNS[name], 9 + rank, 2, seed=rank) for name in ("top-k", "hash")]
    return ModelStatistics.of([output for _, output in pairs])


def test_all_reduce_sums_over_ranks(tmp_path: Path) -> None:
    expected = (_of_rank(0) + _of_rank(1)).summary()
    mp.spawn(_rank, args=(str(tmp_path / "store"), expected), nprocs=2)


def test_all_reduce_without_ranks_changes_nothing() -> None:
    model = _of_rank(0)
    assert model.all_reduce() is model
