"""The activation dense-to-sparse gate as a layer: all experts at first, few once the gate is cold.

Nguyen, Akbarian, Ho: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
arXiv 2401.13875. The paper studies the gate in a Gaussian mixture, as the experiment does; its
estimators are not part of this version.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import DenseToSparse, SwitchBalance
from moekit.systems.system import Shape, System
from moekit.systems.temperature_gaussian_moe_experiment import experiment

ANNEALING_STEPS = 100


def temperature_gaussian_moe(shape: Shape) -> Design:
    """Dense for the first steps while τ falls from 2 to 0.3, then at most k experts a token.

    The paper gives no schedule; this one is short enough to end within a run of `moekit compare`.
    Until it ends a token takes all experts, which the counted operations of a run include.
    """
    gate = DenseToSparse(
        temperature=2.0, final=0.3, steps=ANNEALING_STEPS, activation="tanh", k=shape.k
    )
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    layer = MoESpec(gate, experts, losses=(SwitchBalance(0.01),))
    return Design("temperature_gaussian_moe", (layer,))


TEMPERATURE_GAUSSIAN_MOE = System(
    name="temperature_gaussian_moe",
    title="Dense-to-sparse temperature gates (the layer; the estimators are not built yet)",
    paper="Nguyen et al., arXiv 2401.13875",
    parts="DenseToSparse(activation) over SwiGLU; SwitchBalance",
    use="moekit compare --designs topk,temperature_gaussian_moe; "
    "moekit reproduce temperature_gaussian_moe",
    design=temperature_gaussian_moe,
    experiment=experiment,
)
