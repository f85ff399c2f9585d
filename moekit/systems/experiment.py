"""The check of a system's claim: what was claimed, what was measured, and the verdict."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moekit.compare import StudyProgress
from moekit.compare.record import write_json
from moekit.compare.run import folder_name
from moekit.errors import OutputError

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

    def claim(self, system: str) -> None:
        """Write down that the folder belongs to this experiment.

        Raises:
            OutputError: it belongs to another one, or holds something else.
        """
        path = self.output / "experiment.json"
        wanted = {"system": system, "quick": self.quick, "seed": self.seed}
        if path.exists() and _stored(path) != wanted:
            raise OutputError(
                f"{self.output} holds another experiment, or the same with another seed or length; "
                "choose another folder with --output"
            )
        if not path.exists() and self.output.is_dir() and any(self.output.iterdir()):
            raise OutputError(
                f"{self.output} is not empty and holds no experiment; "
                "choose another folder with --output"
            )
        write_json(path, wanted)

    def measured(
        self, name: str, seed: int, settings: Mapping[str, Any], run: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What ``run`` measures, or what it did if a run of these settings has ended before.

        Args:
            name, seed: which run, among those of the folder.
            settings: all that decides the result, as JSON values.
            run: called if there is no such result; returns JSON values.
        """
        path = self.output / f"{folder_name(name)}-seed{seed}.json"
        stored = _stored(path)
        if isinstance(stored, dict) and stored.get("settings") == settings:
            self.progress.found(name, seed)
            return dict(stored["measured"])
        found = run()
        write_json(path, {"settings": settings, "measured": found})
        return found


def _stored(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


Experiment = Callable[[Laboratory], Reproduction]


def judged(holds: bool, *, quick: bool, decided: bool = True) -> Verdict:
    """The verdict of a comparison; a quick run or one within its uncertainty decides nothing."""
    if quick or not decided:
        return "inconclusive"
    return "reproduced" if holds else "not reproduced"


def deviation_in_words(deviation: float | None) -> str:
    """How far the seeds of a design lie apart, for the measurement of a finding."""
    if deviation is None:
        return "one seed, so no deviation"
    return f"its seeds deviate by {deviation:.4f}"


def tokens_by_experts(surveys: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many tokens used 0, 1, 2 ... feed-forward experts, over all layers.

    Args:
        surveys: summaries of :class:`moekit.measure.ModelStatistics`, one a run.
    """
    histograms = [layer["histogram"] for found in surveys for layer in found["layers"]]
    return [sum(counts) for counts in itertools.zip_longest(*histograms, fillvalue=0)]


def deviation_of_experts(counts: Sequence[int]) -> float:
    """Standard deviation over tokens of what :func:`tokens_by_experts` counted."""
    total = sum(counts)
    mean = sum(n * count for n, count in enumerate(counts)) / total
    return math.sqrt(sum(count * (n - mean) ** 2 for n, count in enumerate(counts)) / total)
