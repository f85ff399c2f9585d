"""Changes to a model that is already trained."""

from moekit.surgery.null_experts import add_null_experts
from moekit.surgery.upcycle import upcycle

__all__ = ["add_null_experts", "upcycle"]
