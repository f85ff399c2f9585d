"""GG MoE's experiment: its networks, tables and scores, and its path from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets
from test_experiments import Nobody

from moekit.errors import MissingExtraError
from moekit.systems import Laboratory, Reproduction, find
from moekit.systems import gg_moe_experiment as study
from moekit.systems.gg_moe_experiment import MODELS, Budget
from moekit.systems.gg_moe_tables import TABLES, load_table


@pytest.mark.parametrize("name", ["MoE", "GG MoE"])
def test_a_mixture_is_the_loop_over_complete_networks(name: str) -> None:
    model = study.build(name, 5, 3).double().eval()
    torch.nn.init.normal_(model.gate.weight)
    x_ND = torch.randn(7, 5, dtype=torch.float64)
    logits_NE = x_ND @ model.gate.weight.T + model.gate.bias
    if name == "MoE":
        weight_NE = logits_NE.softmax(-1)
    else:
        noise_ES = model.gate.noise_ES.double()
        assert noise_ES.shape == (16, 10)
        weight_NE = ((logits_NE[..., None] + noise_ES) / 2.2).softmax(1).mean(-1)
    wanted = torch.zeros(7, 3, dtype=torch.float64)
    for e in range(16):
        hidden = x_ND
        for weight in list(model.weights)[:-1]:
            hidden = (hidden @ weight[e]).clamp_min(0)
        wanted += weight_NE[:, e : e + 1] * (hidden @ model.weights[-1][e])
    torch.testing.assert_close(model(x_ND), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 10), (10, 1)])
def test_parameters_and_their_ranges(inputs: int, outputs: int) -> None:
    model = study.build("GG MoE", inputs, outputs)
    counted = sum(p.numel() for p in model.parameters())
    experts = 16 * (inputs * 32 + 2 * 32**2 + 32 * outputs)
    assert counted == experts + (inputs + 1) * 16
    for weight, following in zip(model.weights, (32, 32, 32, outputs), strict=True):
        assert weight.shape[2] == following
        assert 0.9 < float(weight.abs().max().detach()) * following**0.5 <= 1 + 1e-6
    assert all(not name.endswith("bias") for name, _ in model.weights.named_parameters())
    mlp = sum(p.numel() for p in study.build("MLP", inputs, outputs).parameters())
    assert mlp == (inputs + 1) * 384 + 2 * 385 * 384 + 385 * outputs


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_split_and_prepared_on_its_training_part_alone(name: str) -> None:
    split = load_table(name, 0)
    found = getattr(datasets, f"load_{name.replace(' ', '_')}")()
    sizes = [len(y) for y in (split.train_y, split.validation_y, split.test_y)]
    assert sum(sizes) == len(found.target)
    assert sizes[0] == round(0.6 * len(found.target))
    for x, y in (
        (split.train_x, split.train_y),
        (split.validation_x, split.validation_y),
        (split.test_x, split.test_y),
    ):
        assert x.shape == (len(y), found.data.shape[1])
        assert bool(torch.isfinite(x).all())
    varied = split.train_x[:, split.train_x.std(0) > 0.5]
    assert varied.shape[1] > 0
    assert float(varied.mean().abs()) < 0.5
    if name == "diabetes":
        assert split.outputs == 1
        assert float(split.train_y.mean()) == pytest.approx(0, abs=1e-5)
        assert float(split.train_y.std(correction=0)) == pytest.approx(1, rel=1e-5)
    else:
        assert split.outputs == len(np.unique(found.target))
    assert torch.equal(load_table(name, 0).test_x, split.test_x)
    assert not torch.equal(load_table(name, 1).test_y, split.test_y)


def test_what_is_held_out_does_not_move_the_training_part(monkeypatch: Any) -> None:
    plain, original = load_table("wine", 0), datasets.load_wine
    order = np.random.default_rng(0).permutation(178)

    def louder() -> Any:
        found = original()
        found.data[order[107:]] *= 100
        return found

    monkeypatch.setattr(datasets, "load_wine", louder)
    changed = load_table("wine", 0)
    assert torch.equal(changed.train_x, plain.train_x)
    assert not torch.equal(changed.test_x, plain.test_x)


def test_tables_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match="experiments"):
        load_table("wine", 0)


def test_the_best_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = [], study._tested

    def watched(*args: Any) -> tuple[float, float]:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(study, "_tested", watched)
    split = load_table("wine", 0)
    torch.manual_seed(0)
    model = study.build("MLP", 13, 3)
    budget = Budget(seeds=1, rates=(), epochs=60, patience=5)
    study._train(model, split, 1e-2, 0, budget, Nobody().run("", 0, 0, 1))
    assert original(model, split.validation_x, split.validation_y) == min(seen)
    best = seen.index(min(seen))
    assert len(seen) == min(60, best + 1 + 5)


def test_more_samples_are_of_the_same_network(tmp_path: Path) -> None:
    lab = Laboratory(tmp_path, quick=True, seed=0, device="cpu", progress=Nobody())
    budget = Budget(seeds=1, rates=(), epochs=3, patience=5)
    mlp, moe, gg = (study._run(lab, "", "wine", name, 3e-3, 0, budget, (0, 1)) for name in MODELS)
    for result in (mlp, moe):
        for measure in ("test_loss", "test_error"):
            assert result[measure] == result[f"{measure}_of_many_samples"]
    gap = abs(gg["test_loss"] / gg["test_loss_of_many_samples"] - 1)
    assert 0 < gap < 0.05
    assert (mlp["active"], moe["active"], gg["active"]) == (1, 16, 16)


def test_the_distance_between_numbers_of_samples() -> None:
    def of(measure: str, *pairs: tuple[float, float], is_share: bool) -> float:
        names = (measure, f"{measure}_of_many_samples", "is_share")
        found = [dict(zip(names, (*pair, is_share), strict=True)) for pair in pairs]
        return study._distance(found, measure)

    pairs = ((0.0, 0.0), (0.22, 0.2), (0.18, 0.2))  # 0.04 / 3 apart, of 0.4 / 3
    assert of("test_loss", *pairs, is_share=True) == pytest.approx(0.1)
    assert of("test_error", *pairs, is_share=False) == pytest.approx(0.1)
    assert of("test_error", *pairs, is_share=True) == pytest.approx(0.04 / 3)
    assert of("test_loss", pairs[0], is_share=True) == 0


def test_ranks() -> None:
    assert study.ranks([0.3, 0.1, 0.2]) == [3, 1, 2]
    assert study.ranks([0.1, 0.1, 0.2]) == [1.5, 1.5, 3]
    assert study.ranks([0.2, 0.2, 0.2]) == [2, 2, 2]


def results(errors: dict[str, float], parameters: float = 30.0, gap: float = 0.0002) -> Any:
    """Ten seeds whose errors differ a little, in the same order everywhere."""
    return {
        (table, name): [
            {
                "validation_error": error,
                "test_error": error + seed / 1000,
                "test_error_of_many_samples": error + seed / 1000 + gap,
                "test_loss": 1.3,
                "test_loss_of_many_samples": 1.0,
                "is_share": table != "diabetes",
                "parameters": 100.0 if name == "MLP" else parameters,
                "active": 1.0,
            }
            for seed in range(10)
        ]
        for table in TABLES
        for name, error in errors.items()
    }


BEST = {"MLP": 0.3, "MoE": 0.2, "GG MoE": 0.1}
WORST = {"MLP": 0.1, "MoE": 0.2, "GG MoE": 0.3}
MIXED = {"MLP": 0.1, "MoE": 0.1, "GG MoE": 0.1}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (results(BEST), "+++"),
        (results(WORST), "--+"),
        (results(MIXED), "?++"),
        (results(BEST, parameters=50.0), "+-+"),
        (results(BEST, gap=0.01), "++-"),
    ],
)
def test_verdicts(given: Any, wanted: str) -> None:
    said = {"+": "reproduced", "-": "not reproduced", "?": "inconclusive"}
    found = study._findings(given, quick=False)
    assert [finding.verdict for finding in found] == [said[sign] for sign in wanted]
    quick = study._findings(given, quick=True)
    assert {finding.verdict for finding in quick} == {"inconclusive"}


def test_each_model_has_the_rate_that_validation_prefers() -> None:
    found = {
        (table, name, rate, seed): {"validation_error": abs(rate - best), "rate": rate}
        for table in TABLES
        for name, best in zip(MODELS, (0.1, 0.2, 0.3), strict=True)
        for rate in (0.1, 0.2, 0.3)
        for seed in (4, 5)
    }
    chosen = study._chosen(found, (0.1, 0.2, 0.3), (4, 5))
    for table in TABLES:
        assert [chosen[table, name][0]["rate"] for name in MODELS] == [0.1, 0.2, 0.3]
        assert all(len(chosen[table, name]) == 2 for name in MODELS)


def run(folder: Path) -> Reproduction:
    experiment = find("gg_moe").experiment
    assert experiment is not None
    return experiment(Laboratory(folder, quick=True, seed=0, device="cpu", progress=Nobody()))


def test_a_tiny_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "QUICK", dataclasses.replace(study.QUICK, epochs=2))
    result = run(tmp_path)
    assert result.system == "gg_moe"
    assert [row["design"] for row in result.table] == list(MODELS)
    assert [row["mean_active_experts"] for row in result.table] == [1, 16, 16]
    for row in result.table:
        assert 1 <= row["average_rank"] <= 3
        assert all(math.isfinite(row[f"test_error_{table}"]) for table in TABLES)
    assert {finding.verdict for finding in result.findings} == {"inconclusive"}
    json.dumps(result.to_dict(), allow_nan=False)
    monkeypatch.setattr(study, "_run", lambda *_: pytest.fail("a finished run was run again"))
    assert run(tmp_path).table == result.table


@pytest.mark.slow
def test_a_quick_experiment(tmp_path: Path) -> None:
    assert {finding.verdict for finding in run(tmp_path).findings} == {"inconclusive"}
