"""Systems that make a trained model smaller: methods of ``moekit prune``, not designs to train.

Their comparison on one model, trained for it, is not part of this version.
"""

from __future__ import annotations

from moekit.systems.system import System

DERN = System(
    name="dern",
    title="DERN: drops experts and moves their neurons into those that are kept",
    paper="arXiv 2509.10377",
    parts="recorded router statistics; a plan that reassigns segments of neurons and merges them",
    use="moekit prune CHECKPOINT --method dern",
)

UNCURL = System(
    name="uncurl",
    title="UNCURL: merges experts by the router logits of a task",
    paper="arXiv 2409.01483",
    parts="recorded router logits; a plan from their clusters",
    use="moekit prune CHECKPOINT --method uncurl",
)
