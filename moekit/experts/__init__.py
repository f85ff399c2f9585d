"""What is computed: banks of experts run over rows sorted by expert."""

from moekit.experts.attention_heads import (
    AttentionHeads,
    AttentionHeadsExperts,
    attention_heads,
)
from moekit.experts.experts import Bank, Experts, ExpertsBank, ExpertsSpec
from moekit.experts.feed_forward import (
    GEGLU,
    GELU,
    FeedForwardExperts,
    FeedForwardSpec,
    ReLU,
    SwiGLU,
)
from moekit.experts.groups import GroupedMM, PaddedGroups, RowGroups, fits_grouped_mm
from moekit.experts.zero_computation import (
    Constant,
    ConstantExperts,
    Copy,
    CopyExperts,
    Zero,
    ZeroExperts,
)

__all__ = [
    "GEGLU",
    "GELU",
    "AttentionHeads",
    "AttentionHeadsExperts",
    "Bank",
    "Constant",
    "ConstantExperts",
    "Copy",
    "CopyExperts",
    "Experts",
    "ExpertsBank",
    "ExpertsSpec",
    "FeedForwardExperts",
    "FeedForwardSpec",
    "GroupedMM",
    "PaddedGroups",
    "ReLU",
    "RowGroups",
    "SwiGLU",
    "Zero",
    "ZeroExperts",
    "attention_heads",
    "fits_grouped_mm",
]
