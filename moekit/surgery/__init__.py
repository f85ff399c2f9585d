"""Changes to a model that is already trained."""

from moekit.surgery.experts_backend import register_experts
from moekit.surgery.momentum import AttachedMomentum, attach_momentum
from moekit.surgery.null_experts import add_null_experts
from moekit.surgery.upcycle import upcycle

__all__ = ["AttachedMomentum", "add_null_experts", "attach_momentum", "register_experts", "upcycle"]
