"""ModuleFormer's experiment, at a size that shows nothing but that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moekit import AttentionHeads, ModuleRouting
from moekit.compare import ModelSpec
from moekit.data import ProgressHook
from moekit.models.language import MoEDecoderForCausalLM
from moekit.systems import Laboratory, Shape, find, moduleformer_experiment, moduleformer_runs
from moekit.systems.moduleformer_experiment import CUTS, MOVES
from moekit.systems.moduleformer_runs import Budget, dense_of_equal_size, modular
from moekit.training import ProgressReporter, SilentProgress


class Nobody:
    """A StudyProgress that counts the runs."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    def preparing(self) -> ProgressHook:
        return lambda *_: None

    def run(self, design: str, seed: int, index: int, total: int) -> ProgressReporter:
        self.runs.append(design)
        assert index < total
        return SilentProgress()

    def found(self, design: str, seed: int) -> None:
        return None

    def timing(self) -> None:
        return None


def test_a_tiny_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ModelSpec(width=16, depth=1, heads=2, kv_heads=2)
    for module in (moduleformer_runs, moduleformer_experiment):
        monkeypatch.setattr(module, "MODEL", small)
    monkeypatch.setattr(moduleformer_experiment, "QUICK", Budget(1, steps=2, tuning=2, batches=1))
    experiment, nobody = find("moduleformer").experiment, Nobody()
    assert experiment is not None
    result = experiment(Laboratory(tmp_path, True, 0, "cpu", nobody))
    assert len(nobody.runs) == moduleformer_runs.RUNS_A_SEED
    assert len(set(nobody.runs)) == len(nobody.runs)
    assert [finding.verdict for finding in result.findings] == ["inconclusive"] * 5
    rows = {row["design"]: row for row in result.table}
    assert {name.removeprefix("moduleformer, ") for name in MOVES} < set(rows)
    assert f"pruned_{CUTS[0]:.0%}_by_use" in rows["concentrated"]
    assert all("mean_active_experts" in row for row in result.table)
    json.dumps(result.to_dict(), allow_nan=False)
    again = experiment(Laboratory(tmp_path, True, 0, "cpu", Nobody()))  # trains nothing anew
    for old, new in zip(result.table, again.table, strict=True):
        assert {**new, "tokens_per_second": None} == {**old, "tokens_per_second": None}


def test_the_dense_model_of_the_speed_check_is_as_large() -> None:
    sizes = []
    for design in (modular("mi"), dense_of_equal_size()):
        with torch.device("meta"):
            model = MoEDecoderForCausalLM(design.config(moduleformer_runs.MODEL, 258, 128))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_the_design_routes_both_parts() -> None:
    make = find("moduleformer").design
    assert make is not None
    design = make(Shape(experts=6, hidden=32, k=3))
    (attention,) = design.attention
    assert attention is not None
    assert attention.experts == AttentionHeads(count=6)
    assert attention.router == design.layers[0].router == ModuleRouting(k=3)
