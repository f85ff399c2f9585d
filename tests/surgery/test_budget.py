"""How many experts each block keeps: shares, numbers, bytes, and by importance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from surgery_models import CONFIGS, Blocks, own_config, random_model, tiny

from moekit import MoESpec, SwiGLU, TopK
from moekit.errors import SpecError
from moekit.surgery import prune
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.budget import Budget, StoredSizes, spread
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.methods import REAP, Frequency, Method, MSMoE, Random, Uncurl
from moekit.surgery.recorder import record

DATA = Blocks()
HALF = Budget(ratio=0.5)


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    tiny("olmoe").save_pretrained(tmp_path / "olmoe")
    return tmp_path / "olmoe"


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    """Two layers: 12 narrow experts, and 4 wide ones."""
    config = own_config(
        MoESpec(TopK(k=1), SwiGLU(count=12, hidden=8)),
        MoESpec(TopK(k=1), SwiGLU(count=4, hidden=40)),
    )
    random_model(config).save_pretrained(tmp_path / "unequal")
    return tmp_path / "unequal"


def model_of(folder: Path) -> BlockwiseModel:
    return BlockwiseModel(Checkpoint(folder))


@pytest.mark.parametrize(
    ("budget", "counts"),
    [
        (Budget(ratio=0.5), [4, 4, 4]),
        (Budget(ratio=0.7), [6, 6, 6]),
        (Budget(experts=3), [3, 3, 3]),
        (Budget(ratio=1), [8, 8, 8]),
    ],
)
def test_a_ratio_or_a_number(budget: Budget, counts: list[int], olmoe: Path) -> None:
    assert budget.counts(model_of(olmoe), reroutes=False) == counts


@pytest.mark.parametrize("name", CONFIGS)
def test_a_target_size_is_reached_and_used(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "model")
    model = model_of(tmp_path / "model")
    whole = sum(t.bytes for t in model.checkpoint.stored.values())
    blocks = sum(view is not None for view in model.blocks)
    half = StoredSizes.of(model).after([4] * blocks, False)
    assert Budget(bytes=whole).counts(model, False) == [8] * blocks
    assert Budget(bytes=half).counts(model, False) == [4] * blocks
    prune(tmp_path / "model", tmp_path / "out", Frequency(), Budget(bytes=half), DATA)
    stored = Checkpoint(tmp_path / "out").stored.values()
    assert sum(tensor.bytes for tensor in stored) == half
    with pytest.raises(SpecError, match=r"1 bytes cannot be reached: with one expert a block"):
        Budget(bytes=1).counts(model, True)


def test_a_target_size_holds_with_routers_that_keep_their_rows(olmoe: Path, tmp_path: Path) -> None:
    wanted = StoredSizes.of(model_of(olmoe)).after([4] * 3, True)
    method = MSMoE(allocation="uniform")
    prune(olmoe, tmp_path / "out", method, Budget(bytes=wanted), DATA)
    stored = Checkpoint(tmp_path / "out").stored.values()
    assert sum(tensor.bytes for tensor in stored) == wanted


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(experts=2), "2 experts are too few for model.layers.0.mlp: a token takes 3"),
        (Budget(ratio=0.1), "1 experts are too few"),
        (Budget(experts=9), "9 experts cannot be kept of the 8"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused(budget: Budget, said: str, olmoe: Path) -> None:
    with pytest.raises(SpecError, match=said):
        budget.counts(model_of(olmoe), reroutes=False)


@pytest.mark.parametrize(
    "settings",
    [{}, {"ratio": 0.0}, {"ratio": 1.1}, {"experts": 0}, {"bytes": 0}, {"ratio": 1, "experts": 2}],
)
def test_a_budget_of_nothing_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"wanted|give one"):
        Budget(**settings)


def test_experts_are_spread_by_importance(olmoe: Path) -> None:
    model = model_of(olmoe)
    views = [view for view in model.blocks if view is not None]
    stats = record(Checkpoint(olmoe), DATA, REAP().needs)
    method = REAP(allocation="global")
    counts = spread(method, [4, 4, 4], views, stats)
    assert sum(counts) == 12
    assert min(counts) >= 3
    shares = [method.importance(s) / method.importance(s).sum() for s in stats]
    kept = [x.sort(descending=True).values[:c] for x, c in zip(shares, counts, strict=True)]
    left = [x.sort(descending=True).values[c:] for x, c in zip(shares, counts, strict=True)]
    free = [k[3:] for k in kept]  # beyond what a token needs
    assert all(float(f.min()) >= float(x.max()) for f in free if len(f) for x in left if len(x))
    assert spread(REAP(), [4, 4, 4], views, stats) == [4, 4, 4]
    with pytest.raises(SpecError, match="random ranks no experts"):
        spread(Random(allocation="global"), [4, 4, 4], views, stats)


def test_groups_cannot_be_spread(tmp_path: Path) -> None:
    tiny("deepseek_v3").save_pretrained(tmp_path / "model")
    with pytest.raises(SpecError, match="set allocation to uniform"):
        prune(tmp_path / "model", tmp_path / "out", REAP(allocation="global"), HALF, DATA)


def bytes_of(folder: Path) -> int:
    return sum(tensor.bytes for tensor in Checkpoint(folder).stored.values())


@pytest.mark.parametrize("share", [0.9, 0.6, 0.45])
def test_bytes_take_the_same_share_of_layers_of_several_sizes(share: float, unequal: Path) -> None:
    model = model_of(unequal)
    limit = int(share * bytes_of(unequal))
    counts = Budget(bytes=limit).counts(model, False)
    sizes = StoredSizes.of(model)
    assert sizes.after(counts, False) <= limit
    fit = [
        both
        for both in ([one, max(one // 3, 1)] for one in range(1, 13))
        if sizes.after(both, False) <= limit
    ]
    assert counts == max(fit)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize(
    "method", [REAP(allocation="global"), MSMoE(router="average")], ids=["reap", "m-smoe"]
)
def test_importance_keeps_within_the_bytes(
    method: Method, share: float, unequal: Path, tmp_path: Path
) -> None:
    """Experts that move from the narrow layer to the wide one would take more than is given."""
    limit = int(share * bytes_of(unequal))
    prune(unequal, tmp_path / "out", method, Budget(bytes=limit), DATA)
    assert bytes_of(tmp_path / "out") <= limit
    model = model_of(unequal)
    views = [view for view in model.blocks if view is not None]
    stats = record(Checkpoint(unequal), DATA, method.needs)
    start = Budget(bytes=limit).counts(model, method.reroutes)
    sizes = StoredSizes.of(model)
    free = spread(method, start, views, stats)
    held = spread(method, start, views, stats, lambda c: sizes.after(c, method.reroutes) <= limit)
    assert sum(held) <= sum(free) == sum(start)
    assert (held == free) == (sizes.after(free, method.reroutes) <= limit)


def test_nothing_small_enough_is_said(unequal: Path) -> None:
    views = [view for view in model_of(unequal).blocks if view is not None]
    stats = record(Checkpoint(unequal), DATA, REAP().needs)
    with pytest.raises(SpecError, match="set allocation to uniform"):
        spread(REAP(allocation="global"), [6, 2], views, stats, lambda _: False)


def test_groups_bind_only_where_rows_shrink(tmp_path: Path) -> None:
    """Two groups: 5 of 8 experts are 4 for a router with a row for each that is left."""
    tiny("deepseek_v3").save_pretrained(tmp_path / "model")
    model = model_of(tmp_path / "model")
    blocks = sum(view is not None for view in model.blocks)
    assert Budget(ratio=5 / 8).counts(model, reroutes=False) == [4] * blocks
    assert Budget(ratio=5 / 8).counts(model, reroutes=True) == [5] * blocks
    report = prune(tmp_path / "model", tmp_path / "out", Uncurl(router="alias"), HALF, DATA)
    assert [block.experts for block in report.blocks] == [4] * blocks
