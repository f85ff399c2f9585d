"""Changes to a model that is already trained."""

from moekit.surgery.experts_backend import register_experts
from moekit.surgery.extend import extend_modules, train_new_modules
from moekit.surgery.fold_tasks import fold_tasks
from moekit.surgery.momentum import AttachedMomentum, attach_momentum
from moekit.surgery.null_experts import add_null_experts
from moekit.surgery.prune_modules import prune_modules
from moekit.surgery.upcycle import upcycle
from moekit.surgery.usage import ModuleUsage, module_usage

__all__ = [
    "AttachedMomentum",
    "ModuleUsage",
    "add_null_experts",
    "attach_momentum",
    "extend_modules",
    "fold_tasks",
    "module_usage",
    "prune_modules",
    "register_experts",
    "train_new_modules",
    "upcycle",
]
