"""MoE++: zero, copy and constant experts beside feed-forward ones, and gating residuals.

Jin, Zhu, Yuan, Yan: "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation
Experts", arXiv 2410.07348.
"""

from __future__ import annotations

import itertools
import statistics

from moekit.compare import Design, Study, compare
from moekit.compare.budgets import small_model_study
from moekit.compare.summary import paired_difference, summarise
from moekit.dispatch import Capacity, Dropless
from moekit.experts import Bank, Constant, Copy, SwiGLU, Zero
from moekit.layer import MoESpec
from moekit.routing import HeterogeneousBalance, Pathway
from moekit.systems.baselines import top_k
from moekit.systems.experiment import (
    Finding,
    Laboratory,
    Reproduction,
    deviation_in_words,
    deviation_of_experts,
    judged,
    tokens_by_experts,
)
from moekit.systems.system import Shape, System

TAUS = (0.25, 0.75, 1.0)
DROPLESS = "moepp τ=0.75, no capacity limit"


def moepp(shape: Shape, tau: float = 0.75, name: str = "moepp") -> Design:
    """MoE++ at a size: one zero, one copy and max(N/4 - 2, 1) constant experts (sec. 4.1)."""
    constants = max(shape.experts // 4 - 2, 1)
    if shape.experts in (8, 16):
        constants = 2  # the published models of these sizes have two
    bank = Bank(
        (SwiGLU(count=shape.experts, hidden=shape.hidden), Constant(constants), Copy(1), Zero(1))
    )
    layer = MoESpec(
        router=Pathway(k=shape.k),
        experts=bank,
        dispatch=Capacity(factor=1.1, tau=tau),
        losses=(HeterogeneousBalance(0.01, tau=tau),),
    )
    return Design(name, (layer,))


def expected_feed_forward_load(k: int, tau: float, feed_forward: int, cheap: int) -> float:
    """Feed-forward experts a token at the minimum of the balance loss: ``k τN / (τN + Z)``."""
    return k * tau * feed_forward / (tau * feed_forward + cheap)


def experiment(lab: Laboratory) -> Reproduction:
    """Vanilla top-2 against MoE++ at several τ, three seeds, the same steps.

    MoE++ is run as published, with its capacity limit, and at τ=0.75 also without one, which tells
    what the dropped assignments cost.
    """
    shape = Shape(experts=8, hidden=128, k=2)
    names = {tau: f"moepp τ={tau}" for tau in TAUS}
    published = tuple(moepp(shape, tau, name) for tau, name in names.items())
    designs = (top_k(shape), *published, _without_capacity(moepp(shape)))
    spec = small_model_study(designs, quick=lab.quick, seed=lab.seed)
    study = compare(spec, lab.output / "study", progress=lab.progress, device=lab.device)
    return Reproduction(
        system="moepp",
        setting=spec.describe(),
        table=[
            summary.row() | _by_kind(study, design)
            for summary, design in zip(
                summarise(study.records, study.phases), study.spec.designs, strict=True
            )
        ],
        findings=(
            _load_follows_tau(study, names, lab.quick),
            _time_follows_rows(study, names, lab.quick),
            _loss_is_kept(study, names[0.75], lab.quick),
            _loss_is_kept(study, DROPLESS, lab.quick),
        ),
    )


def _without_capacity(design: Design) -> Design:
    layers = [layer for layer in design.layers if isinstance(layer, MoESpec)]
    return Design(DROPLESS, tuple(layer.replace(dispatch=Dropless()) for layer in layers))


def _by_kind(study: Study, design: Design) -> dict[str, float]:
    """Assignments a token to each kind of cheap expert, and how feed-forward ones vary."""
    found = [record.statistics for record in study.of(design.name)]
    kinds = next(p.experts.expert_kinds() for p in design.layers if isinstance(p, MoESpec))
    layers = [layer for one in found for layer in one["layers"]]
    load = {
        kind: statistics.fmean(
            sum(n for n, own in zip(layer["load"], kinds, strict=True) if own == kind)
            / layer["tokens"]
            for layer in layers
        )
        for kind in ("zero", "copy", "constant")
    }
    return {
        **{f"{kind}_experts_per_token": value for kind, value in load.items()},
        "feed_forward_experts_per_token_sd": deviation_of_experts(tokens_by_experts(found)),
    }


def _load_follows_tau(study: Study, names: dict[float, str], quick: bool) -> Finding:
    load = {s.design: s.feed_forward_experts.mean for s in summarise(study.records)}
    measured = [load[names[tau]] for tau in TAUS]
    formula = [expected_feed_forward_load(2, tau, 8, 4) for tau in TAUS]
    pairs = ", ".join(
        f"τ={tau}: {m:.2f} (formula {f:.2f})"
        for tau, m, f in zip(TAUS, measured, formula, strict=True)
    )
    rising = all(a < b for a, b in itertools.pairwise(measured))
    return Finding(
        claim="A smaller τ sends fewer tokens to feed-forward experts (sec. 3.3)",
        measured=f"feed-forward experts a token {pairs}",
        verdict=judged(rising, quick=quick),
    )


def _time_follows_rows(study: Study, names: dict[float, str], quick: bool) -> Finding:
    base = study.phases["topk"]
    gains = {
        tau: base.seconds_per_token / study.phases[name].seconds_per_token
        for tau, name in names.items()
    }
    rows = {
        tau: base.rows_per_token / study.phases[name].rows_per_token for tau, name in names.items()
    }
    text = ", ".join(f"τ={t}: {gains[t]:.2f} times on {1 / rows[t]:.0%} of the rows" for t in TAUS)
    return Finding(
        claim="The expert phase has 1.1 to 2.1 times the throughput of top-2 of the same size "
        "(abstract; 15% to 111% among settings that keep accuracy)",
        measured=f"throughput of the expert phase against top-2, one interleaved run: {text}",
        verdict=judged(all(gain >= 1.1 for gain in gains.values()), quick=quick),
    )


def _loss_is_kept(study: Study, name: str, quick: bool) -> Finding:
    table = {s.design: s for s in summarise(study.records)}
    gap = paired_difference(study.records, "topk", name)
    saved = 1 - table[name].feed_forward_experts.mean / table["topk"].feed_forward_experts.mean
    deviation = table["topk"].loss.deviation
    kept = deviation is not None and gap.mean <= deviation
    return Finding(
        claim=f"{name}: quality at least that of top-2 with less compute (table 2)",
        measured=f"loss {gap.mean:+.4f} against top-2 ({deviation_in_words(deviation)}) "
        f"with {saved:.0%} fewer feed-forward rows",
        verdict=judged(kept and saved >= 0.25, quick=quick, decided=deviation is not None),
    )


MOEPP = System(
    name="moepp",
    title="MoE++: zero, copy and constant experts, gating residuals between layers",
    paper="Jin et al., arXiv 2410.07348",
    parts="Pathway over SwiGLU, Constant, Copy, Zero; HeterogeneousBalance; Capacity(tau)",
    use="moekit compare --designs topk,moepp; moekit reproduce moepp",
    design=moepp,
    experiment=experiment,
)
