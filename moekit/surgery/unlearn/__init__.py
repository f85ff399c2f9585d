"""Unlearning in one attributed expert while an anchor holds its router, and the baselines.

Zhuang et al.: "SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?", ACL 2025, arXiv
2411.18797 (first version: UOE).
"""

from moekit.surgery.unlearn.algorithms import GA, NPO, RMU, Algorithm, GDiff
from moekit.surgery.unlearn.anchor import RouterAnchorLoss, router_probabilities
from moekit.surgery.unlearn.attribution import attribute_experts, select_experts
from moekit.surgery.unlearn.loop import Look, Texts
from moekit.surgery.unlearn.losses import npo_loss, rmu_forget_loss, rmu_retain_loss
from moekit.surgery.unlearn.measure import Reading, read, selection_overlap
from moekit.surgery.unlearn.spec import UnlearnSpec
from moekit.surgery.unlearn.targets import (
    AllExperts,
    Attributed,
    Everything,
    Named,
    RandomExperts,
    Routers,
    Targets,
)
from moekit.surgery.unlearn.unlearn import SelectedExpert, UnlearnReport, unlearn, unlearn_model

__all__ = [
    "GA",
    "NPO",
    "RMU",
    "Algorithm",
    "AllExperts",
    "Attributed",
    "Everything",
    "GDiff",
    "Look",
    "Named",
    "RandomExperts",
    "Reading",
    "RouterAnchorLoss",
    "Routers",
    "SelectedExpert",
    "Targets",
    "Texts",
    "UnlearnReport",
    "UnlearnSpec",
    "attribute_experts",
    "npo_loss",
    "read",
    "rmu_forget_loss",
    "rmu_retain_loss",
    "router_probabilities",
    "select_experts",
    "selection_overlap",
    "unlearn",
    "unlearn_model",
]
