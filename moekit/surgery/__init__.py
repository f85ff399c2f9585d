"""Changes to a model that is already trained."""

from moekit.surgery.apply import pruned_model
from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.budget import Budget
from moekit.surgery.checkpoint import Checkpoint, local_folder
from moekit.surgery.evaluate import Evaluation, evaluate
from moekit.surgery.experts_backend import register_experts
from moekit.surgery.extend import extend_modules, train_new_modules
from moekit.surgery.fold_tasks import fold_tasks
from moekit.surgery.grafted import GraftedMoEConfig, GraftedMoEForCausalLM
from moekit.surgery.momentum import AttachedMomentum, attach_momentum
from moekit.surgery.null_experts import add_null_experts
from moekit.surgery.plan import BlockPlan
from moekit.surgery.prune import PruneReport, prune, prune_model
from moekit.surgery.prune_modules import prune_modules
from moekit.surgery.pruned import PrunedMoEConfig, PrunedMoEForCausalLM
from moekit.surgery.pruning_factor import (
    FactorRow,
    Threshold,
    pruning_factor_study,
    thresholds,
)
from moekit.surgery.recorder import record, record_model
from moekit.surgery.statistics import BlockStatistics, Needs
from moekit.surgery.upcycle import upcycle
from moekit.surgery.upcycle_dense import upcycle_checkpoint, upcycle_dense
from moekit.surgery.upcycle_families import Upcycling
from moekit.surgery.usage import ModuleUsage, module_usage
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
    "FactorRow",
    "GraftedMoEConfig",
    "GraftedMoEForCausalLM",
    "ModuleUsage",
    "Needs",
    "PruneReport",
    "PrunedMoEConfig",
    "PrunedMoEForCausalLM",
    "RouterWeights",
    "Threshold",
    "Upcycling",
    "add_null_experts",
    "attach_momentum",
    "block_views",
    "evaluate",
    "extend_modules",
    "fold_tasks",
    "local_folder",
    "module_usage",
    "prune",
    "prune_model",
    "prune_modules",
    "pruned_model",
    "pruning_factor_study",
    "record",
    "record_model",
    "register_experts",
    "thresholds",
    "train_new_modules",
    "upcycle",
    "upcycle_checkpoint",
    "upcycle_dense",
]
