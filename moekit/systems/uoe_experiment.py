"""The check of UOE's claims: does unlearning in one anchored expert spare what is to be kept?

Small OLMoE models learn four domains of text that ship with Python, and forget one of two of them.
Every way to unlearn goes on until perplexity on held-out text of that domain is several times what
it was; at that point the loss on the other domains is compared. Each way has the learning rate that
was best for it in unlearning the first of the two from a model that is not among those reported, of
those that got there in half of the steps.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moekit.compare.summary import Spread
from moekit.errors import DivergedError
from moekit.surgery.unlearn import (
    GA,
    NPO,
    RMU,
    Algorithm,
    AllExperts,
    Attributed,
    Everything,
    GDiff,
    RandomExperts,
    Targets,
    Texts,
    UnlearnReport,
    UnlearnSpec,
    unlearn_model,
)
from moekit.systems.domain_models import Schedule, Size, fit, olmoe
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged
from moekit.systems.python_domains import END, VOCABULARY, PythonDomains, python_domains

SIZE = Size(width=64, hidden=32, layers=3, heads=2, experts=16, normalize=True)
LENGTH, BATCH = 64, 16
UNTIL = 4.0
FEW = (1e-4, 3e-4, 1e-3, 3e-3)  # learning rates to try for a few experts, and for all there is
WIDE = (3e-5, 1e-4, 3e-4)
FORGET = ("manual", "source")
TUNING = 1000  # added to the first seed for the model that rates are chosen on
ONE, ALL = "one expert", "all parameters"


@dataclass(frozen=True)
class Budget:
    """How much one run does.

    Attributes:
        seeds: models.
        training: steps of a model.
        steps: most steps of unlearning.
        held_out: blocks of each domain that a look reads.
    """

    seeds: int
    training: int
    steps: int
    held_out: int


FULL = Budget(seeds=4, training=800, steps=200, held_out=24)
QUICK = Budget(seeds=1, training=2, steps=2, held_out=1)


@dataclass(frozen=True)
class Arm:
    """One way to unlearn."""

    algorithm: Algorithm
    targets: Targets
    anchor: float = 1.0

    @property
    def rates(self) -> list[float]:
        """Learning rates to try."""
        return list(WIDE if isinstance(self.targets, Everything | AllExperts) else FEW)


@dataclass(frozen=True)
class Task:
    """What a model unlearns.

    Attributes:
        forget: domains, each from the model as it was.
        rates: learning rates to try, by the name of the arm.
        steps: most steps.
    """

    forget: list[str]
    rates: dict[str, list[float]]
    steps: int


def arms() -> dict[str, Arm]:
    """What is compared."""
    last = SIZE.layers - 1
    found: dict[str, Arm] = {}
    # The paper's weight of 1200 holds models of this size so firmly that nothing is forgotten.
    for algorithm in (GA(), GDiff(), NPO(), RMU(layer=last, weight=1.0)):
        found[f"{algorithm.name}, {ONE}"] = Arm(algorithm, Attributed())
        found[f"{algorithm.name}, {ALL}"] = Arm(algorithm, Everything())
    return found | {
        "ga, one expert, α = 0": Arm(GA(), Attributed(), anchor=0.0),
        "ga, one expert, router frozen": Arm(GA(), Attributed(router=False)),
        "ga, random expert": Arm(GA(), RandomExperts()),
        "ga, three experts, same layer": Arm(GA(), Attributed(count=3, scope="layer")),
        "ga, three experts, any layer": Arm(GA(), Attributed(count=3)),
        "ga, all experts": Arm(GA(), AllExperts()),
    }


def experiment(lab: Laboratory) -> Reproduction:
    """Rates on a model of their own, then every way on every model; what is done stays done."""
    budget = QUICK if lab.quick else FULL
    domains = python_domains(lab, LENGTH)
    seeds = range(lab.seed, lab.seed + budget.seeds)
    settings: dict[str, Any] = {"budget": asdict(budget), "size": SIZE.to_dict()}

    def model(name: str, seed: int, place: int, task: Task) -> Any:
        run = _Model(lab, budget, domains, name, seed, (place, budget.seeds + 1), task)
        return lab.measured(name, seed, {**settings, "task": asdict(task)}, run.run)

    to_try = {name: arm.rates for name, arm in arms().items()}
    tuning = Task(list(FORGET[:1]), to_try, budget.steps // 2)
    tried = model("rates", lab.seed + TUNING, 0, tuning)
    rates = {name: [_best(runs)] for name, runs in tried.items()}
    task = Task(list(FORGET), rates, budget.steps)
    found = [model("unlearning", seed, 1 + n, task) for n, seed in enumerate(seeds)]
    pairs = {name: [run for one in found for run in one[name]] for name in arms()}
    return Reproduction(
        system="uoe",
        setting=_setting(budget, seeds),
        table=[_row(name, rates[name][0], runs) for name, runs in pairs.items()],
        findings=_findings(pairs, lab.quick),
    )


def _setting(budget: Budget, seeds: Sequence[int]) -> str:
    return (
        f"OLMoE, {SIZE.layers} layers of width {SIZE.width}, {SIZE.experts} experts of width "
        f"{SIZE.hidden}, {SIZE.k} a token, {budget.training} steps of {BATCH} x {LENGTH} bytes of "
        f"four domains that ship with Python; each model unlearns {' or '.join(FORGET)} in at most "
        f"{budget.steps} AdamW steps of as much text, until perplexity on held-out text of it is "
        f"{UNTIL:g} times what it was; learning rates {_listed(FEW)}, or {_listed(WIDE)} for all "
        f"experts or parameters, tried on {FORGET[0]} and a model of another seed in half of "
        f"the steps; seeds {_listed(seeds)}; nats a byte that the other domains lose, "
        "interpolated to that point; pairs are of seed and domain"
    )


class _Model:
    """The model of one seed, which unlearns each domain in every way, at some learning rates."""

    def __init__(
        self,
        lab: Laboratory,
        budget: Budget,
        domains: PythonDomains,
        name: str,
        seed: int,
        place: tuple[int, int],
        task: Task,
    ) -> None:
        self.lab, self.budget, self.domains = lab, budget, domains
        self.seed, self.task = seed, task
        self.reporter = lab.progress.run(name, seed, *place)

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """What each way came to, for each domain and rate."""
        model = self._trained()
        tasks = [
            (name, domain, rate)
            for name, rates in self.task.rates.items()
            for domain in self.task.forget
            for rate in rates
        ]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.task.rates}
        self.reporter.start(len(tasks), f"unlearning, seed {self.seed}")
        for done, (name, domain, rate) in enumerate(tasks):
            run = self._unlearned(copy.deepcopy(model), arms()[name], domain, rate)
            found[name].append({"domain": domain, "rate": rate, **run})
            self.reporter.update(done + 1, None, None)
        self.reporter.finish()
        return found

    def _trained(self) -> PreTrainedModel:
        model = olmoe(SIZE, VOCABULARY, END, self.seed)
        model.to(self.lab.device)  # type: ignore[arg-type]
        self.reporter.start(self.budget.training, f"training, seed {self.seed}")

        def told(step: int, loss: float) -> None:
            self.reporter.update(step, loss, None)

        blocks = self.domains.mixture(4000)
        fit(model, blocks, Schedule(self.budget.training, BATCH, 3e-3, self.seed), told)
        self.reporter.finish()
        return model

    def _unlearned(
        self, model: PreTrainedModel, arm: Arm, domain: str, rate: float
    ) -> dict[str, Any]:
        targets = arm.targets
        if isinstance(targets, RandomExperts):
            targets = targets.replace(seed=self.seed)
        spec = UnlearnSpec(
            algorithm=arm.algorithm,
            targets=targets,
            anchor=arm.anchor,
            steps=self.task.steps,
            until=UNTIL,
            check_every=2,
            learning_rate=rate,
            batch_size=BATCH,
            accumulate=1,
            seed=self.seed,
        )
        torch.manual_seed(self.seed)
        try:
            return _measured(unlearn_model(model, self._texts(domain), spec))
        except DivergedError:
            return dict.fromkeys(("lost", "overlap", "share"))

    def _texts(self, domain: str) -> Texts:
        others = [name for name in self.domains.texts if name != domain]
        each = self.budget.held_out
        return Texts(
            forget=self.domains.train(domain, 800),
            retain=[block for name in others for block in self.domains.train(name, 300)],
            forget_held_out=self.domains.held_out(domain, each),
            retain_held_out=[b for name in others for b in self.domains.held_out(name, each)],
        )


def _measured(report: UnlearnReport) -> dict[str, Any]:
    """Nats lost at the point of comparison, None if it was not reached; what is of its end."""
    assert report.retain is not None
    retain = report.retain_perplexity_at(UNTIL)
    before = report.retain["before"]["perplexity"]
    return {
        "lost": None if retain is None else math.log(retain / before),
        "overlap": statistics.fmean(report.overlap["forget"]),
        "share": report.changed_share,
    }


def _best(runs: Sequence[dict[str, Any]]) -> float:
    """The rate that got there, and of several the one that lost least."""

    def merit(rate: float) -> tuple[int, float]:
        lost = [run["lost"] for run in runs if run["rate"] == rate and run["lost"] is not None]
        return len(lost), -statistics.fmean(lost) if lost else 0.0

    return max(sorted({run["rate"] for run in runs}), key=merit)


def _findings(pairs: dict[str, list[dict[str, Any]]], quick: bool) -> tuple[Finding, ...]:
    one = f"ga, {ONE}"

    def spares(name: str, other: str, in_words: str) -> Finding:
        share = _mean(pairs[name], "share")
        of = "" if share is None else f"; {name} changes {share:.1%} of the parameters"
        return _compared(
            f"At equal forgetting, {in_words} loses more on other text than one anchored expert",
            *_both(pairs[other], pairs[name], "lost"),
            f"nats a byte more that {other} loses",
            quick,
            of,
        )

    def holds(other: str, in_words: str) -> Finding:
        return _compared(
            "At equal forgetting, the anchor keeps the choice of experts on the forgotten text "
            f"better than {in_words}",
            *_both(pairs[one], pairs[other], "overlap"),
            "more of the selected experts that stay selected",
            quick,
            f"; {one} {_mean(pairs[one], 'overlap') or 0:.2f}",
        )

    return (
        *(
            spares(f"{name}, {ONE}", f"{name}, {ALL}", f"{name.upper()} on all parameters")
            for name in ("ga", "gdiff", "npo", "rmu")
        ),
        spares(one, "ga, all experts", "GA on all experts"),
        spares(one, "ga, random expert", "GA on a random expert"),
        spares(one, "ga, three experts, same layer", "GA on three experts of a layer"),
        spares(one, "ga, three experts, any layer", "GA on three experts of any layer"),
        holds("ga, one expert, α = 0", "one expert without it"),
        holds(f"ga, {ALL}", "GA on all parameters"),
    )


def _both(
    more: Sequence[dict[str, Any]], less: Sequence[dict[str, Any]], key: str
) -> tuple[list[float], int]:
    """Differences of the pairs that both forgot as much as asked; how many pairs there are."""
    pairs = zip(more, less, strict=True)
    return [a[key] - b[key] for a, b in pairs if None not in (a["lost"], b["lost"])], len(more)


def _compared(
    claim: str, gains: list[float], total: int, in_words: str, quick: bool, more: str
) -> Finding:
    spread = Spread.of(gains) if gains else None
    interval = spread.half_width if spread else None
    decided = spread is not None and interval is not None and abs(spread.mean) > interval
    measured = "none of the runs reached it" if spread is None else f"{spread.mean:+.4f}"
    if interval is not None:
        measured += f" ± {interval:.4f}"
    return Finding(
        claim=claim,
        measured=f"{in_words}: {measured}, over {len(gains)} of {total} pairs of runs{more}",
        verdict=judged(spread is not None and spread.mean > 0, quick=quick, decided=decided),
    )


def _row(name: str, rate: float, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "design": name,
        "runs": len(runs),
        "forgot": sum(run["lost"] is not None for run in runs),
        "nats_lost_elsewhere": _mean(runs, "lost"),
        "overlap_on_forgotten": _mean(runs, "overlap"),
        "parameters_changed": _mean(runs, "share"),
        "learning_rate": rate,
    }


def _mean(runs: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return statistics.fmean(values) if values else None


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
