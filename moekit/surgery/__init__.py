"""Changes to a model that is already trained."""

from moekit.surgery.apply import pruned_model
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.budget import Budget
from moekit.surgery.checkpoint import Checkpoint, local_folder
from moekit.surgery.evaluate import Evaluation, evaluate
from moekit.surgery.momentum import AttachedMomentum, attach_momentum
from moekit.surgery.null_experts import add_null_experts
from moekit.surgery.plan import BlockPlan
from moekit.surgery.prune import PruneReport, prune, prune_model
from moekit.surgery.pruned import PrunedMoEConfig, PrunedMoEForCausalLM
from moekit.surgery.recorder import record, record_model
from moekit.surgery.statistics import BlockStatistics, Needs
from moekit.surgery.upcycle import upcycle
from moekit.surgery.view import BlockView, block_views
from moekit.surgery.weights import ExpertWeights, RouterWeights

__all__ = [
    "AttachedMomentum",
    "BlockPlan",
    "BlockStatistics",
    "BlockView",
    "BlockwiseModel",
    "Budget",
    "Checkpoint",
    "Evaluation",
    "ExpertWeights",
    "Needs",
    "PruneReport",
    "PrunedMoEConfig",
    "PrunedMoEForCausalLM",
    "RouterWeights",
    "add_null_experts",
    "attach_momentum",
    "block_views",
    "evaluate",
    "local_folder",
    "prune",
    "prune_model",
    "pruned_model",
    "record",
    "record_model",
    "upcycle",
]
