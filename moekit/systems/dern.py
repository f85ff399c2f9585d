"""DERN: experts are dropped, and their neurons move into those that are kept.

Zhou, Zhao, Cheng, Wu, Gui, Yang, Wu, Cheng, Fan: "Dropping Experts, Recombining Neurons:
Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs", arXiv 2509.10377.
"""

from __future__ import annotations

from moekit.systems.dern_experiment import experiment
from moekit.systems.system import System

DERN = System(
    name="dern",
    title="DERN: drops experts and moves their neurons into those that are kept",
    paper="Zhou et al., arXiv 2509.10377",
    parts="recorded router statistics; a plan that reassigns segments of neurons and merges them",
    use="moekit prune CHECKPOINT --method dern; moekit reproduce dern",
    experiment=experiment,
)
