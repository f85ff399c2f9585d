"""MEO: the chosen experts' weights become one expert, which is all that runs.

He, Fan, Ding, Shen, Zhou, Tao: "Merging Experts into One: Improving Computational Efficiency of
Mixture of Experts", EMNLP 2023, arXiv 2310.09832.
"""

from __future__ import annotations

from moekit.compare import Design
from moekit.dispatch import Merged
from moekit.experts import AdapterSpec, SwiGLU, TokenAttention
from moekit.layer import MoESpec
from moekit.routing import NoisyTopK, PerChunk, PerTask, RouterSpec
from moekit.systems.meo_experiment import experiment
from moekit.systems.system import Shape, System

CHUNK = 64  # merging 8 experts is then an eighth of the work of the merged one


def meo(shape: Shape) -> Design:
    """MEO at the task level, that of the paper's language models, with one task.

    A merged expert is as wide as the k experts that a top-k design runs, and mixes 2k of them.
    """
    return _design("meo", PerTask(_gate(shape)), None, shape)


def meo_chunk(shape: Shape) -> Design:
    """The causal form of the sequence level: chunks of a sequence, with token attention."""
    return _design("meo_chunk", PerChunk(_gate(shape), length=CHUNK), TokenAttention(), shape)


def _gate(shape: Shape) -> NoisyTopK:
    return NoisyTopK(k=min(2 * shape.k, shape.experts))


def _design(name: str, router: RouterSpec, adapter: AdapterSpec | None, shape: Shape) -> Design:
    experts = SwiGLU(count=shape.experts, hidden=shape.k * shape.hidden)
    return Design(name, (MoESpec(router, experts, Merged(), adapter=adapter),))


MEO = System(
    name="meo",
    title="Merging Experts into One: the selected experts' weights become one expert",
    paper="He et al., arXiv 2310.09832",
    parts="PerTask | PerChunk | PerSequence around NoisyTopK; Merged over SwiGLU; TokenAttention",
    use="moekit compare --designs topk,meo,meo_chunk; moekit.surgery.fold_tasks; "
    "moekit reproduce meo",
    design=meo,
    experiment=experiment,
)

MEO_RELATIVES = (
    System(
        name="meo_chunk",
        title="MEO routed by the chunk before, with token attention",
        paper="He et al., arXiv 2310.09832; Zhong et al., Lory, arXiv 2405.03133",
        parts="PerChunk(NoisyTopK); Merged over SwiGLU; TokenAttention",
        use="moekit compare --designs meo,meo_chunk",
        design=meo_chunk,
    ),
)
