"""The check of UNCURL's claims: how far experts can be reduced for a task.

Families of OLMoE models that differ in their number of experts alone learn four domains of text.
Each is reduced to every smaller size with the statistics of one domain, tuned on that domain, and
compared with the model that had so few experts from the start and was tuned alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from moekit.compare.summary import Spread
from moekit.surgery.methods import Frequency, Method, Random, Uncurl
from moekit.surgery.pruning_factor import (
    NATIVE,
    FactorRow,
    Threshold,
    pruning_factor_study,
    thresholds,
)
from moekit.systems.compression import loss_of
from moekit.systems.domain_models import Schedule, Size, fit, olmoe
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged
from moekit.systems.python_domains import END, VOCABULARY, PythonDomains, python_domains

SIZE = Size(width=64, hidden=32, layers=2, heads=2)
COUNTS = (16, 8, 4, 2)
LENGTH, BATCH = 64, 16
TASK = "manual"
TOLERANCE = 0.03  # bits a byte
GENERAL = "uncurl, all domains"


@dataclass(frozen=True)
class Budget:
    """How much one run does.

    Attributes:
        seeds: families of models.
        steps, tuning: steps on all domains, and then on the task.
        calibration: blocks that statistics are taken from.
        held_out: blocks of the task that losses are measured on.
    """

    seeds: int
    steps: int
    tuning: int
    calibration: int
    held_out: int


FULL = Budget(seeds=5, steps=500, tuning=80, calibration=128, held_out=256)
QUICK = Budget(seeds=1, steps=6, tuning=2, calibration=4, held_out=4)


def methods(seed: int) -> dict[str, Method]:
    """What is compared, beside the native models."""
    return {
        "uncurl": Uncurl(),
        "uncurl, not aligned": Uncurl(align=False),
        "frequency": Frequency(),
        "random": Random(seed=seed),
    }


def experiment(lab: Laboratory) -> Reproduction:
    """One family a seed; a finished one is not run again."""
    budget = QUICK if lab.quick else FULL
    domains = python_domains(lab, LENGTH)
    seeds = range(lab.seed, lab.seed + budget.seeds)
    rows: list[FactorRow] = []
    for index, seed in enumerate(seeds):
        found = lab.measured(
            "family",
            seed,
            {"budget": asdict(budget), "size": SIZE.to_dict()},
            _Family(lab, budget, domains, seed, index).run,
        )
        rows += [FactorRow(**row) for row in found["rows"]]
    return Reproduction(
        system="uncurl",
        setting=f"OLMoE, {SIZE.layers} layers of width {SIZE.width}, experts of width "
        f"{SIZE.hidden}, {SIZE.k} a token, {', '.join(map(str, COUNTS))} of them; {budget.steps} "
        f"steps of {BATCH} x {LENGTH} bytes on four domains that ship with Python, then "
        f"{budget.tuning} on one, the manual; seeds {', '.join(map(str, seeds))}; bits a byte on "
        "held-out text of the manual",
        table=_table(rows),
        findings=(
            _threshold(rows, lab.quick),
            _beats(rows, "frequency", "naive frequency pruning", lab.quick),
            _beats(rows, "random", "random pruning", lab.quick),
            _beats(rows, "uncurl, not aligned", "merging without alignment", lab.quick),
            _beats(rows, GENERAL, "statistics of all domains in place of the task's", lab.quick),
        ),
    )


class _Family:
    """The models of one seed."""

    def __init__(
        self, lab: Laboratory, budget: Budget, domains: PythonDomains, seed: int, index: int
    ) -> None:
        self.lab, self.budget, self.domains, self.seed = lab, budget, domains, seed
        self.task = domains.train(TASK, 4000)
        self.held_out = domains.held_out(TASK, budget.held_out)
        self.index, self.step = index, 0

    def run(self) -> dict[str, Any]:
        """Train, reduce, tune and measure."""
        self.reporter = self.lab.progress.run("family", self.seed, self.index, self.budget.seeds)
        self.reporter.start(self._steps, f"seed {self.seed}")
        mixture = self.domains.mixture(4000)
        models = {count: self._trained(count, mixture) for count in COUNTS}
        rows = self._study(models, methods(self.seed), self.domains.train(TASK, self._blocks))
        others = self._study(models, {GENERAL: Uncurl()}, self.domains.mixture(self._blocks // 4))
        rows += [row for row in others if row.method != NATIVE]
        self.reporter.finish()
        return {"rows": [asdict(row) for row in rows]}

    @property
    def _blocks(self) -> int:
        return self.budget.calibration

    @property
    def _steps(self) -> int:
        """Of all trainings; the natives are tuned once for each of the two studies."""
        pairs = len(COUNTS) * (len(COUNTS) - 1) // 2
        tunings = 2 * len(COUNTS) + pairs * (len(methods(self.seed)) + 1)
        return len(COUNTS) * self.budget.steps + tunings * self.budget.tuning

    def _study(
        self, models: dict[int, PreTrainedModel], known: dict[str, Method], text: Any
    ) -> list[FactorRow]:
        return pruning_factor_study(
            models, known, text, self._tune, self._bits, batch_size=BATCH, seed=self.seed
        )

    def _trained(self, count: int, mixture: Any) -> PreTrainedModel:
        model = olmoe(SIZE.replace(experts=count), VOCABULARY, END, self.seed)
        model.to(self.lab.device)  # type: ignore[arg-type]
        fit(model, mixture, Schedule(self.budget.steps, BATCH, 3e-3, self.seed), self._told)
        return model

    def _tune(self, model: PreTrainedModel) -> None:
        fit(model, self.task, Schedule(self.budget.tuning, BATCH, 1e-3, self.seed), self._told)

    def _bits(self, model: PreTrainedModel) -> float:
        return loss_of(model, self.held_out, 64) / math.log(2)

    def _told(self, _: int, loss: float) -> None:
        self.step += 1
        self.reporter.update(self.step, loss, None)


def _threshold(rows: Sequence[FactorRow], quick: bool) -> Finding:
    found = thresholds(rows, "uncurl", TOLERANCE)
    gaps = found[0].gaps
    double = Spread.of(gaps[2.0])
    rises = [
        Spread.of([b - a for a, b in zip(gaps[2.0], values, strict=True)])
        for factor, values in gaps.items()
        if factor > 2
    ]
    holds = double.mean <= TOLERANCE and all(rise.mean > 0 for rise in rises)
    decided = _clear(double, TOLERANCE) and all(_clear(rise) for rise in rises)
    return Finding(
        claim="A reduced model matches the natively small one up to a factor that depends on the "
        "number of experts: twice usually, four times sometimes; here: twice from 16 experts "
        f"within {TOLERANCE} bits of the native 8, and larger factors further from their natives",
        measured="; ".join(map(_threshold_in_words, found)),
        verdict=judged(holds, quick=quick, decided=decided),
    )


def _threshold_in_words(found: Threshold) -> str:
    gaps = ", ".join(
        f"{factor:g} times {_signed(Spread.of(values))}" for factor, values in found.gaps.items()
    )
    return (
        f"from {found.experts} experts, UNCURL minus native after tuning: {gaps}; "
        f"largest factor within {TOLERANCE}: {found.factor:g}"
    )


def _beats(rows: Sequence[FactorRow], other: str, in_words: str, quick: bool) -> Finding:
    after = {(r.method, r.experts, r.left, r.seed): r.loss for r in rows}
    pairs = list(dict.fromkeys((r.experts, r.left) for r in rows if r.method == other))
    seeds = sorted({row.seed for row in rows})
    gains = {
        pair: [after[other, *pair, seed] - after["uncurl", *pair, seed] for seed in seeds]
        for pair in pairs
    }
    whole = Spread.of([statistics.fmean(g[i] for g in gains.values()) for i in range(len(seeds))])
    return Finding(
        claim=f"UNCURL is better than {in_words}; here: after tuning, in the mean over all pairs "
        "of sizes",
        measured=f"bits saved in the mean {_signed(whole)}; "
        + ", ".join(f"{a} to {b} {_signed(Spread.of(g))}" for (a, b), g in gains.items()),
        verdict=judged(whole.mean > 0, quick=quick, decided=_clear(whole)),
    )


def _clear(spread: Spread, value: float = 0.0) -> bool:
    """Whether a value is outside the 95% interval."""
    return spread.half_width is not None and abs(spread.mean - value) > spread.half_width


def _signed(spread: Spread) -> str:
    interval = "" if spread.half_width is None else f" ± {spread.half_width:.4f}"
    return f"{spread.mean:+.4f}{interval}"


def _table(rows: Sequence[FactorRow]) -> list[dict[str, Any]]:
    keys = dict.fromkeys((r.method, r.experts, r.left) for r in rows)
    table = []
    for method, experts, left in sorted(keys, key=lambda key: (-key[2], -key[1], key[0])):
        own = [r for r in rows if (r.method, r.experts, r.left) == (method, experts, left)]
        after = Spread.of([row.loss for row in own])
        table.append(
            {
                "design": f"{experts} to {left}, {method}"
                if method != NATIVE
                else f"{left} native",
                "seeds": len(own),
                "bits_before_tuning": statistics.fmean(row.before for row in own),
                "bits": after.mean,
                "bits_sd": after.deviation,
            }
        )
    return table
