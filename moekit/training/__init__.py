"""Training on ``transformers.Trainer``: routing losses and controllers, statistics, exact resume.

>>> from moekit.training import TrainingSpec, train
>>> result = train(model, data, TrainingSpec(steps=400), Path("runs/first"))  # doctest: +SKIP
"""

from moekit.training.decay import decays
from moekit.training.evaluation import evaluate
from moekit.training.progress import ProgressReporter, RichProgress, SilentProgress, bars
from moekit.training.run import TrainingResult, train
from moekit.training.spec import TrainingSpec
from moekit.training.trainer import MoETrainer

__all__ = [
    "MoETrainer",
    "ProgressReporter",
    "RichProgress",
    "SilentProgress",
    "TrainingResult",
    "TrainingSpec",
    "bars",
    "decays",
    "evaluate",
    "train",
]
