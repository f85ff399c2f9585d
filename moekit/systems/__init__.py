"""The published systems: what each is made of, and the experiment that checks its claim."""

from moekit.systems.catalogue import DEFAULT_DESIGNS, baselines, find, systems
from moekit.systems.experiment import Experiment, Finding, Laboratory, Reproduction
from moekit.systems.system import Shape, System

__all__ = [
    "DEFAULT_DESIGNS",
    "Experiment",
    "Finding",
    "Laboratory",
    "Reproduction",
    "Shape",
    "System",
    "baselines",
    "find",
    "systems",
]
