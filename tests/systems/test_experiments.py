"""The experiments from end to end: tiny ones always, the quick ones among the slow tests."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from moekit.compare import ModelSpec, StudySpec, budgets
from moekit.data import ProgressHook, TextSpec
from moekit.systems import (
    Laboratory,
    Reproduction,
    adamoe_experiment,
    find,
    moepp,
    rectify_router_experiment,
    remoe,
)
from moekit.systems.experiment import deviation_of_experts, tokens_by_experts
from moekit.systems.rectify_router_experiment import Budget
from moekit.training import ProgressReporter, SilentProgress

NAMES = ("adamoe", "moepp", "rectify_router", "remoe")
TINY_MODEL = ModelSpec(width=16, depth=2, heads=2, kv_heads=1)
TINY_TEXT = TextSpec(source="stdlib", vocab_size=280, sequence_length=32, limit_bytes=60_000)


class Nobody:
    """A StudyProgress that tells nobody."""

    def preparing(self) -> ProgressHook:
        return lambda *_: None

    def run(self, design: str, seed: int, index: int, total: int) -> ProgressReporter:
        return SilentProgress()

    def found(self, design: str, seed: int) -> None:
        return None

    def timing(self) -> None:
        return None


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments with few steps of a narrow model."""
    original = budgets.small_model_study

    def small(designs: Any, **options: Any) -> StudySpec:
        spec = original(designs, **{**options, "quick": True})
        training = spec.training.replace(steps=6, batch_size=2, log_every=2, eval_every=3)
        return spec.replace(model=TINY_MODEL, text=TINY_TEXT, training=training)

    for module in (moepp, remoe):
        monkeypatch.setattr(module, "small_model_study", small)
    for module in (adamoe_experiment, rectify_router_experiment):
        monkeypatch.setattr(module, "SMALL_MODEL", TINY_MODEL)
        monkeypatch.setattr(module, "SMALL_TEXT", TINY_TEXT)
    monkeypatch.setattr(rectify_router_experiment, "QUICK", Budget(steps=4, tuning=3, seeds=1))


def run(name: str, folder: Path) -> Reproduction:
    experiment = find(name).experiment
    assert experiment is not None
    return experiment(Laboratory(folder, quick=True, seed=0, device="cpu", progress=Nobody()))


def check(name: str, result: Reproduction) -> None:
    assert result.system == name
    assert result.findings
    for finding in result.findings:
        assert finding.claim
        assert any(letter.isdigit() for letter in finding.measured)
        assert finding.verdict == "inconclusive"
    losses = [row["validation_loss"] for row in result.table]
    assert len(losses) >= 3
    assert all(math.isfinite(loss) for loss in losses)
    json.dumps(result.to_dict(), allow_nan=False)


def test_experts_are_counted_over_runs_and_layers() -> None:
    layers = [{"histogram": [1, 2]}, {"histogram": [0, 1, 4]}]
    counts = tokens_by_experts([{"layers": layers}, {"layers": layers[:1]}])
    assert counts == [2, 5, 4]
    assert deviation_of_experts(counts) == pytest.approx(
        statistics.pstdev([0] * 2 + [1] * 5 + [2] * 4)
    )


# Nine short trainings and their surveys: longer than a default test should take.
LONG = pytest.param("rectify_router", marks=pytest.mark.slow)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", [LONG if n == "rectify_router" else n for n in NAMES])
def test_a_tiny_experiment(name: str, tmp_path: Path) -> None:
    result = run(name, tmp_path)
    check(name, result)
    if name == "moepp":
        kinds = ("feed_forward", "zero", "copy", "constant")
        for row in result.table:  # every assignment goes to an expert of one kind
            load = [row[f"{kind}_experts_per_token"] for kind in kinds]
            assert sum(load) == pytest.approx(2)
            assert (load[1:] == [0, 0, 0]) == (row["design"] == "topk")
    again = run(name, tmp_path)  # finished runs are not run again
    assert [row["validation_loss"] for row in again.table] == [
        row["validation_loss"] for row in result.table
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quick_experiment(name: str, tmp_path: Path) -> None:
    check(name, run(name, tmp_path))
