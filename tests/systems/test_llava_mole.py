"""The experiment of LLaVA-MoLE, and what its paper and code claim of the router."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moekit.systems.experiment import Laboratory
from moekit.systems.llava_mole_experiment import ARMS, FULL, MIXTURE, PLAIN, ArmRun, Problem
from moekit.training import SilentProgress


class _Nobody:
    """A StudyProgress that tells nobody."""

    def run(self, name: str, seed: int, index: int, total: int) -> SilentProgress:
        return SilentProgress()

    def found(self, name: str, seed: int) -> None:
        pass


def errors(tmp_path: Path, steps: int, *names: str) -> dict[str, dict[str, float]]:
    lab = Laboratory(tmp_path, quick=False, seed=0, device="cpu", progress=_Nobody())
    budget = replace(FULL, steps=steps)
    return {name: ArmRun(lab, ARMS[name], 1, budget, name, (0, 1))() for name in names}


def test_domains_conflict_by_construction() -> None:
    problem = Problem(0)
    x_ND, wanted_ND, domain_N = problem.draw(50, torch.Generator().manual_seed(0))
    for n, x_D in enumerate(x_ND):
        torch.testing.assert_close(wanted_ND[n], problem.wanted[domain_N[n]](x_D))
    first, second = (part(x_ND) for part in problem.wanted[:2])
    assert float((first - second).norm() / first.norm()) > 0.3
    only = problem.draw(9, torch.Generator().manual_seed(0), only=2)
    assert only[2].tolist() == [2] * 9


def test_arms_have_the_sizes_that_they_are_compared_by(tmp_path: Path) -> None:
    found = errors(tmp_path, 1, PLAIN, "plain, r=12", MIXTURE)
    plain, wide, mixture = (found[name]["parameters"] for name in found)
    assert wide == 3 * plain
    assert mixture - wide == 3 * 32 + 3  # its router


@pytest.mark.slow
def test_a_router_that_learns_from_the_task_takes_the_conflict_away(tmp_path: Path) -> None:
    found = errors(tmp_path, 1500, PLAIN, MIXTURE, "mixture, hard")
    assert found[MIXTURE]["error"] < 0.5 * found[PLAIN]["error"]
    assert found[MIXTURE]["information"] > 0.5
    assert found["mixture, hard"]["error"] == pytest.approx(found[PLAIN]["error"], rel=0.1)
    assert found["mixture, hard"]["information"] < 0.1
