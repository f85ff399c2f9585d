"""The experiments of DERN and UNCURL, at a size that shows nothing but that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moekit.data import ProgressHook
from moekit.surgery import FactorRow
from moekit.systems import Laboratory, dern_experiment, find, uncurl_experiment
from moekit.systems.uncurl_experiment import COUNTS, GENERAL
from moekit.training import ProgressReporter


class Counter:
    """A StudyProgress, and reporter, that counts steps."""

    def __init__(self) -> None:
        self.total = self.step = self.again = 0

    def preparing(self) -> ProgressHook:
        return lambda *_: None

    def run(self, design: str, seed: int, index: int, total: int) -> ProgressReporter:
        assert index < total
        return self

    def start(self, total: int, description: str) -> None:
        self.total = total

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        self.step = step

    def finish(self) -> None:
        return None

    def found(self, design: str, seed: int) -> None:
        self.again += 1

    def timing(self) -> None:
        return None


@pytest.mark.parametrize("name", ["dern", "uncurl"])
def test_a_tiny_experiment(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = {"dern": dern_experiment, "uncurl": uncurl_experiment}[name]
    monkeypatch.setattr(module, "SIZE", module.SIZE.replace(width=16, hidden=8, layers=1))
    monkeypatch.setattr(module, "LENGTH", 32)
    experiment, counter = find(name).experiment, Counter()
    assert experiment is not None
    result = experiment(Laboratory(tmp_path, True, 0, "cpu", counter))
    assert counter.step == counter.total > 0
    assert result.system == name
    assert [finding.verdict for finding in result.findings] == ["inconclusive"] * 5
    json.dumps(result.to_dict(), allow_nan=False)
    designs = [row["design"] for row in result.table]
    assert len(set(designs)) == len(designs)
    if name == "dern":
        assert len(designs) == 2 * (1 + len(dern_experiment.methods(0)))
    else:
        pairs = len(COUNTS) * (len(COUNTS) - 1) // 2
        assert len(designs) == len(COUNTS) + pairs * (len(uncurl_experiment.methods(0)) + 1)
        assert sum(GENERAL in design for design in designs) == pairs
    again = Counter()
    assert experiment(Laboratory(tmp_path, True, 0, "cpu", again)) == result
    assert (again.step, again.again) == (0, 1)


def family(uncurl_at_8: float, uncurl_at_4: float, seed: int) -> list[FactorRow]:
    noise = 0.001 * seed
    natives = [FactorRow("native", n, n, seed, 3.0, 2.0) for n in (16, 8, 4, 2)]
    losses = {(16, 8): uncurl_at_8, (16, 4): uncurl_at_4, (16, 2): 2.5, (8, 4): 2.1}
    losses |= {(8, 2): 2.3, (4, 2): 2.2}
    reduced = [
        FactorRow(method, a, b, seed, 3.0, loss + (0.1 if method != "uncurl" else noise))
        for (a, b), loss in losses.items()
        for method in ("uncurl", "frequency")
    ]
    return natives + reduced


@pytest.mark.parametrize(
    ("at_8", "at_4", "verdict"),
    [(2.0, 2.2, "reproduced"), (2.3, 2.4, "not reproduced"), (2.0, 1.9, "not reproduced")],
)
def test_verdicts_of_uncurl(at_8: float, at_4: float, verdict: str) -> None:
    rows = [row for seed in range(3) for row in family(at_8, at_4, seed)]
    found = uncurl_experiment._threshold(rows, quick=False)
    assert found.verdict == verdict
    beats = uncurl_experiment._beats(rows, "frequency", "naive pruning", quick=False)
    assert beats.verdict == "reproduced"
    assert "+0.0990" in beats.measured
    assert uncurl_experiment._threshold(rows, quick=True).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("theirs", "verdict"), [(2.5, "reproduced"), (1.5, "not reproduced"), (None, "inconclusive")]
)
def test_verdicts_of_dern(theirs: float | None, verdict: str, tmp_path: Path) -> None:
    seeds = []
    for seed in range(3):
        other = theirs if theirs is not None else 2.0 + 0.1 * (seed - 1)
        bits = dict.fromkeys(("0.75", "0.5", "0.25"), other + 0.001 * seed)
        own = dict.fromkeys(bits, 2.0)
        seeds.append({"k": {"drop": {"bits": bits}, "dern": {"bits": own, "passed_on": bits}}})
    lab = Laboratory(tmp_path, False, 0, "cpu", Counter())
    assert dern_experiment._beats(seeds, "k", "drop", "dropping", lab).verdict == verdict
    quick = Laboratory(tmp_path, True, 0, "cpu", Counter())
    found = dern_experiment._beats(seeds, "k", "drop", "dropping", quick)
    assert found.verdict == "inconclusive"
