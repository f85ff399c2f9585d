"""A study: several designs, several seeds, one text, one budget; resumable run by run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moekit.compare.apart import run_apart
from moekit.compare.design import Design, Match, matched
from moekit.compare.machine import machine
from moekit.compare.model import ModelSpec
from moekit.compare.record import RunRecord, write_json
from moekit.compare.run import RunPlace, folder_name, measure_phases, run_design
from moekit.data import ProgressHook, TextData, TextSpec, prepare
from moekit.errors import OutputError
from moekit.measure import ExpertPhaseResult
from moekit.spec import Spec
from moekit.training import ProgressReporter, TrainingSpec

CLAIM = "study.json"  # says whose folder it is


@dataclass(frozen=True)
class StudySpec(Spec):
    """What to compare, and how.

    Attributes:
        designs: the designs, in the order of the report; the first sets the cost to match.
        seeds: seeds of the initial weights and of the data order. All designs see the same order.
        model: the decoder around the designs.
        training: the budget of each run; its seed is replaced by each of ``seeds``.
        text: the data.
        match: what the designs are made equal in, see :func:`moekit.compare.matched`.
    """

    designs: tuple[Design, ...]
    seeds: tuple[int, ...] = (0,)
    model: ModelSpec = ModelSpec()
    training: TrainingSpec = TrainingSpec()
    text: TextSpec = TextSpec()
    match: Match = "active"

    def check(self) -> None:
        names = [design.name for design in self.designs]
        self.require(len(names) > 0, "there is no design to compare; name at least one")
        repeated = sorted({name for name in names if names.count(name) > 1})
        self.require(not repeated, f"design names must differ; repeated: {', '.join(repeated)}")
        folders = {folder_name(name) for name in names}
        self.require(len(folders) == len(names), "design names differ in punctuation only")
        self.require(len(self.seeds) > 0, "there is no seed; give at least one")
        self.require(len(set(self.seeds)) == len(self.seeds), "a seed is given twice")
        self.require(min(self.seeds, default=0) >= 0, "a seed is negative; wanted 0 or more")
        for design in self.designs:
            design.at_depth(self.model.depth)

    def matched(self) -> StudySpec:
        """The study with its designs brought to the same cost."""
        length = self.text.sequence_length
        return self.replace(designs=tuple(matched(self.designs, self.model, self.match, length)))

    def describe(self) -> str:
        """The setting in a sentence."""
        training, model = self.training, self.model
        tokens = training.steps * training.batch_size * self.text.sequence_length
        equal = {
            "active": "matched by active parameters",
            "flops": "matched by FLOPs a token",
            "steps": "matched by steps",
        }[self.match]
        return (
            f"{model.depth} layers of width {model.width}, {training.steps} steps of "
            f"{training.batch_size} x {self.text.sequence_length} tokens ({tokens:,} tokens), "
            f"text {self.text.source}, vocabulary {self.text.vocab_size}, "
            f"{training.precision}, seeds {', '.join(map(str, self.seeds))}, {equal}"
        )


class StudyProgress(Protocol):
    """Told what a study does."""

    def preparing(self) -> ProgressHook:
        """Where the progress of reading the text goes."""

    def run(self, design: str, seed: int, index: int, total: int) -> ProgressReporter:
        """A run starts; returns the reporter of its training."""

    def found(self, design: str, seed: int) -> None:
        """A run was finished earlier and is not run again."""

    def timing(self) -> None:
        """The expert phases are being timed."""


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        spec: the study with its designs as they were run.
        records: one a run, in the order of designs and then seeds.
        text: what was read, see :class:`moekit.data.TextData`.
        phases: measured expert phase of each design, all in one interleaved measurement.
        machine: where it ran, with versions.
    """

    spec: StudySpec
    records: tuple[RunRecord, ...]
    text: dict[str, Any]
    phases: dict[str, ExpertPhaseResult]
    machine: dict[str, Any]

    def of(self, design: str) -> list[RunRecord]:
        """The runs of one design, by seed."""
        return [record for record in self.records if record.design == design]


