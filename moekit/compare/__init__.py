"""Train any designs side by side on one's own text, and learn which one is best for it."""

from moekit.compare.design import Design, Match, load_design, matched
from moekit.compare.model import ModelSpec
from moekit.compare.record import RunRecord
from moekit.compare.study import Study, StudyProgress, StudySpec, compare
from moekit.compare.summary import DesignSummary, Spread, paired_difference, summarise
from moekit.compare.verdict import verdict

__all__ = [
    "Design",
    "DesignSummary",
    "Match",
    "ModelSpec",
    "RunRecord",
    "Spread",
    "Study",
    "StudyProgress",
    "StudySpec",
    "compare",
    "load_design",
    "matched",
    "paired_difference",
    "summarise",
    "verdict",
]
