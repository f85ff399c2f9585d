"""The check of a system's claim: what was claimed, what was measured, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moekit.compare import StudyProgress

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]


@dataclass(frozen=True)
class Finding:
    """One claim and what became of it here.

    Attributes:
        claim: what the paper says, with its setting.
        measured: what was found, in numbers.
        verdict: whether it showed at this scale.
    """

    claim: str
    measured: str
    verdict: Verdict


@dataclass(frozen=True)
class Reproduction:
    """The result of an experiment.

    Attributes:
        system: its name.
        setting: model, data, steps and seeds.
        table: one row a design, plain values.
        findings: the claims.
    """

    system: str
    setting: str
    table: list[dict[str, Any]]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Laboratory:
    """Where an experiment runs.

    Attributes:
        output: folder for its runs; finished ones are not run again.
        quick: a smoke run of about a minute, whose verdicts mean nothing.
        seed: first seed.
        device: where tensors live.
        progress: told how far it is.
    """

    output: Path
    quick: bool
    seed: int
    device: str
    progress: StudyProgress


Experiment = Callable[[Laboratory], Reproduction]


def judged(holds: bool, *, quick: bool, decided: bool = True) -> Verdict:
    """The verdict of a comparison; a quick run or one within its uncertainty decides nothing."""
    if quick or not decided:
        return "inconclusive"
    return "reproduced" if holds else "not reproduced"
