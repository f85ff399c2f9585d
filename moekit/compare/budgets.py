"""Study settings that experiments share, so that their numbers can be set side by side."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.compare.design import Design, Match
from moekit.compare.model import ModelSpec
from moekit.compare.study import StudySpec
from moekit.data import TextSpec
from moekit.training import TrainingSpec

SMALL_TEXT = TextSpec(source="stdlib", vocab_size=512, sequence_length=128, limit_bytes=2_000_000)
SMALL_MODEL = ModelSpec(width=64, depth=2, heads=4, kv_heads=2)


def small_model_study(
    designs: Sequence[Design],
    *,
    quick: bool,
    seed: int = 0,
    seeds: int = 3,
    steps: int = 800,
    match: Match = "steps",
) -> StudySpec:
    """Two layers of width 64 on 2 MB of the standard library, 1024 tokens a step.

    Args:
        quick: 30 steps and one seed: shows that everything runs, and decides nothing.
        seed: the first seed.
        seeds: number of seeds.
        steps: optimiser steps.
        match: what the designs are made equal in.
    """
    steps, seeds = (30, 1) if quick else (steps, seeds)
    return StudySpec(
        designs=tuple(designs),
        seeds=tuple(range(seed, seed + seeds)),
        model=SMALL_MODEL,
        training=TrainingSpec(
            steps=steps,
            batch_size=8,
            learning_rate=3e-3,
            log_every=5,
            eval_every=max(1, steps // 10),
            eval_batches=8,
        ),
        text=SMALL_TEXT,
        match=match,
    )
