"""COMET's experiment: the problem it poses, its scores, and its path from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from test_experiments import Nobody

from moekit.routing import Routing
from moekit.systems import Laboratory, Reproduction, comet_experiment, find
from moekit.systems.comet_experiment import QUICK, Problem

TINY = dataclasses.replace(QUICK, steps=4, search=3)


def run(folder: Path) -> Reproduction:
    experiment = find("comet").experiment
    assert experiment is not None
    return experiment(Laboratory(folder, quick=True, seed=0, device="cpu", progress=Nobody()))


def check(result: Reproduction) -> None:
    assert result.system == "comet"
    gates = ("top-2", "hash", "dselect-k", "comet")
    arms = [f"{gate}{search}" for gate in gates for search in ("", "+ paper", "+ safe")]
    assert [row["design"] for row in result.table] == arms
    for row in result.table:
        assert row["seeds"] == 2
        assert 0 <= row["accuracy"] <= 1
        assert math.isfinite(row["median_squared_error"])
        assert 1 <= row["mean_active_experts"] <= 8
    active = {row["design"]: row["mean_active_experts"] for row in result.table}
    for search in ("", "+ paper", "+ safe"):  # a frozen permutation renames and adds nothing
        assert active[f"top-2{search}"] == 2
        assert active[f"hash{search}"] == 1
    for finding in result.findings:
        assert finding.verdict == "inconclusive"
        assert "experts)" in finding.measured
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_right_expert_solves_the_problem_and_no_other_does() -> None:
    problem = Problem(seed=3, device="cpu")
    x_ND = problem.draw(400)
    right_N = problem.right(x_ND)
    assert sorted(set(right_N.tolist())) == list(range(8))
    for n in range(0, 400, 37):  # the cell by comparison with its edges
        column = sum(float(x_ND[n, 0]) >= edge for edge in (-0.5, 0.0, 0.5))
        row = int(float(x_ND[n, 1]) >= 0)
        assert right_N[n] == problem.owner_E[4 * row + column]
    weight_N1 = torch.ones(400, 1)
    assert float(problem.error(x_ND, Routing(right_N[:, None], weight_N1, 8))) == 0
    other_N1 = (right_N[:, None] + 1) % 8
    assert float(problem.error(x_ND, Routing(other_N1, weight_N1, 8))) > 0.1


def test_an_id_lies_in_one_cell_and_a_cell_has_four() -> None:
    problem = Problem(seed=1, device="cpu")
    x_ND = problem.draw(2000)
    ids = comet_experiment._cell(x_ND, 8, 4).tolist()
    right = problem.right(x_ND).tolist()
    owners = {id_: {r for i, r in zip(ids, right, strict=True) if i == id_} for id_ in ids}
    assert set(ids) == set(range(comet_experiment.IDS))
    assert all(len(owner) == 1 for owner in owners.values())
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    assert comet_experiment._cell(corners, 8, 4).tolist() == [0, 7, 24, 31]


def test_a_tiny_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(comet_experiment, "QUICK", TINY)
    state = torch.get_rng_state()
    result = run(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    check(result)
    monkeypatch.setattr(comet_experiment, "_run", lambda *_: pytest.fail("run again"))
    assert run(tmp_path).table == result.table


def test_an_unfinished_or_other_run_is_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(comet_experiment, "QUICK", TINY)
    first = run(tmp_path)
    (path,) = tmp_path.glob("comet-seed0.json")
    path.write_text(path.read_text()[:20])
    assert run(tmp_path).table == first.table
    monkeypatch.setattr(comet_experiment, "QUICK", dataclasses.replace(TINY, steps=5))
    assert run(tmp_path).table != first.table


@pytest.mark.slow
def test_a_quick_experiment(tmp_path: Path) -> None:
    check(run(tmp_path))
