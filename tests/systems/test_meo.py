"""MEO: its designs, the cost measurement, the encoder, and the experiment at a tiny size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_experiments import Nobody

from moekit import Merged, MoESpec, PerChunk, PerTask, TokenAttention
from moekit.measure.merged_bench import Cost, Sizes, costs, slope
from moekit.systems import Laboratory, Shape, find, meo_encoder, meo_experiment
from moekit.systems.digits import Digits, load_digits
from moekit.systems.meo import meo, meo_chunk
from moekit.systems.meo_encoder import ARMS, Projection, built, curve, trained
from moekit.systems.meo_experiment import KS, Budget
from moekit.training import SilentProgress

TINY = Budget(Sizes(8, 16, sequences=2, length=16), repeats=1, seeds=2, epochs=1, curve_epochs=1)


@pytest.mark.parametrize(("experts", "k", "mixed"), [(8, 2, 4), (2, 1, 2), (16, 4, 8), (4, 4, 4)])
def test_designs(experts: int, k: int, mixed: int) -> None:
    for make, router in ((meo, PerTask), (meo_chunk, PerChunk)):
        design = make(Shape(experts, 16, k))
        (layer,) = design.layers
        assert isinstance(layer, MoESpec)
        assert isinstance(layer.router, router)
        assert layer.router.router.k == mixed
        assert layer.dispatch == Merged()
        assert layer.expected_load() == 1.0
        assert layer.experts.hidden == 16 * k
        assert design.causal
        assert isinstance(layer.adapter, TokenAttention) == (make is meo_chunk)
    assert find("meo").design is meo


def test_costs_of_both_ways() -> None:
    sizes = Sizes(16, 32, sequences=3, length=10)
    found = {(c.way, c.k): c for c in costs(sizes, (1, 2, 4), 1)}
    bank = 2 * 16 * 32 + 16 + 32  # entries of an expert, biases included
    products = 2 * 2 * 16 * 32
    for k in (1, 2, 4):
        run, merged = found["run", k], found["merged", k]
        assert run.rows_per_token == k
        assert merged.rows_per_token == 1
        assert run.mflops_per_token == pytest.approx(k * products / 1e6)
        merging = 2 * 8 * bank / sizes.length
        assert merged.mflops_per_token == pytest.approx((products + merging) / 1e6)
        assert 0 < run.forward_ms < run.training_ms
    line = [Cost("run", k, k, 0, 3.0 + 2.0 * k, 0) for k in (1, 2, 5)]
    assert slope(line) == pytest.approx(2.0)


@pytest.mark.slow
def test_time_does_not_grow_with_what_is_merged() -> None:
    """A merge that gathers or loops over experts would be seen in the slope."""
    found = costs(Sizes(128, 512, sequences=8), (1, 2, 4, 8), 7)
    run, merged = ([c for c in found if c.way == way] for way in ("run", "merged"))
    assert slope(merged) < 0.1 * slope(run)


@pytest.fixture(scope="module")
def digits() -> Digits:
    found = load_digits(0)
    return Digits(
        found.train_images[:200], found.train_labels[:200], found.test_images, found.test_labels
    )


def test_arms_start_as_the_dense_encoder(digits: Digits) -> None:
    """Experts are copies of one projection, so every arm whose weights sum to 1 is the same."""
    images = digits.train_images[:5].double()
    dense, _ = built(ARMS["dense"], 3).double()(images)
    for name, arm in ARMS.items():
        logits, _ = built(arm, 3).double().train()(images)
        # Switch's weight, a probability times E, is near 1 before training.
        near = {"rtol": 0.1, "atol": 0.05} if name == "MoE, 1 a token" else {}
        torch.testing.assert_close(logits, dense, **near)
    # The paper's gate, two projections each with a gate of its own, and the balance losses.
    model = built(ARMS["MEO, token"], 3)
    mixtures = [m.mixture for m in model.modules() if isinstance(m, Projection)]
    assert len(mixtures) == 2
    assert len({id(mixture.router) for mixture in mixtures}) == 2
    _, balance = model.train()(digits.train_images[:5])
    assert balance.item() > 0


def test_running_and_merging_train_alike(digits: Digits) -> None:
    run, merged = (
        curve(built(ARMS[name], 1).double(), digits, 1, 4, SilentProgress())
        for name in ("MoE, 4 a sequence", "MEO, sequence")
    )
    assert len(run) == 8
    assert run[-1] < run[0]
    assert max(abs(a - b) for a, b in zip(run, merged, strict=True)) < 1e-10


def test_outcomes_count_what_was_computed(digits: Digits) -> None:
    found = {n: trained(ARMS[n], digits, 0, 1, "cpu", SilentProgress()) for n in ARMS}
    rows = {"MoE, 4 a token": 4.0, "MoE, 4 a sequence": 4.0}
    for name, outcome in found.items():
        assert outcome.rows_per_token == rows.get(name, 1.0)
        assert 0 <= outcome.accuracy <= 1
    weights = 2 * meo_encoder.WIDTH * meo_encoder.HIDDEN
    more = found["MoE, 4 a sequence"].mflops_per_image - found["MEO, sequence"].mflops_per_image
    biases = meo_encoder.WIDTH + meo_encoder.HIDDEN
    running = 3 * 2 * meo_encoder.TOKENS * weights
    merging = 2 * meo_encoder.EXPERTS * (weights + biases)
    assert more == pytest.approx((running - merging) / 1e6)


def test_a_tiny_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meo_experiment, "QUICK", TINY)
    result = meo_experiment.experiment(Laboratory(tmp_path, True, 0, "cpu", Nobody()))
    assert result.system == "meo"
    assert [row["design"] for row in result.table] == [f"{k} of 8" for k in KS] + list(ARMS)
    assert all(row["mean_active_experts"] >= 1 for row in result.table)
    assert len(result.findings) == 8
    for finding in result.findings:
        assert finding.verdict == "inconclusive"
        assert any(letter.isdigit() for letter in finding.measured)
    json.dumps(result.to_dict(), allow_nan=False)
    assert all(math.isfinite(row["accuracy"]) for row in result.table[len(KS) :])
    again = meo_experiment.experiment(Laboratory(tmp_path, True, 0, "cpu", Nobody()))
    assert again.table == result.table  # finished parts are not run again


def test_verdicts() -> None:
    run = [Cost("run", k, k, k * 1.0, 10.0 * k, 30.0 * k) for k in KS]
    merged = [Cost("merged", k, 1, 1.1, 11.0 + 0.01 * k, 33.0) for k in KS]
    found = meo_experiment._cost_findings({"run": run, "merged": merged}, Sizes(8, 8), quick=False)
    assert [f.verdict for f in found] == ["reproduced"] * 3
    slow = [Cost("merged", k, 1, 1.0 * k, 10.0 * k, 33.0) for k in KS]
    found = meo_experiment._cost_findings({"run": run, "merged": slow}, Sizes(8, 8), quick=False)
    assert [f.verdict for f in found] == ["not reproduced"] * 3
