"""MomentumSMoE: its designs, contamination, and the experiment from end to end at a tiny size."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from test_experiments import TINY_MODEL, Nobody

from moekit import AdamFirst, HeavyBall, MoESpec, Plain, RobustMomentum
from moekit.compare import budgets
from moekit.errors import MissingExtraError
from moekit.systems import Laboratory, Shape, find
from moekit.systems import momentum_smoe_digits as digits
from moekit.systems import momentum_smoe_experiment as experiment
from moekit.systems.contaminated_text import contaminate
from moekit.systems.momentum_smoe import adam_smoe, momentum_smoe, robust_momentum_smoe


def test_designs():
    shape = Shape(experts=4, hidden=16, k=2)
    wanted = {
        momentum_smoe: HeavyBall(0.7, 1.0),
        adam_smoe: AdamFirst(0.7, 1.0, 0.9, 0.999, 1e-8, 1.0, 0.0),
        robust_momentum_smoe: RobustMomentum(0.2, 1.25, 1.0),
    }
    for design, rule in wanted.items():
        (layer,) = design(shape).layers
        assert isinstance(layer, MoESpec)
        assert layer.residual == rule
        assert design(shape).name == design.__name__
    assert find("momentum_smoe").design is momentum_smoe


@pytest.mark.parametrize("seed", range(3))
def test_contamination(seed):
    ordinary = torch.tensor([2, 3, 5, 8, 9])
    ids = torch.randint(0, 10, (4000,), generator=torch.Generator().manual_seed(seed))
    found = contaminate(ids, ordinary, 0.3, torch.Generator().manual_seed(seed))
    changed = found["input_ids"] != ids
    assert torch.equal(found["labels"], ids.masked_fill(changed, -100))
    replaceable = torch.isin(ids, ordinary)
    assert not bool((changed & ~replaceable).any())
    assert bool(torch.isin(found["input_ids"][changed], ordinary).all())
    count = int(replaceable.sum())  # the share has a standard deviation of about 0.01
    assert int(changed.sum()) / count == pytest.approx(0.3, abs=0.05)
    again = contaminate(ids, ordinary, 0.3, torch.Generator().manual_seed(seed))
    assert torch.equal(again["input_ids"], found["input_ids"])
    nothing = contaminate(ids, ordinary, 0.0, torch.Generator().manual_seed(seed))
    assert torch.equal(nothing["input_ids"], ids)


def test_patches_and_both_directions():
    """A pixel moves its own patch, and through attention the pooled output of all."""
    model = digits.classifier(HeavyBall(0.5), depth=2).eval()
    image = torch.zeros(1, 8, 8)
    seen = []
    model.patch.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image[0, 7, 0] = 1.0
    assert model(image).shape == (1, 10)
    assert seen[0].nonzero().tolist() == [[0, 12, 2]]
    states = []
    model.blocks.norm.register_forward_hook(lambda *a: states.append(a[2]))
    model(image)
    model(torch.zeros(1, 8, 8))
    assert bool((states[0][0] != states[1][0]).any(-1).all())  # earlier patches see it too


def test_digits():
    found = digits.load_digits(0)
    assert found.train_images.shape == (1200, 8, 8)
    assert found.test_labels.shape == (597,)
    assert found.train_images.min() == 0
    assert found.train_images.max() == 1
    assert not torch.equal(digits.load_digits(1).test_labels, found.test_labels)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match="experiments"):
        digits.load_digits(0)


def test_digits_are_learned(tmp_path):
    """A few epochs are far better than the one in ten of chance, and noise makes it worse."""
    reporter = Nobody().run("", 0, 0, 1)
    found = digits.digits_accuracies(
        HeavyBall(), 0, 5, "cpu", tmp_path / "kept.json", reporter, "digits"
    )
    assert found["clean"] > 0.5
    assert found["noise 0.4"] < found["clean"]
    assert json.loads((tmp_path / "kept.json").read_text()) == found


@pytest.fixture
def tiny(monkeypatch):
    original = budgets.small_model_study

    def small(designs, **options):
        spec = original(designs, **{**options, "quick": True, "seeds": 1})
        training = spec.training.replace(steps=4, batch_size=2, log_every=2, eval_every=2)
        return spec.replace(training=training)

    monkeypatch.setattr(experiment, "small_model_study", small)
    monkeypatch.setattr(experiment, "MODEL", TINY_MODEL)
    text = experiment.TEXT.replace(limit_bytes=40_000)
    monkeypatch.setattr(experiment, "TEXT", text)
    monkeypatch.setattr(experiment, "QUICK_EPOCHS", 1)
    whole = digits.load_digits(0)
    few = digits.Digits(*(part[:100] for part in vars(whole).values()))
    monkeypatch.setattr(digits, "load_digits", lambda _: few)


@pytest.mark.usefixtures("tiny")
def test_a_tiny_experiment(tmp_path):
    run = find("momentum_smoe").experiment
    laboratory = Laboratory(tmp_path, quick=True, seed=0, device="cpu", progress=Nobody())
    result = run(laboratory)
    assert [row["design"] for row in result.table] == [
        "top-2",
        "heavy ball",
        "adam first",
        "robust",
    ]
    measures = ("validation_loss", "contaminated_loss", "digits clean", "digits noise 0.4")
    for row in result.table:
        assert all(math.isfinite(row[name]) for name in measures)
        assert row["validation_loss ±"] is None
        assert row["mean_active_experts"] == 2
        assert row["contaminated_loss"] != row["validation_loss"]
    assert len({row["validation_loss"] for row in result.table}) == 4
    assert len(result.findings) == 8
    assert {finding.verdict for finding in result.findings} == {"inconclusive"}
    assert "text pydoc_data.topics, " in result.setting
    assert experiment.TEXT.source not in result.setting
    json.dumps(result.to_dict(), allow_nan=False)
    assert run(laboratory) == result  # finished runs are not run again


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.1, 0.11, 0.09, 0.1, 0.1], "reproduced"),
        ([-0.1, -0.11, -0.09, -0.1, -0.1], "not reproduced"),
        ([0.1, -0.11, 0.09, -0.1, 0.1], "inconclusive"),
    ],
)
def test_a_gain_within_the_noise_decides_nothing(gains, verdict):
    plain = [2.0 + 0.3 * i for i in range(5)]
    for measure, sign in (("validation_loss", -1), ("digits clean", 1)):
        ours = [value + sign * gain for value, gain in zip(plain, gains, strict=True)]
        found = {"top-2": {measure: plain}, "robust": {measure: ours}}
        finding = experiment._finding(found, measure, "is better", "robust", quick=False)
        assert finding.verdict == verdict
        assert f"{sum(gains) / 5:+.4f}" in finding.measured
        quick = experiment._finding(found, measure, "is better", "robust", quick=True)
        assert quick.verdict == "inconclusive"


def test_the_baseline_is_the_plain_residual():
    assert experiment.RULES[experiment.BASELINE] == Plain()
