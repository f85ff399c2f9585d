"""MomentumSMoE: a stack of MoE layers as momentum descent over depth.

Teo and Nguyen: "MomentumSMoE: Integrating Momentum into Sparse Mixture of Experts", NeurIPS 2024,
arXiv 2410.14574.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.residual import AdamFirst, HeavyBall, ResidualSpec, RobustMomentum
from moekit.routing import SwitchBalance, TopK
from moekit.systems.momentum_smoe_experiment import experiment
from moekit.systems.system import Shape, System


def momentum_smoe(shape: Shape) -> Design:
    """MomentumSMoE at a size: top-k layers with heavy ball, momentum 0.7 and step 1."""
    return _design("momentum_smoe", HeavyBall(mu=0.7, gamma=1.0), shape)


def adam_smoe(shape: Shape) -> Design:
    """AdamSMoE as released: Adam in the first MoE layer, heavy ball above it."""
    return _design("adam_smoe", AdamFirst(), shape)


def robust_momentum_smoe(shape: Shape) -> Design:
    """Robust MomentumSMoE with the parameters of the released vision code."""
    return _design("robust_momentum_smoe", RobustMomentum(rho=0.2, kappa=1.25, L=1.0), shape)


def _design(name: str, rule: ResidualSpec, shape: Shape) -> Design:
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    losses = (SwitchBalance(0.01),)
    return Design(name, (MoESpec(TopK(k=shape.k), experts, losses=losses, residual=rule),))


MOMENTUM_SMOE = System(
    name="momentum_smoe",
    title="MomentumSMoE: heavy-ball, Adam and robust momentum over depth",
    paper="Teo and Nguyen, arXiv 2410.14574",
    parts="MoESpec(residual=HeavyBall | AdamFirst | AdamMomentum | RobustMomentum) around TopK",
    use="moekit compare --designs topk,momentum_smoe; moekit.surgery.attach_momentum; "
    "moekit reproduce momentum_smoe",
    design=momentum_smoe,
    experiment=experiment,
)
