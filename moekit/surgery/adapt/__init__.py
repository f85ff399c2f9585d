"""Adapters: mixtures of LoRA experts on feed-forward parts, and LoRA elsewhere.

Chen et al.: "LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in
Instruction Finetuning MLLMs", arXiv 2401.16160.
"""

from moekit.surgery.adapt.balance import LayerRouting, mole_loss, routing_report
from moekit.surgery.adapt.files import is_adapter, load_adapter, save_adapter
from moekit.surgery.adapt.fit import FitReport, FitSpec, fit_adapter
from moekit.surgery.adapt.install import adapter_of, adapter_parameters, install_adapter
from moekit.surgery.adapt.merge import forced_expert, merge_adapter
from moekit.surgery.adapt.mixture import LoRAExperts, MixtureRouter
from moekit.surgery.adapt.spec import AdaptSpec

__all__ = [
    "AdaptSpec",
    "FitReport",
    "FitSpec",
    "LayerRouting",
    "LoRAExperts",
    "MixtureRouter",
    "adapter_of",
    "adapter_parameters",
    "fit_adapter",
    "forced_expert",
    "install_adapter",
    "is_adapter",
    "load_adapter",
    "merge_adapter",
    "mole_loss",
    "routing_report",
    "save_adapter",
]
