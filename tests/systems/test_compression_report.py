"""The compression study's tables: numbers by hand from made-up cells."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moekit.systems.compression_report import REFERENCE, markdown, page, summarised

DOMAINS = ("a", "b")


def cell(method: str, seed: int, losses: tuple[float, float], keep: float = 0.5) -> dict[str, Any]:
    return {
        "model": "m",
        "method": method,
        "keep": keep,
        "seed": seed,
        "loss": dict(zip(DOMAINS, losses, strict=True)),
        "accuracy": 0.5 + 0.1 * seed,
        "accuracy_normalized": 0.25,
        "parameters": 1000,
        "passed_on": 0.5,
    }


CELLS = [
    {**cell("whole", 0, (1.0, 2.0), keep=1.0)},
    *[cell(REFERENCE, s, (2.0 + s, 3.0 + s)) for s in range(3)],
    *[cell("better", s, (1.9 + s, 2.9 + s + 0.01 * s)) for s in range(3)],
    *[cell("worse", s, (2.1 + s, 3.2 + s + 0.01 * s)) for s in range(3)],
    *[cell("unclear", s, (2.0 + s, 3.0 + s + 0.5 * (-1) ** s)) for s in range(3)],
    *[cell("same", s, (2.0 + s, 3.0 + s)) for s in range(3)],
]
ABOUT: dict[str, Any] = {
    "machine": {"device": "none", "threads": 1, "torch": "0", "transformers": "0"},
    "extent": {"seeds": [0, 1, 2], "calibration": 1, "blocks": 1, "items": 1},
    "models": {
        "m": {
            "parameters": 2000,
            "tokens": 10,
            "items": 4,
            "written": 0.0,
            "size": {"experts": 4, "hidden": 8, "k": 2},
            "untrained": {"layers": [{"information": 0.125}]},
            "trained": {"layers": [{"information": 0.25}], "domain_entropy": math.log(2)},
        }
    },
}


def test_rows_by_hand() -> None:
    rows = {row.method: row for row in summarised(CELLS, "m")}
    assert list(rows) == ["whole", REFERENCE, "better", "worse", "unclear", "same"]
    assert rows["whole"].gap is None
    assert rows["whole"].perplexity == pytest.approx(math.exp(1.5))
    assert rows[REFERENCE].loss.mean == pytest.approx(3.5)
    assert rows[REFERENCE].loss.deviation == pytest.approx(1.0)
    assert rows["better"].accuracy.mean == pytest.approx(0.6)
    gap = rows["better"].gap
    assert gap is not None
    assert gap.mean == pytest.approx(-0.095)
    # Student's t with two degrees of freedom: 4.303
    assert gap.half_width == pytest.approx(4.3027 * 0.005 / math.sqrt(3), rel=1e-3)
    assert {name: row.verdict for name, row in rows.items()} == {
        "whole": "",
        REFERENCE: "",
        "better": "better",
        "worse": "worse",
        "unclear": "not clear",
        "same": "the same",
    }
    assert [rows[n].domains for n in ("better", "worse", "same")] == [2, 0, 0]


def test_another_model_has_no_rows() -> None:
    assert summarised(CELLS, "n") == []


def test_one_seed_is_never_clear() -> None:
    rows = {r.method: r for r in summarised([c for c in CELLS if c["seed"] == 0], "m")}
    assert rows["better"].verdict == "not clear"


def test_page_and_markdown_hold_every_row() -> None:
    tasks = [
        {"task": "t", "method": "native", "experts": n, "loss_before": 3.0, "loss": 2.0 + n}
        for n in (8, 4)
    ]
    html = page(ABOUT, CELLS, tasks).html()
    text = markdown(ABOUT, CELLS, tasks)
    for name in ("whole", REFERENCE, "better", "worse", "unclear", "native"):
        assert name in html
        assert f"| {name} |" in text
    assert "0.125 to 0.250" in text
    assert "<svg" in html
    without = markdown(ABOUT, CELLS, [])
    assert "UNCURL" not in without
    widths = [len(line.split("|")) for line in text.splitlines() if line.startswith("| better |")]
    assert len(set(widths)) == 1
