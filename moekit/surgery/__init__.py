"""Changes to a model that is already trained."""

from moekit.surgery.null_experts import add_null_experts

__all__ = ["add_null_experts"]
