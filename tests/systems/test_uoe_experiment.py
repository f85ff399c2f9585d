"""UOE's experiment: that it runs and goes on, and what its verdicts follow from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_pruning_experiments import Counter

from moekit.systems import Laboratory, find, uoe_experiment
from moekit.systems.uoe_experiment import ALL, ONE, arms


def test_a_tiny_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = uoe_experiment.SIZE.replace(width=16, hidden=8, layers=2, experts=4)
    monkeypatch.setattr(uoe_experiment, "SIZE", size)
    monkeypatch.setattr(uoe_experiment, "FEW", (1e-2,))
    monkeypatch.setattr(uoe_experiment, "WIDE", (1e-2,))
    monkeypatch.setattr(uoe_experiment, "LENGTH", 16)
    experiment, counter = find("uoe").experiment, Counter()
    assert experiment is not None
    result = experiment(Laboratory(tmp_path, True, 0, "cpu", counter))
    assert counter.step == counter.total == 2 * len(arms())
    assert [finding.verdict for finding in result.findings] == ["inconclusive"] * 10
    json.dumps(result.to_dict(), allow_nan=False)
    assert [row["design"] for row in result.table] == list(arms())
    by_name = {row["design"]: row["parameters_changed"] for row in result.table}
    assert by_name[f"ga, {ONE}"] < by_name["ga, three experts, any layer"]
    assert by_name["ga, three experts, any layer"] < by_name["ga, all experts"]
    assert by_name["ga, all experts"] < by_name[f"ga, {ALL}"]
    again = Counter()
    assert experiment(Laboratory(tmp_path, True, 0, "cpu", again)) == result
    assert (again.step, again.again) == (0, 2)


def runs(lost: list[float | None], overlap: float = 0.5) -> list[dict[str, Any]]:
    return [{"lost": value, "overlap": overlap, "share": 0.1} for value in lost]


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([0.8, 0.9, 0.85], "reproduced"),
        ([0.3, 0.25, 0.2], "not reproduced"),
        ([0.2, 0.9, 0.5], "inconclusive"),
        ([0.8, None, None], "inconclusive"),  # one pair alone has no interval
        ([None, None, None], "inconclusive"),
    ],
)
def test_verdicts(others: list[float | None], verdict: str) -> None:
    pairs = {name: runs(others) for name in arms()}
    for name in ("ga", "gdiff", "npo", "rmu"):
        pairs[f"{name}, {ONE}"] = runs([0.5, 0.52, 0.48])
    findings = uoe_experiment._findings(pairs, quick=False)
    assert [finding.verdict for finding in findings[:8]] == [verdict] * 8
    reached = sum(value is not None for value in others)
    assert f"over {reached} of 3 pairs" in findings[0].measured
    assert all(f.verdict == "inconclusive" for f in uoe_experiment._findings(pairs, quick=True))


def test_the_rate_is_the_one_that_gets_there_and_loses_least() -> None:
    found = [
        {"rate": 1e-4, "lost": None},
        {"rate": 1e-4, "lost": 0.1},
        {"rate": 1e-3, "lost": 0.3},
        {"rate": 1e-3, "lost": 0.5},
        {"rate": 1e-2, "lost": 0.9},
        {"rate": 1e-2, "lost": 0.2},
    ]
    assert uoe_experiment._best(found) == 1e-3
    assert uoe_experiment._best([{"rate": 1.0, "lost": None}]) == 1.0
