"""What a model does and costs: routing statistics, efficiency, tokens, checkpoints, reports."""

from moekit.measure.statistics import LayerStatistics, ModelStatistics

__all__ = ["LayerStatistics", "ModelStatistics"]
