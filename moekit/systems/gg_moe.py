"""GG MoE's gate as a layer: one wide network cut into narrow experts under Gumbel-softmax weights.

Chernov: "(GG) MoE vs. MLP on Tabular Data", arXiv 2502.03608. The paper has one gate for a whole
tabular network, as the experiment has; its estimator is not part of this version.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import GumbelSoftmax
from moekit.systems.gg_moe_experiment import experiment
from moekit.systems.system import Shape, System


def gg_moe(shape: Shape) -> Design:
    """All experts on every token, together as wide as the k experts of a top-k design.

    The gain is parameters and not skipped compute: k/E of those of top-k at its compute.
    """
    hidden = -(-shape.k * shape.hidden // shape.experts)  # rounded up
    layer = MoESpec(GumbelSoftmax(), SwiGLU(count=shape.experts, hidden=hidden))
    return Design("gg_moe", (layer,))


GG_MOE = System(
    name="gg_moe",
    title="GG MoE: Gumbel-softmax gates over narrow experts "
    "(the layer; the tabular estimator is not built yet)",
    paper="Chernov, arXiv 2502.03608",
    parts="GumbelSoftmax over SwiGLU",
    use="moekit compare --designs topk,gg_moe; moekit reproduce gg_moe",
    design=gg_moe,
    experiment=experiment,
)
