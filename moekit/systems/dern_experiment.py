"""The check of DERN's claims: is recombining neurons better than dropping experts whole?

Two kinds of OLMoE models learn two domains of text that ship with Python. One is upcycled: a dense
model is copied into experts, which are made unequal by noise, learn on, and have their neurons
shuffled, which changes nothing they compute. The other starts from scratch, so that neurons of
different experts have nothing in common. Both are cut without any training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moekit.compare.summary import Spread
from moekit.surgery import block_views
from moekit.surgery.methods import (
    DERN,
    REAP,
    Frequency,
    HCSMoE,
    Method,
    MSMoE,
    Random,
    RouterWeight,
)
from moekit.systems.compression import calibrated, compressed, loss_of
from moekit.systems.domain_models import Schedule, Size, fit, olmoe
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged
from moekit.systems.python_domains import END, VOCABULARY, PythonDomains, python_domains

SIZE = Size(width=64, hidden=64, layers=2, heads=2, experts=8, normalize=True)
LENGTH, BATCH = 64, 16
KEEP = (0.75, 0.5, 0.25)
NOISE = 0.02
DROP = "router-weight"
KINDS = ("upcycled", "from scratch")


@dataclass(frozen=True)
class Budget:
    """How much one run does.

    Attributes:
        seeds: models of each kind.
        dense, steps: steps of the dense model, and of the mixture after it or from scratch.
        calibration, held_out: blocks of the statistics, and of the measure.
    """

    seeds: int
    dense: int
    steps: int
    calibration: int
    held_out: int


FULL = Budget(seeds=5, dense=400, steps=300, calibration=128, held_out=128)
QUICK = Budget(seeds=1, dense=4, steps=4, calibration=4, held_out=2)


def methods(seed: int) -> dict[str, Method]:
    """What is compared; none trains."""
    return {
        "random": Random(seed=seed),
        "frequency": Frequency(),
        DROP: RouterWeight(),
        "reap": REAP(),
        "m-smoe": MSMoE(allocation="uniform"),
        "hc-smoe": HCSMoE(),
        "dern": DERN(),
        "dern, router=none": DERN(router="none"),
        "dern, router=probability": DERN(router="probability"),
        "dern, alpha=0": DERN(alpha=0.0),
        "dern, alpha=0.7": DERN(alpha=0.7),
        "dern, not weighted": DERN(weighted=False),
        "dern, init=gate_max": DERN(init="gate_max"),
        "dern, paper's start": DERN(init="gate_max", init_distinct=1.0),
    }


def experiment(lab: Laboratory) -> Reproduction:
    """Both kinds of models a seed; a finished seed is not run again."""
    budget = QUICK if lab.quick else FULL
    domains = python_domains(lab, LENGTH, ("manual", "source"))
    seeds = range(lab.seed, lab.seed + budget.seeds)
    settings = {"budget": asdict(budget), "size": SIZE.to_dict()}
    found = [
        lab.measured(
            "cuts",
            seed,
            settings,
            _Models(lab, budget, domains, seed, index).run,
        )
        for index, seed in enumerate(seeds)
    ]
    return Reproduction(
        system="dern",
        setting=f"OLMoE, {SIZE.layers} layers of width {SIZE.width}, {SIZE.experts} experts of "
        f"width {SIZE.hidden}, {SIZE.k} a token; two domains that ship with Python, {BATCH} x "
        f"{LENGTH} bytes a step; upcycled: {budget.dense} dense steps, noise {NOISE}, "
        f"{budget.steps} steps; from scratch: {budget.dense + budget.steps} steps; "
        f"{budget.calibration} blocks of calibration; seeds {', '.join(map(str, seeds))}; bits a "
        "byte on held-out text, no training after the cut",
        table=[row for kind in KINDS for row in _table(found, kind)],
        findings=(
            _beats(found, "upcycled", DROP, "expert-level pruning by the same importance", lab),
            _beats(found, "from scratch", DROP, "expert-level pruning by the same importance", lab),
            _beats(found, "upcycled", "m-smoe", "merging whole experts (M-SMoE)", lab),
            _beats(found, "upcycled", "dern, not weighted", "clustering without weights", lab),
            _beats(found, "upcycled", "dern, paper's start", "its start of k-means as read", lab),
        ),
    )


class _Models:
    """The models of one seed, cut in every way."""

    def __init__(
        self, lab: Laboratory, budget: Budget, domains: PythonDomains, seed: int, index: int
    ) -> None:
        self.lab, self.budget, self.seed = lab, budget, seed
        self.train = domains.mixture(4000)
        self.calibration = domains.mixture(max(1, budget.calibration // 2))
        self.held_out = [
            block for name in domains.texts for block in domains.held_out(name, budget.held_out)
        ]
        self.index, self.step = index, 0

    def run(self) -> dict[str, Any]:
        """Bits a byte by kind of model, method and share left."""
        self.reporter = self.lab.progress.run("cuts", self.seed, self.index, self.budget.seeds)
        self.reporter.start(2 * (self.budget.dense + self.budget.steps), f"seed {self.seed}")
        found = {
            "upcycled": self._cut(self._upcycled()),
            "from scratch": self._cut(self._from_scratch()),
        }
        self.reporter.finish()
        return found

    def _cut(self, model: PreTrainedModel) -> dict[str, Any]:
        known = methods(self.seed)
        statistics_ = calibrated(model, self.calibration, known.values(), self.seed)
        cuts: dict[str, Any] = {"whole": {"bits": {"1.0": self._bits(model)}}}
        for name, method in known.items():
            made = {keep: compressed(model, method, keep, statistics_) for keep in KEEP}
            cuts[name] = {
                "bits": {str(keep): self._bits(one.model) for keep, one in made.items()},
                "passed_on": {str(keep): one.passed_on for keep, one in made.items()},
            }
        return cuts

    def _upcycled(self) -> PreTrainedModel:
        dense = olmoe(SIZE.replace(experts=1, k=1), VOCABULARY, END, self.seed)
        self._fit(dense, self.budget.dense)
        model = grown(dense, self.seed)
        self._fit(model, self.budget.steps)
        shuffle_neurons(model, self.seed)
        return model

    def _from_scratch(self) -> PreTrainedModel:
        model = olmoe(SIZE, VOCABULARY, END, self.seed)
        self._fit(model, self.budget.dense + self.budget.steps)
        return model

    def _fit(self, model: PreTrainedModel, steps: int) -> None:
        model.to(self.lab.device)  # type: ignore[arg-type]
        fit(model, self.train, Schedule(steps, BATCH, 3e-3, self.seed), self._told)

    def _bits(self, model: PreTrainedModel) -> float:
        return loss_of(model, self.held_out, 64) / math.log(2)

    def _told(self, _: int, loss: float) -> None:
        self.step += 1
        self.reporter.update(self.step, loss, None)


@torch.no_grad()
def grown(dense: PreTrainedModel, seed: int) -> PreTrainedModel:
    """An MoE of the experiment's size whose experts are noisy copies of a model with one expert."""
    model = olmoe(SIZE, VOCABULARY, END, seed).to(dense.device)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    own, other = model.state_dict(), dense.state_dict()
    same = {n: v for n, v in other.items() if own[n].shape == v.shape}
    model.load_state_dict({**own, **same})
    for new, old in zip(block_views(model), block_views(dense), strict=True):
        for expert in range(new.experts):
            new.set_expert(
                expert,
                old.expert(0).map(
                    lambda w: w + NOISE * torch.randn(w.shape, generator=generator).to(w.device)
                ),
            )
    return model


