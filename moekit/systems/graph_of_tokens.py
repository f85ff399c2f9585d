"""Graph of tokens: a token takes the expert decision of tokens like it, or that it attends to.

Nguyen, Tran, Nguyen, Baraniuk: "Improving Routing in Sparse Mixture of Experts with Graph of
Tokens", arXiv 2505.00792.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import AttentionAware, RouterSpec, SimilarityAware, SwitchBalance, TopK
from moekit.systems.graph_of_tokens_experiment import experiment
from moekit.systems.system import Shape, System


def graph_of_tokens(shape: Shape) -> Design:
    """Similarity-aware routing at a size."""
    return _design("graph_of_tokens", SimilarityAware(TopK(k=shape.k)), shape)


def attention_aware(shape: Shape) -> Design:
    """Attention-aware routing at a size: the graph is the attention before the layer."""
    return _design("attention_aware", AttentionAware(TopK(k=shape.k)), shape)


def _design(name: str, router: RouterSpec, shape: Shape) -> Design:
    experts = SwiGLU(count=shape.experts, hidden=shape.hidden)
    return Design(name, (MoESpec(router, experts, losses=(SwitchBalance(0.01),)),))


GRAPH_OF_TOKENS = System(
    name="graph_of_tokens",
    title="Similarity- and attention-aware routing over a graph of tokens",
    paper="Nguyen et al., arXiv 2505.00792",
    parts="SimilarityAware | AttentionAware around TopK over SwiGLU; SwitchBalance; "
    "routing_fluctuation",
    use="moekit compare --designs topk,graph_of_tokens,attention_aware; "
    "moekit inspect CHECKPOINT --against EARLIER --data TEXT; moekit reproduce graph_of_tokens",
    design=graph_of_tokens,
    experiment=experiment,
)

GRAPH_RELATIVES = (
    System(
        name="attention_aware",
        title="Attention-aware routing: tokens decide with those they attend to",
        paper="Nguyen et al., arXiv 2505.00792",
        parts="AttentionAware(TopK) over SwiGLU; SwitchBalance",
        use="moekit compare --designs graph_of_tokens,attention_aware",
        design=attention_aware,
    ),
)
