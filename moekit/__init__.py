"""moekit: sparse mixture-of-experts models, as parts that compose.

The parts of a layer are importable from here; models, training and data from their own packages.
"""

from moekit.dispatch import Capacity, Dropless, Rectified
from moekit.errors import MoekitError
from moekit.experts import (
    GEGLU,
    GELU,
    AttentionHeads,
    Bank,
    Constant,
    Copy,
    ReLU,
    SwiGLU,
    Zero,
)
from moekit.layer import MoE, MoEOutput, MoESpec
from moekit.residual import AdamFirst, AdamMomentum, HeavyBall, Plain, RobustMomentum
from moekit.routing import (
    Carry,
    DenseToSparse,
    Entropy,
    ExpertChoice,
    GumbelSoftmax,
    Hash,
    HeterogeneousBalance,
    L1Balance,
    ModuleRouting,
    MutualInformation,
    NullAwareBalance,
    Pathway,
    ReLURouting,
    RouterZ,
    Routing,
    Signals,
    SwitchBalance,
    TopK,
)

__version__ = "0.1.0"

__all__ = [
    "GEGLU",
    "GELU",
    "AdamFirst",
    "AdamMomentum",
    "AttentionHeads",
    "Bank",
    "Capacity",
    "Carry",
    "Constant",
    "Copy",
    "DenseToSparse",
    "Dropless",
    "Entropy",
    "ExpertChoice",
    "GumbelSoftmax",
    "Hash",
    "HeavyBall",
    "HeterogeneousBalance",
    "L1Balance",
    "MoE",
    "MoEOutput",
    "MoESpec",
    "ModuleRouting",
    "MoekitError",
    "MutualInformation",
    "NullAwareBalance",
    "Pathway",
    "Plain",
    "ReLU",
    "ReLURouting",
    "Rectified",
    "RobustMomentum",
    "RouterZ",
    "Routing",
    "Signals",
    "SwiGLU",
    "SwitchBalance",
    "TopK",
    "Zero",
]