@torch.no_grad()
def shuffle_neurons(model: PreTrainedModel, seed: int) -> None:
    """Another order of the hidden neurons of every expert; what it computes stays the same."""
    generator = torch.Generator().manual_seed(seed)
    for view in block_views(model):
        for expert in range(view.experts):
            order_H = torch.randperm(view.bank.hidden, generator=generator)
            view.set_expert(expert, view.expert(expert).reordered(order_H))


def _beats(
    found: Sequence[dict[str, Any]], kind: str, other: str, in_words: str, lab: Laboratory
) -> Finding:
    gains = {
        keep: Spread.of(
            [s[kind][other]["bits"][str(keep)] - s[kind]["dern"]["bits"][str(keep)] for s in found]
        )
        for keep in KEEP
    }
    half = gains[0.5]
    decided = half.half_width is not None and abs(half.mean) > half.half_width
    return Finding(
        claim=f"Without training, DERN is better than {in_words} at 50% of the experts; here: "
        f"{kind} models",
        measured="bits saved a byte, paired by seed: "
        + ", ".join(f"{keep:.0%} left {_signed(gain)}" for keep, gain in gains.items())
        + f"; DERN moves {_passed_on(found, kind):.0%} of the dropped neurons at 50%",
        verdict=judged(half.mean > 0, quick=lab.quick, decided=decided),
    )


def _passed_on(found: Sequence[dict[str, Any]], kind: str) -> float:
    return statistics.fmean(seed[kind]["dern"]["passed_on"]["0.5"] for seed in found)


def _signed(spread: Spread) -> str:
    interval = "" if spread.half_width is None else f" ± {spread.half_width:.4f}"
    return f"{spread.mean:+.4f}{interval}"


def _table(found: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    table = []
    for name in found[0][kind]:
        row: dict[str, Any] = {"design": f"{kind}, {name}", "seeds": len(found)}
        for keep in (1.0, *KEEP):
            values = [s[kind][name]["bits"].get(str(keep)) for s in found]
            row[f"bits_{keep:.0%}"] = None if None in values else statistics.fmean(values)
        table.append(row)
    return table
