"""Who computes: routers, and the losses that keep them balanced."""

from moekit.routing.attention_aware import AttentionAware, AttentionAwareRouter
from moekit.routing.comet import Comet, CometRouter
from moekit.routing.dense_warmup import DenseWarmup, DenseWarmupRouter
from moekit.routing.dselect_k import DSelectK, DSelectKRouter
from moekit.routing.expert_choice import ExpertChoice, ExpertChoiceRouter
from moekit.routing.gumbel import GumbelSoftmax, GumbelSoftmaxRouter
from moekit.routing.hash import Hash, HashRouter
from moekit.routing.l1_balance import L1Balance, L1BalanceLoss
from moekit.routing.losses import (
    Batch,
    Entropy,
    HeterogeneousBalance,
    Loss,
    LossSpec,
    NullAwareBalance,
    RouterZ,
    SwitchBalance,
)
from moekit.routing.module_routing import ModuleRouter, ModuleRouting
from moekit.routing.mutual_information import MutualInformation
from moekit.routing.noisy_top_k import NoisyTopK, NoisyTopKRouter
from moekit.routing.pathway import Pathway, PathwayRouter
from moekit.routing.per_task import PerTask, PerTaskRouter
from moekit.routing.permuted import Permuted, PermutedRouter
from moekit.routing.relu import ReLURouter, ReLURouting
from moekit.routing.router import ZERO_COMPUTATION, Router, RouterSpec, Site
from moekit.routing.routing import Carry, Load, Routing, Signals
from moekit.routing.routing_losses import LossSite, RoutingLosses, all_reduce_loads
from moekit.routing.scoped import (
    PerChunk,
    PerChunkRouter,
    PerSequence,
    PerSequenceRouter,
    ScopedRouter,
    ScopedSpec,
)
from moekit.routing.sequences import (
    Attention,
    AttentionWeights,
    DotProductAttention,
    Memory,
    Sequences,
    View,
)
from moekit.routing.similarity_aware import SimilarityAware, SimilarityAwareRouter
from moekit.routing.sinkhorn import Sinkhorn, SinkhornRouter
from moekit.routing.sparse_simplex import sparse_simplex_projection
from moekit.routing.sparse_transport import SparseTransport, SparseTransportRouter
from moekit.routing.temperature import DenseToSparse, DenseToSparseRouter
from moekit.routing.token_graph import TokenGraph, TokenGraphRouter
from moekit.routing.top_k import TopK, TopKRouter
from moekit.routing.transport import SparseOTResult, solve_sparse_ot

__all__ = [
    "ZERO_COMPUTATION",
    "Attention",
    "AttentionAware",
    "AttentionAwareRouter",
    "AttentionWeights",
    "Batch",
    "Carry",
    "Comet",
    "CometRouter",
    "DSelectK",
    "DSelectKRouter",
    "DenseToSparse",
    "DenseToSparseRouter",
    "DenseWarmup",
    "DenseWarmupRouter",
    "DotProductAttention",
    "Entropy",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "GumbelSoftmax",
    "GumbelSoftmaxRouter",
    "Hash",
    "HashRouter",
    "HeterogeneousBalance",
    "L1Balance",
    "L1BalanceLoss",
    "Load",
    "Loss",
    "LossSite",
    "LossSpec",
    "Memory",
    "ModuleRouter",
    "ModuleRouting",
    "MutualInformation",
    "NoisyTopK",
    "NoisyTopKRouter",
    "NullAwareBalance",
    "Pathway",
    "PathwayRouter",
    "PerChunk",
    "PerChunkRouter",
    "PerSequence",
    "PerSequenceRouter",
    "PerTask",
    "PerTaskRouter",
    "Permuted",
    "PermutedRouter",
    "ReLURouter",
    "ReLURouting",
    "Router",
    "RouterSpec",
    "RouterZ",
    "Routing",
    "RoutingLosses",
    "ScopedRouter",
    "ScopedSpec",
    "Sequences",
    "Signals",
    "SimilarityAware",
    "SimilarityAwareRouter",
    "Sinkhorn",
    "SinkhornRouter",
    "Site",
    "SparseOTResult",
    "SparseTransport",
    "SparseTransportRouter",
    "SwitchBalance",
    "TokenGraph",
    "TokenGraphRouter",
    "TopK",
    "TopKRouter",
    "View",
    "all_reduce_loads",
    "solve_sparse_ot",
    "sparse_simplex_projection",
]
