"""The check of sparsity-constrained transport's claim: balanced experts at no loss of accuracy.

One block of attention and eight experts classifies 8x8 digits. A batch of 16 images is a group of
256 patches, which the routers match to experts at once: top-1 under a capacity limit with a balance
loss, and three that balance by construction. The task is an image's, so that nothing is flattered
by routers that are not causal.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.compare.record import write_json
from moekit.compare.summary import Spread
from moekit.dispatch import Capacity
from moekit.errors import DivergedError
from moekit.experts import ReLU
from moekit.layer import MoEOutput, MoESpec
from moekit.routing import (
    ExpertChoice,
    LossSite,
    RoutingLosses,
    Sinkhorn,
    SparseTransport,
    SwitchBalance,
    TopK,
)
from moekit.systems.digits import Digits, DigitsClassifier, load_digits
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged
from moekit.systems.sparsity_constrained_ot_solver import LIMITS, Convergence, convergence

WIDTH, EXPERTS = 32, 8
IMAGES = 16  # a batch; with 16 patches each, a group of 256
LEARNING_RATE = 2e-3
OURS, TOP_1, CHOICE, S_BASE = "sparse transport", "top-1", "expert choice", "s-base"
_BANK = ReLU(count=EXPERTS, hidden=WIDTH, bias=True)
LAYERS = {
    TOP_1: MoESpec(
        TopK(k=1, normalize="none"),
        _BANK,
        Capacity(factor=1.0, eval_factor=1.0),
        losses=(SwitchBalance(0.01),),
    ),
    S_BASE: MoESpec(Sinkhorn(multiple_of=1), _BANK),
    CHOICE: MoESpec(ExpertChoice(capacity=1.0), _BANK),
    OURS: MoESpec(SparseTransport(multiple_of=1), _BANK),
}


@dataclass(frozen=True)
class Budget:
    """How much is computed.

    Attributes:
        seeds: number of seeds.
        steps: optimiser steps of 16 images.
        solver_steps: most steps of the solver whose convergence is measured.
    """

    seeds: int
    steps: int
    solver_steps: int


FULL, QUICK = Budget(5, 1500, 500), Budget(1, 40, 60)


@dataclass(frozen=True)
class Score:
    """One classifier on the images that it was not trained on.

    Attributes:
        accuracy: share of images recognised.
        dropped: share of the router's choices that found no place.
        unrouted: share of patches without an expert.
        load_cv: standard deviation of the experts' loads over their mean, mean over batches.
        active: mean experts a patch.
    """

    accuracy: float
    dropped: float
    unrouted: float
    load_cv: float
    active: float


def experiment(lab: Laboratory) -> Reproduction:
    """Four routers and five seeds, then the solver on what the gates have learnt."""
    budget = QUICK if lab.quick else FULL
    seeds = range(lab.seed, lab.seed + budget.seeds)
    runs = [(seed, name) for seed in seeds for name in LAYERS]
    scores: dict[str, list[Score]] = {name: [] for name in LAYERS}
    solved: list[dict[int, Convergence]] = []
    for index, (seed, name) in enumerate(runs):
        score, found = _stored_or_run(lab, name, seed, budget, (index, len(runs)))
        scores[name].append(score)
        solved += [found] if found else []
    return Reproduction(
        system="sparsity_constrained_ot",
        setting=f"8x8 digits, 16 patches, one block of width {WIDTH}, {EXPERTS} experts, capacity "
        f"1, {budget.steps} steps of {IMAGES} images (groups of 256 patches), 597 images to test; "
        f"seeds {', '.join(map(str, seeds))}; transport: 20 steps of Adam at 0.01, γ 1",
        table=[_row(name, found) for name, found in scores.items()],
        findings=(
            _balances(scores, lab.quick),
            _routes_more(scores, lab.quick),
            _keeps_accuracy(scores, lab.quick),
            _is_better(scores, lab.quick),
            _converges_faster(solved, lab.quick),
        ),
    )


def _stored_or_run(
    lab: Laboratory, name: str, seed: int, budget: Budget, place: tuple[int, int]
) -> tuple[Score, dict[int, Convergence]]:
    path = lab.output / f"{name.replace(' ', '-')}-seed{seed}.json"
    stored = _stored(path, asdict(budget))
    if stored is not None:
        lab.progress.found(name, seed)
        return stored
    score, found = _run(lab, name, seed, budget, place)
    solver = {str(k): asdict(one) for k, one in found.items()}
    write_json(path, {"budget": asdict(budget), "score": asdict(score), "solver": solver})
    return score, found


def _stored(path: Path, budget: dict[str, int]) -> tuple[Score, dict[int, Convergence]] | None:
    """What a finished run of the same length found, if there is one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["budget"] != budget:
            return None
        solver = {int(k): Convergence(**one) for k, one in data["solver"].items()}
        return Score(**data["score"]), solver
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _run(
    lab: Laboratory, name: str, seed: int, budget: Budget, place: tuple[int, int]
) -> tuple[Score, dict[int, Convergence]]:
    digits = load_digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsClassifier(LAYERS[name], WIDTH, depth=1).to(lab.device)
        _train(model, digits, lab, name, seed, budget.steps, place)
    model.eval()
    score = _tested(model, digits, lab.device)
    found = {}
    if name == OURS:
        scores_NE = _gates(model, digits, lab.device)
        found = {k: convergence(scores_NE, k, budget.solver_steps) for k in LIMITS}
    return score, found


