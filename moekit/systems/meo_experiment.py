"""The check of MEO's claim: the quality of several experts at the cost of one.

Two parts. The expert phase with k experts a sequence, run and merged, counted and timed. And an
encoder of digits in six arms, whose mixtures are single projections as in the paper, so that
merging experts and running them is the same function of a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moekit.compare.record import write_json
from moekit.compare.summary import Spread
from moekit.measure.merged_bench import EXPERTS, Cost, Sizes, costs, slope
from moekit.systems.digits import load_digits
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged
from moekit.systems.meo_encoder import ARMS, Outcome, built, curve, trained
from moekit.training import SilentProgress

KS = tuple(range(1, EXPERTS + 1))


@dataclass(frozen=True)
class Budget:
    """How much is run.

    Attributes:
        sizes: of the timed layer.
        repeats: timed calls of each way and k.
        seeds, epochs: of the encoders.
        curve_epochs: epochs over which loss curves are compared, in float64.
    """

    sizes: Sizes
    repeats: int
    seeds: int
    epochs: int
    curve_epochs: int


FULL = Budget(Sizes(128, 512, sequences=8), repeats=9, seeds=5, epochs=15, curve_epochs=3)
QUICK = Budget(Sizes(64, 128, sequences=4), repeats=2, seeds=1, epochs=1, curve_epochs=1)

Found = Mapping[str, Sequence[Outcome]]
"""The outcomes of each arm, by seed."""


def experiment(lab: Laboratory) -> Reproduction:
    """Cost over k, then six arms at equal steps."""
    budget = QUICK if lab.quick else FULL
    measured = _costs(lab, budget)
    found = _outcomes(lab, budget)
    gap = _curve_gap(budget, lab.seed)
    sizes = budget.sizes
    return Reproduction(
        system="meo",
        setting=f"Cost: {EXPERTS} GELU experts {sizes.width} -> {sizes.hidden} -> {sizes.width}, "
        f"{sizes.sequences} sequences of {sizes.length} tokens; operations a token, and median "
        f"milliseconds of {budget.repeats} interleaved calls of the expert phase on a CPU. "
        "Quality: scikit-learn's digits as 32 tokens, one block of width 32 with projections "
        "32 -> 64 -> 32 of 8 experts that "
        f"start as copies of the dense one, {budget.epochs} epochs on 1200 images, 597 to test; "
        "± is the standard deviation over seeds",
        table=[*_cost_rows(measured), *(_row(name, found[name]) for name in ARMS)],
        findings=(
            *_cost_findings(measured, sizes, lab.quick),
            _same_curves(gap, budget, lab.quick),
            *_quality_findings(found, lab.quick),
        ),
    )


def _costs(lab: Laboratory, budget: Budget) -> dict[str, list[Cost]]:
    """The costs of both ways for each k; measured once."""

    def measure() -> list[dict[str, Any]]:
        lab.progress.timing()
        return [asdict(cost) for cost in costs(budget.sizes, KS, budget.repeats)]

    every = [Cost(**values) for values in _kept(lab.output / "cost.json", budget, measure)]
    return {way: [c for c in every if c.way == way] for way in ("run", "merged")}


def _outcomes(lab: Laboratory, budget: Budget) -> dict[str, list[Outcome]]:
    seeds = range(lab.seed, lab.seed + budget.seeds)
    runs = [(seed, name) for seed in seeds for name in ARMS]
    found: dict[str, list[Outcome]] = {name: [] for name in ARMS}
    for index, (seed, name) in enumerate(runs):
        path = lab.output / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}.json"
        if path.exists():
            lab.progress.found(name, seed)
        found[name].append(_outcome(lab, budget, name, seed, path, (index, len(runs))))
    return found


def _outcome(
    lab: Laboratory, budget: Budget, name: str, seed: int, path: Path, place: tuple[int, int]
) -> Outcome:
    def run() -> dict[str, Any]:
        reporter = lab.progress.run(name, seed, *place)
        digits = load_digits(seed)
        return asdict(trained(ARMS[name], digits, seed, budget.epochs, lab.device, reporter))

    return Outcome(**_kept(path, budget, run))


def _kept(path: Path, budget: Budget, measure: Callable[[], Any]) -> Any:
    """What an earlier run of the same budget left at ``path``, or what ``measure`` gives."""
    asked = json.loads(json.dumps(asdict(budget)))
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["budget"] == asked:
            return stored["result"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    result = measure()
    write_json(path, {"budget": asked, "result": result})
    return result


def _curve_gap(budget: Budget, seed: int) -> float:
    """Largest difference of the loss at any step between experts that are run and merged."""
    digits = load_digits(seed)
    arms = ("MoE, 4 a sequence", "MEO, sequence")
    run, merged = (
        curve(built(ARMS[arm], seed).double(), digits, seed, budget.curve_epochs, SilentProgress())
        for arm in arms
    )
    return max(abs(a - b) for a, b in zip(run, merged, strict=True))


def _cost_rows(measured: Mapping[str, Sequence[Cost]]) -> list[dict[str, Any]]:
    pairs = zip(measured["run"], measured["merged"], strict=True)
    return [
        {
            "design": f"{run.k} of {EXPERTS}",
            "mean_active_experts": run.k,
            "run_rows": run.rows_per_token,
            "merged_rows": merged.rows_per_token,
            "run_mflops": run.mflops_per_token,
            "merged_mflops": merged.mflops_per_token,
            "fewer_flops": run.mflops_per_token / merged.mflops_per_token,
            "run_ms": run.forward_ms,
            "merged_ms": merged.forward_ms,
            "speed": run.forward_ms / merged.forward_ms,
            "run_training_ms": run.training_ms,
            "merged_training_ms": merged.training_ms,
            "training_speed": run.training_ms / merged.training_ms,
        }
        for run, merged in pairs
    ]


def _cost_findings(
    measured: Mapping[str, Sequence[Cost]], sizes: Sizes, quick: bool
) -> tuple[Finding, ...]:
    run, merged = measured["run"], measured["merged"]
    slopes = [slope(run), slope(merged)]
    times = run[-1].forward_ms / merged[-1].forward_ms
    saved = run[3].mflops_per_token / merged[3].mflops_per_token
    return (
        Finding(
            claim="Four experts merged need 72.0 / 28.6 = 2.5 times fewer FLOPs than four run "
            "(abstract; BERT as a whole); here: of the expert phase",
            measured=f"{saved:.2f} times fewer: {run[3].mflops_per_token:.3f} MFLOPs a token run, "
            f"{merged[3].mflops_per_token:.3f} merged, {merged[0].mflops_per_token:.3f} for one "
            f"merged, sequences of {sizes.length} tokens",
            verdict=judged(saved >= 72.0 / 28.6, quick=quick),
        ),
        Finding(
            claim="Time hardly grows with the number of merged experts (cost figure); here: by "
            "less than a tenth of what each expert that is run adds",
            measured=f"{slopes[1]:+.3f} ms an expert merged, {slopes[0]:+.3f} ms an expert run",
            verdict=judged(slopes[1] < 0.1 * slopes[0], quick=quick),
        ),
        Finding(
            claim=f"Merging is faster nearly by the number of experts; here: at least "
            f"{0.6 * EXPERTS:.1f} times for {EXPERTS} experts, forward",
            measured=f"{times:.2f} times ({run[-1].forward_ms:.1f} ms run, "
            f"{merged[-1].forward_ms:.1f} ms merged)",
            verdict=judged(times >= 0.6 * EXPERTS, quick=quick),
        ),
    )


def _same_curves(gap: float, budget: Budget, quick: bool) -> Finding:
    return Finding(
        claim="Merging projections and running them is the same function (eq. of the method)",
        measured=f"training losses differ by at most {gap:.1e} over {12 * budget.curve_epochs} "
        "steps in float64",
        verdict=judged(gap < 1e-9, quick=quick),
    )


_QUALITY = (
    ("MEO, sequence", "MoE, 1 a token", "Four experts a sequence, merged, beat one that is run"),
    ("MEO, token", "MEO, sequence", "Token attention improves on merging alone"),
    ("MEO, token", "MoE, 4 a token", "Token-level MEO beats four experts a token (83.3, 82.6)"),
    ("MEO, token", "dense", "Token-level MEO beats the dense model"),
)


def _quality_findings(found: Found, quick: bool) -> tuple[Finding, ...]:
    return tuple(_beats(found, *claim, quick=quick) for claim in _QUALITY)


def _beats(found: Found, ours: str, theirs: str, claim: str, *, quick: bool) -> Finding:
    pairs = zip(found[ours], found[theirs], strict=True)
    gain = Spread.of([a.accuracy - b.accuracy for a, b in pairs])
    interval = "" if gain.half_width is None else f" ± {gain.half_width:.4f} (95%)"
    decided = gain.half_width is not None and abs(gain.mean) > gain.half_width
    costs_ = {name: found[name][0].mflops_per_image for name in (ours, theirs)}
    return Finding(
        claim=claim,
        measured=f"accuracy of {ours} minus that of {theirs}: {gain.mean:+.4f}{interval}, paired "
        f"by seed, {len(found[ours])} runs; {costs_[ours]:.2f} and {costs_[theirs]:.2f} MFLOPs "
        "an image",
        verdict=judged(gain.mean > 0, quick=quick, decided=decided),
    )


def _row(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    accuracy = Spread.of([outcome.accuracy for outcome in outcomes])
    seconds = Spread.of([outcome.seconds_per_epoch for outcome in outcomes])
    return {
        "design": name,
        "seeds": len(outcomes),
        "accuracy": accuracy.mean,
        "accuracy ±": accuracy.deviation,
        "mean_active_experts": ARMS[name].experts_per_token,
        "rows_per_token": outcomes[0].rows_per_token,
        "image_mflops": outcomes[0].mflops_per_image,
        "epoch_seconds": seconds.mean,
    }
