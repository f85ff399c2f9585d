"""Graph of tokens: its designs, the untrained routers under noise, and a tiny experiment."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from test_experiments import TINY_MODEL, Nobody

from moekit import AttentionAware, MoESpec, SimilarityAware, SwitchBalance, TopK
from moekit.compare import budgets
from moekit.routing import Site
from moekit.systems import Laboratory, Reproduction, Shape, baselines, find, systems
from moekit.systems import graph_of_tokens_experiment as experiment
from moekit.systems import graph_of_tokens_stress as stress
from moekit.systems.graph_of_tokens import attention_aware, graph_of_tokens


def test_designs() -> None:
    shape = Shape(experts=4, hidden=16, k=2)
    for design, router in (
        (graph_of_tokens, SimilarityAware(TopK(k=2))),
        (attention_aware, AttentionAware(TopK(k=2))),
    ):
        (layer,) = design(shape).layers
        assert isinstance(layer, MoESpec)
        assert layer.router == router
        assert layer.losses == (SwitchBalance(0.01),)  # the backbone's own, and no other
        assert design(shape).causal
        assert find(design.__name__).design is design
    assert find("graph_of_tokens") in systems()
    assert find("attention_aware") in baselines()


def test_the_arms_differ_in_the_router_alone() -> None:
    specs = [experiment._design(name, r).layers[0] for name, r in experiment.ROUTERS.items()]
    assert {spec.replace(router=TopK(k=2)) for spec in specs} == {specs[0]}
    assert specs[0].router == TopK(k=2)
    assert all(spec.router.k == 2 for spec in specs)


def test_flips_by_hand() -> None:
    """The share of slots that noise changes, from the formulas, for one draw."""
    seed, n, d, e = 3, stress.TOKENS, stress.WIDTH, stress.EXPERTS
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(8, d, generator=generator)
    clean = torch.stack([centre[i // 8] for i in range(n)])
    clean = clean + 0.5 * torch.randn(n, d, generator=generator)
    noisy = clean + 0.5 * torch.randn(n, d, generator=generator)
    gate = torch.randn(e, d, generator=torch.Generator().manual_seed(seed + 1000)) / math.sqrt(d)

    def chosen(x: torch.Tensor, temperature: float | None) -> list[set[int]]:
        share = (x @ gate.T).softmax(-1)
        if temperature is not None:
            share = (x @ x.T / math.sqrt(d) / temperature).softmax(-1) @ share
        return [set(row.topk(2).indices.tolist()) for row in share]

    found = stress.flip_rates(seed)
    temperatures = {"top-2": None} | {f"τ {t:g}": t for t in stress.TEMPERATURES}
    assert found.keys() == temperatures.keys()
    for name, temperature in temperatures.items():
        pairs = zip(chosen(clean, temperature), chosen(noisy, temperature), strict=True)
        wanted = sum(1 - len(a & b) / 2 for a, b in pairs) / n
        assert found[name] == pytest.approx(wanted, abs=0.51 / n)  # a tie may fall either way


def test_flips_depend_on_the_seed_alone() -> None:
    assert stress.flip_rates(0) == stress.flip_rates(0) != stress.flip_rates(1)
    fixed = SimilarityAware(stress.BASE, rank=0).build(Site(4, ("feed_forward",) * 3))
    assert len(list(fixed.parameters())) == 1  # the gate alone, which all of them share


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    original = budgets.small_model_study

    def small(designs, **options):  # type: ignore[no-untyped-def]
        spec = original(designs, **{**options, "quick": True})
        return spec.replace(training=spec.training.replace(steps=6, batch_size=2, log_every=2))

    monkeypatch.setattr(experiment, "small_model_study", small)
    monkeypatch.setattr(experiment, "MODEL", TINY_MODEL)
    monkeypatch.setattr(experiment, "TEXT", experiment.TEXT.replace(limit_bytes=40_000))
    monkeypatch.setattr(experiment, "STRESS_SEEDS", 3)


def run(folder: Path) -> Reproduction:
    return experiment.experiment(
        Laboratory(folder, quick=True, seed=0, device="cpu", progress=Nobody())
    )


@pytest.mark.usefixtures("tiny")
def test_a_tiny_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = experiment.routing_fluctuation

    def watched(models, dataset):  # type: ignore[no-untyped-def]
        compared.append(original(models, dataset))
        return compared[-1]

    monkeypatch.setattr(experiment, "routing_fluctuation", watched)
    result = run(tmp_path)
    names = ["top-2", "similarity-aware", "attention-aware"]
    assert [row["design"] for row in result.table[:3]] == names
    assert [len(pairs) for pairs in compared] == [4, 4, 4]  # between five checkpoints
    assert {len(pair) for pairs in compared for pair in pairs} == {TINY_MODEL.depth}
    for row in result.table[:3]:
        assert row["experts_per_token"] == 2
        assert 0 < row["changed_slots"] <= row["changed_tokens"] <= 1
        assert 0 < row["entropy"] <= math.log(8)
        assert row["contaminated_bits"] != row["bits_per_byte"]
    assert len({row["bits_per_byte"] for row in result.table[:3]}) == 3
    assert result.table[3]["design"] == "untrained top-2"
    assert len(result.findings) == 9
    assert {finding.verdict for finding in result.findings} == {"inconclusive"}
    assert "pydoc_data/topics.py of the standard library" in result.setting
    assert experiment.TEXT.source not in result.setting
    json.dumps(result.to_dict(), allow_nan=False)
    monkeypatch.setattr(experiment, "_run", None)  # finished runs are not run again
    assert run(tmp_path) == result


@pytest.mark.usefixtures("tiny")
def test_an_unreadable_or_other_run_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = experiment.Score(*(float(i) for i in range(1, 8)))
    monkeypatch.setattr(experiment, "_run", lambda *_: score)
    run(tmp_path)
    other = dataclasses.replace(score, bits_per_byte=9.0)
    monkeypatch.setattr(experiment, "_run", lambda *_: other)
    path = tmp_path / "top-2-seed0.json"
    path.write_text(path.read_text()[:30])
    assert [row["bits_per_byte"] for row in run(tmp_path).table[:3]] == [9.0, 1.0, 1.0]
    monkeypatch.setattr(experiment, "KEPT", 4)
    assert [row["bits_per_byte"] for row in run(tmp_path).table[:3]] == [9.0, 9.0, 9.0]


def scores(values: list[float], measure: str) -> list[experiment.Score]:
    plain = experiment.Score(1.0, 1.0, 1.0, 0.2, 0.2, 2.0, 100.0)
    return [dataclasses.replace(plain, **{measure: value}) for value in values]


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([0.1, 0.1, 0.1], "reproduced"), ([0.1, 0.1, 0.3], "not reproduced")],
)
def test_fluctuation_must_be_lower_in_every_seed(ours: list[float], verdict: str) -> None:
    for measure, judge in (
        ("changed_slots", experiment._steadier),
        ("entropy", experiment._more_certain),
    ):
        found = {"top-2": scores([0.2, 0.2, 0.2], measure), "x": scores(ours, measure)}
        assert judge(found, "x", False).verdict == verdict
        assert judge(found, "x", True).verdict == "inconclusive"
        assert f"{ours[-1]:.4f}" in judge(found, "x", False).measured


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.1, 0.11, 0.09], "reproduced"),
        ([-0.1, -0.11, -0.09], "not reproduced"),
        ([0.1, -0.11, 0.09], "inconclusive"),
    ],
)
def test_a_gain_within_the_noise_decides_nothing(gains: list[float], verdict: str) -> None:
    plain = [2.0, 2.3, 2.6]
    ours = [p - g for p, g in zip(plain, gains, strict=True)]
    measure = "bits_per_byte"
    found = {"top-2": scores(plain, measure), "x": scores(ours, measure)}
    finding = experiment._better(found, "x", measure, "is better", quick=False)
    assert finding.verdict == verdict
    assert f"{sum(gains) / 3:+.4f}" in finding.measured