def _train(
    model: DigitsClassifier,
    digits: Digits,
    lab: Laboratory,
    name: str,
    seed: int,
    steps: int,
    place: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = RoutingLosses([LossSite(LAYERS[name].losses, model.layers[0].router)])
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    reporter = lab.progress.run(name, seed, *place)
    reporter.start(steps, name)
    order = torch.empty(0, dtype=torch.int64)
    try:
        for step in range(1, steps + 1):
            if len(order) < IMAGES:
                order = torch.randperm(len(digits.train_labels), generator=generator)
            rows, order = order[:IMAGES], order[IMAGES:]
            logits, records = model.logits_and_records(digits.train_images[rows].to(lab.device))
            loss = F.cross_entropy(logits, digits.train_labels[rows].to(lab.device))
            total = loss + losses([record.routing for record in records])[0]
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            if step % 50 == 0 or step == steps:
                reporter.update(step, float(loss.detach()), None)
    finally:
        reporter.finish()
    if not math.isfinite(float(loss.detach())):
        raise DivergedError(f"the classifier with {name} diverged: its loss is {float(loss)}")


@torch.no_grad()
def _tested(model: DigitsClassifier, digits: Digits, device: str) -> Score:
    right = patches = choices = dropped = unrouted = rows = 0
    variations = []
    batches = zip(digits.test_images.split(IMAGES), digits.test_labels.split(IMAGES), strict=True)
    for images, labels in batches:
        logits, (record,) = model.logits_and_records(images.to(device))
        right += int((logits.argmax(-1).cpu() == labels).sum())
        lost, used_N = int(record.dropped), record.routing.used_NK.any(1)
        patches, choices = patches + len(used_N), choices + int(record.routing.used_NK.sum())
        # Only top-1 loses choices, and with its one choice a patch loses its expert.
        dropped, unrouted = dropped + lost, unrouted + lost + int((~used_N).sum())
        rows += int(record.rows_E.sum())
        variations.append(_variation(record))
    return Score(
        accuracy=right / len(digits.test_labels),
        dropped=dropped / choices,
        unrouted=unrouted / patches,
        load_cv=statistics.fmean(variations),
        active=rows / patches,
    )


def _variation(record: MoEOutput) -> float:
    load_E = record.rows_E.double()
    return float(load_E.std(correction=0) / load_E.mean())


@torch.no_grad()
def _gates(model: DigitsClassifier, digits: Digits, device: str) -> Tensor:
    """Probabilities (256, E) of one group."""
    _, (record,) = model.logits_and_records(digits.test_images[:IMAGES].to(device))
    assert record.routing.scores_NE is not None
    return record.routing.scores_NE


def _row(name: str, scores: Sequence[Score]) -> dict[str, Any]:
    accuracy = Spread.of([score.accuracy for score in scores])
    row: dict[str, Any] = {
        "design": name,
        "seeds": len(scores),
        "accuracy": accuracy.mean,
        "accuracy_sd": accuracy.deviation,
    }
    for measure in ("dropped", "unrouted", "load_cv", "active"):
        row[measure] = statistics.fmean(getattr(score, measure) for score in scores)
    return row


def _mean(scores: dict[str, list[Score]], name: str, measure: str) -> float:
    return statistics.fmean(getattr(score, measure) for score in scores[name])


def _gap(scores: dict[str, list[Score]], rival: str, measure: str) -> Spread:
    """Our measure minus that of a rival, paired by seed."""
    pairs = zip(scores[OURS], scores[rival], strict=True)
    return Spread.of([getattr(a, measure) - getattr(b, measure) for a, b in pairs])


def _balances(scores: dict[str, list[Score]], quick: bool) -> Finding:
    worst = max(max(score.load_cv, score.dropped) for score in scores[OURS])
    return Finding(
        claim="Loads are even and nothing is dropped, without a balance loss (sec. 6)",
        measured=f"largest variation of load or share dropped over seeds {worst:.4f}; top-1 with "
        f"its balance loss: variation {_mean(scores, TOP_1, 'load_cv'):.3f}, "
        f"dropped {_mean(scores, TOP_1, 'dropped'):.3f}",
        verdict=judged(worst < 1e-6, quick=quick),
    )


def _routes_more(scores: dict[str, list[Score]], quick: bool) -> Finding:
    gap = _gap(scores, CHOICE, "unrouted")
    return Finding(
        claim="Fewer tokens are left without an expert than under expert choice, for each token "
        "has a mass to send (this project's own check)",
        measured=f"patches without an expert: {_mean(scores, OURS, 'unrouted'):.3f} against "
        f"{_mean(scores, CHOICE, 'unrouted'):.3f}, by {_interval(gap)}",
        verdict=judged(gap.mean < 0, quick=quick, decided=_decided(gap)),
    )


def _keeps_accuracy(scores: dict[str, list[Score]], quick: bool) -> Finding:
    gap = _gap(scores, TOP_1, "accuracy")
    error = (gap.deviation or 0.0) / math.sqrt(len(scores[OURS]))
    return Finding(
        claim="Accuracy is not below that of top-1 with a balance loss by more than a standard "
        "error (this project's own check)",
        measured=f"accuracy minus that of top-1: {_interval(gap)}, standard error {error:.4f}",
        verdict=judged(gap.mean >= -error, quick=quick),
    )


def _is_better(scores: dict[str, list[Score]], quick: bool) -> Finding:
    gaps = {rival: _gap(scores, rival, "accuracy") for rival in (TOP_1, S_BASE)}
    words = "; ".join(f"minus {rival} {_interval(gap)}" for rival, gap in gaps.items())
    return Finding(
        claim="It is better than top-k and S-BASE (V-MoE B/32 on JFT-300M, by less than a point)",
        measured=f"accuracy {words}",
        verdict=judged(
            all(gap.mean > 0 for gap in gaps.values()),
            quick=quick,
            decided=all(_decided(gap) for gap in gaps.values()),
        ),
    )


def _converges_faster(solved: Sequence[dict[int, Convergence]], quick: bool) -> Finding:
    steps = {k: [found[k].to_value for found in solved] for k in LIMITS}
    mean = {k: statistics.fmean(values) for k, values in steps.items()}
    rows = {k: [found[k].to_plan for found in solved] for k in LIMITS}
    reached = {k: [n for n in values if n is not None] for k, values in rows.items()}
    ordered = list(mean.values())
    words = ", ".join(
        f"k={k} {mean[k]:.0f} ({_rows_in_words(reached[k], len(solved))})" for k in LIMITS
    )
    return Finding(
        claim="The solver converges faster the larger k is",
        measured="mean evaluations by BFGS to 99% of the way to the best dual value, in "
        f"brackets to row sums within 0.001: {words}. Below k={256 // EXPERTS} the experts have "
        "fewer places than there are tokens, and row sums cannot hold",
        verdict=judged(all(a >= b for a, b in itertools.pairwise(ordered)), quick=quick),
    )


def _rows_in_words(reached: Sequence[int], of: int) -> str:
    if not reached:
        return "never"
    return f"{statistics.fmean(reached):.0f} in {len(reached)} of {of}"


def _decided(gap: Spread) -> bool:
    return gap.half_width is not None and abs(gap.mean) > gap.half_width


def _interval(gap: Spread) -> str:
    width = "one seed" if gap.half_width is None else f"± {gap.half_width:.4f}, 95%"
    return f"{gap.mean:+.4f} ({width})"
