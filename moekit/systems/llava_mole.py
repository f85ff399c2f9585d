"""LLaVA-MoLE: a top-1 mixture of LoRA experts on every feed-forward part.

Chen, Jie, Ma: "LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in
Instruction Finetuning MLLMs", arXiv 2401.16160.
"""

from __future__ import annotations

from moekit.systems.llava_mole_experiment import experiment
from moekit.systems.system import System

LLAVA_MOLE = System(
    name="llava_mole",
    title="LLaVA-MoLE: top-1 mixture of LoRA experts on a frozen model",
    paper="Chen et al., arXiv 2401.16160",
    parts="LoRA experts for each projection; one router a feed-forward part; a balance loss",
    use="moekit adapt CHECKPOINT --data FILES; moekit reproduce llava_mole",
    experiment=experiment,
)
