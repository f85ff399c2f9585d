"""Sparsity-constrained optimal transport: tokens and experts matched with at most k an expert.

Liu, Puigcerver, Blondel: "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv 2209.15466.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import RouterSpec, Sinkhorn, SparseTransport
from moekit.systems.sparsity_constrained_ot_experiment import experiment
from moekit.systems.system import Shape, System


def sparsity_constrained_ot(shape: Shape) -> Design:
    """The paper's router at a size: capacity for k experts a token. It is not causal."""
    return _design("sparsity_constrained_ot", SparseTransport(capacity_factor=shape.k), shape)


def s_base(shape: Shape) -> Design:
    """The dense entropic transport that the paper compares with. It is not causal."""
    return _design("s_base", Sinkhorn(capacity_factor=shape.k), shape)


def _design(name: str, router: RouterSpec, shape: Shape) -> Design:
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    return Design(name, (MoESpec(router, experts),))


SPARSITY_CONSTRAINED_OT = System(
    name="sparsity_constrained_ot",
    title="Transport-based routing with at most k tokens an expert (not causal)",
    paper="Liu, Puigcerver, Blondel, arXiv 2209.15466",
    parts="SparseTransport over SwiGLU; solve_sparse_ot, sparse_simplex_projection",
    use="moekit compare --designs topk,expert_choice,sparsity_constrained_ot; "
    "moekit.routing.solve_sparse_ot; moekit reproduce sparsity_constrained_ot",
    design=sparsity_constrained_ot,
    experiment=experiment,
)

TRANSPORT_RELATIVES = (
    System(
        name="s_base",
        title="Experts take tokens by a Sinkhorn plan (not causal)",
        paper="Clark et al., Unified Scaling Laws for Routed Language Models, arXiv 2202.01169",
        parts="Sinkhorn over SwiGLU",
        use="moekit compare --designs s_base,sparsity_constrained_ot",
        design=s_base,
    ),
)
