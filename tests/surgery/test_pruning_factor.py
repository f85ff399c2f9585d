"""The threshold of reduction: thresholds by hand, and the study on tiny families of models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from surgery_models import CONFIGS, Blocks, random_model
from transformers import PreTrainedModel

from moekit.errors import DataError, SpecError
from moekit.surgery import FactorRow, block_views, pruning_factor_study, thresholds
from moekit.surgery.methods import Frequency, Method, Uncurl

DATA = Blocks()
METHODS: dict[str, Method] = {"uncurl": Uncurl(), "frequency": Frequency()}


def model_of(name: str, experts: int) -> PreTrainedModel:
    config = CONFIGS[name]()
    key = "n_routed_experts" if name.startswith("deepseek") else "num_experts"
    setattr(config, key, experts)
    return random_model(config)


@torch.no_grad()
def mean_loss(model: PreTrainedModel) -> float:
    tokens = DATA.tokens
    return float(model(input_ids=tokens, labels=tokens).loss)


@torch.no_grad()
def halved(model: PreTrainedModel) -> None:
    """A training that anybody can repeat: the output projection at half its size."""
    model.get_output_embeddings().weight.mul_(0.5)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe", "deepseek_v2"])
def test_every_pair_of_sizes(name: str) -> None:
    models = {experts: model_of(name, experts) for experts in (8, 4, 3)}
    before = {e: {k: v.clone() for k, v in m.state_dict().items()} for e, m in models.items()}
    told: list[FactorRow] = []
    rows = pruning_factor_study(models, METHODS, DATA, halved, mean_loss, seed=5, done=told.append)
    assert told == rows
    assert [(r.method, r.experts, r.left, r.seed) for r in rows] == [
        ("native", 8, 8, 5),
        *[(method, 8, left, 5) for left in (4, 3) for method in METHODS],
        ("native", 4, 4, 5),
        *[(method, 4, 3, 5) for method in METHODS],
        ("native", 3, 3, 5),
    ]
    assert rows[1].factor == 2
    for experts, model in models.items():  # tuning was done on copies
        for key, value in model.state_dict().items():
            assert value.equal(before[experts][key])
        native = next(r for r in rows if r.method == "native" and r.left == experts)
        assert native.before == pytest.approx(mean_loss(model))
        halved(model)
        assert native.loss == pytest.approx(mean_loss(model))


def test_reduced_models_have_fewer_experts() -> None:
    seen = []

    def look(model: PreTrainedModel) -> None:
        seen.append({view.experts for view in block_views(model)})

    models = {experts: model_of("olmoe", experts) for experts in (8, 4)}
    pruning_factor_study(models, METHODS, DATA, look, mean_loss)
    assert seen == [{8}, {4}, {4}, {4}]


def row(method: str, experts: int, left: int, loss: float, seed: int = 0) -> FactorRow:
    return FactorRow(method, experts, left, seed, before=10 - loss, loss=loss)


NATIVES = {8: 1.0, 4: 2.0, 2: 3.0}
BY_HAND = [
    *[row("native", n, n, loss, seed) for n, loss in NATIVES.items() for seed in (0, 1)],
    row("uncurl", 8, 4, 2.1),
    row("uncurl", 8, 4, 1.9, seed=1),
    row("uncurl", 8, 2, 3.4),
    row("uncurl", 8, 2, 3.2, seed=1),
    row("uncurl", 4, 2, 3.5),
    row("uncurl", 4, 2, 3.1, seed=1),
]


@pytest.mark.parametrize(
    ("tolerance", "factors"),
    [(-0.1, [1, 1]), (1e-9, [2, 1]), (0.29, [2, 1]), (0.300001, [4, 2])],
)
def test_thresholds_by_hand(tolerance: float, factors: list[float]) -> None:
    found = thresholds(BY_HAND, "uncurl", tolerance)
    assert [one.experts for one in found] == [8, 4]
    assert [one.factor for one in found] == factors
    assert found[0].gaps[2.0] == pytest.approx([0.1, -0.1])
    assert found[0].gaps[4.0] == pytest.approx([0.4, 0.2])


def test_thresholds_before_tuning() -> None:
    gaps = thresholds(BY_HAND, "uncurl", tuned=False)[0].gaps
    assert gaps[2.0] == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row is of 'uncurl'"),
        ([row("native", 4, 4, 1.0)], "no row is of 'uncurl'"),
        ([row("uncurl", 8, 4, 1.0)], "no native model of 4 experts"),
        ([row("uncurl", 8, 4, 1.0), row("native", 4, 4, 1.0, seed=1)], "seed 0"),
        (BY_HAND[:-1], "0 rows are of 'uncurl' with 2 of 4 experts, seed 1"),
        ([*BY_HAND, BY_HAND[-1]], "2 rows are of 'uncurl' with 2 of 4 experts, seed 1"),
        ([*BY_HAND[:-1], row("uncurl", 4, 2, math.nan, seed=1)], "uncurl with 2 of 4 .* NaN"),
        ([*BY_HAND, row("native", 2, 2, math.nan, seed=5)], "native with 2 of 2 .* seed 5, is NaN"),
    ],
)
def test_rows_that_say_nothing(rows: list[FactorRow], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        thresholds(rows, "uncurl")


def test_what_is_refused() -> None:
    pair = {experts: model_of("olmoe", experts) for experts in (8, 4)}

    def study(models: Any = pair, methods: Any = METHODS, data: Any = DATA) -> None:
        pruning_factor_study(models, methods, data, halved, mean_loss)

    with pytest.raises(SpecError, match="two sizes"):
        study({8: pair[8]})
    with pytest.raises(SpecError, match="for 6 experts has 4"):
        study({8: pair[8], 6: pair[4]})
    with pytest.raises(SpecError, match="rename"):
        study(methods={"native": Frequency()})
    with pytest.raises(SpecError, match="too few"):
        study({8: pair[8], 2: model_of_two()})
    with pytest.raises(DataError, match="no token"):
        study(data=[])


def model_of_two() -> PreTrainedModel:
    """Two experts, of which a token takes two; the larger model's tokens take three."""
    config = CONFIGS["olmoe"]()
    config.num_experts, config.num_experts_per_tok = 2, 2
    return random_model(config)
