"""Sparsity-constrained transport: its designs, how convergence is counted, and the experiment."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experiments import Nobody

from moekit import MoESpec
from moekit.routing import Sinkhorn, SparseTransport
from moekit.systems import Laboratory, Reproduction, Shape, digits, find
from moekit.systems import sparsity_constrained_ot_experiment as study
from moekit.systems.sparsity_constrained_ot_solver import Convergence, convergence

TINY = dataclasses.replace(study.QUICK, steps=3, solver_steps=5)


def test_designs() -> None:
    for name, kind in (("sparsity_constrained_ot", SparseTransport), ("s_base", Sinkhorn)):
        design = find(name).design
        assert design is not None
        found = design(Shape(experts=4, hidden=16, k=2))
        (layer,) = found.layers
        assert isinstance(layer, MoESpec)
        assert layer.router == kind(capacity_factor=2)
        assert found.name == name
        assert not found.causal


def run(folder: Path) -> Reproduction:
    experiment = find("sparsity_constrained_ot").experiment
    assert experiment is not None
    return experiment(Laboratory(folder, quick=True, seed=0, device="cpu", progress=Nobody()))


def check(result: Reproduction) -> None:
    assert [row["design"] for row in result.table] == list(study.LAYERS)
    for row in result.table:
        assert 0 <= row["accuracy"] <= 1
        assert row["active"] == pytest.approx(1, abs=0.05 if row["dropped"] == 0 else 1)
    top_1, *others = result.table
    assert top_1["dropped"] == top_1["unrouted"] == pytest.approx(1 - top_1["active"])
    assert all(row["dropped"] == row["load_cv"] == 0 for row in others)
    assert len(result.findings) == 5
    assert {finding.verdict for finding in result.findings} == {"inconclusive"}
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_tiny_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "QUICK", TINY)
    whole = digits.load_digits(0)
    few = digits.Digits(*(part[:90] for part in vars(whole).values()))
    monkeypatch.setattr(study, "load_digits", lambda _: few)
    state = torch.get_rng_state()
    result = run(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    check(result)
    monkeypatch.setattr(study, "_run", None)  # finished runs are not run again
    assert run(tmp_path) == result


@pytest.mark.slow
def test_a_quick_experiment(tmp_path: Path) -> None:
    check(run(tmp_path))


def scores(gains: list[float]) -> dict[str, list[study.Score]]:
    """Five seeds in which ours is better by ``gains`` and leaves fewer patches out."""
    plain = study.Score(accuracy=0.9, dropped=0.1, unrouted=0.3, load_cv=0.5, active=0.9)
    found = {name: [plain] * len(gains) for name in study.LAYERS}
    found[study.OURS] = [study.Score(0.9 + gain, 0.0, 0.2 - abs(gain), 0.0, 1.0) for gain in gains]
    return found


@pytest.mark.parametrize(
    ("gains", "verdicts"),
    [
        ([0.05, 0.051, 0.049, 0.05, 0.05], ("reproduced", "reproduced", "reproduced")),
        ([-0.05, -0.051, -0.049, -0.05, -0.05], ("reproduced", "not reproduced", "not reproduced")),
        ([0.05, -0.052, 0.049, -0.05, 0.05], ("reproduced", "reproduced", "inconclusive")),
    ],
)
def test_verdicts(gains: list[float], verdicts: tuple[str, ...]) -> None:
    given = scores(gains)
    found = [
        study._balances(given, False),
        study._keeps_accuracy(given, False),
        study._is_better(given, False),
    ]
    assert tuple(finding.verdict for finding in found) == verdicts
    assert study._routes_more(given, False).verdict == "reproduced"
    assert study._balances(given, True).verdict == "inconclusive"
    uneven = {**given, study.OURS: given[study.TOP_1]}
    assert study._balances(uneven, False).verdict == "not reproduced"


@pytest.mark.parametrize("rising", [False, True])
def test_the_verdict_on_convergence(rising: bool) -> None:
    steps = sorted(range(10, 10 + len(study.LIMITS)), reverse=not rising)
    solved: list[Any] = [
        {k: Convergence(n, None if k < 32 else n) for k, n in zip(study.LIMITS, steps, strict=True)}
    ]
    finding = study._converges_faster(solved, quick=False)
    assert finding.verdict == ("not reproduced" if rising else "reproduced")
    assert "k=8 " in finding.measured
    assert "(never)" in finding.measured
    assert "in 1 of 1" in finding.measured


def test_convergence_is_counted() -> None:
    """Even gates are solved at the start; no plan of one token an expert has right row sums."""
    assert convergence(torch.full((64, 8), 0.125), 64, steps=20) == Convergence(0, 0)
    gates = (torch.randn(64, 8) * 3).softmax(-1)
    tight = convergence(gates, 1, steps=100)
    assert tight.to_plan is None
    smooth = convergence(gates, 64, steps=100)
    assert 0 < smooth.to_value < tight.to_value
    assert smooth.to_plan is not None
    assert smooth.to_plan >= smooth.to_value
