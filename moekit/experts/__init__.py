"""What is computed: banks of experts run over rows sorted by expert."""

from moekit.experts.adapter import Adapter, AdapterSpec, TokenAttention, TokenAttentionBlock
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
from moekit.experts.linear import Linear, LinearExperts
from moekit.experts.mixtures import GatheredMixtures, Mixtures
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
    "Adapter",
    "AdapterSpec",
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
    "GatheredMixtures",
    "GroupedMM",
    "Linear",
    "LinearExperts",
    "Mixtures",
    "PaddedGroups",
    "ReLU",
    "RowGroups",
    "SwiGLU",
    "TokenAttention",
    "TokenAttentionBlock",
    "Zero",
    "ZeroExperts",
    "attention_heads",
    "fits_grouped_mm",
]
