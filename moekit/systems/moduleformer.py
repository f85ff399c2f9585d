"""ModuleFormer: attention modules and feed-forward modules, both routed token by token.

Shen, Zhang, Cao, Tan, Chen, Gan: "ModuleFormer: Learning Modular Large Language Models From
Uncurated Data", arXiv 2306.04640.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.experts import GELU, AttentionHeads, ExpertsSpec
from moekit.layer import MoESpec
from moekit.routing import ModuleRouting, MutualInformation
from moekit.systems.moduleformer_experiment import experiment
from moekit.systems.system import Shape, System


def moduleformer(shape: Shape) -> Design:
    """ModuleFormer at a size: as many attention modules as feed-forward ones, k of each a token."""

    def mixture(modules: ExpertsSpec) -> MoESpec:
        return MoESpec(ModuleRouting(k=shape.k), modules, losses=(MutualInformation(0.01),))

    return Design(
        "moduleformer",
        layers=(mixture(GELU(count=shape.experts, hidden=shape.hidden)),),
        attention=(mixture(AttentionHeads(count=shape.experts)),),
    )


MODULEFORMER = System(
    name="moduleformer",
    title="ModuleFormer: stick-breaking attention modules and feed-forward modules",
    paper="Shen et al., arXiv 2306.04640",
    parts="ModuleRouting over AttentionHeads and GELU; MutualInformation; Entropy(marginal)",
    use="moekit compare --designs topk,moduleformer; moekit.surgery.extend_modules, "
    "prune_modules; moekit reproduce moduleformer",
    design=moduleformer,
    experiment=experiment,
)
