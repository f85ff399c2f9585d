"""Methods of reducing the experts of a model, one a file, all under one interface."""

from moekit.surgery.methods.dern import DERN
from moekit.surgery.methods.frequency import Frequency
from moekit.surgery.methods.hc_smoe import HCSMoE
from moekit.surgery.methods.m_smoe import MSMoE
from moekit.surgery.methods.method import Method, ScoreMethod
from moekit.surgery.methods.random import Random
from moekit.surgery.methods.reap import REAP
from moekit.surgery.methods.router_weight import RouterWeight
from moekit.surgery.methods.uncurl import Uncurl

__all__ = [
    "DERN",
    "REAP",
    "Frequency",
    "HCSMoE",
    "MSMoE",
    "Method",
    "Random",
    "RouterWeight",
    "ScoreMethod",
    "Uncurl",
]
