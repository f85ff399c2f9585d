"""UNCURL: experts merged by the router logits of a task, and how far that can go.

Sarkar, Lausen, Cevher, Zha, Brox, Karypis: "Revisiting SMoE Language Models by Evaluating
Inefficiencies with Task Specific Expert Pruning", arXiv 2409.01483.
"""

from __future__ import annotations

from moekit.systems.system import System
from moekit.systems.uncurl_experiment import experiment

UNCURL = System(
    name="uncurl",
    title="UNCURL: merges experts by the router logits of a task",
    paper="Sarkar et al., arXiv 2409.01483",
    parts="recorded router logits; a plan from their spectral clusters; pruning_factor_study",
    use="moekit prune CHECKPOINT --method uncurl; moekit.surgery.pruning_factor_study; "
    "moekit reproduce uncurl",
    experiment=experiment,
)
