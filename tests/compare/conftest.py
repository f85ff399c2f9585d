"""Studies small enough to run in a second or two, and records made by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_study import DESIGNS, MODEL

from moekit.compare import RunRecord, StudySpec
from moekit.data import TextSpec
from moekit.training import TrainingSpec


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file whose words follow each other at random."""
    draw = random.Random(0)
    known = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "12",
        "7",
        "(",
        ")",
        ".",
        ",",
        "<img\nif",
    ]
    path = tmp_path_factory.mktemp("text") / "words <b>.txt"
    path.write_text(" ".join(draw.choice(known) for _ in range(6000)))
    return path


@pytest.fixture
def study_spec(words: Path) -> Callable[..., StudySpec]:
    """A function from changes to a tiny study of a dense and a top-2 design."""

    def make(**changes: Any) -> StudySpec:
        training = TrainingSpec(steps=6, batch_size=2, log_every=2, save_every=2, eval_batches=2)
        text = TextSpec(source=str(words), vocab_size=280, sequence_length=16)
        settings = {"designs": DESIGNS, "model": MODEL, "training": training, "text": text}
        return StudySpec(**{**settings, **changes})

    return make


@pytest.fixture
def record() -> Callable[..., RunRecord]:
    """A function from a design, a seed and a loss to a record, other measurements made up."""

    def make(design: str, seed: int, loss: float, **changes: Any) -> RunRecord:
        settings: dict[str, Any] = {
            "causal": True,
            "bits_per_byte": loss / 2,
            "parameters": {"total": 100, "active": 50},
            "flops_per_token": 1e6,
            "training_flops": 3e9,
            "tokens": 1000,
            "tokens_per_second": 10.0,
            "peak_memory_bytes": 2**20,
        }
        return RunRecord(design, seed, validation_loss=loss, **{**settings, **changes})

    return make
