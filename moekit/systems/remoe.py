"""ReMoE: ReLU gates decide which experts run, an adaptive L1 penalty how many.

Wang, Chen, Zhu: "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
arXiv 2412.14711.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from moekit.compare import Design, RunRecord, Study, compare
from moekit.compare.budgets import small_model_study
from moekit.compare.summary import Spread, paired_difference, summarise
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import DenseWarmup, L1Balance, ReLURouting, SwitchBalance, TopK
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged
from moekit.systems.system import Shape, System

WARMUP_STEPS = 100


def remoe(shape: Shape) -> Design:
    """ReMoE at a size: the mean number of experts a token is held at k."""
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    layer = MoESpec(ReLURouting(k=shape.k), experts, losses=(L1Balance(k=shape.k),))
    return Design("remoe", (layer,))


def _top_1(name: str, router: TopK) -> Design:
    experts = SwiGLU(count=8, hidden=128)
    return Design(name, (MoESpec(router, experts, losses=(SwitchBalance(0.01),)),))


def experiment(lab: Laboratory) -> Reproduction:
    """ReMoE against dropless top-1 at equal steps, at equal compute, and warmed up near-dense."""
    top_1 = TopK(k=1, normalize="none")
    warm = DenseWarmup(k=1, normalize="none", warmup_k=6, warmup_steps=WARMUP_STEPS)
    designs = (
        remoe(Shape(experts=8, hidden=128, k=1)),
        _top_1("top-1", top_1),
        _top_1("top-1 near-dense warm-up", warm),
    )
    spec = small_model_study(designs, quick=lab.quick, seed=lab.seed)
    study = compare(spec, lab.output / "equal_steps", progress=lab.progress, device=lab.device)
    extra = _steps_of_equal_compute(study, spec.training.steps)
    longer = spec.replace(
        designs=(_top_1("top-1 equal compute", top_1),),
        training=spec.training.replace(steps=extra),
    )
    equal = compare(longer, lab.output / "equal_compute", progress=lab.progress, device=lab.device)
    records = (*study.records, *equal.records)
    rows = [*summarise(study.records, study.phases), *summarise(equal.records, equal.phases)]
    return Reproduction(
        system="remoe",
        setting=f"{spec.describe()}; top-1 at equal compute has {extra} steps",
        table=[row.row() for row in rows],
        findings=(
            _sparsity_settles(study, lab.quick),
            *(_loss_against(records, rival, lab.quick) for rival in _RIVALS),
            _rare_tokens_use_more(study, lab.quick),
        ),
    )


_RIVALS = ("top-1", "top-1 equal compute", "top-1 near-dense warm-up")


def _steps_of_equal_compute(study: Study, steps: int) -> int:
    """Steps of top-1 that cost what ReMoE's run cost, its near-dense start included."""
    cost = {name: study.of(name)[0].training_flops for name in ("remoe", "top-1")}
    return max(steps, round(steps * cost["remoe"] / cost["top-1"]))


def _sparsity_settles(study: Study, quick: bool) -> Finding:
    target = 1 - 1 / 8
    late, deviations = [], []
    for record in study.of("remoe"):
        found = [row["routing"]["sparsity"] for row in record.history if row.get("routing")]
        half = found[len(found) // 2 :]
        late.append(statistics.fmean(half))
        deviations.append(statistics.pstdev(half))
    spread = Spread.of(late)
    return Finding(
        claim="The controller holds the sparsity at 1 - k/E after about 100 steps (fig. 5)",
        measured=f"mean sparsity over the second half of training {spread.mean:.4f} "
        f"(target {target}), by seed {', '.join(f'{value:.4f}' for value in late)}; standard "
        f"deviation over its log rows {', '.join(f'{value:.4f}' for value in deviations)}",
        verdict=judged(all(abs(value - target) <= 0.02 for value in late), quick=quick),
    )


def _loss_against(records: Sequence[RunRecord], rival: str, quick: bool) -> Finding:
    gap = paired_difference(records, "remoe", rival)
    decided = gap.half_width is not None and abs(gap.mean) > gap.half_width
    interval = "" if gap.half_width is None else f" ± {gap.half_width:.4f} (95%)"
    return Finding(
        claim=f"ReMoE has a lower validation loss than {rival} (1.921 against 1.936 at E=8, "
        "and 1.928 with near-dense warm-up; table 3)",
        measured=f"loss of {rival} minus ReMoE's: {gap.mean:+.4f}{interval}",
        verdict=judged(gap.mean > 0, quick=quick, decided=decided),
    )


def _rare_tokens_use_more(study: Study, quick: bool) -> Finding:
    found = [record.tokens_report["frequency_correlation"] for record in study.of("remoe")]
    return Finding(
        claim="Rare tokens use more experts: experts a token fall with token frequency (sec. 5.1)",
        measured="correlation of experts a token with log frequency by seed "
        + ", ".join(f"{value:+.2f}" for value in found),
        verdict=judged(all(value < 0 for value in found), quick=quick),
    )


REMOE = System(
    name="remoe",
    title="ReMoE: ReLU routing with an adaptive, load-balancing L1 penalty",
    paper="Wang et al., arXiv 2412.14711",
    parts="ReLURouting over SwiGLU; L1Balance",
    use="moekit compare --designs topk,remoe; moekit reproduce remoe",
    design=remoe,
    experiment=experiment,
)
