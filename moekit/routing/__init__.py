"""Who computes: routers, and the losses that keep them balanced."""

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
from moekit.routing.pathway import Pathway, PathwayRouter
from moekit.routing.permuted import Permuted, PermutedRouter
from moekit.routing.relu import ReLURouter, ReLURouting
from moekit.routing.router import ZERO_COMPUTATION, Router, RouterSpec, Site
from moekit.routing.routing import Carry, Load, Routing, Signals
from moekit.routing.routing_losses import LossSite, RoutingLosses, all_reduce_loads
from moekit.routing.temperature import DenseToSparse, DenseToSparseRouter
from moekit.routing.top_k import TopK, TopKRouter

__all__ = [
    "ZERO_COMPUTATION",
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
    "ModuleRouter",
    "ModuleRouting",
    "MutualInformation",
    "NullAwareBalance",
    "Pathway",
    "PathwayRouter",
    "Permuted",
    "PermutedRouter",
    "ReLURouter",
    "ReLURouting",
    "Router",
    "RouterSpec",
    "RouterZ",
    "Routing",
    "RoutingLosses",
    "Signals",
    "Site",
    "SwitchBalance",
    "TopK",
    "TopKRouter",
    "all_reduce_loads",
]
