"""The check of LLaVA-MoLE's claim, on a regression: do LoRA experts take the conflict out of data?

A frozen SwiGLU is to become another function on each of three domains: itself with a change of rank
4 to every projection, another one in each. Inputs of a domain lie around a point of its own. One
low-rank update must serve all three; LoRA experts can take one each, if their router learns to tell
the domains apart.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.compare.summary import Spread
from moekit.surgery.adapt import AdaptSpec, mole_loss
from moekit.surgery.adapt.balance import layer_routing, routers_of
from moekit.surgery.adapt.install import install_mixture
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged

WIDTH, HIDDEN, DOMAINS, RANK, TOKENS, TEST = 32, 64, 3, 4, 384, 3000
CHANGE = 0.5  # norm of a domain's change over that of the weight
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Budget:
    """How much one run does.

    Attributes:
        seeds: problems.
        steps: of every arm.
    """

    seeds: int
    steps: int


FULL = Budget(seeds=5, steps=1500)
QUICK = Budget(seeds=1, steps=10)


@dataclass(frozen=True)
class Arm:
    """One way to adapt.

    Attributes:
        spec: the adapter.
        longer: times the steps.
        alone: one adapter a domain, each trained on its own data only.
    """

    spec: AdaptSpec
    longer: int = 1
    alone: bool = False


def _spec(**fields: Any) -> AdaptSpec:
    given = {"experts": 1, "rank": RANK, "dropout": 0.0, "attention": False, **fields}
    return AdaptSpec(alpha=2.0 * given["rank"], **given)


PLAIN, MIXTURE = "plain, r=4", "mixture, sparse_ste"
ARMS: dict[str, Arm] = {
    "a domain alone, r=4": Arm(_spec(), alone=True),
    PLAIN: Arm(_spec()),
    "plain, r=4, twice the data": Arm(_spec(), longer=2),
    "plain, r=12": Arm(_spec(rank=DOMAINS * RANK)),
    MIXTURE: Arm(_spec(experts=DOMAINS)),
    **{
        f"mixture, {combine}": Arm(_spec(experts=DOMAINS, combine=combine))
        for combine in ("hard", "gate", "ste", "soft")
    },
}


class SwiGLUPart(nn.Module):
    """The frozen feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.requires_grad_(False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Rows (N, D) to rows (N, D)."""
        inner: Tensor = F.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND)
        y_ND: Tensor = self.down_proj(inner)
        return y_ND


class Problem:
    """The frozen part, and what each domain wants of it.

    Args:
        seed: draws weights, changes and domains.
    """

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.frozen = SwiGLUPart()
            self.wanted = [self._changed() for _ in range(DOMAINS)]
            self.centre_CD = torch.randn(DOMAINS, WIDTH)
            self.test = self.draw(TEST, torch.Generator().manual_seed(seed + 1))

    def _changed(self) -> SwiGLUPart:
        part = copy.deepcopy(self.frozen)
        for name in PROJECTIONS:
            weight = part.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            change = torch.randn(weight.shape[0], RANK) @ torch.randn(RANK, weight.shape[1])
            weight.add_(CHANGE * weight.norm() / change.norm() * change)
        return part

    @torch.no_grad()
    def draw(
        self, count: int, generator: torch.Generator, only: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, what is wanted, and domains, of ``count`` tokens."""
        domain_N = torch.randint(DOMAINS, (count,), generator=generator)
        if only is not None:
            domain_N = torch.full_like(domain_N, only)
        noise_ND = torch.randn(count, WIDTH, generator=generator)
        x_ND = self.centre_CD[domain_N] + noise_ND
        all_CND = torch.stack([part(x_ND) for part in self.wanted])
        return x_ND, all_CND[domain_N, torch.arange(count)], domain_N


def experiment(lab: Laboratory) -> Reproduction:
    """Every arm on every seed; a finished one is not run again."""
    budget = QUICK if lab.quick else FULL
    seeds = range(lab.seed, lab.seed + budget.seeds)
    total = len(ARMS) * budget.seeds
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for index, (seed, name) in enumerate((seed, name) for seed in seeds for name in ARMS):
        settings = {**asdict(budget), "arm": str(ARMS[name])}
        run = ArmRun(lab, ARMS[name], seed, budget, name, (index, total))
        found[name].append(lab.measured(name, seed, settings, run))
    return Reproduction(
        system="llava_mole",
        setting=f"a frozen SwiGLU {WIDTH} to {HIDDEN} to {WIDTH}; {DOMAINS} domains, each with its "
        f"own change of rank {RANK} and half the norm of the weights; {budget.steps} steps of "
        f"{TOKENS} tokens, Adam 2e-3, balance loss 0.01; seeds {', '.join(map(str, seeds))}; "
        "squared error on new tokens over that of the frozen part",
        table=[_row(name, runs) for name, runs in found.items()],
        findings=_findings(found, lab.quick),
    )


@dataclass(frozen=True)
class ArmRun:
    """One arm on one problem."""

    lab: Laboratory
    arm: Arm
    seed: int
    budget: Budget
    name: str
    place: tuple[int, int]

    def __call__(self) -> dict[str, Any]:
        problem = Problem(self.seed)
        reporter = self.lab.progress.run(self.name, self.seed, *self.place)
        domains: Sequence[int | None] = range(DOMAINS) if self.arm.alone else [None]
        steps = self.budget.steps * self.arm.longer
        reporter.start(steps * len(domains), self.name)
        parts = []
        for place, only in enumerate(domains):

            def tell(step: int, before: int = place * steps) -> None:
                reporter.update(before + step, None, None)

            parts.append(self._train(problem, only, tell))
        reporter.finish()
        return _measured(problem, parts)

    def _train(self, problem: Problem, only: int | None, tell: Callable[[int], None]) -> SwiGLUPart:
        part = copy.deepcopy(problem.frozen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            install_mixture(part, PROJECTIONS, self.arm.spec)
        optimiser = torch.optim.Adam([p for p in part.parameters() if p.requires_grad], lr=2e-3)
        generator = torch.Generator().manual_seed(self.seed + 2)
        for step in range(self.budget.steps * self.arm.longer):
            x_ND, wanted_ND, _ = problem.draw(TOKENS, generator, only)
            loss = F.mse_loss(part(x_ND), wanted_ND)
            if self.arm.spec.experts > 1:
                loss = loss + self.arm.spec.balance * mole_loss(part)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            tell(step + 1)
        return part.eval()


@torch.no_grad()
def _measured(problem: Problem, parts: Sequence[SwiGLUPart]) -> dict[str, Any]:
    """Error over that of the frozen part; which experts the domains use, if there are several."""
    x_ND, wanted_ND, domain_N = problem.test
    before = (problem.frozen(x_ND) - wanted_ND).square().mean()
    each_PND = torch.stack([part(x_ND) for part in parts])
    which_N = domain_N if len(parts) > 1 else torch.zeros_like(domain_N)
    y_ND = each_PND[which_N, torch.arange(len(x_ND))]
    found: dict[str, Any] = {"error": float((y_ND - wanted_ND).square().mean() / before)}
    adapter = [p for part in parts for p in part.parameters() if p.requires_grad]
    found["parameters"] = sum(parameter.numel() for parameter in adapter)
    if any("mole_router" in name for name, _ in parts[0].named_modules()):
        (router,) = routers_of(parts[0]).values()
        assert router.mixed is not None
        routing = layer_routing("part", domain_N, router.mixed.expert_NK, DOMAINS)
        found["information"] = routing.information
    return found


def _row(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    information = [run["information"] for run in runs if "information" in run]
    return {
        "design": name,
        "seeds": len(runs),
        "error": statistics.fmean(run["error"] for run in runs),
        "error_of_each_seed": ", ".join(f"{run['error']:.3f}" for run in runs),
        "parameters": runs[0]["parameters"],
        "information": statistics.fmean(information) if information else None,
    }


def _findings(found: dict[str, list[dict[str, Any]]], quick: bool) -> tuple[Finding, ...]:
    information = [run["information"] for run in found[MIXTURE]]
    unled = [run["information"] for run in found["mixture, hard"]]
    return (
        _compared(
            "Plain LoRA suffers from data that conflict: worse on the mix than on a domain alone",
            found["a domain alone, r=4"],
            found[PLAIN],
            quick,
        ),
        _compared(
            "A mixture of LoRA experts, one a token, is better than plain LoRA of its rank",
            found[MIXTURE],
            found[PLAIN],
            quick,
        ),
        _compared(
            "It is better than plain LoRA on twice the data",
            found[MIXTURE],
            found["plain, r=4, twice the data"],
            quick,
        ),
        _compared(
            "It is better than plain LoRA of as many parameters",
            found[MIXTURE],
            found["plain, r=12"],
            quick,
        ),
        Finding(
            claim="Experts come to serve different domains",
            measured="share of the domain's entropy that the expert tells: "
            f"{_each(information)} with sparse_ste; {_each(unled)} with hard, the official "
            "training path, whose router learns balance alone",
            verdict=judged(min(information) > 0.5, quick=quick),
        ),
        _compared(
            "The official sparse path (hard) takes half of the error of plain LoRA away, or more",
            found["mixture, hard"],
            found[PLAIN],
            quick,
            times=2.0,
        ),
    )


def _compared(
    claim: str,
    better: list[dict[str, Any]],
    worse: list[dict[str, Any]],
    quick: bool,
    times: float = 1.0,
) -> Finding:
    """Paired by seed, as logarithms of errors, which differ by orders of magnitude."""
    gain = Spread.of(
        [math.log(b["error"] / a["error"]) for a, b in zip(better, worse, strict=True)]
    )
    above = gain.mean - math.log(times)
    decided = gain.half_width is not None and abs(above) > gain.half_width
    interval = "" if gain.half_width is None else f" ± {gain.half_width:.2f}"
    return Finding(
        claim=claim,
        measured=f"errors {_each([a['error'] for a in better])} against "
        f"{_each([b['error'] for b in worse])}; logarithm of the ratio {gain.mean:.2f}{interval}",
        verdict=judged(above > 0, quick=quick, decided=decided),
    )


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
