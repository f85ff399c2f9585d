"""Rectify-Router: dropped tokens go to local experts, padding is filled with next-best tokens.

Zeng, Guo, Fei, Yin, Zhou, Li, Sun, Yan, Lin, Qiu: "Turn Waste into Worth: Rectifying Top-k Router
of MoE", arXiv 2402.12399.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.dispatch import Rectified
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import SwitchBalance, TopK
from moekit.systems.rectify_router_experiment import experiment
from moekit.systems.system import Shape, System


def rectify_router(shape: Shape) -> Design:
    """Top-k under capacity 1 with both repairs, one expert a device as in the paper.

    A token cannot ask for more than every expert, so with k of all experts nothing is filled in.
    """
    dispatch = Rectified(groups=shape.experts, fill_in=shape.k < shape.experts)
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    layer = MoESpec(TopK(k=shape.k), experts, dispatch, losses=(SwitchBalance(0.01),))
    return Design("rectify_router", (layer,))


RECTIFY_ROUTER = System(
    name="rectify_router",
    title="Rectify-Router: dropped tokens go to local experts, padding is filled",
    paper="Zeng et al., arXiv 2402.12399",
    parts="TopK over SwiGLU; Rectified; SwitchBalance; moekit.surgery.upcycle",
    use="moekit.surgery.upcycle; moekit reproduce rectify_router",
    design=rectify_router,
    experiment=experiment,
)
