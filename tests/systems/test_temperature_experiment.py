"""The experiment on temperatures: its mixture, its measures, and its path from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm
from test_experiments import Nobody

from moekit.systems import Laboratory, Reproduction, find
from moekit.systems import temperature_gaussian_moe_experiment as study
from moekit.systems.temperature_gaussian_moe_experiment import GATES, MEASURES, Budget, Mixture

EVERY_GATE = pytest.mark.parametrize("gate", GATES)
SQUASHED = {
    "linear": lambda z: z,
    "relu": lambda z: max(z, 0.0),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "tanh": math.tanh,
}


@EVERY_GATE
def test_the_density_is_the_formula(gate: str) -> None:
    model = Mixture(gate)
    x_N = torch.tensor([-2.5, 0.0, 1.7], dtype=torch.float64)
    y_N = torch.tensor([-8.0, 3.0, 7.1], dtype=torch.float64)
    found = model.log_density(x_N, y_N).exp().tolist()
    for x, y, density in zip(x_N.tolist(), y_N.tolist(), found, strict=True):
        odds = [
            math.exp((SQUASHED[gate](w * x) + b) / 0.4)
            for w, b in zip(study.SLOPES[gate], (0.3, -0.3, 0.0), strict=True)
        ]
        bells = [
            norm.pdf(y, a * x + b, math.sqrt(v))
            for a, b, v in zip((2, -2, 0.5), (-4, 2, 6), (0.09, 0.16, 0.12), strict=True)
        ]
        wanted = sum(o * n for o, n in zip(odds, bells, strict=True)) / sum(odds)
        assert density == pytest.approx(wanted, rel=1e-12)
    y_Y = torch.linspace(-20, 20, 8001, dtype=torch.float64)
    for x in x_N:
        mass = model.log_density(x.expand_as(y_Y), y_Y).exp().sum() * 0.005
        assert float(mass.detach()) == pytest.approx(1, abs=1e-9)


@EVERY_GATE
def test_the_shares_are_the_routers_weights(gate: str) -> None:
    model, x_N = Mixture(gate), torch.linspace(-3, 3, 50, dtype=torch.float64)
    weight_NE = model.gate(x_N[:, None]).dense_weight_NE()
    torch.testing.assert_close(model.log_shares(x_N).exp(), weight_NE, rtol=1e-12, atol=1e-15)


@EVERY_GATE
@torch.no_grad()
def test_samples_have_the_mean_and_variance_of_the_mixture(gate: str) -> None:
    model, count = Mixture(gate), 200_000
    x_N = torch.full((count,), 0.6, dtype=torch.float64)
    y_N = model.sample(x_N, torch.Generator().manual_seed(3))
    share_E = model.log_shares(x_N[:1]).exp()[0]
    mean_E = 0.6 * model.slope_E + model.offset_E
    mean = float((share_E * mean_E).sum())
    second = float((share_E * (mean_E.square() + model.log_variance_E.exp())).sum())
    error = math.sqrt((second - mean**2) / count)
    assert float(y_N.mean()) == pytest.approx(mean, abs=5 * error)
    assert float(y_N.var()) == pytest.approx(second - mean**2, rel=0.02)


@EVERY_GATE
@torch.no_grad()
def test_the_errors_of_the_truth_are_zero_whatever_the_experts_are_called(gate: str) -> None:
    model, truth = Mixture(gate), Mixture(gate)
    assert study._errors(model, truth, gate) == (0.0, 0.0, 0.0, 0.0)
    order = [2, 0, 1]
    for parameter in (*model.gate.parameters(), model.slope_E, model.offset_E):
        if parameter.dim():
            parameter.copy_(parameter[order])
    model.log_variance_E.copy_(model.log_variance_E[order])
    assert study._errors(model, truth, gate) == pytest.approx((0, 0, 0, 0), abs=1e-7)


@EVERY_GATE
@torch.no_grad()
def test_a_scaled_gate_is_another_one_only_where_the_activation_is_not_homogeneous(
    gate: str,
) -> None:
    model, truth = Mixture(gate), Mixture(gate)
    model.gate.weight.mul_(2)
    model.gate.bias.mul_(2)
    model.gate.log_temperature.add_(math.log(2))
    if gate == "linear":
        model.gate.weight.add_(5.0)  # nor does a shift of all slopes matter here
    tau, slopes, ratio, density = study._errors(model, truth, gate)
    assert tau == pytest.approx(0.4)
    assert slopes > 0.5
    assert ratio < 1e-6
    assert (density < 1e-6) == (gate in ("linear", "relu"))


def test_a_fit_climbs_and_more_samples_come_nearer() -> None:
    reporter = Nobody().run("", 0, 0, 1)
    far = []
    for size in (200, 20_000):
        model = study._fitted("tanh", 0, size, 200, reporter, 1)
        far.append(study._hellinger(model, Mixture("tanh")))
    assert far[1] < far[0] / 3


def test_slope_of_a_power() -> None:
    sizes = (10, 100, 1000)
    assert study.slope(sizes, [3 * n**-0.5 for n in sizes]) == pytest.approx(-0.5)


def medians(rates: dict[str, float], ratio: float = -0.5, density: float = -0.5) -> Any:
    powers = {"temperature": rates, "hellinger": dict.fromkeys(GATES, density)}
    return {
        gate: {
            measure: [
                n ** powers.get(measure, dict.fromkeys(GATES, ratio))[gate] for n in (10, 100, 1000)
            ]
            for measure in MEASURES
        }
        for gate in GATES
    }


PAPER = {"linear": -0.1, "relu": -0.2, "sigmoid": -0.5, "tanh": -0.5}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (medians(PAPER), "+++++"),
        (medians(PAPER | {"linear": -0.5}), "-+-++"),
        (medians(PAPER | {"tanh": -0.2}), "+-+++"),
        (medians(PAPER, ratio=-0.1), "+++-+"),
        (medians(PAPER, density=-0.1), "++++-"),
    ],
)
def test_verdicts(given: Any, wanted: str) -> None:
    said = {"+": "reproduced", "-": "not reproduced"}
    found = study._findings(given, (10, 100, 1000), quick=False)
    assert [finding.verdict for finding in found] == [said[sign] for sign in wanted]
    quick = study._findings(given, (10, 100, 1000), quick=True)
    assert {finding.verdict for finding in quick} == {"inconclusive"}


def run(folder: Path) -> Reproduction:
    experiment = find("temperature_gaussian_moe").experiment
    assert experiment is not None
    return experiment(Laboratory(folder, quick=True, seed=0, device="cpu", progress=Nobody()))


def test_a_tiny_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "QUICK", Budget(sizes=(50, 100, 200), seeds=2, iterations=20))
    result = run(tmp_path)
    assert result.system == "temperature_gaussian_moe"
    assert [row["design"] for row in result.table] == list(GATES)
    for row in result.table:
        assert row["seeds"] == 2
        assert row["mean_active_experts"] == 3
        assert all(math.isfinite(row[f"slope_of_{measure}"]) for measure in MEASURES)
    assert len(result.findings) == 5
    json.dumps(result.to_dict(), allow_nan=False)
    monkeypatch.setattr(study, "_run", lambda *_: pytest.fail("a finished run was run again"))
    assert run(tmp_path).table == result.table


@pytest.mark.slow
def test_a_quick_experiment(tmp_path: Path) -> None:
    assert {finding.verdict for finding in run(tmp_path).findings} == {"inconclusive"}