def compare(
    spec: StudySpec,
    output: Path,
    *,
    progress: StudyProgress,
    device: str = "cpu",
    report_to: Sequence[str] = (),
    apart: bool = False,
) -> Study:
    """Train every design with every seed, or take up where an earlier call stopped.

    Runs go to ``output/runs``. A finished run is not run again; an interrupted one goes on from
    its last whole checkpoint.

    Args:
        spec: what to compare.
        output: folder of the study; one study a folder.
        progress: told how far it is.
        device: where to train.
        report_to: trackers of :class:`transformers.Trainer`, such as ``tensorboard``.
        apart: give every run a fresh process, so that peak memory on a CPU is the run's own. A
            script that asks for it must guard its entry with ``if __name__ == "__main__"``, as
            with every use of :mod:`multiprocessing`.

    Raises:
        SpecError: a design cannot be built or matched.
        OutputError: ``output`` cannot be written, or holds another study.
        DataError: the text cannot be read.
        DivergedError: a loss stopped being finite.
        ProcessError: the process of a run was killed.
    """
    spec = spec.matched()
    run = run_apart if apart else run_design
    _require_free(output, spec)
    data = prepare(spec.text, progress=progress.preparing())
    write_json(output / CLAIM, spec.to_dict())
    records = []
    runs = [(design, seed) for seed in spec.seeds for design in spec.designs]
    for index, (design, seed) in enumerate(runs):
        place = RunPlace(output / "runs", design.name, seed)
        record = place.finished()
        if record is None:
            reporter = progress.run(design.name, seed, index, len(runs))
            training = spec.training.replace(seed=seed)
            record = run(design, spec.model, training, data, place, reporter, device, report_to)
        else:
            progress.found(design.name, seed)
        records.append(record)
    records.sort(key=lambda r: [d.name for d in spec.designs].index(r.design))
    phases = _phases(spec, output, data, progress, device)
    return Study(spec, tuple(records), data.report, phases, machine(device))


def _phases(
    spec: StudySpec, output: Path, data: TextData, progress: StudyProgress, device: str
) -> dict[str, ExpertPhaseResult]:
    """The expert phases, timed once a study."""
    path = output / "expert_phase.json"
    if path.exists():
        return _stored_phases(path)
    progress.timing()
    places = {d.name: RunPlace(output / "runs", d.name, spec.seeds[0]) for d in spec.designs}
    phases = measure_phases(places, data.validation, spec.training.batch_size, device)
    write_json(path, {name: vars(timing) for name, timing in phases.items()})
    return phases


def _stored_phases(path: Path) -> dict[str, ExpertPhaseResult]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {name: _phase(values) for name, values in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise OutputError(f"{path} cannot be read ({error}); delete it to time again") from None


def _phase(values: dict[str, Any]) -> ExpertPhaseResult:
    return ExpertPhaseResult(**{**values, "repeats": tuple(values["repeats"])})


def _has_results(output: Path) -> bool:
    """Whether a run of the study is finished or has a checkpoint."""
    runs = output / "runs"
    return any(runs.glob("*/record.json")) or any(runs.glob("*/training/checkpoint-*"))


def _require_free(output: Path, spec: StudySpec) -> None:
    """Refuse a folder with results of another study, or one that is not empty and no study's."""
    path = output / CLAIM
    if not path.exists():
        if output.is_dir() and any(output.iterdir()):
            raise OutputError(
                f"{output} is not empty and holds no study; choose another folder with --output"
            )
        return
    try:
        stored = StudySpec.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}); choose another folder") from None
    if stored != spec and _has_results(output):
        changed = [name for name in vars(spec) if getattr(stored, name) != getattr(spec, name)]
        raise OutputError(
            f"{output} holds a study with other {', '.join(changed)}; "
            "choose another folder with --output, or delete that one"
        )
