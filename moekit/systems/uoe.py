"""UOE: unlearns in the one expert that a text engages most, while an anchor holds the router.

Zhuang, Zhang, Guo, Jia, Liu, Liu, Zhang: "SEUF: Is Unlearning One Expert Enough for
Mixture-of-Experts LLMs?", ACL 2025, arXiv 2411.18797 (first version: UOE).
"""

from __future__ import annotations

from moekit.systems.system import System
from moekit.systems.uoe_experiment import experiment

UOE = System(
    name="uoe",
    title="UOE: unlearns in one expert while an anchor holds the router",
    paper="Zhuang et al., arXiv 2411.18797",
    parts="attribution by the router's affinity; a router anchor loss; GA, GDiff, NPO or RMU",
    use="moekit unlearn CHECKPOINT --forget FILES --retain FILES; moekit reproduce uoe",
    experiment=experiment,
)
