"""The check of MomentumSMoE's claim: better and more robust than the plain residual.

Two tasks, each clean and contaminated at test time only: bytes of the standard library's manual
with 2.5% of them replaced, and 8x8 digits under Gaussian noise. The paper's gains are small where
they are not under attack, and seeds differ by as much; a finding within its uncertainty is
inconclusive, and one that is clearly the other way is not reproduced.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from moekit.compare import Design, ModelSpec, Study, StudySpec, compare
from moekit.compare.budgets import small_model_study
from moekit.compare.run import RunPlace, load_trained
from moekit.compare.summary import Spread
from moekit.data import prepare
from moekit.experts import ReLU
from moekit.layer import MoESpec
from moekit.residual import AdamFirst, HeavyBall, Plain, RobustMomentum
from moekit.routing import SwitchBalance, TopK
from moekit.systems.contaminated_text import SHARE, TEXT, contaminated_loss
from moekit.systems.experiment import Finding, Laboratory, Reproduction, Verdict, judged
from moekit.systems.momentum_smoe_digits import NOISE, digits_accuracies

BASELINE = "top-2"
RULES = {
    BASELINE: Plain(),
    "heavy ball": HeavyBall(mu=0.7, gamma=1.0),
    "adam first": AdamFirst(),
    "robust": RobustMomentum(rho=0.2, kappa=1.25, L=1.0),
}
MODEL = ModelSpec(width=64, depth=6, heads=4, kv_heads=4)
SEEDS, STEPS, EPOCHS = 5, 240, 15  # within ten minutes on two cores
QUICK_EPOCHS = 2

Measures = dict[str, dict[str, list[float]]]
"""Values by seed, of each measure of each design."""


def experiment(lab: Laboratory) -> Reproduction:
    """The four rules at equal steps, on text and on digits."""
    spec = _text_study(lab)
    study = compare(spec, lab.output / "text", progress=lab.progress, device=lab.device)
    found = _text_measures(study, lab)
    described = spec.describe().replace(spec.text.source, "pydoc_data.topics")
    for name, measures in _digits_measures(lab, spec.seeds).items():
        found[name] |= measures
    return Reproduction(
        system="momentum_smoe",
        setting=f"{described}; contamination replaces {SHARE:.1%} of the bytes by others, "
        "and the loss is over the next bytes that are not replaced. Digits: 16 patches, 6 blocks "
        f"of width 32, {_epochs(lab)} epochs on 1200 images without a balance loss, 597 to test, "
        "noise in shares of the brightest pixel; ± is the standard error over seeds",
        table=[_row(name, measures, _active(study, name)) for name, measures in found.items()],
        findings=_findings(found, lab.quick),
    )


def _text_study(lab: Laboratory) -> StudySpec:
    designs = [_design(name) for name in RULES]
    seeds = 1 if lab.quick else SEEDS
    spec = small_model_study(designs, quick=lab.quick, seed=lab.seed, seeds=seeds, steps=STEPS)
    return spec.replace(model=MODEL, text=TEXT)


def _design(name: str) -> Design:
    experts = ReLU(count=8, hidden=MODEL.width, bias=True)
    losses = (SwitchBalance(0.01),)
    return Design(name, (MoESpec(TopK(k=2), experts, losses=losses, residual=RULES[name]),))


def _text_measures(study: Study, lab: Laboratory) -> Measures:
    data = prepare(study.spec.text, progress=lab.progress.preparing())
    runs = lab.output / "text" / "runs"
    found: Measures = {}
    for name in RULES:
        losses = [
            contaminated_loss(load_trained(RunPlace(runs, name, seed), lab.device), data, seed)
            for seed in study.spec.seeds
        ]
        clean = [record.validation_loss for record in study.of(name)]
        found[name] = {"validation_loss": clean, "contaminated_loss": losses}
    return found


def _digits_measures(lab: Laboratory, seeds: Sequence[int]) -> Measures:
    found: Measures = {name: {} for name in RULES}
    runs = [(name, seed) for seed in seeds for name in RULES]
    for index, (name, seed) in enumerate(runs):
        accuracies = digits_accuracies(
            RULES[name],
            seed,
            _epochs(lab),
            lab.device,
            lab.output / "digits" / f"{name}-seed{seed}.json".replace(" ", "-"),
            lab.progress.run(f"{name}, digits", seed, index, len(runs)),
            f"{name}, digits, seed {seed}",
        )
        for condition, accuracy in accuracies.items():
            found[name].setdefault(f"digits {condition}", []).append(accuracy)
    return found


def _epochs(lab: Laboratory) -> int:
    return QUICK_EPOCHS if lab.quick else EPOCHS


_CLAIMS = (
    ("validation_loss", "has a slightly lower validation loss than the plain residual (WikiText)"),
    ("contaminated_loss", "has a lower loss than it on contaminated text (word-swap attack)"),
    ("digits clean", "classifies clean images slightly better (ImageNet)"),
    (f"digits noise {NOISE[-1]}", "classifies corrupted images better (ImageNet-C)"),
)


def _findings(found: Measures, quick: bool) -> tuple[Finding, ...]:
    """The pairs that the paper reports: Adam on text alone, the robust rule on images alone."""
    return tuple(
        _finding(found, measure, claim, rival, quick)
        for measure, claim in _CLAIMS
        for rival in ("heavy ball", "robust" if measure.startswith("digits") else "adam first")
    )


def _finding(found: Measures, measure: str, claim: str, rival: str, quick: bool) -> Finding:
    lower = measure.endswith("loss")
    ours, plain = found[rival][measure], found[BASELINE][measure]
    better, worse = (plain, ours) if lower else (ours, plain)
    gain = Spread.of([b - w for b, w in zip(better, worse, strict=True)])
    interval = "" if gain.half_width is None else f" ± {gain.half_width:.4f} (95%)"
    names = (BASELINE, rival) if lower else (rival, BASELINE)
    return Finding(
        claim=f"{rival} {claim}",
        measured=f"{measure.replace('_', ' ')} of {names[0]} minus that of {names[1]}: "
        f"{gain.mean:+.4f}{interval}, paired by seed, {_seeds(ours)}",
        verdict=_verdict(gain, quick),
    )


def _seeds(values: Sequence[float]) -> str:
    return "1 seed" if len(values) == 1 else f"{len(values)} seeds"


def _verdict(gain: Spread, quick: bool) -> Verdict:
    """Undecided within the 95% interval, which at these gains is a likely outcome."""
    decided = gain.half_width is not None and abs(gain.mean) > gain.half_width
    return judged(gain.mean > 0, quick=quick, decided=decided)


def _active(study: Study, name: str) -> float:
    """Mean experts a token and MoE layer on validation text; on digits it is k as well."""
    return statistics.fmean(record.feed_forward_experts for record in study.of(name))


def _row(name: str, measures: Mapping[str, Sequence[float]], active: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "design": name,
        "seeds": len(measures["validation_loss"]),
        "mean_active_experts": active,
    }
    for measure, values in measures.items():
        spread = Spread.of(values)
        row[measure] = spread.mean
        row[f"{measure} ±"] = (
            None if spread.deviation is None else spread.deviation / math.sqrt(len(values))
        )
    return row
