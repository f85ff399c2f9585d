"""Changes to a model that is already trained."""

from moekit.surgery.blockwise import BlockwiseModel
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.momentum import AttachedMomentum, attach_momentum
from moekit.surgery.null_experts import add_null_experts
from moekit.surgery.recorder import record, record_model
from moekit.surgery.statistics import BlockStatistics, Needs
from moekit.surgery.upcycle import upcycle
from moekit.surgery.view import BlockView, block_views
from moekit.surgery.weights import ExpertWeights, RouterWeights

__all__ = [
    "AttachedMomentum",
    "BlockStatistics",
    "BlockView",
    "BlockwiseModel",
    "Checkpoint",
    "ExpertWeights",
    "Needs",
    "RouterWeights",
    "add_null_experts",
    "attach_momentum",
    "block_views",
    "record",
    "record_model",
    "upcycle",
]
