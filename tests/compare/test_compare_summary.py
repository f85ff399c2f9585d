"""Records, their summary, and the verdict in words."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.stats

from moekit.compare import RunRecord, Spread, paired_difference, summarise, verdict
from moekit.compare.record import write_csv, write_json, write_text
from moekit.errors import OutputError

Make = Callable[..., RunRecord]


def words(records: list[RunRecord]) -> list[str]:
    return verdict(records, summarise(records))


def test_a_record_survives_json(record: Make) -> None:
    full = record(
        "a", 1, 2.5, statistics={"x": [1, None]}, history=[{"step": 1}], group_losses={"g": 1.0}
    )
    assert RunRecord.from_dict(json.loads(json.dumps(full.to_dict()))) == full


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_is_student_t(count: int) -> None:
    values = [math.sin(7 * i) for i in range(count)]
    found = Spread.of(values)
    low, high = scipy.stats.t.interval(
        0.95, count - 1, loc=statistics.mean(values), scale=scipy.stats.sem(values)
    )
    assert found.mean == pytest.approx((low + high) / 2, abs=1e-12)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.deviation == pytest.approx(statistics.stdev(values))
    assert Spread.of(values[:1]) == Spread(values[0], None, None)


def test_the_interval_by_hand() -> None:
    """1, 2, 3: deviation 1, t of 2 degrees 4.3027, half width 4.3027 / √3."""
    assert Spread.of([1.0, 2.0, 3.0]).half_width == pytest.approx(2.4841, abs=1e-4)


def test_differences_are_paired_by_seed(record: Make) -> None:
    records = [record("a", 0, 1.0), record("a", 1, 5.0), record("b", 1, 5.5), record("b", 0, 1.5)]
    assert paired_difference(records, "a", "b") == Spread(0.5, 0.0, 0.0)
    lone = [*records, record("b", 2, 9.0)]
    assert paired_difference(lone, "a", "b").mean == 0.5  # a has no seed 2


def test_summary(record: Make) -> None:
    records = [
        record("b", 0, 1.0, statistics={"load_violation": 2.0}),
        record("a", 0, 3.0),
        record("b", 1, 2.0, statistics={"load_violation": 4.0}, tokens_per_second=30.0),
    ]
    second, first = summarise(records)
    assert (second.design, first.design) == ("b", "a")
    assert second.loss.mean == 1.5
    assert second.perplexity.mean == pytest.approx((math.e + math.e**2) / 2)
    assert second.tokens_per_second == 20
    assert second.load_violation is not None
    assert second.load_violation.mean == 3
    assert first.load_violation is None
    assert first.feed_forward_experts.mean == 1
    assert "expert_phase_seconds_per_token" not in first.row()


def test_one_seed_is_no_evidence(record: Make) -> None:
    (sentence,) = words([record("a", 0, 1.0), record("b", 0, 1.25)])
    assert sentence.startswith("a has the lowest validation loss (1.0000 nats a token")
    assert "0.2500 below b" in sentence
    assert "no telling that from chance: run at least three seeds" in sentence


def test_one_design_alone(record: Make) -> None:
    assert words([record("a", 0, 1.0)]) == ["a was run alone: 1.0000 nats a token, perplexity 2.7."]


def test_a_clear_winner(record: Make) -> None:
    runs = [record("a", s, 1 + s) for s in range(3)]
    runs += [record("b", s, 1.5 + s + 0.01 * s) for s in range(3)]
    sentence = words(runs)[0]
    assert "ahead of every other design beyond chance" in sentence
    # differences 0.50, 0.51, 0.52: deviation 0.01, half width 4.3027 · 0.01 / √3
    assert "95% intervals over 3 seeds: b +0.5100 ± 0.0248." in sentence


def test_no_difference_is_clear(record: Make) -> None:
    gaps = (0.5, -0.4, 0.1)
    runs = [record("a", s, 1.0) for s in range(3)]
    runs += [record("b", s, 1.0 + gap) for s, gap in enumerate(gaps)]
    assert "but no difference is clear of chance" in words(runs)[0]


def test_ahead_of_some(record: Make) -> None:
    gaps = (0.5, -0.4, 0.1)
    runs = [record("a", s, 1.0) for s in range(3)]
    runs += [record("b", s, 1.0 + gap) for s, gap in enumerate(gaps)]
    runs += [record("c", s, 1.5 + 0.01 * s) for s in range(3)]
    runs += [record("d", s, 1.6 + 0.01 * s) for s in range(3)]
    assert "ahead of c and d beyond chance, but not clearly of b." in words(runs)[0]


def test_a_design_that_is_not_causal_is_left_out(record: Make) -> None:
    runs = [record("a", 0, 2.0), record("b", 0, 2.5), record("peeks", 0, 0.5, causal=False)]
    first, second = words(runs)
    assert first.startswith("a has the lowest")
    assert second.startswith("peeks (0.5000) is left out of the ranking")
    (only,) = words([runs[2]])
    assert "left out" in only


def test_the_cheapest_of_those_that_are_level(record: Make) -> None:
    gaps = (0.5, -0.4, 0.1)
    runs = [record("a", s, 1.0, flops_per_token=4e6) for s in range(3)]
    runs += [record("b", s, 1.0 + g, flops_per_token=3e6) for s, g in enumerate(gaps)]
    runs += [record("c", s, 3.0 + 0.01 * s, flops_per_token=1e6) for s in range(3)]
    _, cheap = words(runs)
    assert cheap.startswith("b is the cheapest design not clearly worse than a")
    assert "25% less a token (3.00 against 4.00 MFLOP forward)" in cheap


def test_a_loss_that_still_falls_is_said(record: Make) -> None:
    falling = [{"step": i, "loss": 5 - 0.1 * i} for i in range(20)]
    flat = [{"step": i, "loss": 5.0} for i in range(20)]
    runs = [record("a", 0, 1.0, history=falling), record("b", 0, 1.5, history=flat)]
    assert words(runs)[-1].startswith("After 1,000 tokens the loss of a was still falling")
    level = [record("a", 0, 1.0, history=flat), record("b", 0, 1.5, history=flat)]
    assert len(words(level)) == 1


def test_files_are_written_whole(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"x": 1, "y": "a,b"}, {"x": None, "z": "τ"}])
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"x": "1", "y": "a,b", "z": ""},
            {"x": "", "y": "", "z": "τ"},
        ]
    write_json(tmp_path / "deep" / "a.json", {"τ": [1.5]})
    assert json.loads((tmp_path / "deep" / "a.json").read_text(encoding="utf-8")) == {"τ": [1.5]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "deep"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken"):
        write_text(tmp_path / "taken", "x")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]
    assert (tmp_path / "file").read_text() == "kept"


def test_new_files_have_the_permissions_of_the_user(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode
