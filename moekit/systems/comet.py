"""COMET: smooth trees over the experts instead of top-k, and local search over who is who.

Ibrahim, Chen, Hazimeh, Ponomareva, Zhao, Mazumder: "COMET: Learning Cardinality Constrained
Mixture of Experts with Trees and Local Search", KDD 2023, arXiv 2306.02824.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import Comet, DSelectK, Permuted, RouterSpec
from moekit.systems.comet_experiment import experiment
from moekit.systems.system import Shape, System

SEARCH_STEPS = 200  # the paper's phase is 1 to 10 epochs of 100 to 200


def comet(shape: Shape) -> Design:
    """COMET at a size: k trees, so at most k experts a token once they are saturated."""
    return _design("comet", Comet(k=shape.k), shape)


def comet_plus(shape: Shape) -> Design:
    """COMET with a permutation that is learned over the first steps, which run every expert."""
    return _design("comet_plus", Permuted(Comet(k=shape.k), steps=SEARCH_STEPS), shape)


def dselect_k(shape: Shape) -> Design:
    """DSelect-k at a size, the smooth gate that COMET is compared with."""
    return _design("dselect_k", DSelectK(k=shape.k), shape)


def _design(name: str, router: RouterSpec, shape: Shape) -> Design:
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    return Design(name, (MoESpec(router, experts),))


COMET = System(
    name="comet",
    title="COMET: tree gates, local search over permutations, DSelect-k",
    paper="Ibrahim et al., arXiv 2306.02824",
    parts="Comet over SwiGLU; Permuted around any router; DSelectK; HashRouter.balance",
    use="moekit compare --designs topk,comet,comet_plus,dselect_k; moekit reproduce comet",
    design=comet,
    experiment=experiment,
)

COMET_RELATIVES = (
    System(
        name="comet_plus",
        title="COMET with local search over the assignment of leaves to experts",
        paper="Ibrahim et al., arXiv 2306.02824",
        parts="Permuted(Comet) over SwiGLU",
        use="moekit compare --designs comet,comet_plus",
        design=comet_plus,
    ),
    System(
        name="dselect_k",
        title="DSelect-k: smooth binary codes of k experts",
        paper="Hazimeh et al., DSelect-k, arXiv 2106.03760",
        parts="DSelectK over SwiGLU",
        use="moekit compare --designs topk,dselect_k",
        design=dselect_k,
    ),
)
