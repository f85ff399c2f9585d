"""AdaMoE: null experts in the pool, so that the number of true experts a token is free.

Zeng, Miao, Gao, Zhang, Deng: "AdaMoE: Token-Adaptive Routing with Null Experts for
Mixture-of-Experts Language Models", arXiv 2406.13233.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.experts import Bank, SwiGLU, Zero
from moekit.layer import MoESpec
from moekit.routing import NullAwareBalance, TopK
from moekit.systems.adamoe_experiment import experiment
from moekit.systems.system import Shape, System


def adamoe(shape: Shape) -> Design:
    """AdaMoE at a size: as many null experts as true ones and k + 1 picks.

    With 8 experts and k=2 that is the paper's main setting for Mixtral, n=8, m=8, k=3, whose load
    is 1.5 true experts a token.
    """
    bank = Bank((SwiGLU(count=shape.experts, hidden=shape.hidden), Zero(shape.experts)))
    router = TopK(k=shape.k + 1, normalize="nonzero")
    return Design("adamoe", (MoESpec(router, bank, losses=(NullAwareBalance(0.01),)),))


def null_experts_for_load(experts: int, k: int, load: float) -> int:
    """Null experts m for which ``k`` picks over ``experts + m`` give ``load`` true ones a token.

    From ``load = k n / (n + m)`` (AdaMoE, sec. 3.2).
    """
    return max(0, round(experts * (k / load - 1)))


ADAMOE = System(
    name="adamoe",
    title="AdaMoE: null experts make the number of experts a token free",
    paper="Zeng et al., arXiv 2406.13233",
    parts="TopK(normalize=nonzero) over SwiGLU and Zero; NullAwareBalance",
    use="moekit compare --designs topk,adamoe; moekit.surgery.add_null_experts; "
    "moekit reproduce adamoe",
    design=adamoe,
    experiment=experiment,
)
