"""What a model does and costs: routing statistics, efficiency, tokens, checkpoints, reports.

Reports, which need matplotlib and jinja2, are imported from :mod:`moekit.measure.report`.
"""

from moekit.measure.choice_files import read_choices
from moekit.measure.expert_phase import ExpertPhase, ExpertPhaseResult, compare_expert_phase
from moekit.measure.flops import count_flops
from moekit.measure.fluctuation import Fluctuation, routing_fluctuation
from moekit.measure.information import (
    GroupInformation,
    RoutingInformation,
    group_information,
    routing_information,
)
from moekit.measure.inspect import CheckpointStructure, inspect_checkpoint
from moekit.measure.layer_bench import LayerBench, LayerTiming
from moekit.measure.layer_shapes import LayerShape, grid
from moekit.measure.memory import PeakMemory
from moekit.measure.multiple_choice import ChoiceItem, ChoiceScores, score_choices
from moekit.measure.observe import Observation, observe, routing_statistics
from moekit.measure.parameters import ParameterCounts, parameter_counts
from moekit.measure.perplexity import TextLoss, text_loss
from moekit.measure.roofline import LimitRuns, Limits, alternating, interleaved
from moekit.measure.statistics import LayerStatistics, ModelStatistics
from moekit.measure.structure import LayerStructure
from moekit.measure.token_types import TOKEN_TYPES, token_texts, token_type
from moekit.measure.tokens import (
    ExpertTokens,
    GroupUse,
    TokenRouting,
    TokenUse,
    TypeUse,
    token_routing,
)
from moekit.measure.whole_layer_bench import WholeLayerBench
from moekit.measure.zero_computation_bench import ZeroComputationTiming, time_zero_computation

__all__ = [
    "TOKEN_TYPES",
    "CheckpointStructure",
    "ChoiceItem",
    "ChoiceScores",
    "ExpertPhase",
    "ExpertPhaseResult",
    "ExpertTokens",
    "Fluctuation",
    "GroupInformation",
    "GroupUse",
    "LayerBench",
    "LayerShape",
    "LayerStatistics",
    "LayerStructure",
    "LayerTiming",
    "LimitRuns",
    "Limits",
    "ModelStatistics",
    "Observation",
    "ParameterCounts",
    "PeakMemory",
    "RoutingInformation",
    "TextLoss",
    "TokenRouting",
    "TokenUse",
    "TypeUse",
    "WholeLayerBench",
    "ZeroComputationTiming",
    "alternating",
    "compare_expert_phase",
    "count_flops",
    "grid",
    "group_information",
    "inspect_checkpoint",
    "interleaved",
    "observe",
    "parameter_counts",
    "read_choices",
    "routing_fluctuation",
    "routing_information",
    "routing_statistics",
    "score_choices",
    "text_loss",
    "time_zero_computation",
    "token_routing",
    "token_texts",
    "token_type",
]
